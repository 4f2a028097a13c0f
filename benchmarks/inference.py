"""The table a buyer reads: how fast, how large, how hungry, against stock HuBERT Base, in five forms.

    python benchmarks/inference.py
    python benchmarks/inference.py --forms fp32 int8 --repeats 10

Weights are random: speed does not depend on them. All models of a form, and stock HuBERT Base in fp32, take turns
within each repeat, so that whatever else the machine does hits all of them, and speed-ups are medians of the ratios
within a repeat. The share of the peak is that of the machine's own matrix product, measured in the same rounds; it
counts MACs of the model, not what a back end saves or adds. Memory is what a process of its own adds while it hears
15 s of audio.
"""

import argparse
import dataclasses
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import psutil
import torch
from tqdm.auto import tqdm
from transformers import HubertConfig, HubertModel
from transformers.models.hubert.modeling_hubert import HubertPreTrainedModel
from transformers.utils import logging

from modeling_lighthubert import LightHubertConfig, LightHubertModel, SearchSpace, Subnet
from modeling_lighthubert.onnx_export import to_onnx
from modeling_lighthubert.profiling import macs_per_second


SAMPLING_RATE = 16_000
FORMS = ("fp32", "bf16", "compiled", "onnx", "int8")
REFERENCE = "stock HuBERT Base"
A_SMALL = Subnet.uniform(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
SUBNETS = {
    "largest": SearchSpace.tiny_to_base().largest,
    "a_base": Subnet.uniform(hidden_size=640, num_hidden_layers=12, num_attention_heads=10, intermediate_size=2560),
    "a_small": A_SMALL,
    "smallest of the small space": SearchSpace.small().smallest,
    "a_small, half the channels": dataclasses.replace(A_SMALL, conv_dim=(256,) * 7),
    "384 wide, narrow below": Subnet.uniform(384, 10, 4, 768, conv_dim=(128, 128, 128, 256, 256, 256, 384)),
    "smallest of tiny_to_base": SearchSpace.tiny_to_base().smallest,
}
ROWS = (REFERENCE, "DistilHuBERT's shape", *SUBNETS)

Runner = Callable[[np.ndarray], None]


def build(row: str) -> HubertPreTrainedModel:
    """A model with random weights."""
    torch.manual_seed(0)
    if row == REFERENCE:
        return HubertModel(HubertConfig()).eval()
    if row == "DistilHuBERT's shape":
        return HubertModel(HubertConfig(num_hidden_layers=2)).eval()
    config = LightHubertConfig(search_space=SearchSpace.tiny_to_base()).cut_to(SUBNETS[row])
    return LightHubertModel(config).eval()


def gigamacs(row: str, seconds: float) -> float:
    """MACs for a second of audio, in clips of that length. The shape is all that counts."""
    if row in SUBNETS:
        return macs_per_second(build_empty(SUBNETS[row]), seconds=seconds) / 1e9
    layers = 12 if row == REFERENCE else 2
    return macs_per_second(build_empty(Subnet.uniform(768, layers, 12, 3072)), seconds=seconds) / 1e9


def build_empty(subnet: Subnet) -> LightHubertModel:
    with torch.device("meta"):
        return LightHubertModel(LightHubertConfig(search_space=SearchSpace.tiny_to_base()).cut_to(subnet))


def size_in_mebibytes(row: str, form: str, folder: Path) -> float:
    """Of the weights on disk."""
    if form in ("onnx", "int8"):
        return (folder / row.replace(" ", "-") / onnx_name(form)).stat().st_size / 2**20
    bits = 16 if form == "bf16" else 32
    return build(row).num_parameters() * bits / 8 / 2**20


def onnx_name(form: str) -> str:
    return "model_int8.onnx" if form == "int8" else "model.onnx"


def runner(row: str, form: str, folder: Path) -> Runner:
    """What runs the model on audio (batch_size, num_samples), float32, in that form."""
    if form in ("onnx", "int8"):
        import onnxruntime

        target = folder / row.replace(" ", "-")
        if not (target / onnx_name(form)).exists():
            to_onnx(build(row), target, quantize="int8" if form == "int8" else None)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # its threads would go on waiting busily, and take the cores from what has its turn next
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(target / onnx_name(form), options, providers=["CPUExecutionProvider"])

        def run_onnx(audio: np.ndarray) -> None:
            session.run(None, {"input_values": audio, "attention_mask": np.ones(audio.shape, dtype=np.int64)})

        return run_onnx
    model = build(row)
    if form == "bf16":
        model = model.to(torch.bfloat16)
    dtype, called = model.dtype, torch.compile(model) if form == "compiled" else model

    @torch.inference_mode()
    def run_torch(audio: np.ndarray) -> None:
        called(torch.from_numpy(audio).to(dtype))

    return run_torch


def matrix_product(size: int = 2048) -> Runner:
    """The machine's peak, as torch reaches it."""
    one, other = torch.randn(2, size, size)
    return lambda audio: torch.mm(one, other)


def alternating_times(runners: Mapping[str, Runner], audio: np.ndarray, repeats: int) -> dict[str, list[float]]:
    """Seconds of each in each repeat, after a warm-up round. The order is drawn anew in every repeat."""
    rng, times = random.Random(0), {name: [] for name in runners}
    for repeat in range(repeats + 1):
        for name in rng.sample(sorted(runners), len(runners)):
            start = time.perf_counter()
            runners[name](audio)
            if repeat:
                times[name].append(time.perf_counter() - start)
    return times


def speed_up(times: Mapping[str, list[float]], row: str) -> float:
    """How many times faster than stock HuBERT Base in fp32: the median over repeats."""
    return statistics.median(one / other for one, other in zip(times["reference"], times[row], strict=True))


def memory(row: str, form: str, folder: Path, threads: int) -> float:
    """Mebibytes that a process adds, from before the model is there to the most it held with 15 s of audio."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    if form in ("onnx", "int8"):
        import onnxruntime  # noqa: F401
    before = psutil.Process().memory_info().rss / 2**20
    runner(row, form, folder)(noise(1, 15))
    return most_memory() - before


def most_memory() -> float:
    """Mebibytes that this process held at most. `getrusage` would know what its parent held as well."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 2**10


def noise(batch_size: int, seconds: float) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch_size, int(seconds * SAMPLING_RATE)), dtype=np.float32)


def table(form: str, rows: list[str], folder: Path, repeats: int) -> str:
    """Markdown: one line for each model in that form."""
    runners = {"reference": runner(REFERENCE, "fp32", folder), "peak": matrix_product()}
    runners |= {row: runner(row, form, folder) for row in rows}
    times = {seconds: alternating_times(runners, noise(1, seconds), repeats) for seconds in (1, 5, 15)}
    batch = alternating_times(runners, noise(8, 5), max(3, repeats // 4))
    peak = 2048**3 / statistics.median(times[5]["peak"]) / 1e9
    lines = [
        f"| {form} | parameters, M | MiB on disk | GMAC/s | share of peak | 1 s | 5 s | 15 s | 8 x 5 s | MiB added |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as process:
        for row in rows:
            macs = gigamacs(row, 5)
            share = 5 * macs / statistics.median(times[5][row]) / peak
            added = process.apply(memory, (row, form, folder, torch.get_num_threads()))
            cells = [f"{build(row).num_parameters() / 1e6:.1f}", f"{size_in_mebibytes(row, form, folder):.0f}"]
            cells += [f"{macs:.2f}", f"{share:.0%}"]
            cells += [f"{speed_up(times[seconds], row):.2f}" for seconds in times]
            cells += [f"{speed_up(batch, row):.2f}", f"{added:.0f}"]
            lines.append(f"| {row} | {' | '.join(cells)} |")
    lines.append(f"\nPeak {2 * peak:.0f} GFLOP/s, {torch.get_num_threads()} threads.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="Forms to measure (default: all).")
    parser.add_argument("--models", nargs="+", choices=ROWS, default=ROWS, help="Models to measure (default: all).")
    parser.add_argument("--repeats", type=int, default=15, help="Timed rounds (default: 15).")
    options = parser.parse_args()
    logging.set_verbosity_error()
    print("Speed-ups over stock HuBERT Base in fp32 for clips of 1, 5 and 15 s, and for a batch of 8 clips of 5 s.\n")
    with tempfile.TemporaryDirectory() as scratch:
        for form in tqdm(options.forms, desc="forms"):
            print(table(form, list(options.models), Path(scratch), options.repeats), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
