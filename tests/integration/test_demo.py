"""The demonstration, from the command line to its results, a step or two of each stage on a few spoken digits."""

import io
import json
from pathlib import Path

import pytest
import soundfile
import soxr
from datasets import Audio, Dataset, load_dataset
from scripts import run
from transformers import AutoModelForCTC


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """What a very short run leaves, on recordings of 8 kHz and of single words only."""
    folder = tmp_path_factory.mktemp("demo")
    recordings = load_dataset("parquet", data_files=str(ROOT / "demo/speech/test.parquet"), split="train")
    recordings = recordings.cast_column("audio", Audio(decode=False))
    words = recordings.filter(lambda text: len(text.split()) == 1, input_columns="text").select(range(0, 480, 8))
    rows = []
    for row in words:
        waveform, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        file = io.BytesIO()
        soundfile.write(file, soxr.resample(waveform, rate, 8000), 8000, format="FLAC")
        rows.append(row | {"audio": {"bytes": file.getvalue(), "path": None}})
    Dataset.from_list(rows).cast_column("audio", Audio(decode=False)).to_parquet(folder / "digits.parquet")
    run(
        ROOT / "demo/run_demo.py",
        *("--train_file", folder / "digits.parquet", "--test_file", folder / "digits.parquet"),
        *("--output_dir", folder / "output", "--max_probe_recordings", 24),
        *("--stage1_steps", 2, "--stage2_steps", 2, "--ctc_steps", 2),
    )
    return folder / "output"


def test_the_demonstration_compares_every_subnet_with_both_controls(output):
    rows = json.loads((output / "results.json").read_text())["models"]
    kinds = ("distilled", "slice of the teacher", "random weights")
    assert [row["model"] for row in rows] == [
        "teacher",
        *(f"{name}, {kind}" for name in ("largest", "middle", "smallest") for kind in kinds),
    ]
    assert all(set(row) >= {"parameters", "macs", "rtf", "digit", "speaker", "r2"} for row in rows)


def test_the_untrained_slice_of_full_size_is_the_teacher(output):
    teacher, _, largest_slice, *_ = json.loads((output / "results.json").read_text())["models"]
    assert largest_slice["r2"] == pytest.approx(teacher["r2"], abs=1e-4)
    assert largest_slice["digit"] == pytest.approx(teacher["digit"], abs=0.02)


def test_the_demonstration_leaves_a_model_with_a_card_a_plot_and_transcripts(output):
    model = AutoModelForCTC.from_pretrained(output / "asr")
    assert f"{model.num_parameters():,}" in (output / "asr" / "README.md").read_text()
    assert (output / "accuracy-against-macs.png").read_bytes().startswith(b"\x89PNG")
    transcripts = json.loads((output / "asr" / "transcripts.json").read_text())["transcripts"]
    assert all(3 <= len(pair["reference"].split()) <= 6 for pair in transcripts)
