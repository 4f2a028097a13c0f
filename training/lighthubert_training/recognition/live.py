"""Transcription of audio while it arrives, in steady memory."""

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from lighthubert_training.decoding import Word, greedy, text_of, words_of
from lighthubert_training.recognition.recognizer import Recognizer
from lighthubert_training.recognition.transcripts import word_as_json


class LiveEvent(NamedTuple):
    """What became known at `time`, in seconds of audio.

    Attributes:
        words: if `is_final`, those that follow the earlier final ones and never change; otherwise a guess at all that
            comes after these, in place of the guess before.
    """

    time: float
    is_final: bool
    words: list[Word]


class LiveTranscriber:
    """Transcribes audio while it arrives, greedily. What it holds does not grow.

    Each `chunk_length_s`, the model hears the new audio with `context_length_s` before it. Frames are settled when it
    has heard `lookahead_length_s` more, and words are final when they and the delimiter behind them are settled, or
    when none has come for `context_length_s` after their first letter. What is heard at once is normalised on its own,
    as chunks of recordings are.

    Attributes:
        samples: the last ones that were heard, from the beginning of `first_frame` on.
        pending: log probabilities of settled frames that are in no final word, from `first_pending` on.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        chunk_length_s: float = 1.0,
        context_length_s: float = 5.0,
        lookahead_length_s: float = 0.5,
    ):
        self.recognizer, self.chunk = recognizer, round(chunk_length_s * recognizer.sampling_rate)
        self.context, self.lookahead = map(recognizer.frames_in, (context_length_s, lookahead_length_s))
        if recognizer.num_frames(self.chunk) == 0:
            raise ValueError(f"--live_chunk_length_s {chunk_length_s} is less than a frame: give 0.1 or more")
        self.arrived, self.samples = np.zeros((2, 0), dtype=np.float32)
        self.first_frame, self.num_heard = 0, 0
        self.pending, self.first_pending = np.zeros((0, recognizer.config.vocab_size), dtype=np.float32), 0
        self.guess: list[Word] = []

    def feed(self, samples: np.ndarray) -> list[LiveEvent]:
        """What follows from more mono samples at the model's sampling rate, shape (num_samples), -1 to 1."""
        self.arrived = np.concatenate([self.arrived, samples.astype(np.float32)])
        events = []
        while len(self.arrived) >= self.chunk:
            chunk, self.arrived = np.split(self.arrived, [self.chunk])
            events += self._hear(chunk)
        return events

    def finish(self) -> list[LiveEvent]:
        """What is left at the end of the audio: all of it is final."""
        return self._hear(self.arrived, is_last=True)

    def _hear(self, samples: np.ndarray, is_last: bool = False) -> list[LiveEvent]:
        self.samples = np.concatenate([self.samples, samples])
        self.num_heard += len(samples)
        (log_probs,) = self.recognizer.log_probs([self.samples])
        num_settled = self.first_pending + len(self.pending) - self.first_frame
        newly = log_probs[num_settled : max(num_settled, len(log_probs) - (0 if is_last else self.lookahead))]
        self.pending = np.concatenate([self.pending, newly])
        num_settled += len(newly)
        final = self._take_final(is_last)
        guess = self._words(np.concatenate([self.pending, log_probs[num_settled:]]))
        time = self.num_heard / self.recognizer.sampling_rate
        events = [LiveEvent(time, True, final)] if final else []
        if [word.text for word in guess] != [word.text for word in self.guess]:
            events.append(LiveEvent(time, False, guess))
        self.guess = guess
        dropped = max(0, num_settled - self.context)
        self.samples = self.samples[dropped * self.recognizer.samples_per_frame :].copy()
        self.first_frame += dropped
        return events

    def _take_final(self, is_last: bool) -> list[Word]:
        """Takes the frames of final words, and of silence where no word is open, from those that are pending."""
        alphabet, path = self.recognizer.alphabet, greedy(self.pending)
        delimiters = np.flatnonzero(path == alphabet.delimiter)
        letters = np.flatnonzero(np.isin(path, list(alphabet.letters)))
        num_taken = int(delimiters[-1]) + 1 if len(delimiters) else 0
        open_letters = letters[letters >= num_taken]
        if is_last or not len(open_letters) or len(path) - open_letters[0] > self.context:
            num_taken = len(path)
        words = self._words(self.pending[:num_taken])
        self.pending = self.pending[num_taken:].copy()
        self.first_pending += num_taken
        return words

    def _words(self, log_probs: np.ndarray) -> list[Word]:
        recognizer = self.recognizer
        return words_of(
            greedy(log_probs), log_probs, recognizer.alphabet, recognizer.seconds_per_frame, self.first_pending
        )


def transcribe_live(live: LiveTranscriber, audio: BinaryIO, output_format: str) -> None:
    """Prints what is said in raw samples, 16 bit: final words on standard output, guesses at what follows on standard
    error; or, as jsonl, both as lines of JSON."""

    def show(events: Sequence[LiveEvent]) -> None:
        for event in events:
            text, time = text_of(event.words), round(event.time, 3)
            if output_format == "jsonl":
                words = {"words": [word_as_json(word) for word in event.words]} if event.is_final else {}
                print(json.dumps({"time": time, ("text" if event.is_final else "partial"): text} | words), flush=True)
            elif event.is_final:
                print("\r\033[K", end="", file=sys.stderr, flush=True)
                print(text, flush=True)
            else:
                print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    odd = b""
    for data in _arriving(audio):
        data = odd + data
        whole = len(data) // 2 * 2
        odd = data[whole:]
        show(live.feed(np.frombuffer(data[:whole], dtype="<i2") / np.float32(32768)))
    show(live.finish())


def _arriving(audio: BinaryIO) -> Iterator[bytes]:
    """Audio as it arrives. An interrupt ends it, but waits for what is being transcribed, lest words be lost or a line
    be cut. The next interrupt does what it always does."""
    waiting, interrupted = True, False

    def interrupt(number: int, frame: object) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, usual)
        if waiting:
            raise KeyboardInterrupt

    usual = signal.signal(signal.SIGINT, interrupt)
    try:
        while not interrupted and (data := audio.read1(1 << 16)):
            waiting = False
            yield data
            waiting = True
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, usual)
