"""The script that transcribes: what it reads, what it writes, how it goes on, and how it transcribes a pipe."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import soundfile
import torch
import transcribe
from conftest import tiny_model
from datasets import Audio, Dataset
from recognizers import TOKENS, babble, build_reader, save_processor, say
from scripts import TRAINING, call, environment, held, killed, run, start, wait_until
from speech import FORMATS, damaged, encoded

from lighthubert_training.data.audio import load_waveform
from lighthubert_training.recognition.recognizer import Recognizer
from modeling_lighthubert import LightHubertForCTC
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.errors import run as run_command


SCRIPT = TRAINING / "transcribe.py"


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return build_reader(tmp_path_factory.mktemp("reader"))


@pytest.fixture
def script(reader, monkeypatch, capsys):
    """Runs the script in this process with the `Reader` of recognizers.py: its exit status, output and messages."""

    def run(*options):
        monkeypatch.setattr(transcribe, "build_recognizer", lambda *arguments: reader)
        monkeypatch.setattr(sys, "argv", ["transcribe.py", "--model_name_or_path", "reader", *map(str, options)])
        with pytest.raises(SystemExit) as ended:
            run_command(transcribe.main)
        return (ended.value.code, *capsys.readouterr())

    return run


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# What is read


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Recordings of all kinds, broken ones too."""
    root = tmp_path_factory.mktemp("recordings")
    (root / "deep").mkdir()
    soundfile.write(root / "ab.wav", say("_a_b_"), 16_000)
    soundfile.write(root / "deep" / "ab.flac", say("_b_|_a_"), 16_000)
    soundfile.write(root / "flac.wav", say("_c_c_"), 16_000, format="FLAC")
    stereo = np.stack([babble(2.0, 44_100), babble(2.0, 44_100, seed=1)], axis=1) * 0.1
    soundfile.write(root / "stereo.mp3", stereo, 44_100)
    soundfile.write(root / "short.wav", say("a")[:399], 16_000)
    soundfile.write(root / "nothing.wav", np.zeros(0), 16_000)
    soundfile.write(root / "nan.wav", np.full(1000, np.nan), 16_000, subtype="FLOAT")
    (root / "empty.wav").write_bytes(b"")
    (root / "text.wav").write_text("no audio at all")
    (root / "notes.txt").write_text("not a recording")
    return root


BROKEN = {"nothing.wav", "nan.wav", "empty.wav", "text.wav"}


def test_a_folder_is_transcribed_and_what_is_broken_in_it_is_reported_and_passed_over(
    script, folder, tmp_path, reader
):
    output = tmp_path / "new" / "all.jsonl"
    status, _, messages = script("--inputs", folder, "--output_file", output)
    entries = {os.path.relpath(entry["name"], folder): entry for entry in lines(output)}
    assert status == 0
    assert {name for name, entry in entries.items() if "error" in entry} == BROKEN
    assert all(f"{folder / name} (" in messages for name in BROKEN)
    assert "4 of 9 recordings could not be read" in messages
    texts = {name: entry["text"] for name, entry in entries.items() if name not in BROKEN}
    mp3 = reader.transcribe([load_waveform(folder / "stereo.mp3", 16_000)])[0]
    expected = {"ab.wav": "ab", "deep/ab.flac": "b a", "flac.wav": "cc", "short.wav": "", "stereo.mp3": mp3.text}
    assert texts == expected
    assert entries["stereo.mp3"]["duration"] == pytest.approx(2.0, abs=0.1)
    word = {"text": "ab", "start": 0.02, "end": 0.08, "confidence": pytest.approx(0.999, abs=1e-3)}
    assert entries["ab.wav"]["words"] == [word]


def test_the_same_command_again_changes_nothing(script, folder, tmp_path):
    output = tmp_path / "all.jsonl"
    script("--inputs", folder, "--output_file", output)
    before = output.read_bytes()
    status, _, messages = script("--inputs", folder, "--output_file", output)
    assert (status, output.read_bytes()) == (0, before)
    assert "has 9 recordings already" in messages


def test_the_status_says_when_nothing_could_be_read(script, folder, tmp_path):
    command = ("--inputs", folder / "nan.wav", folder / "empty.wav")
    assert script(*command)[0] == 1
    assert script(*command, "--output_file", tmp_path / "all.jsonl")[0] == 1
    assert script(*command, "--output_file", tmp_path / "all.jsonl")[0] == 1
    assert script(*command, folder / "ab.wav", "--output_file", tmp_path / "all.jsonl")[0] == 0


def test_more_broken_recordings_than_allowed_end_the_run(script, folder):
    status, _, messages = script("--inputs", folder, "--max_unreadable_share", 0.2)
    assert status == 2
    assert "error: 2 of 9 recordings cannot be read, more than a share of 0.2" in messages


def test_an_interrupted_run_says_how_to_go_on(script, folder, tmp_path, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(transcribe, "transcribe", interrupted)
    status, _, messages = script("--inputs", folder, "--output_file", tmp_path / "all.jsonl")
    assert status == 130
    assert messages == "interrupted: the same command goes on from here if it has --output_file or --output_dir\n"


def test_recordings_inside_tables_have_the_number_of_their_row(script, folder, tmp_path):
    rows = []
    for path in ("_a_", "_b_"):
        file = io.BytesIO()
        soundfile.write(file, say(path), 16_000, format="WAV")
        rows.append({"speech": {"bytes": file.getvalue(), "path": "same.wav"}})
    Dataset.from_list(rows).cast_column("speech", Audio(decode=False)).to_parquet(tmp_path / "two.parquet")
    (folder / "list.csv").write_text("speech,other\nab.wav,1\ndeep/ab.flac,2\nab.wav,3\n")
    inputs = (tmp_path / "two.parquet", folder / "list.csv", folder / "ab.wav")
    script("--inputs", *inputs, "--audio_column_name", "speech", "--output_file", tmp_path / "all.jsonl")
    texts = {entry["name"]: entry["text"] for entry in lines(tmp_path / "all.jsonl")}
    table = str(tmp_path / "two.parquet")
    named = {f"{table}#0": "a", f"{table}#1": "b", f"{folder / 'ab.wav'}": "ab", f"{folder / 'deep/ab.flac'}": "b a"}
    assert texts == named
    assert len(lines(tmp_path / "all.jsonl")) == 4


# What is written


def test_transcripts_are_printed_when_there_is_no_file(script, folder):
    assert script("--inputs", folder / "ab.wav", folder / "flac.wav")[1] == "ab\ncc\n"
    assert json.loads(script("--inputs", folder / "ab.wav", "--output_format", "jsonl")[1])["text"] == "ab"
    assert script("--inputs", folder / "ab.wav", "--output_format", "srt")[1].startswith("1\n00:00:00,020 -->")


@pytest.mark.parametrize("suffix", ["txt", "srt", "vtt"])
def test_a_file_of_another_format_is_whole_and_alone(script, folder, tmp_path, suffix):
    script("--inputs", folder / "ab.wav", "--output_file", tmp_path / f"ab.{suffix}")
    assert "ab\n" in (tmp_path / f"ab.{suffix}").read_text()
    assert [path.name for path in tmp_path.iterdir()] == [f"ab.{suffix}"]


def test_a_file_has_nothing_of_an_earlier_run_with_other_inputs(script, folder, tmp_path):
    (tmp_path / "ab.txt.jsonl").write_text('{"name": "other", "text": "what was killed"}\n')
    script("--inputs", folder / "ab.wav", "--output_file", tmp_path / "ab.txt")
    assert (tmp_path / "ab.txt").read_text() == "ab\n"


def test_every_recording_has_a_file_in_a_folder_also_when_names_are_alike(script, folder, tmp_path):
    inputs = (folder / "ab.wav", folder / "deep", folder / "nan.wav")
    script("--inputs", *inputs, "--output_dir", tmp_path, "--output_format", "srt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ab-2.srt", "ab.srt", "transcripts.jsonl"]
    assert "b a" in (tmp_path / "ab-2.srt").read_text()


@pytest.mark.parametrize("content", ["something else\n", "no end of line", '{"text": "no name"}\n', "[1]\n"])
def test_a_file_with_other_content_is_not_touched(script, folder, tmp_path, content):
    (tmp_path / "mine.jsonl").write_text(content)
    status, _, message = script("--inputs", folder / "ab.wav", "--output_file", tmp_path / "mine.jsonl")
    assert status == 2
    assert "line 1 of" in message
    assert "is no transcript" in message
    assert (tmp_path / "mine.jsonl").read_text() == content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give what to transcribe: either --inputs or --dataset_name, or --live"),
        (["--live", "--inputs", "ab.wav"], "either --inputs or --dataset_name, or --live"),
        (["--inputs", "gone.wav"], "gone.wav does not exist"),
        (["--inputs", "."], "transcripts have to be one of jsonl, txt, srt, vtt, not 'doc'"),
        (["--inputs", "."], "2 recordings do not fit into one srt file: give --output_dir"),
        (["--live", "--output_format", "srt"], "transcripts have to be jsonl or txt with --live, not 'srt'"),
        (["--live", "--lm_path", "lm.arpa"], "--live decodes greedily: leave --lm_path out"),
        (["--inputs", ".", "--output_dir", "x"], "--output_file goes neither with --output_dir nor with --live"),
    ],
)
def test_options_that_make_no_sense_are_explained(script, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    for name in ("1.wav", "2.wav"):
        soundfile.write(name, say("_a_"), 16_000)
    files = {"doc": "all.doc", "srt file": "all.srt", "neither": "all.txt"}
    for part, file in files.items():
        options = [*options, "--output_file", file] if part in message else options
    status, output, messages = script(*options)
    assert (status, output) == (2, "")
    last = messages.splitlines()[-1]
    assert last.startswith("error: ") and message in last


# A model of PyTorch


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asr")
    model = tiny_model(LightHubertForCTC, feat_extract_norm="layer", pad_token_id=0)
    with torch.no_grad():
        model.lm_head.bias[[TOKENS.index("<pad>"), TOKENS.index("<unk>")]] = -100.0  # a talkative model
    model.save_pretrained(folder)
    save_processor(folder)
    return folder


def test_of_a_thousand_damaged_files_each_is_transcribed_or_named_with_its_reason(
    model_folder, tmp_path, monkeypatch, capsys
):
    rng, files = random.Random(0), [encoded(0.1 * babble(0.2, seed=seed), **FORMATS[seed % 6]) for seed in range(12)]
    huge = np.where(np.arange(800) % 2, 1e38, -1e38).astype(np.float32)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "huge.wav").write_bytes(encoded(huge, format="WAV", subtype="FLOAT"))
    for number in range(999):
        (tmp_path / "in" / f"{number}.wav").write_bytes(damaged(files[number % len(files)], rng))
    output = tmp_path / "all.jsonl"
    command = ["transcribe.py", "--model_name_or_path", model_folder, "--inputs", tmp_path / "in"]
    monkeypatch.setattr(sys, "argv", list(map(str, [*command, "--output_file", output, "--batch_size", 64])))
    with pytest.raises(SystemExit) as ended:
        run_command(transcribe.main)
    entries = {entry["name"]: entry for entry in lines(output)}
    errors = {name: entry["error"] for name, entry in entries.items() if "error" in entry}
    assert ended.value.code == 0
    assert set(entries) == set(map(str, (tmp_path / "in").iterdir()))
    assert all("text" in entry for name, entry in entries.items() if name not in errors)
    assert errors[str(tmp_path / "in" / "huge.wav")] == "audio has samples of 1e+38, full scale is 1"
    messages = capsys.readouterr().err
    assert all(f"{name} ({reason})" in messages for name, reason in errors.items() if reason.strip())
    assert all(reason.strip() for reason in errors.values())
    assert f"{len(errors)} of 1000 recordings could not be read" in messages
    assert 200 < len(errors) < 800, "the damage is of no use"


# Processes


def test_a_run_that_was_killed_goes_on_and_loses_and_repeats_nothing(model_folder, tmp_path):
    for number in range(90):
        (tmp_path / "in").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "in" / f"{number}.wav", babble(1 + number % 3, seed=number) * 0.1, 16_000)
    (tmp_path / "in" / "0.wav").write_text("broken")
    output = tmp_path / "all.jsonl"
    command = (SCRIPT, "--model_name_or_path", model_folder, "--subnet", "smallest", "--inputs", tmp_path / "in")
    command = (*command, "--output_file", output, "--batch_size", 2, "--device", "cpu")
    (process,) = start(*command)
    wait_until(lambda: output.exists() and output.read_bytes().count(b"\n") >= 5, process)
    process.kill()
    process.join()
    written = output.read_bytes()
    assert 5 <= written.count(b"\n") < 90
    output.write_bytes(written + b'{"name": "half of a li')
    run(*command)
    assert output.read_bytes().startswith(written[: written.rindex(b"\n") + 1])
    entries = {entry["name"]: entry for entry in lines(output)}
    assert len(entries) == len(lines(output)) == 90
    assert [name for name, entry in entries.items() if "error" in entry] == [str(tmp_path / "in" / "0.wav")]
    names = sorted(entries)[-20:]
    recognizer = Recognizer.from_pretrained(model_folder, "smallest")
    for name, transcript in zip(names, recognizer.transcribe([load_waveform(name, 16_000) for name in names])):
        assert entries[name]["text"] == transcript.text


def test_a_second_run_to_the_same_file_is_refused(model_folder, tmp_path):
    soundfile.write(tmp_path / "one.wav", babble(1) * 0.1, 16_000)
    words = ("--model_name_or_path", model_folder, "--device", "cpu", "--inputs", tmp_path / "one.wav")
    with held(tmp_path, "all.txt.jsonl") as pid:
        with pytest.raises(UserError, match=f"all.txt.jsonl is being written by process {pid} on"):
            call(transcribe.main, SCRIPT, *words, "--output_file", tmp_path / "all.txt")
        call(transcribe.main, SCRIPT, *words, "--output_file", tmp_path / "other.txt")
    assert {path.name for path in tmp_path.glob("[!.]*")} == {"one.wav", "other.txt"}


JOURNAL = "lighthubert_training.recognition.transcripts"


def test_a_run_killed_in_each_window_of_its_writing_ends_with_the_same_text(model_folder, tmp_path):
    """A batch is written to the journal or not; then the text is there, then the journal is not."""
    (tmp_path / "in").mkdir()
    for number in range(4):
        soundfile.write(tmp_path / "in" / f"{number}.wav", babble(1, seed=number) * 0.1, 16_000)
    output, journal = tmp_path / "all.txt", tmp_path / "all.txt.jsonl"
    words = ("--model_name_or_path", model_folder, "--device", "cpu", "--inputs", tmp_path / "in", "--batch_size", 1)
    windows = [(f"{JOURNAL}:Journal.add", 2, 1), (f"{JOURNAL}:Journal.add", 3, 3), (f"{JOURNAL}:write_text", 1, 4)]
    for function, number, transcribed in windows:
        killed(function, number, SCRIPT, *words, "--output_file", output)
        assert len(lines(journal)) == transcribed, function
    killed("pathlib:Path.unlink", 3, SCRIPT, *words, "--output_file", output)
    assert output.exists() and journal.exists()
    for file in (output, tmp_path / "undisturbed.txt"):
        call(transcribe.main, SCRIPT, *words, "--output_file", file)
    assert output.read_text() == (tmp_path / "undisturbed.txt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.txt", "in", "undisturbed.txt"]


@pytest.fixture
def live_process(model_folder):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, SCRIPT, "--model_name_or_path", model_folder, "--live", "--output_format", "jsonl"]
    process = subprocess.Popen(list(map(str, command)), env=environment(), **pipes)
    alarm = threading.Timer(60, process.kill)  # a test that waits for a line then sees the end
    alarm.start()
    yield process
    alarm.cancel()
    process.kill()
    process.communicate()


def spoken(seconds: float) -> bytes:
    return (babble(seconds).clip(-1, 1) * 32767).astype("<i2").tobytes()


def test_a_pipe_is_transcribed_before_it_ends(live_process):
    audio = spoken(6.0)
    live_process.stdin.write(audio[:40_001])  # in the middle of a sample
    live_process.stdin.flush()
    first = json.loads(live_process.stdout.readline())  # while the input is open
    assert first["time"] == 1.0
    rest, messages = live_process.communicate(audio[40_001:])
    events = [first, *map(json.loads, rest.splitlines())]
    assert live_process.returncode == 0, messages
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    assert events[-1]["time"] == pytest.approx(6.0)
    assert any(event.get("partial") for event in events)
    assert any(event.get("text") for event in events)


def test_an_interrupted_pipe_ends_cleanly_with_what_was_said(live_process):
    live_process.stdin.write(spoken(2.5))
    live_process.stdin.flush()
    events = [json.loads(live_process.stdout.readline())]
    live_process.send_signal(signal.SIGINT)
    rest, messages = live_process.communicate()
    events += map(json.loads, rest.splitlines())
    assert live_process.returncode == 0
    assert b"Traceback" not in messages
    assert "text" in {key for event in events for key in event}


# Several subnets in turn


@pytest.fixture(scope="module")
def supernet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cascade") / "asr"
    settings = {"feat_extract_norm": "layer", "pad_token_id": 0, "vocab_size": len(TOKENS)}
    tiny_model(LightHubertForCTC, **settings).save_pretrained(folder)
    save_processor(folder)
    return folder


def cascaded(supernet, *options) -> None:
    words = ("--model_name_or_path", supernet, "--device", "cpu", "--cascade", "smallest,largest", *options)
    call(transcribe.main, SCRIPT, *words)


def test_a_cascade_transcribes_and_tells_what_each_stage_got(supernet, tmp_path, capsys):
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", babble(1, seed=number) * 0.1, 16_000)
    recordings = [tmp_path / f"{number}.wav" for number in range(3)]
    waveforms = [soundfile.read(file, dtype="float32")[0] for file in recordings]
    for threshold, subnet, share in ((0.0, "smallest", "largest 0%"), (1.0, "largest", "largest 100%")):
        cascaded(supernet, "--min_confidence", threshold, "--inputs", *recordings)
        told = capsys.readouterr()
        expected = Recognizer.from_pretrained(supernet, subnet).transcribe(waveforms)
        assert told.out.splitlines() == [transcript.text for transcript in expected]
        assert share in told.err and "MMAC/s in the mean" in told.err


def test_a_cascade_is_calibrated_on_labelled_recordings(supernet, tmp_path, capsys):
    audio = [{"bytes": encoded(babble(1, seed=number) * 0.1, format="WAV"), "path": None} for number in range(4)]
    audio.append({"bytes": b"no audio", "path": None})
    rows = {"audio": audio, "sentence": ["A", "B, c", "D", "E", "F"]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "dev.parquet")
    words = ("--text_column_name", "sentence", "--text_case", "lower", "--chars_to_ignore", ",")
    cascaded(supernet, "--calibrate_cascade", tmp_path / "dev.parquet", *words, "--max_wer", 100)
    *table, chosen = capsys.readouterr().out.strip().splitlines()
    assert table[0] == "| min_confidence | WER | MMAC/s |"
    assert table[2].startswith("| 0 | ")
    assert chosen.startswith("--min_confidence 0: word error rate ") and chosen.endswith(" over 4 recordings")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--calibrate_cascade", "dev.parquet"), "calibrate_cascade needs a cascade, such as --cascade"),
        (("--max_wer", "0.1"), "max_wer and max_macs are for --calibrate_cascade"),
        (("--cascade", "a,b", "--calibrate_cascade", "d", "--max_wer", "1", "--max_macs", "1M"), "not both"),
        (("--cascade", "smallest,largest", "--subnet", "smallest", "--inputs", "."), "--subnet smallest or --cascade"),
        (("--cascade", "smallest,largest", "--live"), "--live transcribes with one subnet"),
        (("--cascade", "a,b", "--calibrate_cascade", "d", "--live"), "--calibrate_cascade transcribes nothing"),
    ],
)
def test_options_of_a_cascade_that_contradict_each_other_are_refused(supernet, options, reason, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["transcribe.py", "--model_name_or_path", str(supernet), *options])
    with pytest.raises(SystemExit) as ended:
        run_command(transcribe.main)
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err
