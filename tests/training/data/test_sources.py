"""Every kind of source gives the same recordings, put together, limited and filtered; mistakes are named."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from datasets import Audio, Dataset, Features, IterableDataset
from speech import RATE, TONE, encoded, undecoded

from lighthubert_training.data.audio import load_waveform
from lighthubert_training.data.recordings import SpeechDataset
from lighthubert_training.data.sources import DataArguments, load_speech
from modeling_lighthubert.errors import UserError


def write_parquet(path: Path, rows: list[dict]) -> str:
    undecoded(rows).to_parquet(path)
    return str(path)


@pytest.fixture
def parquet(tmp_path) -> str:
    row = {"audio": {"bytes": encoded(TONE, format="WAV"), "path": None}, "text": "tone"}
    return write_parquet(tmp_path / "speech.parquet", [row] * 3)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three recordings in files: a tone, one of twice its length in a folder below, silence. And what is none."""
    folder = tmp_path / "recordings"
    (folder / "below").mkdir(parents=True)
    soundfile.write(folder / "a.wav", TONE, RATE)
    soundfile.write(folder / "below" / "b.flac", np.tile(TONE, 2), RATE)
    soundfile.write(folder / "silence.ogg", 1e-4 * TONE, RATE)
    (folder / "notes.txt").write_text("no audio")
    return folder


def lengths(dataset: Dataset | IterableDataset) -> list[int]:
    return [len(load_waveform(row["audio"], RATE)) for row in dataset]


def test_parquet_is_loaded_and_limited(parquet):
    assert len(load_speech(DataArguments(train_file=[parquet], max_train_samples=2), training=True)) == 2
    assert load_speech(DataArguments(train_file=[parquet]), training=False) is None


def manifests(folder: Path) -> dict[str, Path]:
    """The same recordings named by each kind of source."""
    names = ["a.wav", "below/b.flac", "silence.ogg"]
    (folder / "m.jsonl").write_text("".join(json.dumps({"audio": name}) + "\n" for name in names))
    (folder / "m.csv").write_text("audio,text\n" + "".join(f"{name},words\n" for name in names))
    (folder.parent / "m.tsv").write_text(f"{folder}\n" + "".join(f"{name}\t8000\n" for name in names))
    (folder / "relative.tsv").write_text("below/..\n" + "".join(f"{name}\t8000\n" for name in names))
    rows = [{"audio": {"bytes": (folder / name).read_bytes(), "path": name}} for name in names]
    write_parquet(folder.parent / "m.parquet", rows)
    empty = pa.array([None] * 3, pa.binary())
    rows = pa.StructArray.from_arrays([empty, pa.array(names)], ["bytes", "path"])
    pq.write_table(pa.table({"audio": rows}), folder / "rows.parquet", row_group_size=2)
    decoded = Features({"audio": Audio()}).arrow_schema
    pq.write_table(pa.table({"audio": rows}, schema=decoded), folder / "decoded.parquet")
    pq.write_table(pa.table({"audio": names}), folder / "text.parquet")
    return {
        "folder": folder,
        "json": folder / "m.jsonl",
        "csv": folder / "m.csv",
        "fairseq": folder.parent / "m.tsv",
        "fairseq-relative": folder / "relative.tsv",
        "parquet": folder.parent / "m.parquet",
        "parquet-rows": folder / "rows.parquet",
        "parquet-decoded": folder / "decoded.parquet",
        "parquet-text": folder / "text.parquet",
    }


KINDS = ["folder", "json", "csv", "fairseq", "fairseq-relative"]
KINDS += ["parquet", "parquet-rows", "parquet-decoded", "parquet-text"]


@pytest.mark.parametrize("streaming", [False, True], ids=["at-hand", "streamed"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_recordings(folder, kind, streaming, monkeypatch):
    """Wherever it is read: paths in a file are relative to it."""
    monkeypatch.chdir("/")
    source = str(manifests(folder)[kind])
    speech = load_speech(DataArguments(train_file=[source], streaming=streaming), training=True)
    assert isinstance(speech, IterableDataset if streaming else Dataset)
    assert lengths(speech) == [8000, 16000, 8000]


def test_absolute_paths_in_a_table_stay_as_they_are(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    table = tmp_path / "elsewhere" / "m.csv"
    table.write_text(f"audio\n{folder / 'a.wav'}\n")
    (row,) = load_speech(DataArguments(train_file=[str(table)]), training=True)
    assert row == {"audio": {"bytes": None, "path": str(folder / "a.wav")}}


def test_a_row_without_a_path_is_one_that_cannot_be_read(folder):
    (folder / "m.jsonl").write_text('{"audio": "a.wav"}\n{"audio": null}\n')
    speech = load_speech(DataArguments(train_file=[str(folder / "m.jsonl")]), training=True)
    recordings = list(SpeechDataset(speech, "audio", RATE))
    assert [recording.problem[:30] for recording in recordings] == ["", "audio has to be a path, bytes,"]


def test_sources_are_put_together(folder, parquet):
    both = load_speech(DataArguments(train_file=[parquet, str(folder)], validation_file=[parquet]), training=True)
    assert lengths(both) == [8000] * 4 + [16000, 8000]
    assert len(load_speech(DataArguments(train_file=[str(folder)], validation_file=[parquet]), training=False)) == 3


def test_datasets_are_put_together_and_have_a_split_each(tmp_path, parquet):
    rows = [{"audio": {"bytes": encoded(TONE, format="WAV"), "path": None}}]
    for name, split in (("one", "train"), ("two", "clean")):
        (tmp_path / name / "data").mkdir(parents=True)
        write_parquet(tmp_path / name / "data" / f"{split}-0.parquet", rows)
    names = [str(tmp_path / "one"), str(tmp_path / "two")]
    arguments = DataArguments(dataset_name=names, train_split_name=["train", "train"], eval_split_name=["train"])
    assert len(load_speech(arguments, training=True)) == 2
    assert len(load_speech(arguments, training=False)) == 2
    with pytest.raises(UserError, match="--train_split_name has 3 values for 2 datasets"):
        load_speech(DataArguments(dataset_name=names, train_split_name=["a", "b", "c"]), training=True)


def test_files_to_train_on_take_the_place_of_the_dataset_of_a_recipe(parquet):
    arguments = DataArguments(dataset_name=["no/such"], eval_split_name=["test"], train_file=[parquet])
    assert len(load_speech(arguments, training=True)) == 3
    assert load_speech(arguments, training=False) is None


@pytest.mark.parametrize("streaming", [False, True], ids=["at-hand", "streamed"])
@pytest.mark.parametrize(
    ("filters", "left"),
    [
        ({"min_duration_in_seconds": 0.6}, [16000]),
        ({"max_duration_in_seconds": 0.6}, [8000, 8000]),
        ({"min_level_in_db": -60.0}, [8000, 16000]),
    ],
    ids=["short", "long", "silent"],
)
def test_filters_leave_out_what_is_too_short_too_long_or_silent(folder, filters, left, streaming):
    arguments = DataArguments(train_file=[str(folder)], streaming=streaming, **filters)
    assert lengths(load_speech(arguments, training=True)) == left


@pytest.mark.parametrize("streaming", [False, True], ids=["at-hand", "streamed"])
def test_a_missing_column_is_named_with_those_there_are(parquet, streaming):
    arguments = DataArguments(train_file=[parquet], audio_column_name="speech", streaming=streaming)
    with pytest.raises(UserError, match=r"no column 'speech': choose --audio_column_name from \['audio', 'text'\]"):
        load_speech(arguments, training=True)


def test_a_missing_column_of_labels_is_named(parquet):
    with pytest.raises(UserError, match=r"no column 'speaker': it has \['audio', 'text'\]"):
        load_speech(DataArguments(train_file=[parquet]), True, ("text", "speaker"))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("broken.parquet", "broken.parquet cannot be loaded: "),
        ("broken.jsonl", "broken.jsonl cannot be loaded: "),
        ("nowhere.parquet", "nowhere.parquet does not exist"),
        ("notes.txt", "of no known kind: .*\\.parquet, \\.json"),
        ("empty", "empty has no audio"),
        ("empty.parquet", "empty.parquet cannot be loaded: .* no data"),
    ],
)
def test_bad_sources_are_refused(tmp_path, file, message):
    for name in ("notes.txt", "broken.parquet", "broken.jsonl"):
        (tmp_path / name).write_text("no audio")
    (tmp_path / "empty").mkdir()
    empty = Dataset.from_dict({"audio": []}).cast_column("audio", Audio(decode=False))
    empty.to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(UserError, match=message):
        load_speech(DataArguments(train_file=[str(tmp_path / file)]), training=True)


def test_no_data_at_all_is_refused():
    with pytest.raises(UserError, match="--train_file or --dataset_name"):
        load_speech(DataArguments(), training=True)
