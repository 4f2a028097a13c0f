"""Makes small data sets with the structure of SUPERB's, from recordings of single digits.

    python demo/make_superb_stand_ins.py --output_dir stand-ins
    python demo/make_superb_stand_ins.py --train_file digits-train.parquet --test_file digits-test.parquet \\
        --output_dir stand-ins

Words of one speaker are joined to strings and to commands with slots, and strings of two speakers are mixed; emotions
are imitated by speed, pitch and tremor. The data test `training/run_superb.py` and rank models; scores on them are no
SUPERB results. The same seed makes the same data.
"""

import csv
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from datasets import Audio, Dataset, disable_progress_bars

from lighthubert_training.data.audio import load_waveform
from lighthubert_training.data.strings import SAMPLING_RATE, encode_flac, read_parquet
from lighthubert_training.runs.options import OptionParser, option, parse_options
from modeling_lighthubert.errors import UserError, run
from modeling_lighthubert.files import write_text


SPEECH = Path(__file__).resolve().parent / "speech"
PHONES = {
    "zero": "Z IH R OW", "one": "W AH N", "two": "T UW", "three": "TH R IY", "four": "F AO R", "five": "F AY V",
    "six": "S IH K S", "seven": "S EH V AH N", "eight": "EY T", "nine": "N AY N",
}  # fmt: skip
"""Of the digits, as in the CMU dictionary."""
DIGITS = tuple(PHONES)
KEYWORDS = DIGITS[:8]
SLOTS = {"action": DIGITS[:3], "object": DIGITS[3:6], "location": DIGITS[6:9]}
NUM_FOLDS = 5


def tremor(waveform: np.ndarray) -> np.ndarray:
    """Amplitude modulation at 7 Hz."""
    return waveform * (0.55 + 0.45 * np.sin(2 * np.pi * 7 * np.arange(len(waveform)) / SAMPLING_RATE)).astype("f4")


EMOTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "neutral": lambda waveform: waveform,
    "excited": lambda waveform: soxr.resample(waveform, 1.3 * SAMPLING_RATE, SAMPLING_RATE),
    "sad": lambda waveform: soxr.resample(waveform, SAMPLING_RATE / 1.3, SAMPLING_RATE),
    "afraid": tremor,
}
"""Faster and higher, slower and lower, or trembling."""


@dataclass
class StandInArguments:
    """What the data are made of, and how much of them."""

    output_dir: str = option(help="Folder for a folder of data for each task.")
    train_file: str = option(str(SPEECH / "train.parquet"), "Parquet file with the columns audio, text and speaker.")
    test_file: str = option(str(SPEECH / "test.parquet"), "Such a file, of other speakers, for the test parts.")
    num_train: int = option(320, "Number of training recordings of each task.")
    num_eval: int = option(100, "Number of recordings of each other part.")
    seed: int = option(0, "Random seed.")


@dataclass(frozen=True)
class Word:
    """A recorded digit."""

    digit: str
    speaker: str
    waveform: np.ndarray


Row = dict[str, Any]


class Voices:
    """Recorded words by their speakers, and random choices among them."""

    def __init__(self, words: Sequence[Word], rng: random.Random):
        self.rng = rng
        self.by_speaker: dict[str, dict[str, list[Word]]] = {}
        for word in words:
            self.by_speaker.setdefault(word.speaker, {}).setdefault(word.digit, []).append(word)
        self.digit_turns = itertools.cycle(DIGITS)
        self.turns = itertools.cycle(self.rng.sample(sorted(self.by_speaker), len(self.by_speaker)))

    def speaker(self) -> str:
        """The next speaker; all of them take turns."""
        return next(self.turns)

    def joined(self, digits: Sequence[str], speaker: str) -> np.ndarray:
        """Digits by one speaker, each with a pause behind it."""
        parts = []
        for digit in digits:
            silence = np.zeros(int(self.rng.uniform(0.05, 0.15) * SAMPLING_RATE), dtype=np.float32)
            parts += [self.rng.choice(self.by_speaker[speaker][digit]).waveform, silence]
        return np.concatenate(parts)

    def word(self, digit: str) -> np.ndarray:
        """A digit by anyone."""
        return self.rng.choice(self.by_speaker[self.speaker()][digit]).waveform

    def digits(self, least: int, most: int) -> list[str]:
        """Between `least` and `most` random digits."""
        return self.rng.choices(DIGITS, k=self.rng.randint(least, most))


def read_words(file: str) -> list[Word]:
    """Recordings of single digits.

    Raises:
        UserError: the file cannot be read, or a speaker lacks a digit.
    """
    rows = read_parquet(file).filter(lambda text: text in DIGITS, input_columns="text")
    words = [Word(row["text"], row["speaker"], load_waveform(row["audio"], SAMPLING_RATE)) for row in rows]
    said = {(word.speaker, word.digit) for word in words}
    for speaker in {word.speaker for word in words}:
        if lacking := [digit for digit in DIGITS if (speaker, digit) not in said]:
            raise UserError(f"{file}: {speaker} never says {', '.join(lacking)}")
    return words


def string(voices: Voices) -> Row:
    speaker, digits = voices.speaker(), voices.digits(2, 5)
    return {"audio": voices.joined(digits, speaker), "text": " ".join(digits), "speaker": speaker}


def keyword(voices: Voices) -> Row:
    digit = next(voices.digit_turns)
    return {"audio": voices.word(digit), "label": digit if digit in KEYWORDS else "_unknown_"}


def voice(voices: Voices, speaker: str | None = None) -> Row:
    speaker = speaker or voices.speaker()
    return {"audio": voices.joined(voices.digits(2, 3), speaker), "speaker": speaker}


def intent(voices: Voices) -> Row:
    chosen = {slot: voices.rng.choice(digits) for slot, digits in SLOTS.items()}
    return {"audio": voices.joined(list(chosen.values()), voices.speaker()), **chosen}


def command(voices: Voices) -> Row:
    """One to three slots of one or two words, in any order, with the word nine between some of them."""
    words, text = [], []
    for slot in voices.rng.sample(sorted(SLOTS), voices.rng.randint(1, 3)):
        if voices.rng.random() < 0.3:
            words, text = [*words, "nine"], [*text, "nine"]
        value = voices.rng.choices(SLOTS[slot], k=voices.rng.randint(1, 2))
        words, text = [*words, *value], [*text, f"B-{slot}", *value, f"E-{slot}"]
    return {"audio": voices.joined(words, voices.speaker()), "text": " ".join(text)}


def mixture(voices: Voices) -> Row:
    """Two speakers; the second begins before or soon after the first has ended."""
    speakers = voices.rng.sample(sorted(voices.by_speaker), 2)
    clips = [voices.joined(voices.digits(2, 4), speaker) for speaker in speakers]
    starts = [0, int(voices.rng.uniform(0.5, 1.1) * len(clips[0]))]
    mixed = np.zeros(max(start + len(clip) for start, clip in zip(starts, clips)), dtype=np.float32)
    segments = []
    for speaker, start, clip in zip(speakers, starts, clips, strict=True):
        mixed[start : start + len(clip)] += clip
        ends = (start / SAMPLING_RATE, (start + len(clip)) / SAMPLING_RATE)
        segments.append({"speaker": speaker, "start": ends[0], "end": ends[1]})
    return {"audio": mixed, "segments": segments}


def emotion(voices: Voices) -> Row:
    """A neutral recording, or one of another imitated emotion. Each speaker belongs to one fold."""
    speaker, name = voices.speaker(), voices.rng.choice(sorted(EMOTIONS))
    fold = 1 + sorted(voices.by_speaker).index(speaker) % NUM_FOLDS
    return {"audio": EMOTIONS[name](voices.joined(voices.digits(1, 2), speaker)), "emotion": name, "fold": fold}


def write_part(folder: Path, name: str, rows: Sequence[Row]) -> None:
    """Writes a Parquet file with the recordings encoded as FLAC, attenuated where they would clip."""
    encoded = []
    for row in rows:
        loudest = max(1.0, float(np.abs(row["audio"]).max()))
        encoded.append(row | {"audio": encode_flac(row["audio"] / loudest)})
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(encoded).cast_column("audio", Audio(decode=False)).to_parquet(folder / f"{name}.parquet")


def write_table(file: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Writes a CSV file."""
    with file.open("w", encoding="utf-8", newline="") as table:
        csv.writer(table).writerows([header, *rows])


def write_verification(folder: Path, train: Voices, dev: Voices, test: Voices, arguments: StandInArguments) -> None:
    """Recordings of speaker verification, and trials, half of them of the same speaker."""
    write_part(folder, "train", [voice(train) for _ in range(arguments.num_train)])
    for name, voices in (("dev", dev), ("test", test)):
        some = itertools.cycle(sorted(voices.by_speaker)[: max(2, arguments.num_eval // 4)])  # each several times
        rows = [{"id": f"{name}-{number}", **voice(voices, next(some))} for number in range(arguments.num_eval)]
        write_part(folder, name, [{"id": row["id"], "audio": row["audio"]} for row in rows])
        trials = []
        while len(trials) < 5 * arguments.num_eval:
            one, other = voices.rng.sample(rows, 2)
            if (one["speaker"] == other["speaker"]) == (len(trials) % 2 == 0):
                trials.append((one["id"], other["id"], int(one["speaker"] == other["speaker"])))
        write_table(folder / f"{name}_trials.csv", ("enrolment", "trial", "same"), trials)


def write_queries(folder: Path, dev: Voices, test: Voices, arguments: StandInArguments) -> None:
    """Two recordings of each digit as queries, and strings as documents, a third as many as recordings elsewhere."""
    for name, voices in (("dev", dev), ("test", test)):
        queries = [{"id": f"{digit}-{number}", "audio": voices.word(digit)} for digit in DIGITS for number in range(2)]
        documents = [{"id": f"document-{number}", **string(voices)} for number in range(arguments.num_eval // 3)]
        pairs = [
            (query["id"], document["id"])
            for query in queries
            for document in documents
            if query["id"].split("-")[0] in document["text"].split()
        ]
        write_part(folder, f"{name}_queries", queries)
        write_part(folder, f"{name}_documents", [{"id": row["id"], "audio": row["audio"]} for row in documents])
        write_table(folder / f"{name}_pairs.csv", ("query", "document"), pairs)


def language_model() -> str:
    """A bigram model in ARPA format, in which every digit and the end are equally likely after each digit."""
    log_prob = f"{np.log10(1 / (len(DIGITS) + 1)):.4f}"
    unigrams = ["-99\t<s>\t0", "-99\t<unk>\t0", f"{log_prob}\t</s>", *(f"{log_prob}\t{word}\t0" for word in DIGITS)]
    bigrams = [f"{log_prob}\t{one} {other}" for one in ("<s>", *DIGITS) for other in ("</s>", *DIGITS)]
    header = ["\\data\\", f"ngram 1={len(unigrams)}", f"ngram 2={len(bigrams)}", ""]
    lines = [*header, "\\1-grams:", *unigrams, "", "\\2-grams:", *bigrams, "", "\\end\\"]
    return "\n".join(lines) + "\n"


def main() -> None:
    (arguments,) = parse_options(OptionParser(StandInArguments, description=__doc__))
    disable_progress_bars()
    output, rng = Path(arguments.output_dir), random.Random(arguments.seed)
    words = read_words(arguments.train_file)
    rng.shuffle(words)
    # every speaker says every digit in each of the three parts
    thirds: list[list[Word]] = [[], [], []]
    seen: dict[tuple[str, str], int] = {}
    for word in words:
        number = seen[word.speaker, word.digit] = seen.get((word.speaker, word.digit), -1) + 1
        thirds[number % 3].append(word)
    train, dev, known = (Voices(third, rng) for third in thirds)
    test = Voices(read_words(arguments.test_file), rng)
    makers = {"asr": string, "pr": string, "ks": keyword, "sid": voice, "ic": intent, "sf": command, "sd": mixture}
    for task, make in makers.items():
        parts = {"train": train, "dev": dev, "test": known if task == "sid" else test}
        for name, voices in parts.items():
            count = arguments.num_train if name == "train" else arguments.num_eval
            write_part(output / task, name, [make(voices) for _ in range(count)])
    write_part(output / "er", "train", [emotion(train) for _ in range(arguments.num_train)])
    write_verification(output / "asv", train, dev, test, arguments)
    write_queries(output / "qbe", dev, test, arguments)
    write_text(output / "pr/lexicon.txt", "".join(f"{word} {phones}\n" for word, phones in PHONES.items()))
    write_text(output / "asr/lm.arpa", language_model())
    print(f"stand-ins for ten tasks are in {output}")


if __name__ == "__main__":
    run(main)
