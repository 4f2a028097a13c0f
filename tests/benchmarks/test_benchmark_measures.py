"""What models are measured by, on a tiny teacher and little speech."""

import json
from dataclasses import replace

import pytest
import torch
from speech import TONE
from tiny_bench import benchmarks_on_the_path, load, tiny_bench_arguments  # noqa: F401

from lighthubert_training.data.strings import read_parquet


@pytest.fixture
def bench_arguments(tmp_path):
    return tiny_bench_arguments(tmp_path)


def test_what_is_held_out_is_not_distilled_on(bench_arguments, tmp_path):
    files = load("recordings").distillation_files(bench_arguments, tmp_path / "kept")
    rows = {file.stem: read_parquet(file, ["audio"]) for file in files}
    assert set(rows) == {"digits-train", "prompts-train", "commands-train", "prompts-unlabelled"}
    assert set(rows["digits-train"]["speaker"]) == {"ann", "zoe"}
    assert set(rows["prompts-train"]["language"]) == {"en"}


def test_the_measures_of_a_model_are_of_known_and_of_held_out_speech(bench_arguments):
    bench = load("gains").Gains(bench_arguments)
    row = bench.measures(bench.control("slice of the teacher", bench.subnets["middle"], 0), seed=0)
    assert {"r2", "r2, held-out speaker", "r2, held-out language", "r2 of masked frames"} <= set(row)
    assert {"digit", "digit, held-out speaker", "speaker", "language", "slots"} <= set(row)
    assert {"per", "per, held-out language", "wer, 0.05 min", "wer, 0.05 min, held-out language"} <= set(row)
    assert "wer, 0.05 min, en" in row
    assert row["digit"] > 0.9, "tones of three pitches"
    again = bench.measures(bench.control("slice of the teacher", bench.subnets["middle"], 0), seed=0)
    assert row == again


def test_data_of_keyword_spotting_and_slot_filling_are_made_of_the_labels(bench_arguments, tmp_path):
    speech = load("recordings")
    labels = [{"slots": json.dumps({"size": "small", "roast": "dark", "milk": "some"})}, {"keyword": "alexa"}]
    recordings = [
        speech.Recording("", part, TONE, each, "") for part in ("train", "test") for each in labels for _ in range(20)
    ]
    speech.write_superb_data(recordings, tmp_path)
    for task, column, expected in (
        ("sf", "text", "B-size small E-size B-roast dark E-roast B-milk some E-milk"),
        ("ks", "label", "alexa"),
    ):
        parts = {
            part: read_parquet(tmp_path / task / f"{part}.parquet", ["audio"]) for part in ("train", "dev", "test")
        }
        assert {part: len(rows) for part, rows in parts.items()} == {"train": 17, "dev": 3, "test": 20}
        assert {text for rows in parts.values() for text in rows[column]} == {expected}


def test_a_model_is_scored_on_the_tasks_of_superb_that_the_speech_has_labels_for(bench_arguments):
    bench = load("gains").Gains(replace(bench_arguments, measures=["superb"]))
    row = bench.measure(bench.control("slice of the teacher", bench.subnets["smallest"], 0), seed=0)
    assert set(row) == {"sf f1, people", "sf cer, people"}


@pytest.mark.parametrize("name", ["teacher", "the demonstration's teacher", "MFCC", "random weights"])
def test_a_teacher_is_compared_with_what_one_may_start_from(bench_arguments, name):
    arguments = replace(bench_arguments, measures=["probes", "phones", "recognition"])
    (row,) = load("teachers").Teachers(arguments).run(name, 0).values()
    assert {"digit", "slots", "per", "wer, 0.05 min", "wer, 0.05 min, en"} <= set(row)
    assert row["digit"] > 0.6, "tones of three pitches"


def test_features_that_are_computed_once_are_those_of_the_model(bench_arguments):
    measures, bench = load("measures"), load("gains").Gains(bench_arguments)
    model = bench.control("slice of the teacher", bench.subnets["middle"], 0)
    frozen, batch = measures.ModelFeatures(model, bench.measures.speech), [0, 1, 40]
    assert frozen.shares_encoder
    states, _ = frozen(batch)
    audio = bench.measures.speech.audio(batch)
    with torch.no_grad():
        own = model(audio["input_values"], audio["attention_mask"]).last_hidden_state
    torch.testing.assert_close(states, own, rtol=0, atol=2e-2)  # they are kept in half precision
    assert not measures.ModelFeatures(
        bench.control("random weights", bench.subnets["middle"], 0), frozen.speech
    ).shares_encoder


def test_the_phone_probe_finds_phones_in_features_that_are_all_but_constant(bench_arguments):
    """What tells phones apart is a hundredth of the rest, as in the features of a transformer."""
    measures, bench = load("measures"), load("gains").Gains(replace(bench_arguments, phone_steps=200, device="cpu"))
    phones = bench.measures.phones
    units = sorted({phone for of_recording in phones.values() for phone in of_recording})
    mixed = torch.randn(len(units) + 1, len(units) + 1, generator=torch.Generator().manual_seed(0)) / 100

    class Correlated(measures.Features):
        def __call__(self, batch, mask=None):
            spoken = [[each for unit in phones[number] for each in (units.index(unit), -1)] for number in batch]
            frames = [torch.eye(len(units) + 1)[numbers] @ mixed + 10 for numbers in spoken]
            padded = torch.nn.utils.rnn.pad_sequence(frames, batch_first=True)
            return padded.to(self.speech.device), torch.tensor(list(map(len, frames)))

    assert bench.measures.phone_probe(Correlated(bench.measures.speech), 0)["per"] < 0.1
