"""An hour of speech: chunks against utterances, memory, speed; and what the live mode holds after every minute.

    python benchmarks/transcription.py
    python benchmarks/transcription.py --train_file digits-train.parquet --test_file digits-test.parquet

Single words are joined to utterances of one speaker. For training they have 1 to 24 words, because a chunk is up to
20 s long: a model that was trained on nothing but short clips is worse on long ones. The middle subnet of a distilled
supernet is fine-tuned on them, unless `--model` is given. The hour is made of held-out words, in utterances of 1 to 12
of speakers who take turns of a minute, so its text is known. It is transcribed three times: utterance by utterance, in
chunks, and live, second by second. Memory is the most that the process held, over what it held before.
"""

import itertools
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from processes import ROOT, SpeechArguments, parse, process_memory, run_script

from lighthubert_training.data.audio import load_waveform
from lighthubert_training.data.strings import SAMPLING_RATE, join_words, read_parquet
from lighthubert_training.decoding import text_of
from lighthubert_training.error_rates import character_error_rate, word_error_rate
from lighthubert_training.recognition.live import LiveTranscriber
from lighthubert_training.recognition.recognizer import Recognizer
from lighthubert_training.runs.options import option
from modeling_lighthubert.errors import run


PAUSE = (0.05, 0.6)
"""Seconds behind each word, at least and at most."""


@dataclass
class TranscriptionArguments(SpeechArguments):
    """What is transcribed, and with which model."""

    model: str | None = option(None, "Folder of a fine-tuned model. Default: one is made.")
    steps: int = option(600, "Steps of its fine-tuning.")
    minutes: int = option(60, "Length of the recording.")
    output_dir: str = option(str(ROOT / "benchmarks/output/transcription"), "Folder for what is made.")


def single_words(file: str) -> Dataset:
    return read_parquet(file).filter(lambda text: len(text.split()) == 1, input_columns="text")


def fine_tune(train_file: str, output: Path, steps: int) -> Path:
    """Distils a supernet, and fine-tunes its middle subnet on strings of all lengths up to that of a chunk."""
    output.mkdir(parents=True, exist_ok=True)
    supernet, folder, strings = output / "supernet", output / "model", output / "strings.parquet"
    join_words(single_words(train_file), 1000, random.Random(0), num_words=(1, 24), pause=PAUSE).to_parquet(strings)
    shared = {"seed": 0, "report_to": "none", "resume_from_checkpoint": "latest"}
    run_script(
        "training/run_distillation.py", config="small_budget", train_file=Path(train_file).resolve(), max_steps=300,
        dataloader_num_workers=0, output_dir=supernet, **shared,
    )  # fmt: skip
    run_script(
        "training/run_speech_recognition_ctc.py", config="ctc_small_budget", model_name_or_path=supernet,
        subnet="middle", train_file=strings, validation_file=strings, max_eval_samples=10, max_steps=steps,
        per_device_train_batch_size=16, per_device_train_batch_seconds=30.0, output_dir=folder, **shared,
    )  # fmt: skip
    return folder


def make_recording(file: str, minutes: int) -> tuple[list[np.ndarray], list[str]]:
    """Utterances of speakers who take turns of a minute, until there are `minutes` of them, and their texts."""
    strings = join_words(single_words(file), max(200, 20 * minutes), random.Random(1), num_words=(1, 12), pause=PAUSE)
    by_speaker = defaultdict(list)
    for row in strings:
        by_speaker[row["speaker"]].append((load_waveform(row["audio"], SAMPLING_RATE), row["text"]))
    utterances, texts, seconds = [], [], 0.0
    for minute, speaker in zip(range(1, minutes + 1), itertools.cycle(sorted(by_speaker))):
        while seconds < 60 * minute:
            waveform, text = by_speaker[speaker].pop()
            utterances.append(waveform)
            texts.append(text)
            seconds += len(waveform) / SAMPLING_RATE
    return utterances, texts


def transcribe_live(recognizer: Recognizer, recording: np.ndarray) -> tuple[str, list[float]]:
    """The text, and the mebibytes that the process holds after every minute."""
    live, words, held = LiveTranscriber(recognizer), [], []
    for second in range(0, len(recording), SAMPLING_RATE):
        for event in live.feed(recording[second : second + SAMPLING_RATE]):
            words += event.words if event.is_final else []
        if (second // SAMPLING_RATE) % 60 == 59:
            held.append(process_memory("VmRSS"))
    words += [word for event in live.finish() if event.is_final for word in event.words]
    return text_of(words), held


def compare(recognizer: Recognizer, utterances: Sequence[np.ndarray], reference: str) -> None:
    """Prints error rates, speed and memory of all three ways."""
    recording = np.concatenate(utterances)
    audio_seconds = len(recording) / SAMPLING_RATE
    print(f"{audio_seconds / 60:.1f} minutes, {len(reference.split())} words, {torch.get_num_threads()} threads\n")
    print("| | WER | CER | real-time factor |\n|---|---|---|---|")

    def report(name: str, text: str, start: float) -> None:
        rate = (time.perf_counter() - start) / audio_seconds
        wer, cer = word_error_rate([reference], [text]), character_error_rate([reference], [text])
        print(f"| {name} | {wer:.2%} | {cer:.2%} | {rate:.4f} |", flush=True)

    recognizer.transcribe(utterances[:8])  # what the first pass allocates for good is not what an hour adds
    start, before = time.perf_counter(), process_memory("VmRSS")
    report("in chunks", recognizer.transcribe([recording])[0].text, start)
    grown, start = process_memory("VmHWM") - before, time.perf_counter()
    report("by utterances", " ".join(transcript.text for transcript in recognizer.transcribe(utterances)), start)
    start = time.perf_counter()
    text, held = transcribe_live(recognizer, recording)
    report("live", text, start)
    print(f"\nin chunks: {grown:.0f} MiB above the model and the recording ({recording.nbytes / 2**20:.0f} MiB)")
    print(f"live: {held[0]:.0f} MiB after the first minute, {held[-1]:.0f} after the last; at most {max(held):.0f},")
    first, last = statistics.mean(held[:10]), statistics.mean(held[-10:])
    print(f"      in the mean of the first and the last ten {first:.0f} and {last:.0f}; minutes:", *map(round, held))


def main() -> None:
    arguments = parse(TranscriptionArguments, __doc__)
    output = Path(arguments.output_dir).resolve()
    model = arguments.model or fine_tune(arguments.train_file, output, arguments.steps)
    utterances, texts = make_recording(arguments.test_file, arguments.minutes)
    compare(Recognizer.from_pretrained(model), utterances, " ".join(texts))


if __name__ == "__main__":
    run(main)
