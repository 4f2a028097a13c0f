"""Transcription of audio while it arrives, in constant memory."""

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lighthubert_training.decoding import Word, greedy, text_of, words_of
from lighthubert_training.recognition.recognizer import Recognizer
from modeling_lighthubert.errors import UserError


class LiveEvent(NamedTuple):
    """A piece of the transcript.

    Attributes:
        time: seconds of audio that had arrived.
        is_final: whether the words never change any more.
        words: if they are final, those that follow the earlier final ones; otherwise a guess at all that comes after
            these, in place of the guess before.
    """

    time: float
    is_final: bool
    words: list[Word]


class LiveTranscriber:
    """Transcribes audio while it arrives, greedily. Its memory does not grow.

    After each `chunk_length_s` of audio, the model runs on it and the `context_length_s` before it. A frame is settled
    when the model has run on `lookahead_length_s` more, and a word is final when it and the delimiter behind it are
    settled, or when no delimiter has come for `context_length_s` after its first letter. Each input of the model is
    normalised on its own, as chunks of recordings are.

    Args:
        chunk_length_s: seconds of new audio in an input of the model.
        context_length_s: seconds before it.
        lookahead_length_s: seconds at the end of an input whose frames may still change.

    Attributes:
        arrived: samples that make no chunk yet.
        samples: the last input of the model, from the beginning of `first_frame` on.
        num_samples: how many the model has run on so far.
        pending: log probabilities of settled frames that are in no final word, from `first_pending` on.
        guess: words after the final ones.

    Raises:
        UserError: a chunk without a frame.
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
            raise UserError(f"--live_chunk_length_s {chunk_length_s} is less than a frame: give 0.1 or more")
        self.arrived = np.zeros(0, dtype=np.float32)
        self.samples = np.zeros(0, dtype=np.float32)
        self.first_frame, self.num_samples = 0, 0
        self.pending, self.first_pending = np.zeros((0, recognizer.config.vocab_size), dtype=np.float32), 0
        self.guess: list[Word] = []

    def feed(self, samples: np.ndarray) -> list[LiveEvent]:
        """The events of more audio: mono samples at the model's sampling rate, shape (num_samples), -1 to 1."""
        self.arrived = np.concatenate([self.arrived, samples.astype(np.float32)])
        events = []
        while len(self.arrived) >= self.chunk:
            chunk, self.arrived = np.split(self.arrived, [self.chunk])
            events += self._process(chunk)
        return events

    def finish(self) -> list[LiveEvent]:
        """The events at the end of the audio: all words that are left are final."""
        return self._process(self.arrived, is_last=True)

    def _process(self, samples: np.ndarray, is_last: bool = False) -> list[LiveEvent]:
        """Runs the model on new samples and their context."""
        self.samples = np.concatenate([self.samples, samples])
        self.num_samples += len(samples)
        (log_probs,) = self.recognizer.log_probs([self.samples])
        num_settled = self.first_pending + len(self.pending) - self.first_frame
        settled = log_probs[num_settled : max(num_settled, len(log_probs) - (0 if is_last else self.lookahead))]
        self.pending = np.concatenate([self.pending, settled])
        num_settled += len(settled)
        final = self._take_final(is_last)
        guess = self._words(np.concatenate([self.pending, log_probs[num_settled:]]))
        time = self.num_samples / self.recognizer.sampling_rate
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
        alphabet, seconds_per_frame = self.recognizer.alphabet, self.recognizer.seconds_per_frame
        return words_of(greedy(log_probs), log_probs, alphabet, seconds_per_frame, self.first_pending)


def transcribe_live(live: LiveTranscriber, audio: Any, output_format: str) -> None:
    """Prints the words in raw samples, 16 bit, of `audio`, a buffered binary stream such as `sys.stdin.buffer`: final
    ones on standard output, guesses at what follows on standard error; or, as jsonl, both as lines of JSON on standard
    output."""

    def show(events: Sequence[LiveEvent]) -> None:
        for event in events:
            text, time = text_of(event.words), round(event.time, 3)
            if output_format == "jsonl":
                words = {"words": [word.as_json() for word in event.words]} if event.is_final else {}
                print(json.dumps({"time": time, ("text" if event.is_final else "partial"): text} | words), flush=True)
                continue
            print("\r\033[K" + ("" if event.is_final else text), end="", file=sys.stderr, flush=True)
            if event.is_final:
                print(text, flush=True)

    odd = b""
    for data in _arriving(audio):
        data = odd + data
        samples = np.frombuffer(data, dtype="<i2", count=len(data) // 2)
        odd = data[samples.nbytes :]
        show(live.feed(samples / np.float32(32768)))
    show(live.finish())


def _arriving(audio: Any) -> Iterator[bytes]:
    """Audio as it arrives. An interrupt ends it, but only after what is being transcribed, so that no word is lost and
    no line is cut. The next interrupt does what it always does."""
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
