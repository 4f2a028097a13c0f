"""Minutes of audio in one call: time and memory of full attention in two back ends, of windows, and of chunks.

    python benchmarks/long_audio.py
    python benchmarks/long_audio.py --minutes 1 5 --ways windows chunks

Each measurement is a process of its own, with a_small and random weights: neither depends on them. Memory is the most
that the process held, less what it held before the audio was made. Windows reach 5 s to either side in every layer.
Chunks are 20 s, of which 2 s on either side are for context alone, eight at a time. The eager back end holds scores of
all pairs of frames, and is left out where these alone would take more than 4 GiB.
"""

import argparse
import dataclasses
import multiprocessing
import time
from collections.abc import Callable

import torch
from processes import process_memory
from transformers.utils import logging

from lighthubert_training.data.strings import SAMPLING_RATE
from modeling_lighthubert import LightHubertConfig, LightHubertModel, SearchSpace
from modeling_lighthubert.errors import run


A_SMALL = SearchSpace.small().named["a_small"]
WINDOW = 250
"""Frames of 20 ms on each side."""


def build(window: int | None, attn_implementation: str) -> LightHubertModel:
    windows = None if window is None else (window,) * A_SMALL.num_hidden_layers
    subnet = dataclasses.replace(A_SMALL, attention_window=windows)
    config = LightHubertConfig(search_space=SearchSpace.small(), attn_implementation=attn_implementation)
    return LightHubertModel(config.cut_to(subnet)).eval()


def gibibytes_of_scores(minutes: float) -> float:
    """Size of the attention scores of one layer, in fp32."""
    return (60 * minutes * 50) ** 2 * A_SMALL.num_attention_heads[0] * 4 / 2**30


def encode_in_chunks(model: LightHubertModel, audio: torch.Tensor, chunk: int = 20, stride: int = 2) -> None:
    """Runs the model on all chunks. Choosing the frames that are kept costs nothing, and is left out."""
    length, step = chunk * SAMPLING_RATE, (chunk - 2 * stride) * SAMPLING_RATE
    pieces = [audio[:, start : start + length] for start in range(0, max(1, audio.shape[1] - step // 2), step)]
    whole = [piece for piece in pieces if piece.shape[1] == length]
    for start in range(0, len(whole), 8):
        model(torch.cat(whole[start : start + 8]))
    for piece in pieces[len(whole) :]:
        model(piece)


WAYS: dict[str, tuple[int | None, str, Callable[[LightHubertModel, torch.Tensor], object]]] = {
    "full": (None, "sdpa", lambda model, audio: model(audio)),
    "full, eager": (None, "eager", lambda model, audio: model(audio)),
    "windows": (WINDOW, "sdpa", lambda model, audio: model(audio)),
    "chunks": (None, "sdpa", encode_in_chunks),
}
"""Window and back end of the model, and how it is run."""


def measure(way: str, minutes: float, threads: int) -> tuple[float, float]:
    """Seconds that the model takes, and mebibytes that it adds."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    window, attn_implementation, encode = WAYS[way]
    model = build(window, attn_implementation)
    with torch.inference_mode():
        model(torch.randn(1, SAMPLING_RATE))
        before = process_memory("VmHWM")
        audio = torch.randn(1, int(60 * minutes * SAMPLING_RATE))
        start = time.perf_counter()
        encode(model, audio)
        return time.perf_counter() - start, process_memory("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 5, 30], help="Lengths (default: 1 5 30).")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="What to measure (default: all).")
    options = parser.parse_args()
    print("| minutes | attention | real-time factor | MiB |\n|---|---|---|---|")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as process:
        for minutes in options.minutes:
            for way in options.ways:
                scores = gibibytes_of_scores(minutes)
                if way == "full, eager" and scores > 4:
                    print(f"| {minutes:g} | {way} | | more than {scores:.0f} GiB of scores |", flush=True)
                    continue
                seconds, mebibytes = process.apply(measure, (way, minutes, torch.get_num_threads()))
                print(f"| {minutes:g} | {way} | {seconds / 60 / minutes:.4f} | {mebibytes:.0f} |", flush=True)


if __name__ == "__main__":
    run(main)
