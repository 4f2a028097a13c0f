"""Transcribed recordings: their labels, and which are left out, and recordings to transcribe in batches."""

import tracemalloc

import datasets
import numpy as np
import pytest
from conftest import tiny_model
from datasets import Dataset
from recognizers import save_processor
from speech import RATE, TONE, encoded, undecoded
from transformers import Wav2Vec2Processor

from lighthubert_training.data.sources import DataArguments
from lighthubert_training.recognition.data import (
    StreamedSpeech,
    TranscribedSpeech,
    find_recordings,
    leave_out_useless,
    load_batches,
)
from lighthubert_training.recognition.text import TextArguments
from modeling_lighthubert import LightHubertForCTC
from modeling_lighthubert.errors import UserError


WHOLE = encoded(TONE, format="FLAC")
TORN = WHOLE[: len(WHOLE) // 2]
"""Its header is as it was."""
ROWS = [
    ("good.flac", WHOLE, "abc"),
    ("torn.flac", TORN, "ab"),
    ("headless.flac", b"no audio", "a"),
    ("short.flac", encoded(TONE[:399], format="FLAC"), "a"),
    ("untold.flac", WHOLE, ""),
    ("crammed.flac", WHOLE, "abcdefghi" * 3),
    ("last.flac", WHOLE, "c"),
]


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Wav2Vec2Processor:
    return save_processor(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def model() -> LightHubertForCTC:
    return tiny_model(LightHubertForCTC, None)


def rows(chosen=ROWS) -> Dataset:
    return undecoded([{"audio": {"path": name, "bytes": audio}, "text": text} for name, audio, text in chosen])


def transcribed(processor: Wav2Vec2Processor, chosen=ROWS, share: float = 1.0) -> TranscribedSpeech:
    return TranscribedSpeech(rows(chosen), "audio", [text for *_, text in chosen], processor, share)


def test_an_item_is_a_recording_with_its_labels_or_why_it_cannot_be_read(processor):
    speech = transcribed(processor)
    assert (len(speech), speech.seconds[0], speech.seconds[2]) == (7, 0.5, 0.0)
    good, torn = speech[0], speech[1]
    assert (good.name, good.labels, good.problem) == ("good.flac", [3, 4, 5], "")
    np.testing.assert_allclose(good.waveform, TONE, atol=2**-14)  # of 16 bits
    assert torn.waveform is None and torn.problem
    assert (torn.name, torn.labels) == ("torn.flac", [3, 4])


@pytest.mark.parametrize(
    ("part", "left"), [("train", ["abc", "ab", "c"]), ("eval", ["abc", "abcdefghi" * 3, "c"])], ids=["train", "eval"]
)
def test_useless_recordings_are_left_out_and_named(processor, model, caplog, part, left):
    """Bodies are only read of recordings to evaluate on, and long transcripts are only useless to train on."""
    speech = transcribed(processor)
    leave_out_useless(speech, model, part)
    assert speech.texts == left
    assert [processor.tokenizer(text).input_ids for text in left] == list(speech.labels)
    assert [speech[index].labels for index in range(3)] == list(speech.labels)
    assert len(speech.seconds) == len(speech) == 3
    assert f"left out of {part}: 1 of 7 recordings, shorter than one frame: short.flac" in caplog.text
    assert f"left out of {part}: 1 of 7 recordings, no transcript: untold.flac" in caplog.text
    assert ("crammed.flac" in caplog.text) == (part == "train")
    unreadable = {"headless.flac"} if part == "train" else {"headless.flac", "torn.flac"}
    assert speech.unreadable.names == unreadable
    assert all(f"left out, because it cannot be read: {name}" in caplog.text for name in unreadable)


def test_more_unreadable_recordings_than_allowed_end_the_run(processor, model):
    leave_out_useless(transcribed(processor, share=0.3), model, "eval")
    with pytest.raises(UserError, match=r"2 of 7 recordings cannot be read, more than a share of 0\.2"):
        leave_out_useless(transcribed(processor, share=0.2), model, "eval")


def test_data_without_one_recording_of_use_say_why(processor, model):
    message = "no recording of train is of use. 1: shorter than one frame; 1: no transcript"
    with pytest.raises(UserError, match=message):
        leave_out_useless(transcribed(processor, ROWS[3:5]), model, "train")


def test_a_stream_gives_recordings_in_its_order_without_useless_ones(processor, model, caplog):
    stream = rows().to_iterable_dataset()
    speech = list(StreamedSpeech(stream, DataArguments(), TextArguments(), processor, model))
    assert [each.name for each in speech] == ["good.flac", "torn.flac", "headless.flac", "last.flac"]
    assert [each.labels for each in speech if each.waveform is not None] == [[3, 4, 5], [5]]
    for name in ("short.flac", "untold.flac", "crammed.flac"):
        assert f"left out: {name} (no transcript, or one longer than the recording has frames)" in caplog.text


def test_a_streamed_transcript_with_the_sign_for_a_space_is_left_out_and_named(processor, model, caplog):
    stream = rows([("pipe.flac", WHOLE, "a|b"), ("spelt.flac", WHOLE, "<pad>")]).to_iterable_dataset()
    speech = list(StreamedSpeech(stream, DataArguments(), TextArguments(), processor, model))
    assert [(each.name, len(each.labels)) for each in speech] == [("spelt.flac", 5)]
    assert "left out: pipe.flac (| in its transcript: --chars_to_ignore)" in caplog.text


def test_recordings_to_transcribe_are_found_once(tmp_path):
    (tmp_path / "one.flac").write_bytes(WHOLE)
    undecoded([{"audio": {"path": "same.flac", "bytes": WHOLE}}] * 2).to_parquet(tmp_path / "two.PARQUET")
    one, two = str(tmp_path / "one.flac"), str(tmp_path / "two.PARQUET")
    found = find_recordings([one, two, str(tmp_path), one], DataArguments())
    assert list(found) == [one, f"{two}#0", f"{two}#1"]
    assert found[one]["path"] == one
    assert found[f"{two}#1"]["bytes"] == WHOLE
    with pytest.raises(UserError, match="gone.wav does not exist"):
        find_recordings([str(tmp_path / "gone.wav")], DataArguments())


def test_recordings_of_a_large_table_stay_on_disk_until_they_are_asked_for(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).standard_normal(30_000).astype(np.float32)
    audio = {"path": None, "bytes": encoded(noise, format="WAV", subtype="FLOAT")}
    undecoded([{"audio": audio}] * 400).to_parquet(tmp_path / "large.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tracemalloc.start()
    found = find_recordings([str(tmp_path / "large.parquet")], DataArguments())
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 400
    assert held < 400 * len(audio["bytes"]) / 10
    assert found[f"{tmp_path / 'large.parquet'}#399"]["bytes"] == audio["bytes"]


def test_batches_are_bounded_in_recordings_and_in_seconds():
    def silence(seconds: float) -> dict:
        return {"array": np.zeros(int(seconds * RATE), dtype=np.float32), "sampling_rate": RATE}

    recordings = {str(number): silence(seconds) for number, seconds in enumerate((1, 1, 1, 1, 5, 30, 1, 0))}
    batches = list(load_batches(recordings, recordings, RATE, batch_size=3, max_seconds=6.0))
    assert [[each.name for each in batch] for batch in batches] == [["0", "1", "2"], ["3", "4"], ["5"], ["6", "7"]]
    assert batches[-1][1].waveform is None
