"""Settings of tasks, and data: what is there is read, what is missing or wrong is said, with what to do."""

import shutil
from pathlib import Path

import pytest
import yaml
from speech import TONE, encoded
from superb_toys import rewrite_as_files, stock, write_data, write_lines, write_part

from lighthubert_training.superb import recipes
from lighthubert_training.superb.data import TaskData
from lighthubert_training.superb.query_by_example import QueryByExample
from lighthubert_training.superb.recipes import TaskSettings, read_settings, task_names
from lighthubert_training.superb.tasks import TASKS
from modeling_lighthubert.errors import UserError


@pytest.fixture(scope="module")
def upstream():
    return stock()


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path / "data")


def load(task: str, data_dir: Path, upstream, max_unreadable_share: float = 0.0, **changes):
    """The task, or the first of its folds."""
    source = TaskData(read_settings(task, "stand_in", **changes), data_dir, max_unreadable_share)
    return QueryByExample(source) if task == "qbe" else TASKS[task].load_folds(source, upstream)[0]


# Settings


def test_every_task_has_a_recipe():
    assert {*TASKS, "qbe"} == set(task_names()) and len(task_names()) == 10
    for task in task_names():
        assert read_settings(task).data.startswith(("Get ", "Simulate "))


def test_a_variant_changes_what_it_names_and_the_command_line_has_the_last_word(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "RECIPES", tmp_path)
    values = {"data": "Get it.", "batch_size": 4, "variants": {"small": {"batch_size": 2, "max_steps": 5}}}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "two.yaml").write_text("data: Get that.\n")
    assert read_settings("one") == TaskSettings("one", "Get it.", batch_size=4)
    assert read_settings("one", "small") == TaskSettings("one", "Get it.", batch_size=2, max_steps=5)
    assert read_settings("two", "small") == TaskSettings("two", "Get that.")
    assert read_settings("one", "small", max_steps=7, learning_rate=None).max_steps == 7
    (tmp_path / "one.yaml").write_text("{data: Get it., stepz: 3, variants: {small: {}}}")
    for changes, message in (
        ({"task": "three"}, "no task 'three': choose from one, two, or all"),
        ({"task": "two", "variant": "big"}, "no task has a variant 'big': choose from small"),
        ({"task": "one"}, "one.yaml has unknown values: stepz"),
    ):
        with pytest.raises(UserError, match=message):
            read_settings(**changes)


# What is there


def test_what_the_hub_has_is_taken_where_no_part_lies(data, upstream, tmp_path):
    shutil.move(data / "pr", tmp_path / "hub")
    (data / "pr").mkdir()
    shutil.move(tmp_path / "hub/lexicon.txt", data / "pr")
    splits = {"train": "train", "dev": "validation", "test": "test"}
    hub = {"dataset": str(tmp_path / "hub"), "config": "default", **splits}
    task = load("pr", data, upstream, hub=hub)
    assert {name: len(part) for name, part in task.parts.items()} == dict.fromkeys(("train", "dev", "test"), 4)
    shutil.copy(tmp_path / "hub/train.parquet", data / "pr")
    with pytest.raises(UserError, match=r"there is no .*dev.parquet"):
        load("pr", data, upstream, hub=hub)


def test_ids_are_text_and_a_suffix_may_be_in_capitals(tmp_path):
    (tmp_path / "asv").mkdir()
    write_lines(tmp_path / "asv" / "test.CSV", "audio,id", "a.wav,007", "b.wav,NA")
    write_lines(tmp_path / "asv" / "trials.csv", "one,other,label", "007,NA,1")
    source = TaskData(TaskSettings("asv", "Get it."), tmp_path)
    part = source.part("test", ("id",))
    assert [row["id"] for row in part.rows] == ["007", "NA"]
    assert source.pairs("trials", {"one": part, "other": part}, ("label",)) == [(0, 1, 1)]


def test_pairs_are_found_by_their_ids(data, upstream):
    assert load("asv", data, upstream).trials == dict.fromkeys(("dev", "test"), [(0, 1, 1), (1, 2, 0), (2, 3, 1)])
    relevant = load("qbe", data, upstream).relevant["test"]
    assert relevant.tolist() == [[False, False, True], [False] * 3, [True, False, False]]


def test_as_many_recordings_as_are_allowed_are_left_out_with_their_pairs(data, upstream, caplog):
    whole = encoded(TONE, format="FLAC")
    contents = [whole, b"no audio", whole, whole]
    rewrite_as_files(data / "asv", "test", [{"id": f"test-{number}"} for number in range(4)], contents)
    rewrite_as_files(data / "sid", "dev", [{"speaker": name} for name in "abab"], contents)
    verification, identification = (load(task, data, upstream, 0.25) for task in ("asv", "sid"))
    assert [row["id"] for row in verification.parts["test"].rows] == ["test-0", "test-2", "test-3"]
    assert verification.trials == {"dev": [(0, 1, 1), (1, 2, 0), (2, 3, 1)], "test": [(1, 2, 1)]}
    assert [row["speaker"] for row in identification.parts["dev"].rows] == ["a", "a", "b"]
    assert len(identification.parts["dev"].audio) == 3
    assert caplog.text.count("left out, because it cannot be read: ") == 2 and "1.flac" in caplog.text
    with pytest.raises(UserError, match=r"1 of 4 recordings cannot be read, more than a share of 0.2; .*1.flac"):
        load("sid", data, upstream, 0.2)
    assert len(load("sid", data, upstream).parts["dev"]) == 4  # nothing is read in advance


# What is wrong


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def relabel(folder: Path) -> None:
    write_part(folder, "test", [{"speaker": name} for name in ("a", "b", "nobody")])


def rename_trial(folder: Path) -> None:
    write_lines(folder / "test_trials.csv", "enrolment,trial,same", "test-0,test-99,0")


def remove_trials(folder: Path) -> None:
    (folder / "dev_trials.csv").unlink()


def remove_column(folder: Path) -> None:
    write_lines(folder / "test_trials.csv", "enrolment,trial", "test-0,test-1")


def remove_lexicon(folder: Path) -> None:
    (folder / "lexicon.txt").unlink()


def remove_word(folder: Path) -> None:
    write_lines(folder / "lexicon.txt", "one W AH N")


def rename_query(folder: Path) -> None:
    write_lines(folder / "dev_pairs.csv", "query,document", "eleven-0,documents-0")


def write_unknown_phone(folder: Path) -> None:
    write_lines(folder / "lexicon.txt", "one W AH N", "two T UW", "six S IH K S")
    write_part(folder, "dev", [{"text": "six"}])


def join_folds(folder: Path) -> None:
    write_part(folder, "train", [{"emotion": "sad", "fold": 1}] * 3)


@pytest.mark.parametrize(
    ("task", "spoil", "message"),
    [
        ("sid", remove_folder, "there is no .*train.parquet or .*train.csv. Get VoxCeleb1"),
        ("sid", relabel, "recording 2 of the test part has the speaker 'nobody', which no training recording has"),
        ("asv", rename_trial, "test_trials.csv names 'test-99', which its part lacks"),
        ("asv", remove_trials, "there is no .*dev_trials.csv. Get VoxCeleb1"),
        ("asv", remove_column, "lacks same"),
        ("pr", remove_lexicon, "there is no .*lexicon.txt. Get LibriSpeech"),
        ("pr", remove_word, "the word 'two' is not in lexicon.txt"),
        ("pr", write_unknown_phone, "the dev part has what no training recording has: 'IH', 'K', 'S'"),
        ("qbe", rename_query, "dev_pairs.csv names 'eleven-0', which its part lacks"),
        ("er", join_folds, "the column fold has one value, 1: give two or more"),
    ],
)
def test_wrong_data_end_with_their_reason(data, upstream, task, spoil, message):
    load(task, data, upstream)
    spoil(data / task)
    with pytest.raises(UserError, match=message):
        load(task, data, upstream)
