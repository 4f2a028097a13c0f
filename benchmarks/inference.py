"""Inference benchmark: speed, size and memory of subnets, and of what people would use instead, against stock HuBERT
Base.

    python benchmarks/inference.py
    python benchmarks/inference.py --forms fp32 int8 --repeats 10

Forms are PyTorch's fp32, bf16, compiled, and its own 8 bits of linear layers (`torchao`, compiled, which needs `pip
install torchao`, and the older `quantize_dynamic`), and an ONNX file in fp32 and in 8 bits. What people would use
instead is measured in fp32 alone (`rivals.py`).

Weights are random: speed does not depend on them. All models of a form, and stock HuBERT Base in fp32, take turns
within each repeat, so that whatever else the machine does hits all of them, and speed-ups are medians of the ratios
within a repeat. The share of the peak is that of the machine's own matrix product, measured in the same rounds; it
counts MACs of the model, not what a back end saves or adds. Memory is what a process of its own adds while it runs the
model on 15 s of audio.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from processes import device_name, process_memory
from recordings import noise
from rivals import RIVALS
from shapes import REFERENCE, ROWS, build, gigamacs
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from lighthubert_training.runs.tables import markdown_table
from modeling_lighthubert.errors import run
from modeling_lighthubert.onnx_export import onnx_session, quantize_file, to_onnx
from modeling_lighthubert.profiling import median_ratio, time_in_turns


FORMS = ("fp32", "bf16", "compiled", "torchao", "quantize_dynamic", "onnx", "int8")
Runner = Callable[[np.ndarray], None]


def onnx_file(row: str, form: str, folder: Path) -> Path:
    return folder / row.replace(" ", "-") / ("model_int8.onnx" if form == "int8" else "model.onnx")


def mebibytes_on_disk(row: str, form: str, folder: Path) -> float:
    """Size of the weights."""
    if form in ("onnx", "int8"):
        return onnx_file(row, form, folder).stat().st_size / 2**20
    model = build(row)
    if form in ("torchao", "quantize_dynamic"):
        of_linear = sum(each.weight.numel() for each in model.modules() if isinstance(each, nn.Linear))
        return (4 * model.num_parameters() - 3 * of_linear) / 2**20
    return model.num_parameters() * (2 if form == "bf16" else 4) / 2**20


def runner(row: str, form: str, folder: Path) -> Runner:
    """Runs the model on audio (batch_size, num_samples), float32, in that form."""
    if form in ("onnx", "int8"):
        file, exact = onnx_file(row, form, folder), onnx_file(row, "onnx", folder)
        if not exact.exists():
            to_onnx(build(row), exact.parent)
        if not file.exists():
            quantize_file(exact, file)
        session = onnx_session(file)

        def run_onnx(audio: np.ndarray) -> None:
            session.run(None, {"input_values": audio, "attention_mask": np.ones(audio.shape, dtype=np.int64)})

        return run_onnx
    model = build(row)
    if form == "bf16":
        model = model.to(torch.bfloat16)
    if form == "torchao":
        torchao: Any = import_module("torchao.quantization")
        torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    if form == "quantize_dynamic":
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    dtype, call = model.dtype, RIVALS[row].call if row in RIVALS else None
    called = torch.compile(model) if form in ("compiled", "torchao") else model

    @torch.inference_mode()
    def run_torch(audio: np.ndarray) -> None:
        inputs = torch.from_numpy(audio)
        call(called, inputs) if call else called(inputs.to(dtype))

    return run_torch


def memory(row: str, form: str, folder: Path, threads: int) -> float:
    """Mebibytes that a process adds, from before the model is there to the most it held with 15 s of audio."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    if form in ("onnx", "int8"):
        import_module("onnxruntime")  # it is no part of the model
    before = process_memory("VmRSS")
    runner(row, form, folder)(noise(1, 15))
    return process_memory("VmHWM") - before


def table(form: str, rows: list[str], folder: Path, repeats: int) -> str:
    """Markdown: one line for each model in that form."""
    runners = {"reference": runner(REFERENCE, "fp32", folder)}
    one, other = torch.randn(2, 2048, 2048)
    runners["peak"] = lambda audio: torch.mm(one, other)  # the machine's, as torch reaches it
    runners |= {row: runner(row, form, folder) for row in rows}

    def times(batch_size: int, seconds: float, repeats: int) -> dict[str, list[float]]:
        audio = noise(batch_size, seconds)
        return time_in_turns({name: partial(run, audio) for name, run in runners.items()}, repeats)

    columns = [*(times(1, seconds, repeats) for seconds in (1, 5, 15)), times(8, 5, max(3, repeats // 4))]
    medians = {name: statistics.median(of_clips) for name, of_clips in columns[1].items()}  # of clips of 5 s
    peak, lines = 2048**3 / medians["peak"] / 1e9, []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as process:
        for row in rows:
            macs = gigamacs(row, 5)
            added = process.apply(memory, (row, form, folder, torch.get_num_threads()))
            cells = [f"{build(row).num_parameters() / 1e6:.1f}", f"{mebibytes_on_disk(row, form, folder):.0f}"]
            cells += [f"{macs:.2f}", f"{5 * macs / medians[row] / peak:.0%}"]
            cells += [f"{1e3 * medians[row]:.0f}", f"{medians[row] / 5:.4f}"]
            cells += [f"{median_ratio(column['reference'], column[row]):.2f}" for column in columns]
            lines.append([row, *cells, f"{added:.0f}"])
    header = [form, "parameters, M", "MiB on disk", "GMAC/s", "share of peak", "ms, 5 s", "real-time factor, 5 s"]
    header += ["1 s", "5 s", "15 s", "8 x 5 s", "MiB added"]
    note = f"{device_name(torch.device('cpu'))}; peak {2 * peak:.0f} GFLOP/s."
    return f"{markdown_table(header, lines)}\n\n{note}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="Forms to measure (default: all).")
    models = (*ROWS, *RIVALS)
    parser.add_argument("--models", nargs="+", choices=models, default=models, help="Models (default: all).")
    parser.add_argument("--repeats", type=int, default=15, help="Timed rounds (default: 15).")
    options = parser.parse_args()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="torch")  # of quantize_dynamic, that torchao takes its place
    print("Speed-ups over stock HuBERT Base in fp32 for clips of 1, 5 and 15 s, and for a batch of 8 clips of 5 s.\n")
    with tempfile.TemporaryDirectory() as scratch:
        for form in tqdm(options.forms, desc="forms"):
            rows = [row for row in options.models if row in ROWS or form == "fp32"]
            print(table(form, rows, Path(scratch), options.repeats), end="\n\n", flush=True)


if __name__ == "__main__":
    run(main)
