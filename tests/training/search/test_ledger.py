"""The ledger gives each subnet to one process, and knows which search it belongs to."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import TWO_DEEP, small_disk

from lighthubert_training.search.ledger import Ledger
from modeling_lighthubert.errors import UserError


def test_a_subnet_is_claimed_by_one_process_and_taken_over_when_that_is_gone(tmp_path):
    first, second = Ledger(tmp_path), Ledger(tmp_path)
    assert first.claim(TWO_DEEP.largest, 2) == 1
    assert second.claim(TWO_DEEP.largest, 2) is None
    assert second.claim(TWO_DEEP.smallest, 2) == 2
    assert first.claim(TWO_DEEP.sample(0), 2) is None  # enough
    assert second.take_over() is None
    first.alive.release()  # as the system does when a process ends
    assert second.take_over() == (1, TWO_DEEP.largest)
    assert second.take_over() is None
    second.finish(1, [0.5, 0.25], 1.0)
    assert [each.errors for each in second.finished()] == [(0.5, 0.25)]
    second.close()


def test_evaluations_come_in_the_order_in_which_they_were_finished(tmp_path):
    ledger = Ledger(tmp_path)
    subnets = [TWO_DEEP.largest, TWO_DEEP.smallest, TWO_DEEP.middle]
    assert [ledger.claim(subnet, 9) for subnet in subnets] == [1, 2, 3]
    ledger.finish(3, [0.3], 1.0)
    ledger.finish(1, [0.1], 2.0)
    assert [(each.number, each.subnet) for each in ledger.finished()] == [(3, subnets[2]), (1, subnets[0])]
    assert [each.number for each in ledger.finished(after=1)] == [1]
    assert len(ledger) == 3
    ledger.close()


def test_a_search_goes_on_with_the_same_settings_alone(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.check_settings({"seed": 0, "objectives": ["macs"]})
    ledger.close()
    ledger = Ledger(tmp_path)
    ledger.check_settings({"seed": 0, "objectives": ["macs"], "of a later version": 1})
    with pytest.raises(UserError, match=r"search with objectives=\[\"macs\"\], not \[\"params\"\]"):
        ledger.check_settings({"objectives": ["params"]})
    ledger.close()


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "search").write_text("")
    with pytest.raises(UserError, match="search"):
        Ledger(tmp_path / "search")


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + b"half" * 100], ids=["another", "damaged"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "evaluations.sqlite3").write_bytes(content * 20)
    with pytest.raises(UserError, match=r"evaluations.sqlite3 cannot be used \(.*\): .* if it is damaged, delete it"):
        Ledger(tmp_path)


def test_a_full_disk_is_an_error_that_loses_no_evaluation(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.claim(TWO_DEEP.largest, 9)
    ledger.finish(1, [0.1], 1.0)
    ledger.claim(TWO_DEEP.smallest, 9)
    with small_disk(4096), pytest.raises(UserError, match="cannot be used .*see to it that the disk has room"):
        ledger.finish(2, [0.5] * 2000, 1.0)
    ledger.close()
    again = Ledger(tmp_path)
    assert [each.number for each in again.finished()] == [1]
    assert again.take_over() == (2, TWO_DEEP.smallest)
    again.close()


def test_processes_may_open_a_new_ledger_at_once(tmp_path):
    """Each turns the file to a write-ahead log, which SQLite does not wait for."""
    for number in range(20):
        with ThreadPoolExecutor(4) as pool:
            opened = pool.map(lambda _, folder=tmp_path / str(number): Ledger(folder), range(4))
            assert len(list(opened)) == 4
