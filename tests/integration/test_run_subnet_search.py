"""A search measures new subnets within its budget, finds better ones than chance does, and survives its processes."""

import csv
import json
import random
import re
import signal
import sqlite3
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import run_speech_recognition_ctc
import run_subnet_search
import torch
from conftest import NARROW, SIX_DEEP, TWO_DEEP, WINDOWED, noise, tiny_model
from datasets import Audio, load_dataset
from scripts import TRAINING, distil, start
from transformers import AutoModel

from lighthubert_training.data.sources import load_waveform
from lighthubert_training.error_rates import CharacterErrorRate
from lighthubert_training.recognition.recognizer import Recognizer
from lighthubert_training.search.candidates import Budget, Candidates, SubnetCosts
from lighthubert_training.search.latency import LatencyTable, covering, parts_of
from lighthubert_training.search.ledger import Ledger
from lighthubert_training.search.report import FurtherTraining, importances
from lighthubert_training.search.search import Search
from modeling_lighthubert import LightHubertForCTC, LightHubertModel, SearchSpace, Subnet
from modeling_lighthubert.profiling import macs_per_second


SPACES = [
    pytest.param(space, id=name)
    for name, space in {"two-deep": TWO_DEEP, "six-deep": SIX_DEEP, "narrow": NARROW, "windowed": WINDOWED}.items()
]


# Candidates


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("head", [LightHubertModel, LightHubertForCTC])
def test_costs_are_those_of_the_cut_model(head, space):
    model, rng = tiny_model(head, space), random.Random(0)
    selected, costs = model.subnet, SubnetCosts(model)
    for subnet in [space.smallest, space.largest, *(space.sample(rng) for _ in range(10))]:
        cut = model.extract_subnet(subnet)
        assert costs(subnet) == {"params": cut.num_parameters(), "macs": macs_per_second(cut)}
    assert model.subnet == selected


@pytest.mark.parametrize("space", SPACES)
def test_drawn_and_bred_subnets_are_within_the_budget(space):
    costs = SubnetCosts(tiny_model(search_space=space))
    ends = [costs(subnet) for subnet in (space.smallest, space.largest)]
    low, high = (
        {name: (1 - share) * ends[0][name] + share * ends[1][name] for name in ends[0]} for share in (0.3, 0.5)
    )
    budget = Budget({name: (low[name], high[name]) for name in low})
    candidates, rng = Candidates(space, costs, budget), random.Random(0)
    drawn = [candidates.draw(rng) for _ in range(20)]
    for subnet in [*drawn, *(candidates.child(drawn, rng) for _ in range(20))]:
        assert subnet in space
        assert all(low[name] <= cost <= high[name] for name, cost in costs(subnet).items())


def test_candidates_for_a_stock_hubert_are_all_exportable():
    costs, rng = SubnetCosts(tiny_model(search_space=SIX_DEEP)), random.Random(0)
    assert not all(SIX_DEEP.sample(rng).is_hubert_exportable for _ in range(20))
    candidates = Candidates(SIX_DEEP, costs, Budget(hubert_exportable=True))
    assert all(candidates.draw(rng).is_hubert_exportable for _ in range(20))


def test_an_impossible_budget_says_what_the_least_is():
    model = tiny_model()
    least = model.num_subnet_parameters("smallest")
    with pytest.raises(ValueError, match=re.escape(f"the smallest has {least:,}")):
        Candidates(TWO_DEEP, SubnetCosts(model), Budget({"params": (0, least - 1)}))
    with pytest.raises(ValueError, match="no subnet was found with at most .* parameters, at least .* MACs"):
        most = {"params": (0, least), "macs": (SubnetCosts(model)(TWO_DEEP.largest)["macs"], float("inf"))}
        Candidates(TWO_DEEP, SubnetCosts(model), Budget(most))


# Latency


@pytest.mark.parametrize("space", SPACES)
def test_what_is_measured_has_every_part_of_every_subnet(space):
    measured, rng = {part for subnet in covering(space) for part in parts_of(subnet)}, random.Random(0)
    for subnet in [space.smallest, space.largest, *(space.sample(rng) for _ in range(50))]:
        assert measured.issuperset(parts_of(subnet))


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_the_latency_of_a_subnet_is_that_of_its_parts(tmp_path, norm):
    space = replace(TWO_DEEP, hidden_size=(16,), conv_dim=((8, 16),) * 7)
    model = tiny_model(search_space=space, feat_extract_norm=norm)
    LatencyTable.measure(model, seconds=0.1, repeats=3, num_checks=2).to_json_file(tmp_path / "latency.json")
    table = LatencyTable.from_json_file(tmp_path / "latency.json")
    assert all(milliseconds > 0 for milliseconds in table.milliseconds.values())
    subnet = space.sample(0)
    assert table(subnet) == pytest.approx(sum(table.milliseconds[part] for part in parts_of(subnet)))
    assert SubnetCosts(model, table)(subnet)["latency_ms"] == table(subnet)
    assert 0 < table.error < 10


# The search


class DistanceFromTarget:
    """An error that takes no time: how far each layer is from that of a target, on three shares of the data."""

    name, num_shares = "distance", 3

    def __init__(self, target: Subnet):
        self.target, self.measured = target, list[Subnet]()

    def errors(self, subnet: Subnet):
        sizes = zip(subnet.num_attention_heads, self.target.num_attention_heads)
        different = sum(heads != wanted for heads, wanted in sizes) + (subnet.hidden_size != self.target.hidden_size)
        units = zip(subnet.intermediate_size, self.target.intermediate_size)
        different += sum(abs(number - wanted) / wanted for number, wanted in units)
        for share in range(3):
            self.measured.append(subnet)
            yield different + share / 10


def search(folder: Path, seed: int = 0, **options) -> Search:
    space = SIX_DEEP
    candidates = Candidates(space, SubnetCosts(tiny_model(search_space=space)), options.pop("budget", Budget()))
    fitness = DistanceFromTarget(space.sample(100 + seed))
    with closing(Ledger(folder)) as ledger:
        made = Search(candidates, fitness, ledger, seed=seed, **({"num_evaluations": 150} | options))
        made.run()
    return made


def test_every_subnet_is_measured_once_and_within_the_budget(tmp_path):
    budget = Budget({"params": (0, 20_000)})
    made = search(tmp_path, objectives=["params"], population_size=10, budget=budget)
    subnets = [each.subnet for each in made.evaluations]
    assert len(subnets) == len(set(subnets)) == 150
    model = tiny_model(search_space=SIX_DEEP)
    assert max(model.num_subnet_parameters(subnet) for subnet in subnets) <= 20_000


def hypervolume(made: Search) -> float:
    """What the front dominates, of errors up to 20 and costs up to the most."""
    most = made.candidates.costs(SIX_DEEP.largest)["params"]
    area, error = 0.0, 20.0
    for each in made.front("params"):
        area += (error - made.error(each)) * (most - made.costs[each.number]["params"])
        error = made.error(each)
    return area


@pytest.mark.parametrize("seed", range(3))
def test_breeding_finds_better_subnets_than_drawing(tmp_path, seed):
    drawn = search(tmp_path / "drawn", seed, num_evaluations=300, population_size=300)
    evolved = search(tmp_path / "evolved", seed, num_evaluations=300, population_size=15)
    assert evolved.error(evolved.best()) < drawn.error(drawn.best())
    front = search(tmp_path / "front", seed, num_evaluations=300, population_size=15, objectives=["params"])
    assert hypervolume(front) > hypervolume(drawn)


def test_the_front_has_less_error_for_every_cost_more(tmp_path):
    made = search(tmp_path, objectives=["params"], population_size=15)
    points = [(made.candidates.costs(each.subnet)["params"], made.error(each)) for each in made.front("params")]
    assert len(points) > 2
    assert points == sorted(points)
    assert [error for _, error in points] == sorted((error for _, error in points), reverse=True)
    for each in made.complete:
        cost, error = made.candidates.costs(each.subnet)["params"], made.error(each)
        assert any(other_cost <= cost and other_error <= error for other_cost, other_error in points)


def test_halving_measures_less_and_orders_what_it_stopped(tmp_path):
    whole = search(tmp_path / "whole", population_size=15)
    halved = search(tmp_path / "halved", population_size=15, successive_halving=True)
    assert len(whole.fitness.measured) == 3 * 150
    assert len(halved.fitness.measured) < 0.9 * 3 * 150
    stopped = [each for each in halved.evaluations if len(each.errors) < 3]
    assert stopped
    # what a share adds is the same for all subnets here
    assert all(halved.error(each) == pytest.approx(each.errors[0] + 0.2) for each in stopped)
    assert halved.best() not in stopped


def test_a_space_that_is_all_measured_ends_the_search(tmp_path):
    model = tiny_model()
    space = SearchSpace((16,), (4, 6), (2,), (1, 2), head_dim=4)
    candidates = Candidates(space, SubnetCosts(tiny_model(search_space=space)), Budget())
    assert model.search_space.num_subnets > space.num_subnets == 6
    with closing(Ledger(tmp_path)) as ledger:
        made = Search(candidates, DistanceFromTarget(space.largest), ledger)
        made.run()
    assert len(made.evaluations) == 6


# Its ledger


def test_a_search_goes_on_as_if_it_had_not_stopped(tmp_path):
    options = {"objectives": ["params"], "population_size": 10}
    whole = search(tmp_path / "whole", **options)
    search(tmp_path / "parts", **options, num_evaluations=63)
    rest = search(tmp_path / "parts", **options)
    assert len(rest.fitness.measured) == 3 * (150 - 63)
    assert [each.subnet for each in rest.evaluations] == [each.subnet for each in whole.evaluations]


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


def test_a_search_ends_with_what_others_are_still_measuring(tmp_path):
    """Else the process that ends first would write results without it, perhaps after those of the other."""
    claimed, claiming = SIX_DEEP.sample(1000), threading.Event()

    def measure_slowly() -> None:
        with closing(Ledger(tmp_path)) as ledger:
            number = ledger.claim(claimed, 5)
            claiming.set()
            time.sleep(1)
            ledger.finish(number, [1.0, 1.1, 1.2], 1.0)

    other = threading.Thread(target=measure_slowly)
    other.start()
    claiming.wait()
    made = search(tmp_path, num_evaluations=5)
    other.join()
    assert len(made.evaluations) == 5
    assert claimed in [each.subnet for each in made.evaluations]


# The script


@pytest.fixture(scope="module")
def supernet(workshop) -> Path:
    return distil(workshop, "searched", "--max_steps", 2)


def command(workshop: Path, supernet: Path, output: Path, *options: object) -> list[str]:
    given = (
        *("--model_name_or_path", supernet, "--teacher_name_or_path", workshop / "teacher", "--num_target_layers", 2),
        *("--validation_file", workshop / "speech.parquet", "--output_dir", output, "--num_evaluations", 12),
        *("--population_size", 4, "--per_device_eval_batch_size", 2, *options),
    )
    return [str(word) for word in (TRAINING / "run_subnet_search.py", *given)]


def run_script(workshop: Path, supernet: Path, output: Path, *options: object) -> Path:
    """In this process: a new one takes seconds to import what it needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command(workshop, supernet, output, *options))
        run_subnet_search.main()
    return output


def num_finished(output: Path) -> int:
    """Evaluations that the ledger has, while a search goes on."""
    if not (output / "evaluations.sqlite3").exists():
        return 0
    with closing(sqlite3.connect(output / "evaluations.sqlite3")) as database:
        try:
            return database.execute("SELECT count(*) FROM evaluations WHERE errors IS NOT NULL").fetchone()[0]
        except sqlite3.OperationalError:
            return 0


def rows(output: Path) -> list[dict[str, str]]:
    with (output / "evaluations.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_search_leaves_the_best_subnet_the_front_and_a_plot(workshop, supernet, tmp_path):
    output = run_script(workshop, supernet, tmp_path / "search", "--max_params", "20k")
    results = json.loads((output / "results.json").read_text())
    model = AutoModel.from_pretrained(supernet)
    cut = model.extract_subnet(Subnet.from_json_file(output / "best.json"))
    assert cut.num_parameters() == results["best"]["params"] <= 20_000
    errors = [float(row["error"]) for row in rows(output) if row["on_all_data"] == "True"]
    assert results["best"]["error"] == pytest.approx(min(errors))
    assert len(rows(output)) == results["num_evaluations"]
    assert set(results["named"]) == {"largest", "smallest"}
    assert [Subnet.from_dict(row["subnet"]) for row in json.loads((output / "front.json").read_text())]
    assert (output / "front.png").read_bytes().startswith(b"\x89PNG")


def test_a_search_keeps_to_milliseconds_of_a_table_that_it_measures_once(workshop, supernet, tmp_path, capsys):
    options = ("--max_latency_ms", 10_000, "--latency_seconds", 0.1, "--num_evaluations", 2)
    for _ in range(2):
        output = run_script(workshop, supernet, tmp_path / "search", *options)
    assert capsys.readouterr().out.count("whole models differ by") == 1
    best, table = json.loads((output / "results.json").read_text())["best"], output / "latency.json"
    assert best["latency_ms"] == LatencyTable.from_json_file(table)(Subnet.from_json_file(output / "best.json"))


def test_the_error_of_a_subnet_is_what_distillation_measures(workshop, supernet, tmp_path):
    output = run_script(workshop, supernet, tmp_path / "search", "--num_evaluations", 1, "--algorithm", "random")
    measured = json.loads((supernet / "eval_results.json").read_text())
    named = json.loads((output / "results.json").read_text())["named"]
    for name in ("largest", "smallest"):
        assert named[name]["error"] == pytest.approx(measured[f"eval_loss_{name}"], abs=1e-5)


@pytest.fixture(scope="module")
def once_for_all(workshop, supernet, tmp_path_factory) -> Path:
    """Fine-tuned for characters."""
    asr = tmp_path_factory.mktemp("once-for-all") / "asr"
    words = ("--model_name_or_path", supernet, "--once_for_all", "--train_file", workshop / "speech.parquet")
    words += ("--output_dir", asr, "--max_steps", 2, "--use_cpu", "--report_to", "none", "--save_strategy", "no")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(map(str, ("run_speech_recognition_ctc.py", *words))))
        run_speech_recognition_ctc.main()
    return asr


def test_a_model_that_was_fine_tuned_once_for_all_is_searched_by_its_character_errors(
    workshop, once_for_all, tmp_path
):
    output = run_script(workshop, once_for_all, tmp_path / "search", "--fitness", "ctc", "--num_evaluations", 2)
    recognizer = Recognizer.from_pretrained(once_for_all, str(output / "best.json"))
    speech = load_dataset("parquet", data_files=str(workshop / "speech.parquet"), split="train")
    waveforms = [load_waveform(audio, 16_000) for audio in speech.cast_column("audio", Audio(decode=False))["audio"]]
    texts = [transcript.text for transcript in recognizer.transcribe(waveforms)]
    expected = CharacterErrorRate().compute(predictions=texts, references=list(speech["text"]))["cer"]
    assert json.loads((output / "results.json").read_text())["best"]["error"] == pytest.approx(expected)


def test_a_supernet_is_searched_by_a_linear_probe(workshop, supernet, tmp_path):
    """High and low tones are easy to tell apart."""
    options = ("--fitness", "probe", "--train_file", workshop / "speech.parquet", "--label_column_name", "text")
    output = run_script(workshop, supernet, tmp_path / "search", *options, "--num_evaluations", 2)
    assert json.loads((output / "results.json").read_text())["best"]["error"] == 0.0


@pytest.mark.parametrize("fitness", ["distillation", "ctc"])
def test_a_report_says_what_matters_and_how_subnets_do_after_further_training(
    workshop, supernet, once_for_all, tmp_path, fitness
):
    given = ("--fitness", fitness, "--report", "--report_subnets", 4, "--report_steps", 3)
    given += ("--train_file", workshop / "speech.parquet", "--report_learning_rate", 1e-2)
    searched = once_for_all if fitness == "ctc" else supernet
    plain = rows(run_script(workshop, searched, tmp_path / "search", "--fitness", fitness))
    output = run_script(workshop, searched, tmp_path / "search", *given)
    assert rows(output) == plain  # nothing was measured again
    report = json.loads((output / "report.json").read_text())
    if fitness == "distillation":  # after two steps, all subnets have all characters wrong
        assert sum(report["importance"].values()) == pytest.approx(1.0)
    for part in report["front"].values():
        assert sum(part["heads"].values()) == pytest.approx(1.0)
        assert sum(part["ratios"].values()) == pytest.approx(1.0)
    trained = report["further_training"]
    assert len(trained["subnets"]) == 4
    before = [each["supernet"] for each in trained["subnets"]]
    assert before == sorted(before)
    if fitness == "distillation":
        assert all(each["trained"] < each["supernet"] for each in trained["subnets"])
        assert f"Spearman's rank correlation {trained['spearman']:.2f}" in (output / "report.md").read_text()
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")


class SizeOfAnswers:
    """An error that training can lower."""

    name, num_shares = "size", 1

    def __init__(self, model: LightHubertModel):
        self.model, self.waveform = model, noise(1, 4000)

    def loss(self, waveform: torch.Tensor) -> torch.Tensor:
        return (self.model(waveform).last_hidden_state - 1).square().mean()

    @torch.no_grad()
    def errors(self, subnet: Subnet):
        self.model.set_subnet(subnet)
        yield float(self.loss(self.waveform))


def test_each_subnet_is_trained_further_from_the_weights_of_the_supernet_which_stay():
    model = tiny_model()
    fitness, kept = SizeOfAnswers(model), {name: weight.clone() for name, weight in model.state_dict().items()}
    training = FurtherTraining(model, fitness.loss, [fitness.waveform], steps=5, learning_rate=1e-2, seed=0)
    subnet = TWO_DEEP.sample(0)
    (before,), (first, second) = fitness.errors(subnet), training.errors(fitness, [subnet, subnet])
    assert first == second < before
    assert not model.training
    assert all(torch.equal(weight, kept[name]) for name, weight in model.state_dict().items())


class WidthAlone:
    """An error that is the width and nothing else."""

    name, num_shares = "width", 1

    def errors(self, subnet: Subnet):
        yield float(subnet.hidden_size)


def test_importance_goes_to_the_choice_that_makes_the_error(tmp_path):
    candidates = Candidates(SIX_DEEP, SubnetCosts(tiny_model(search_space=SIX_DEEP)), Budget())
    with closing(Ledger(tmp_path)) as ledger:
        made = Search(candidates, WidthAlone(), ledger, num_evaluations=60)
        made.run()
    shares = importances(made, SIX_DEEP)
    assert next(iter(shares)) == "hidden_size"
    assert shares["hidden_size"] > 0.9


def test_a_killed_search_repeats_and_loses_nothing(workshop, supernet, tmp_path):
    output = tmp_path / "killed"
    options = ("--num_evaluations", 30)
    process = start(*command(workshop, supernet, output, *options))
    while process.poll() is None and num_finished(output) < 5:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = num_finished(output)
    assert 5 <= before < 30
    run_script(workshop, supernet, output, *options)
    run_script(workshop, supernet, tmp_path / "undisturbed", *options)
    assert [row["subnet"] for row in rows(output)] == [row["subnet"] for row in rows(tmp_path / "undisturbed")]


def test_two_processes_share_a_search(workshop, supernet, tmp_path):
    words = command(workshop, supernet, tmp_path / "shared", "--num_evaluations", 30)
    processes = [start(*words) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    subnets = [row["subnet"] for row in rows(tmp_path / "shared")]
    assert len(subnets) == len(set(subnets)) == 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max_params", "many"), "'many' is no number"),
        (("--max_params", "1k"), "the smallest has"),
        (("--population_size", 1), "population_size=1 at least 2"),
        (("--validation_file", "{}/nothing.parquet"), "nothing.parquet does not exist"),
        (("--model_name_or_path", "{}/teacher"), "lacks ["),
        (("--fitness", "ctc"), "is no CTC model with its processor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_to_a_search_ends_with_its_reason(workshop, supernet, tmp_path, options, message):
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        run_script(workshop, supernet, tmp_path / "bad", *(str(option).format(workshop) for option in options))


def test_other_training_speech_is_another_search_by_probes_and_the_same_by_any_other_error(
    workshop, supernet, tmp_path
):
    speech, other = workshop / "speech.parquet", tmp_path / "other.parquet"
    other.write_bytes(speech.read_bytes())
    probe = ("--fitness", "probe", "--label_column_name", "text", "--num_evaluations", 1)
    output = run_script(workshop, supernet, tmp_path / "probe", *probe, "--train_file", speech)
    with pytest.raises(ValueError, match="has evaluations of a search with train_file"):
        run_script(workshop, supernet, output, *probe, "--train_file", other)
    output = run_script(workshop, supernet, tmp_path / "loss", "--num_evaluations", 1)
    run_script(workshop, supernet, output, "--num_evaluations", 1, "--train_file", other)


def test_another_search_in_the_same_folder_is_refused(workshop, supernet, tmp_path):
    output = run_script(workshop, supernet, tmp_path / "search", "--num_evaluations", 2)
    with pytest.raises(ValueError, match="has evaluations of a search with seed=0, not 1"):
        run_script(workshop, supernet, output, "--seed", 1)
