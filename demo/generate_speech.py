"""Makes the speech of the demonstration with espeak-ng: spoken digits and strings of digits, by many voices.

    apt-get install espeak-ng
    python demo/generate_speech.py --output_dir speech

Writes `train.parquet` and `test.parquet`, such as those in `demo/speech`, whose speakers differ. A speaker is one
voice with its own pitch and speed; every recording varies both a little, and has silence around it, a gain and some
noise. The same seed gives the same recordings.
"""

import io
import random
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile
import soxr
from datasets import Audio, Dataset

from lighthubert_training.data.audio import duration
from lighthubert_training.data.strings import SAMPLING_RATE
from lighthubert_training.runs.options import OptionParser, option, parse_options
from modeling_lighthubert.errors import UserError, run
from modeling_lighthubert.files import require_unused, whole_folder


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Speaker:
    """One voice: its name in espeak-ng, accent and variant; pitch (0 to 99); and speed in words per minute."""

    name: str
    pitch: int
    speed: int


TRAIN_SPEAKERS = (
    Speaker("en-us+m1", 45, 165), Speaker("en-gb+m2", 35, 150), Speaker("en-gb-scotland+m3", 55, 180),
    Speaker("en-gb-x-rp+m4", 40, 140), Speaker("en-029+m5", 50, 170), Speaker("en-us+m6", 30, 155),
    Speaker("en-gb+Andy", 60, 175), Speaker("en-us+michael", 48, 160), Speaker("en-gb-x-gbclan+max", 38, 185),
    Speaker("en-gb-x-gbcwmd+john", 52, 150), Speaker("en-us+f1", 55, 165), Speaker("en-gb+f2", 65, 150),
    Speaker("en-gb-scotland+f3", 50, 175), Speaker("en-gb-x-rp+f4", 70, 160), Speaker("en-029+Annie", 60, 145),
    Speaker("en-us+linda", 45, 180), Speaker("en-gb-x-gbclan+steph", 58, 170),
    Speaker("en-gb-x-gbcwmd+belinda", 66, 155), Speaker("en-us+klatt2", 42, 160), Speaker("en-gb+Alex", 47, 190),
)  # fmt: skip
TEST_SPEAKERS = (
    Speaker("en-us+m7", 50, 158), Speaker("en-gb+f5", 60, 168), Speaker("en-gb-scotland+David", 44, 172),
    Speaker("en-gb-x-rp+Alicia", 62, 152), Speaker("en-029+m8", 40, 162), Speaker("en-us+anika", 54, 178),
)  # fmt: skip


@dataclass
class SpeechArguments:
    """How much speech is made."""

    output_dir: str = option(help="Folder of the two Parquet files.")
    train_takes: int = option(3, "Recordings of each digit by each training speaker.")
    train_strings: int = option(36, "Strings of digits by each training speaker.")
    test_takes: int = option(8, "Recordings of each digit by each test speaker.")
    test_strings: int = option(18, "Strings of digits by each test speaker.")
    compression_level: float = option(0.97, "Compression of Opus, from 0 to 1, the most.")
    seed: int = option(0, "Random seed.")


def speak(text: str, speaker: Speaker, rng: random.Random) -> np.ndarray:
    """One recording: float32 samples at 16 kHz, shape (num_samples).

    Raises:
        UserError: espeak-ng is not installed, or does not know the voice.
    """
    if shutil.which("espeak-ng") is None:
        raise UserError("espeak-ng is not installed: `apt-get install espeak-ng`, or `brew install espeak-ng`")
    pitch = max(0, min(99, speaker.pitch + rng.randint(-8, 8)))
    speed = round(speaker.speed * rng.uniform(0.85, 1.2))
    command = ["espeak-ng", "-v", speaker.name, "-p", str(pitch), "-s", str(speed), "--stdout", text]
    result = subprocess.run(command, capture_output=True, check=False)
    if result.returncode or not result.stdout:
        raise UserError(f"espeak-ng failed: {result.stderr.decode().strip()}")
    voice, rate = soundfile.read(io.BytesIO(result.stdout), dtype="float32")
    voice = soxr.resample(voice, rate, SAMPLING_RATE)
    loud = np.flatnonzero(np.abs(voice) > 1e-3)
    voice = voice[loud[0] : loud[-1] + 1]
    before, after = (np.zeros(int(rng.uniform(0.03, 0.15) * SAMPLING_RATE), dtype=np.float32) for _ in range(2))
    waveform = np.concatenate([before, voice, after])
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(len(waveform)).astype(np.float32)
    noise_level = float(np.sqrt(np.mean(voice**2))) * 10 ** (-rng.uniform(20, 35) / 20)
    waveform = waveform + noise_level * noise
    return waveform / np.abs(waveform).max() * np.float32(rng.uniform(0.3, 0.9))


def utterances(num_takes: int, num_strings: int, rng: random.Random) -> Iterator[tuple[str, int]]:
    """Texts with their digit, or -1 for a string of 3 to 6 digits."""
    for digit, word in enumerate(DIGITS):
        yield from [(word, digit)] * num_takes
    for _ in range(num_strings):
        yield " ".join(rng.choices(DIGITS, k=rng.randint(3, 6))), -1


def record(speakers: tuple[Speaker, ...], num_takes: int, num_strings: int, arguments: SpeechArguments) -> Dataset:
    """All recordings of some speakers, as Opus in an `Audio` column."""

    def row(task: tuple[Speaker, str, int, int]) -> dict[str, Any]:
        speaker, text, digit, seed = task
        file = io.BytesIO()
        waveform = speak(text, speaker, random.Random(seed))
        compression = {"format": "OGG", "subtype": "OPUS", "compression_level": arguments.compression_level}
        soundfile.write(file, waveform, SAMPLING_RATE, **compression)
        audio = {"bytes": file.getvalue(), "path": None}
        return {"audio": audio, "text": text, "digit": digit, "speaker": speaker.name}

    rng = random.Random(arguments.seed)
    tasks = [
        (speaker, text, digit, rng.getrandbits(32))
        for speaker in speakers
        for text, digit in utterances(num_takes, num_strings, rng)
    ]
    with ThreadPoolExecutor() as threads:
        dataset = Dataset.from_list(list(threads.map(row, tasks)))
    return dataset.cast_column("audio", Audio(sampling_rate=SAMPLING_RATE, decode=False))


def main() -> None:
    (arguments,) = parse_options(OptionParser(SpeechArguments, description=__doc__))
    with whole_folder(require_unused(arguments.output_dir)) as folder:
        for name, speakers, num_takes, num_strings in (
            ("train", TRAIN_SPEAKERS, arguments.train_takes, arguments.train_strings),
            ("test", TEST_SPEAKERS, arguments.test_takes, arguments.test_strings),
        ):
            dataset, file = record(speakers, num_takes, num_strings, arguments), folder / f"{name}.parquet"
            dataset.to_parquet(file)
            minutes, size = sum(map(duration, dataset["audio"])) / 60, file.stat().st_size / 1e6
            recordings = f"{name}: {len(dataset)} recordings of {len(speakers)} speakers"
            print(f"{recordings}, {minutes:.1f} minutes, {size:.2f} MB")


if __name__ == "__main__":
    run(main)
