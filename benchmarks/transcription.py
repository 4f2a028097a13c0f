"""An hour of speech: chunks against utterances, memory, speed; and what the live mode holds after every minute.

    python benchmarks/transcription.py
    python benchmarks/transcription.py --train_file digits-train.parquet --test_file digits-test.parquet

Single words are joined to utterances of one speaker. For training they have 1 to 24 words, because a chunk is up to
20 s long: a model that has heard nothing but short clips is worse on long ones. The middle subnet of a distilled
supernet is fine-tuned on them, unless `--model` is given. The hour is made of held-out words, in utterances of 1 to 12
of speakers who take turns of a minute, so its text is known. It is transcribed three times: utterance by utterance, in
chunks, and live, second by second. Memory is the most that the process held, over what it held before.
"""

import argparse
import itertools
import random
import resource
import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil
import torch
from asr import ROOT, SPACE, prepare_process, run_script
from datasets import Audio, Dataset, load_dataset
from run_demo import SAMPLING_RATE, join_words, middle_subnet

from lighthubert_training.data.sources import load_waveform
from lighthubert_training.decoding import text_of
from lighthubert_training.error_rates import CharacterErrorRate, WordErrorRate
from lighthubert_training.recognition.live import LiveTranscriber
from lighthubert_training.recognition.recognizer import Recognizer
from modeling_lighthubert import SearchSpace


PAUSE = (0.05, 0.6)
"""Seconds behind each word, at least and at most."""


def single_words(file: str) -> Dataset:
    rows = load_dataset("parquet", data_files=file, split="train").cast_column("audio", Audio(decode=False))
    return rows.filter(lambda text: len(text.split()) == 1, input_columns="text")


def fine_tune(train_file: str, output: Path, steps: int) -> Path:
    """Distils a supernet, and fine-tunes its middle subnet on strings of all lengths up to that of a chunk."""
    output.mkdir(parents=True, exist_ok=True)
    supernet, folder, strings = output / "supernet", output / "model", output / "strings.parquet"
    join_words(single_words(train_file), 1000, random.Random(0), num_words=(1, 24), pause=PAUSE).to_parquet(strings)
    run_script("run_distillation", "small_budget", supernet, 0, 300, train_file=train_file, dataloader_num_workers=0)
    subnet = output / "middle.json"
    middle_subnet(SearchSpace.from_json_file(SPACE)).to_json_file(subnet)
    data = {"train_file": strings, "validation_file": strings, "max_eval_samples": 10}
    batches = {"per_device_train_batch_size": 16, "per_device_train_batch_seconds": 30.0}
    start = {"model_name_or_path": supernet, "subnet": subnet}
    run_script("run_speech_recognition_ctc", "ctc_small_budget", folder, 0, steps, **start, **data, **batches)
    return folder


def make_recording(file: str, minutes: float) -> tuple[list[np.ndarray], list[str]]:
    """Utterances of speakers who take turns of a minute, until there are `minutes` of them, and their texts."""
    strings = join_words(single_words(file), int(20 * minutes), random.Random(1), num_words=(1, 12), pause=PAUSE)
    by_speaker = defaultdict(list)
    for row in strings:
        by_speaker[row["speaker"]].append((load_waveform(row["audio"], SAMPLING_RATE), row["text"]))
    utterances, texts, heard = [], [], 0.0
    turns = itertools.cycle(sorted(by_speaker))
    for minute in range(1, int(minutes) + 1):
        speaker = next(turns)
        while heard < 60 * minute:
            waveform, text = by_speaker[speaker].pop()
            utterances.append(waveform)
            texts.append(text)
            heard += len(waveform) / SAMPLING_RATE
    return utterances, texts


def mebibytes_now() -> float:
    return psutil.Process().memory_info().rss / 2**20


def mebibytes_at_most() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # kibibytes on Linux


def report(name: str, text: str, reference: str, seconds: float, audio_seconds: float) -> None:
    errors = {"predictions": [text], "references": [reference]}
    wer, cer = WordErrorRate().compute(**errors)["wer"], CharacterErrorRate().compute(**errors)["cer"]
    print(f"| {name} | {wer:.2%} | {cer:.2%} | {seconds / audio_seconds:.4f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", default=str(ROOT / "demo/speech/train.parquet"), help="Words to train on.")
    parser.add_argument("--test_file", default=str(ROOT / "demo/speech/test.parquet"), help="Words of the recording.")
    parser.add_argument("--model", help="Folder of a fine-tuned model. Default: one is made.")
    parser.add_argument("--steps", type=int, default=600, help="Steps of its fine-tuning (default: 600).")
    parser.add_argument("--minutes", type=int, default=60, help="Length of the recording (default: 60).")
    parser.add_argument(
        "--output_dir", default=str(ROOT / "benchmarks/output/transcription"), help="Folder for what is made."
    )
    options = parser.parse_args()
    prepare_process()
    train_file, test_file, output = (
        str(Path(path).resolve()) for path in (options.train_file, options.test_file, options.output_dir)
    )
    model = options.model or fine_tune(train_file, Path(output), options.steps)
    utterances, texts = make_recording(test_file, options.minutes)
    reference, recording = " ".join(texts), np.concatenate(utterances)
    audio_seconds = len(recording) / SAMPLING_RATE
    recognizer = Recognizer.from_pretrained(model)
    print(f"{audio_seconds / 60:.1f} minutes, {len(reference.split())} words, {torch.get_num_threads()} threads\n")
    print("| | WER | CER | real-time factor |")
    print("|---|---|---|---|")
    recognizer.transcribe(utterances[:8])  # what the first pass allocates for good is not what an hour adds

    start, before = time.perf_counter(), mebibytes_now()
    chunked = recognizer.transcribe([recording])[0].text
    report("in chunks", chunked, reference, time.perf_counter() - start, audio_seconds)
    grown = mebibytes_at_most() - before

    start = time.perf_counter()
    spoken = " ".join(transcript.text for transcript in recognizer.transcribe(utterances))
    report("by utterances", spoken, reference, time.perf_counter() - start, audio_seconds)

    live, words, held = LiveTranscriber(recognizer), [], []
    start = time.perf_counter()
    for second in range(0, len(recording), SAMPLING_RATE):
        for event in live.feed(recording[second : second + SAMPLING_RATE]):
            words += event.words if event.is_final else []
        if (second // SAMPLING_RATE) % 60 == 59:
            held.append(mebibytes_now())
    words += [word for event in live.finish() if event.is_final for word in event.words]
    report("live", text_of(words), reference, time.perf_counter() - start, audio_seconds)
    print(f"\nin chunks: {grown:.0f} MiB above the model and the recording ({recording.nbytes / 2**20:.0f} MiB)")
    print(f"live: {held[0]:.0f} MiB after the first minute, {held[-1]:.0f} after the last; at most {max(held):.0f},")
    print(f"      in the mean of the first and the last ten {statistics.mean(held[:10]):.0f} and", end=" ")
    print(f"{statistics.mean(held[-10:]):.0f}; minutes: {' '.join(f'{value:.0f}' for value in held)}")


if __name__ == "__main__":
    main()
