"""Claims about the script that transcribes: what it reads, what it writes, how it goes on, and how it listens."""

import copy
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import soundfile
import torch
import transcribe
from conftest import tiny_model
from datasets import Audio, Dataset
from scripts import TRAINING
from test_ctc_decoding import TOKENS, save_processor
from test_pipelines import speech
from transcribe import Source, load_batches
from transformers import HubertConfig

from lighthubert_training.data.sources import load_waveform
from lighthubert_training.decoding import Word, text_of
from lighthubert_training.recognition.live import LiveTranscriber, transcribe_live
from lighthubert_training.recognition.recognizer import Recognizer
from lighthubert_training.recognition.transcripts import Journal, formatted, split_into_cues
from modeling_lighthubert import LightHubertForCTC


SCRIPT = TRAINING / "transcribe.py"
FRAME = 320


class Reader:
    """A model that hears a letter where the samples of a frame are its number in hundredths: see `say`."""

    def __init__(self):
        self.longest = 0

    def __call__(self, input_values, attention_mask):
        self.longest = max(self.longest, input_values.shape[1])
        num_frames = (input_values.shape[1] - 400) // FRAME + 1
        ids = np.rint(input_values[:, 200::FRAME][:, :num_frames] * 100).astype(int)
        return 9 * np.eye(len(TOKENS), dtype=np.float32)[ids.clip(0, len(TOKENS) - 1)]


def say(path: str) -> np.ndarray:
    """A recording in which `Reader` hears a path, "_" for the blank."""
    ids = [TOKENS.index("<pad>" if token == "_" else token) for token in path]
    return np.append(np.repeat(ids, FRAME), np.zeros(80)).astype(np.float32) / 100


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    processor = save_processor(tmp_path_factory.mktemp("reader"), do_normalize=False)
    return Recognizer(Reader(), HubertConfig(vocab_size=len(TOKENS), feat_extract_norm="layer"), processor)


@pytest.fixture
def script(reader, monkeypatch, capsys):
    """Runs the script in this process with `Reader`: its exit status, output and messages."""

    def run(*options):
        monkeypatch.setattr(transcribe, "build_recognizer", lambda arguments: reader)
        monkeypatch.setattr(sys, "argv", ["transcribe.py", "--model_name_or_path", "reader", *map(str, options)])
        with pytest.raises(SystemExit) as ended:
            transcribe.main()
        status = ended.value.code
        captured = capsys.readouterr()
        return (1, captured.out, status) if isinstance(status, str) else (status, captured.out, captured.err)

    return run


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# Formats


ENTRY = {
    "name": "talk",
    "text": "a b <c> d",
    "words": [
        {"text": "a", "start": 0.02, "end": 0.5, "confidence": 1.0},
        {"text": "b", "start": 0.6, "end": 1.0, "confidence": 0.5},
        {"text": "<c>", "start": 3.0, "end": 3.2004, "confidence": 0.5},
        {"text": "d", "start": 3661.9999, "end": 3662.5, "confidence": 0.5},
    ],
}


def test_subrip_numbers_its_cues_and_has_commas():
    assert formatted(ENTRY, "srt", 10, 5.0) == (
        "1\n00:00:00,020 --> 00:00:01,000\na b\n\n"
        "2\n00:00:03,000 --> 00:00:03,200\n<c>\n\n"
        "3\n01:01:02,000 --> 01:01:02,500\nd\n"
    )


def test_webvtt_has_a_header_and_escapes():
    assert formatted(ENTRY, "vtt", 10, 5.0) == (
        "WEBVTT\n\n00:00:00.020 --> 00:00:01.000\na b\n\n"
        "00:00:03.000 --> 00:00:03.200\n&lt;c&gt;\n\n01:01:02.000 --> 01:01:02.500\nd\n"
    )


def test_silence_makes_valid_subtitles():
    silent = {"name": "silent", "text": "", "words": []}
    assert formatted(silent, "srt", 10, 5.0) == ""
    assert formatted(silent, "vtt", 10, 5.0) == "WEBVTT\n"


def test_cues_are_split_by_words_seconds_and_pauses():
    words = [Word(str(number), number, number + 0.9, 1.0) for number in range(7)]
    assert [len(cue) for cue in split_into_cues(words, 3, 100.0)] == [3, 3, 1]
    assert [len(cue) for cue in split_into_cues(words, 100, 2.0)] == [2, 2, 2, 1]
    assert [len(cue) for cue in split_into_cues(words[:2] + words[4:], 100, 100.0)] == [2, 3]


# What is read


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Recordings of all kinds, broken ones too."""
    root = tmp_path_factory.mktemp("recordings")
    (root / "deep").mkdir()
    soundfile.write(root / "ab.wav", say("_a_b_"), 16_000)
    soundfile.write(root / "deep" / "ab.flac", say("_b_|_a_"), 16_000)
    soundfile.write(root / "flac.wav", say("_c_c_"), 16_000, format="FLAC")
    stereo = np.stack([speech(2.0, 44_100), speech(2.0, 44_100, seed=1)], axis=1) * 0.1
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


def test_batches_are_bounded_in_recordings_and_in_seconds():
    def source(number, seconds):
        return Source(
            str(number), {"array": np.zeros(int(seconds * 16_000), dtype=np.float32), "sampling_rate": 16_000}
        )

    sources = [source(number, seconds) for number, seconds in enumerate((1, 1, 1, 1, 5, 30, 1, 0))]
    batches = list(load_batches(sources, 16_000, batch_size=3, max_seconds=6.0))
    assert [[loaded.name for loaded in batch] for batch in batches] == [["0", "1", "2"], ["3", "4"], ["5"], ["6", "7"]]
    assert batches[-1][1].waveform is None


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


def test_a_line_without_end_is_dropped(tmp_path):
    path = tmp_path / "all.jsonl"
    path.write_bytes(b'{"name": "a", "text": ""}\n{"name": "b", "error": "?"}\n{"name": "c", "te')
    journal = Journal(path)
    assert (journal.names, journal.errors) == ({"a", "b"}, {"b"})
    journal.add([{"name": "c", "text": "é"}])
    assert [entry["name"] for entry in lines(path)] == ["a", "b", "c"]


@pytest.mark.parametrize("content", ["something else\n", "no end of line", '{"text": "no name"}\n', "[1]\n"])
def test_a_file_with_other_content_is_not_touched(script, folder, tmp_path, content):
    (tmp_path / "mine.jsonl").write_text(content)
    status, _, message = script("--inputs", folder / "ab.wav", "--output_file", tmp_path / "mine.jsonl")
    assert status == 1
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
    status, _, said = script(*options)
    assert status == 1
    assert message in said


# Processes


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asr")
    model = tiny_model(LightHubertForCTC, feat_extract_norm="layer", pad_token_id=0)
    with torch.no_grad():
        model.lm_head.bias[[TOKENS.index("<pad>"), TOKENS.index("<unk>")]] = -100.0  # a talkative model
    model.save_pretrained(folder)
    save_processor(folder)
    return folder


def start(model_folder, *options, **pipes) -> subprocess.Popen:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPT, "--model_name_or_path", model_folder, *options]
    return subprocess.Popen(list(map(str, command)), env=environment, **pipes)


def test_a_run_that_was_killed_goes_on_and_loses_and_repeats_nothing(model_folder, tmp_path):
    for number in range(90):
        (tmp_path / "in").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "in" / f"{number}.wav", speech(1 + number % 3, seed=number) * 0.1, 16_000)
    (tmp_path / "in" / "0.wav").write_text("broken")
    output = tmp_path / "all.jsonl"
    command = ("--subnet", "smallest", "--inputs", tmp_path / "in", "--output_file", output, "--batch_size", 2)
    process = start(model_folder, *command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < 5):
        time.sleep(0.002)
    process.kill()
    process.wait()
    written = output.read_bytes()
    assert 5 <= written.count(b"\n") < 90
    output.write_bytes(written + b'{"name": "half of a li')
    assert start(model_folder, *command, stderr=subprocess.DEVNULL).wait() == 0
    assert output.read_bytes().startswith(written[: written.rindex(b"\n") + 1])
    entries = {entry["name"]: entry for entry in lines(output)}
    assert len(entries) == len(lines(output)) == 90
    assert [name for name, entry in entries.items() if "error" in entry] == [str(tmp_path / "in" / "0.wav")]
    names = sorted(entries)[-20:]
    recognizer = Recognizer.from_pretrained(model_folder, "smallest")
    for name, transcript in zip(names, recognizer.transcribe([load_waveform(name, 16_000) for name in names])):
        assert entries[name]["text"] == transcript.text


@pytest.fixture
def listening(model_folder):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start(model_folder, "--live", "--output_format", "jsonl", **pipes)
    alarm = threading.Timer(60, process.kill)  # whoever waits for a line then sees the end
    alarm.start()
    yield process
    alarm.cancel()
    process.kill()
    process.communicate()


def spoken(seconds: float) -> bytes:
    return (speech(seconds).clip(-1, 1) * 32767).astype("<i2").tobytes()


def test_a_pipe_is_transcribed_before_it_ends(listening):
    audio = spoken(6.0)
    listening.stdin.write(audio[:40_001])  # in the middle of a sample
    listening.stdin.flush()
    first = json.loads(listening.stdout.readline())  # while the input is open
    assert first["time"] == 1.0
    rest, messages = listening.communicate(audio[40_001:])
    events = [first, *map(json.loads, rest.splitlines())]
    assert listening.returncode == 0, messages
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    assert events[-1]["time"] == pytest.approx(6.0)
    assert any(event.get("partial") for event in events)
    assert any(event.get("text") for event in events)


def test_an_interrupted_pipe_ends_cleanly_with_what_was_said(listening):
    listening.stdin.write(spoken(2.5))
    listening.stdin.flush()
    heard = [json.loads(listening.stdout.readline())]
    listening.send_signal(signal.SIGINT)
    rest, messages = listening.communicate()
    heard += map(json.loads, rest.splitlines())
    assert listening.returncode == 0
    assert b"Traceback" not in messages
    assert "text" in {key for event in heard for key in event}


class InterruptedOutput(io.StringIO):
    """Standard output in the middle of whose first line the user wants no more."""

    def write(self, text):
        num_written = super().write(text)
        if self.getvalue() == text:
            signal.raise_signal(signal.SIGINT)
        return num_written


@pytest.fixture
def interruptible():
    """A process in the background may ignore interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_cuts_no_line_and_loses_no_word(reader, monkeypatch):
    monkeypatch.setattr(sys, "stdout", InterruptedOutput())
    audio = io.BytesIO((say("a_b" + "_" * 60 + "|b_a" + "_" * 200) * 32768).astype("<i2").tobytes())
    transcribe_live(LiveTranscriber(reader), audio, "jsonl")
    events = [json.loads(line) for line in sys.stdout.getvalue().splitlines()]
    assert " ".join(event["text"] for event in events if event.get("text")) == "ab ba"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# Live


def sentence(num_words: int, seed: int = 0) -> str:
    """A path of words of 1 to 4 letters, with pauses before and behind their delimiters."""
    rng = np.random.default_rng(seed)
    words = [
        "".join(f"{letter}_" for letter in rng.choice(list("abcdefghi"), rng.integers(1, 5))) for _ in range(num_words)
    ]
    return "".join(word + "_" * rng.integers(0, 20) + "|" + "_" * rng.integers(0, 60) for word in words)


@pytest.mark.parametrize("block", [1000, 16_000, 100_000])
def test_live_final_words_are_those_of_the_whole_recording(reader, block):
    audio, live = say(sentence(60)), LiveTranscriber(reader)
    events = [event for at in range(0, len(audio), block) for event in live.feed(audio[at : at + block])]
    events += live.finish()
    final = [word for event in events if event.is_final for word in event.words]
    (expected,) = reader.transcribe([audio])
    assert text_of(final) == expected.text
    np.testing.assert_allclose([word[1:] for word in final], [word[1:] for word in expected.words], rtol=1e-5)


class Hesitant(Reader):
    """A model that hears nothing in the last frames of what it is given: it wants to know how it goes on."""

    def __call__(self, input_values, attention_mask):
        logits = super().__call__(input_values, attention_mask)
        logits[:, -20:] = np.eye(len(TOKENS))[TOKENS.index("<pad>")]
        return logits


def test_words_are_not_final_before_their_future_was_heard(reader):
    audio, hesitant = say(sentence(60) + "_" * 20), copy.copy(reader)
    hesitant.model = Hesitant()
    live = LiveTranscriber(hesitant)
    events = live.feed(audio) + live.finish()
    final = [word for event in events if event.is_final for word in event.words]
    assert text_of(final) == reader.transcribe([audio])[0].text


def test_a_guess_comes_within_a_chunk_and_is_final_later(reader):
    live = LiveTranscriber(reader, chunk_length_s=0.5)
    events = live.feed(say("_" * 10 + "a_b" + "_" * 30)[: 16_000 // 2])
    assert [(event.time, event.is_final, text_of(event.words)) for event in events] == [(0.5, False, "ab")]
    events = live.feed(say("_" * 20 + "|" + "_" * 79))
    assert [text_of(event.words) for event in events if event.is_final] == ["ab"]
    assert not live.guess


def test_a_word_without_delimiter_is_final_in_time(reader):
    live = LiveTranscriber(reader)
    events = live.feed(say("a_b" + "_" * 400))
    assert [text_of(event.words) for event in events if event.is_final] == ["ab"]


def test_an_endless_recording_needs_no_more_memory(reader):
    live, sizes = LiveTranscriber(reader), []
    reader.model.longest = 0
    for minute in range(20):
        audio = say(sentence(70, seed=minute) + ("abab" * 500 if minute == 7 else ""))
        for at in range(0, len(audio), 8000):
            live.feed(audio[at : at + 8000])
            sizes.append(len(live.samples) + len(live.arrived) + live.pending.size + len(live.guess))
        assert live.samples.base is None and live.pending.base is None  # views would hold what is dropped
    assert live.num_heard > 15 * 60 * 16_000
    assert max(sizes) < 8 * 16_000
    assert 6 * 16_000 <= reader.model.longest < 8 * 16_000


def test_a_change_of_loudness_and_offset_is_forgotten_with_the_context(model_folder):
    recognizer, heard = Recognizer.from_pretrained(model_folder), []
    live, reader = LiveTranscriber(recognizer), Reader()
    recognizer.model = lambda audio, mask: heard.append(audio[0]) or reader(audio, mask)
    live.feed(np.concatenate([speech(10) * 0.05 + 0.2, speech(10)]))
    for now in (heard[9], heard[-1]):  # at the end of the quiet part, and of the loud one
        assert (now.mean(), now.std()) == pytest.approx((0, 1), abs=0.01)


def test_nothing_and_less_than_a_frame_are_silence(reader):
    assert LiveTranscriber(reader).finish() == []
    live = LiveTranscriber(reader)
    assert live.feed(np.zeros(0, dtype=np.float32)) == []
    assert live.feed(say("a")[:399]) == live.finish() == []


def test_a_live_chunk_without_a_frame_is_refused(reader):
    with pytest.raises(ValueError, match="--live_chunk_length_s 0.01 is less than a frame"):
        LiveTranscriber(reader, chunk_length_s=0.01)
