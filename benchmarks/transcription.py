"""An hour of speech: chunks against utterances, memory, speed; and what the live mode holds after every minute.

    python benchmarks/transcription.py --model benchmarks/output/asr/all/middle-alone-0
    python benchmarks/transcription.py --model ... --test_file digits-test.parquet --pause 0.25

The recording is made of the test recordings, in random order with pauses between them, so its text is known. It is
transcribed three times: utterance by utterance, in chunks, and live, second by second. Memory is the most that the
process held, over what it held before the model heard anything.
"""

import argparse
import random
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from datasets import Audio, load_dataset


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "training")]

from ctc_decoding import text_of  # noqa: E402
from live_transcription import LiveTranscriber  # noqa: E402
from metrics import CharacterErrorRate, WordErrorRate  # noqa: E402
from recognizer import Recognizer  # noqa: E402
from speech_data import load_waveform  # noqa: E402


SAMPLING_RATE = 16_000


def make_recording(file: str, minutes: float, pause: float) -> tuple[list[np.ndarray], list[str]]:
    """Utterances, each with silence behind it, until there are `minutes` of them, and their texts."""
    rows = load_dataset("parquet", data_files=file, split="train").cast_column("audio", Audio(decode=False))
    waveforms = [load_waveform(audio, SAMPLING_RATE) for audio in rows["audio"]]
    rng, chosen, length = random.Random(0), [], 0
    while length < 60 * minutes * SAMPLING_RATE:
        chosen.append(rng.randrange(len(waveforms)))
        length += len(waveforms[chosen[-1]]) + int(pause * SAMPLING_RATE)
    silence = np.zeros(int(pause * SAMPLING_RATE), dtype=np.float32)
    return [np.concatenate([waveforms[index], silence]) for index in chosen], [rows["text"][index] for index in chosen]


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
    parser.add_argument("--model", required=True, help="Folder of a fine-tuned model.")
    parser.add_argument("--test_file", default=str(ROOT / "demo/speech/test.parquet"), help="Recordings to join.")
    parser.add_argument("--minutes", type=float, default=60.0, help="Length of the recording (default: 60).")
    parser.add_argument("--pause", type=float, default=0.3, help="Seconds between recordings (default: 0.3).")
    options = parser.parse_args()
    utterances, texts = make_recording(options.test_file, options.minutes, options.pause)
    reference, recording = " ".join(texts), np.concatenate(utterances)
    audio_seconds = len(recording) / SAMPLING_RATE
    recognizer = Recognizer.from_pretrained(options.model)
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
