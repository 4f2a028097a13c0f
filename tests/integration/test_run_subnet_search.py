"""The script of the search leaves its results, goes on with what is there, and survives its processes."""

import csv
import json
import re
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest
import run_speech_recognition_ctc
import run_subnet_search
from conftest import assert_close
from datasets import Audio, load_dataset
from scripts import TRAINING, call, distil, killed, start
from speech import undecoded
from transformers import AutoModel, AutoModelForCTC

from lighthubert_training.data.audio import load_waveform
from lighthubert_training.error_rates import CharacterErrorRate
from lighthubert_training.recognition.recognizer import Recognizer
from lighthubert_training.search.latency import LatencyTable
from modeling_lighthubert import Subnet
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.profiling import macs_per_second


@pytest.fixture(scope="module")
def supernet(workshop) -> Path:
    return distil(workshop, "searched", "--max_steps", 2)


def command(workshop: Path, supernet: Path, output: Path, *options: object) -> list[str]:
    given = (
        *("--model_name_or_path", supernet, "--teacher_name_or_path", workshop / "teacher", "--num_target_layers", 2),
        *("--validation_file", workshop / "speech.parquet", "--output_dir", output, "--num_evaluations", 12),
        *("--population_size", 4, "--per_device_eval_batch_size", 2, "--device", "cpu", *options),
    )
    return [str(word) for word in (TRAINING / "run_subnet_search.py", *given)]


def run_script(workshop: Path, supernet: Path, output: Path, *options: object) -> Path:
    """In this process: a new one takes seconds to import what it needs."""
    call(run_subnet_search.main, *command(workshop, supernet, output, *options))
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
    assert (results["num_recordings"], results["num_available"]) == (8, 8)
    assert set(results["named"]) == {"largest", "smallest", "middle"}
    assert (output / "front.png").read_bytes().startswith(b"\x89PNG")


def test_a_search_keeps_to_milliseconds_of_a_table_that_it_measures_once(workshop, supernet, tmp_path, capsys):
    options = ("--max_latency_ms", 10_000, "--latency_seconds", 0.1, "--num_evaluations", 2)
    for _ in range(2):
        output = run_script(workshop, supernet, tmp_path / "search", *options)
    assert capsys.readouterr().out.count("whole models differ by") == 1
    best, file = json.loads((output / "results.json").read_text())["best"], output / "latency.json"
    table = LatencyTable.from_json_file(file)
    assert best["latency_ms"] == table(Subnet.from_json_file(output / "best.json"))
    table.device = "cuda"
    table.to_json_file(file)
    with pytest.raises(UserError, match="latency.json was measured on cuda, not cpu"):
        run_script(workshop, supernet, output, *options)


def test_the_error_of_a_subnet_is_what_distillation_measures(workshop, tmp_path):
    """Also where a recording cannot be read: masks depend on the place of a recording in the data."""
    rows = load_dataset("parquet", data_files=str(workshop / "speech.parquet"), split="train")
    rows = rows.cast_column("audio", Audio(decode=False)).to_list()
    rows[2]["audio"]["bytes"] = b"no audio"
    undecoded(rows).to_parquet(tmp_path / "broken.parquet")
    options = ("--validation_file", tmp_path / "broken.parquet", "--max_unreadable_share", 0.2)
    supernet = distil(workshop, "measured", "--max_steps", 2, *options)
    output = run_script(workshop, supernet, tmp_path / "search", "--num_evaluations", 1, *options)
    measured = json.loads((supernet / "eval_results.json").read_text())
    named = json.loads((output / "results.json").read_text())["named"]
    for name in ("largest", "smallest", "middle"):
        assert_close(named[name]["error"], measured[f"eval_loss_{name}"])


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


def test_measured_subnets_cost_and_lose_what_their_cut_models_do(workshop, once_for_all, tmp_path):
    run_script(workshop, once_for_all, tmp_path / "search", "--fitness", "ctc", "--num_evaluations", 8)
    speech = load_dataset("parquet", data_files=str(workshop / "speech.parquet"), split="train")
    waveforms = [load_waveform(audio, 16_000) for audio in speech.cast_column("audio", Audio(decode=False))["audio"]]
    model = AutoModelForCTC.from_pretrained(once_for_all)
    assert model.measured_subnets().error == "character error rate"
    for name, measured in model.measured_subnets().subnets.items():
        cut = model.extract_subnet(name)
        assert measured.costs == {"params": cut.num_parameters(), "macs": macs_per_second(cut)}
        recognizer = Recognizer.from_pretrained(once_for_all, name)
        texts = [transcript.text for transcript in recognizer.transcribe(waveforms)]
        cer = CharacterErrorRate().compute(predictions=texts, references=list(speech["text"]))["cer"]
        assert measured.error == pytest.approx(cer)


def test_a_search_puts_what_it_found_beside_the_weights_and_into_the_card(workshop, supernet, tmp_path):
    for number, budget in enumerate(("1G", "20k")):
        output = run_script(workshop, supernet, tmp_path / str(number), "--max_params", budget)
        assert (supernet / "subnets.json").read_text() == (output / "subnets.json").read_text()
        assert (supernet / "subnets.png").read_bytes() == (output / "front.png").read_bytes()
    card = (supernet / "README.md").read_text()
    found = AutoModel.from_pretrained(supernet).measured_subnets()
    assert card.count("## Measured subnets") == card.count("![distillation loss over cost](subnets.png)") == 1
    for name, each in found.subnets.items():
        row = f"| {name} | {each.costs['params']:,} | {each.costs['macs']:,.0f} | {each.error:.4f} |"
        assert each.costs["params"] <= 20_000 and row in card
    assert card.index("## Limits") < card.index("## Measured subnets")


def test_a_supernet_is_searched_by_a_linear_probe(workshop, supernet, tmp_path):
    """High and low tones are easy to tell apart."""
    options = ("--fitness", "probe", "--train_file", workshop / "speech.parquet", "--label_column_name", "text")
    output = run_script(workshop, supernet, tmp_path / "search", *options, "--num_evaluations", 2)
    assert json.loads((output / "results.json").read_text())["best"]["error"] == 0.0


@pytest.mark.parametrize("fitness", ["distillation", "ctc"])
def test_a_report_says_what_matters_and_how_subnets_do_after_further_training(
    workshop, supernet, once_for_all, tmp_path, fitness
):
    given = ("--fitness", fitness, "--report", "--report_subnets", 5, "--report_steps", 3)
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
    assert len(trained["subnets"]) == 5
    before = [each["supernet"] for each in trained["subnets"]]
    assert before == sorted(before)
    if fitness == "distillation":
        assert all(each["trained"] < each["supernet"] for each in trained["subnets"])
        assert f"Spearman's rank correlation {trained['spearman']:.2f}" in (output / "report.md").read_text()
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")


LEDGER = "lighthubert_training.search.ledger:Ledger"
WINDOWS = [
    (f"{LEDGER}.check_settings", 1, 0),
    (f"{LEDGER}.claim", 1, 0),
    (f"{LEDGER}.finish", 1, 0),  # claimed and measured, and not written down
    (f"{LEDGER}.finish", 3, 2),
    ("lighthubert_training.search.report:write_results", 1, 12),
    ("lighthubert_training.search.report:write_json", 2, 12),
]
"""Functions in whose n-th call a search is killed, and the evaluations that are finished then."""


def test_a_search_killed_in_each_window_of_its_ledger_repeats_and_loses_nothing(workshop, supernet, tmp_path):
    output = tmp_path / "killed"
    for function, number, finished in WINDOWS:
        killed(function, number, *command(workshop, supernet, output))
        assert num_finished(output) == finished, function
    run_script(workshop, supernet, output)
    run_script(workshop, supernet, tmp_path / "undisturbed")
    assert [row["subnet"] for row in rows(output)] == [row["subnet"] for row in rows(tmp_path / "undisturbed")]
    best = [(folder / "best.json").read_text() for folder in (output, tmp_path / "undisturbed")]
    assert best[0] == best[1]


def test_two_processes_share_a_search(workshop, supernet, tmp_path):
    words = command(workshop, supernet, tmp_path / "shared", "--num_evaluations", 30)
    processes = [*start(*words), *start(*words)]
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
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
        (("--model_name_or_path", "{}/teacher", "--fitness", "probe"), "is no supernet: there is nothing to choose"),
        (("--fitness", "ctc"), "is no CTC model with its processor"),
        (("--device", "abacus"), "abacus"),
        (("--config", "search.yaml"), "--config search.yaml is no file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_to_a_search_ends_with_its_reason(workshop, supernet, tmp_path, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run_script(workshop, supernet, tmp_path / "bad", *(str(option).format(workshop) for option in options))


def test_other_training_speech_is_another_search_by_probes_and_the_same_by_any_other_error(
    workshop, supernet, tmp_path
):
    speech, other = workshop / "speech.parquet", tmp_path / "other.parquet"
    other.write_bytes(speech.read_bytes())
    probe = ("--fitness", "probe", "--label_column_name", "text", "--num_evaluations", 1)
    output = run_script(workshop, supernet, tmp_path / "probe", *probe, "--train_file", speech)
    with pytest.raises(UserError, match="has evaluations of a search with train_file"):
        run_script(workshop, supernet, output, *probe, "--train_file", other)
    output = run_script(workshop, supernet, tmp_path / "loss", "--num_evaluations", 1)
    run_script(workshop, supernet, output, "--num_evaluations", 1, "--train_file", other)


def test_another_search_in_the_same_folder_is_refused(workshop, supernet, tmp_path):
    output = run_script(workshop, supernet, tmp_path / "search", "--num_evaluations", 2)
    run_script(workshop, supernet, output, "--num_evaluations", 3, "--max_unreadable_share", 0.5)  # free to change
    assert len(rows(output)) == 3
    with pytest.raises(UserError, match="has evaluations of a search with seed=0, not 1"):
        run_script(workshop, supernet, output, "--seed", 1)
