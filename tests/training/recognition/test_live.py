"""Live transcription: final words are those of the whole recording, guesses come early, and memory does not grow."""

import copy
import io
import json
import signal
import sys

import numpy as np
import pytest
from recognizers import TOKENS, Reader, babble, build_reader, save_processor, say

from lighthubert_training.decoding import text_of
from lighthubert_training.recognition.live import LiveTranscriber, transcribe_live
from lighthubert_training.recognition.recognizer import Recognizer
from modeling_lighthubert.errors import UserError


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Recognizer:
    return build_reader(tmp_path_factory.mktemp("reader"))


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
    """A model that gives blanks in the last frames of its input, whose future it does not know."""

    def __call__(self, input_values, attention_mask):
        logits = super().__call__(input_values, attention_mask)
        logits[:, -20:] = np.eye(len(TOKENS))[TOKENS.index("<pad>")]
        return logits


def test_words_are_not_final_before_their_lookahead(reader):
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
    assert live.num_samples > 15 * 60 * 16_000
    assert max(sizes) < 8 * 16_000
    assert 6 * 16_000 <= reader.model.longest < 8 * 16_000


def test_a_change_of_loudness_and_offset_is_forgotten_with_the_context(tmp_path):
    recognizer, inputs, reader = build_reader(tmp_path / "reader"), [], Reader()
    recognizer.processor = save_processor(tmp_path / "normalised")
    recognizer.model = lambda audio, mask: inputs.append(audio[0]) or reader(audio, mask)
    live = LiveTranscriber(recognizer)
    live.feed(np.concatenate([babble(10) * 0.05 + 0.2, babble(10)]))
    for now in (inputs[9], inputs[-1]):  # at the end of the quiet part, and of the loud one
        assert (now.mean(), now.std()) == pytest.approx((0, 1), abs=0.01)


def test_nothing_and_less_than_a_frame_are_silence(reader):
    assert LiveTranscriber(reader).finish() == []
    live = LiveTranscriber(reader)
    assert live.feed(np.zeros(0, dtype=np.float32)) == []
    assert live.feed(say("a")[:399]) == live.finish() == []


def test_a_live_chunk_without_a_frame_is_refused(reader):
    with pytest.raises(UserError, match="--live_chunk_length_s 0.01 is less than a frame"):
        LiveTranscriber(reader, chunk_length_s=0.01)
