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


# Tables as other programs write them


def texts(*files: Path, column: str = "audio", text_column: str = "text", **options) -> list[str]:
    arguments = DataArguments(train_file=list(map(str, files)), audio_column_name=column, **options)
    return [row[text_column] for row in load_speech(arguments, True, (), (text_column,))]


WORDS = ["null", "NA", "nan", "None", "007", "1e3", "2020-01-01", "true"]


@pytest.mark.parametrize("streaming", [False, True], ids=["at-hand", "streamed"])
@pytest.mark.parametrize("suffix", [".csv", ".CSV", ".tsv", ".jsonl", ".JSON", ".parquet"])
def test_transcripts_that_look_like_other_things_are_text(tmp_path, suffix, streaming):
    """Alone, too: a whole column of numbers or dates is text as well."""
    for number, words in enumerate((WORDS, WORDS[4:5], WORDS[5:6], WORDS[6:7])):
        table = tmp_path / f"{number}{suffix}"
        if "sv" in suffix.lower():
            separator = "," if "c" in suffix.lower() else "\t"
            lines = ["audio" + separator + "text", *(f"{word}.wav{separator}{word}" for word in words)]
            table.write_text("\n".join(lines) + "\n")
        elif "j" in suffix.lower():
            table.write_text("".join(json.dumps({"audio": f"{word}.wav", "text": word}) + "\n" for word in words))
        else:
            pq.write_table(pa.table({"audio": [f"{word}.wav" for word in words], "text": words}), table)
        assert texts(table, streaming=streaming) == words
        paths = texts(table, text_column="audio", column="text")
        assert paths == [f"{word}.wav" for word in words]


def test_a_missing_transcript_is_empty_and_a_whole_number_is_its_digits(tmp_path):
    (tmp_path / "missing.csv").write_text("audio,text\na.wav,\nb.wav,word\n")
    assert texts(tmp_path / "missing.csv") == ["", "word"]
    rows = [{"audio": "a", "text": 7}, {"audio": "b", "text": "null"}, {"audio": "c", "text": None}, {"audio": "d"}]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "numbers.jsonl").write_text('{"audio": "a", "text": 7}\n{"audio": "b", "text": null}\n')
    assert texts(tmp_path / "lines.jsonl") == texts(tmp_path / "list.json") == ["7", "null", "", ""]
    assert texts(tmp_path / "numbers.jsonl") == ["7", ""]
    pq.write_table(pa.table({"audio": ["a", "b"], "text": [7, None]}), tmp_path / "numbers.parquet")
    assert texts(tmp_path / "numbers.parquet") == ["7", ""]


@pytest.mark.parametrize("value", [7.5, True, ["a", "b"], {"a": "b"}])
def test_what_is_no_text_is_named_with_its_file_and_row(tmp_path, value):
    rows = [{"audio": "a", "text": value if row == 1 else None} for row in range(3)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    for name in ("t.jsonl", "t.parquet"):
        with pytest.raises(UserError, match=rf"row 1 of .*{name} has .* in column 'text', which is no text: write"):
            texts(tmp_path / name)


def test_columns_that_are_no_text_keep_their_types(tmp_path):
    (tmp_path / "t.csv").write_text("audio,label,share\na.wav,3,0.5\nb.wav,4,NA\n")
    rows = load_speech(DataArguments(train_file=[str(tmp_path / "t.csv")]), True, ("label", "share"))
    assert (list(rows["label"]), list(rows["share"])) == ([3, 4], [0.5, None])


def test_tables_of_common_voice_are_recognised_by_their_header(folder, tmp_path):
    (folder / "below").rename(folder / "clips")
    table = folder / "train.tsv"
    lines = ["client_id\tpath\tsentence", '1\tb.flac\t"Yes," she said', '2\tb.flac\t"""No"" he said."']
    table.write_text("\n".join(lines) + "\n")
    assert texts(table, column="path", text_column="sentence") == ['"Yes," she said', '"No" he said.']
    speech = load_speech(DataArguments(train_file=[str(table)], audio_column_name="path"), training=True)
    assert [len(load_waveform(row["path"], RATE)) for row in speech] == [16000] * 2
    with pytest.raises(UserError, match=r"choose --audio_column_name from \['client_id', 'path', 'sentence'\]"):
        load_speech(DataArguments(train_file=[str(table)]), training=True)


def test_a_tsv_of_one_column_is_a_table(folder):
    (folder / "one.tsv").write_text("audio\na.wav\n")
    assert lengths(load_speech(DataArguments(train_file=[str(folder / "one.tsv")]), training=True)) == [8000]


def test_a_comma_without_quotation_marks_is_named(tmp_path):
    """pandas would take the paths for names of the rows, and the words for paths."""
    (tmp_path / "t.csv").write_text("audio,text\na.wav,well, yes\nb.wav,no, never\n")
    with pytest.raises(UserError, match="rows with more values than its header has columns: put values with a comma"):
        texts(tmp_path / "t.csv")


def test_pieces_of_recordings_are_refused_and_whole_ones_are_not(folder):
    rows = [{"audio_filepath": "a.wav", "duration": 0.5, "offset": offset, "text": "t"} for offset in (0.0, 0.25)]
    (folder / "pieces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "whole.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert texts(folder / "whole.jsonl", column="audio_filepath") == ["t"]
    with pytest.raises(UserError, match="pieces.jsonl names pieces of recordings, by offset and duration"):
        texts(folder / "pieces.jsonl", column="audio_filepath")


def test_rows_without_bytes_name_files_beside_the_table_also_between_rows_with_bytes(folder, monkeypatch):
    monkeypatch.chdir("/")
    rows = [{"bytes": encoded(TONE[:4000], format="WAV"), "path": "a.wav"}, {"bytes": None, "path": "a.wav"}]
    pq.write_table(pa.Table.from_pylist([{"audio": row} for row in rows]), folder / "mixed.parquet")
    speech = load_speech(DataArguments(train_file=[str(folder / "mixed.parquet")]), training=True)
    assert lengths(speech) == [4000, 8000]


def test_a_column_without_audio_is_refused(tmp_path):
    audio = {"array": [0.0, 0.5], "sampling_rate": RATE}
    pq.write_table(pa.Table.from_pylist([{"audio": audio}]), tmp_path / "arrays.parquet")
    pq.write_table(pa.table({"audio": [1, 2]}), tmp_path / "numbers.parquet")
    for name in ("arrays", "numbers"):
        with pytest.raises(
            UserError, match=f"{name}.parquet has no encoded audio in column 'audio': give a column of"
        ):
            load_speech(DataArguments(train_file=[str(tmp_path / f"{name}.parquet")]), training=True)
    for number, value in enumerate((audio, 7)):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"audio": value}) + "\n")
        speech = load_speech(DataArguments(train_file=[str(tmp_path / f"{number}.jsonl")]), training=True)
        assert SpeechDataset(speech, "audio", RATE)[0].problem.startswith("audio has to be a path")


# Folders


def test_every_suffix_that_libsndfile_reads_is_found_in_any_case(tmp_path):
    for suffix in ("wav", "WAV", "Flac", "OGG", "oga", "mp3", "AIFF", "au", "caf", "w64", "rf64"):
        format = {"oga": "OGG"}.get(suffix, suffix.upper())
        (tmp_path / f"1.{suffix}").write_bytes(encoded(TONE, format=format))
    speech = load_speech(DataArguments(train_file=[str(tmp_path)]), training=True)
    assert len(speech) == 11
    assert not [each.problem for each in SpeechDataset(speech, "audio", RATE) if each.problem]


def test_what_a_folder_has_besides_is_a_problem_of_its_name_or_counted(folder, caplog):
    for name in ("talk.m4a", "below/TALK.AAC", "talk.wma"):
        (folder / name).write_bytes(b"other audio")
    (folder / "folder.wav").mkdir()
    (folder / "caf\udce9.wav").write_bytes(encoded(TONE, format="WAV"))  # a name in Latin-1
    speech = SpeechDataset(load_speech(DataArguments(train_file=[str(folder)]), True), "audio", RATE)
    problems = {Path(each.name).name: each.problem for each in speech if each.problem}
    assert set(problems) == {"talk.m4a", "TALK.AAC", "talk.wma"}
    assert all("ffmpeg" in problem for problem in problems.values())
    assert len(speech) == 6
    assert f"{folder}: 1 files are no recordings and are passed over: .txt (1)" in caplog.text
    assert "left out, because their names are no UTF-8, rename them: '" in caplog.text
    assert "caf\\udce9.wav" in caplog.text


@pytest.mark.parametrize("kind", ["csv", "folder"])
def test_a_recording_that_was_replaced_is_measured_anew(folder, kind):
    source = str(manifests(folder)[kind])
    arguments = DataArguments(train_file=[source], max_duration_in_seconds=0.6)
    assert lengths(load_speech(arguments, training=True)) == [8000, 8000]
    soundfile.write(folder / "below" / "b.flac", TONE[:6000], RATE)
    assert sorted(lengths(load_speech(arguments, training=True))) == [6000, 8000, 8000]
