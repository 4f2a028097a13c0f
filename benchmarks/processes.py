"""The process of a benchmark, and the scripts that it runs in others."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import cpuinfo
import torch
from datasets import disable_progress_bars
from transformers.utils import logging

from lighthubert_training.runs.options import OptionParser, option, parse_options
from modeling_lighthubert.errors import UserError


T = TypeVar("T")
INSTRUCTIONS = {
    **{"AVX2": "avx2", "AVX-512": "avx512f", "VNNI": "avx512_vnni", "VNNI (AVX)": "avx_vnni"},
    **{"bf16": "avx512_bf16", "AMX": "amx_tile"},
}
"""Instruction sets of x86-64 that multiply matrices, and the flags of processors that have them."""
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class SpeechArguments:
    """Recordings of single words, or strings of them."""

    train_file: str = option(str(ROOT / "demo/speech/train.parquet"), "Parquet file to train on.")
    test_file: str = option(str(ROOT / "demo/speech/test.parquet"), "Parquet file to test on.")


def parse(kind: type, description: str | None) -> Any:
    """Options of a benchmark, as `kind`; this process computes with one thread."""
    prepare_process()
    return parse_options(OptionParser(kind, description=description))[0]


def prepare_process() -> None:
    """One thread, and no messages of libraries between the results."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()


def in_process_of_its_own(function: Callable[..., T], *arguments: Any) -> T:
    """What `function` returns, called in a new process: what it holds is free afterwards, and what libraries keep for
    a process, as Accelerate its device and its precision, is not there before."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=logging.set_verbosity_error) as process:
        return process.submit(function, *arguments).result()


def run_script(script: str, **options: Any) -> None:
    """Runs `script` from the top folder, with one thread and its options that are not `None`; a list is several words.
    Its output is added to `run.log` in its `output_dir`.

    Raises:
        UserError: the script says that an option is wrong.
        RuntimeError: it failed otherwise.
    """
    words = []
    for name, value in options.items():
        if isinstance(value, list | tuple):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")
    command, environment = [sys.executable, str(ROOT / script), *words], os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode == 2:
        raise UserError(finished.stderr.splitlines()[-1].removeprefix("error: "))
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{finished.stderr[-3000:]}")
    with (Path(options["output_dir"]) / "run.log").open("a", encoding="utf-8") as log:
        log.write(finished.stdout + finished.stderr)


def process_memory(kind: str, pid: int | str = "self") -> float:
    """Mebibytes that a process, by default this one, holds (`VmRSS`), or held at most (`VmHWM`), on Linux. `getrusage`
    would count what its parent held as well."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status[kind].split()[0]) / 2**10


def synchronizer(device: torch.device) -> Callable[[], None] | None:
    """Waits for the device, if there is anything to wait for."""
    return torch.cuda.synchronize if device.type == "cuda" else None


def device_name(device: torch.device) -> str:
    """What its maker calls it; of a CPU also the number of threads, and the instructions that multiply matrices."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = cpuinfo.get_cpu_info()
    flags = set(found.get("flags", ()))
    sets = [name for name, flag in INSTRUCTIONS.items() if flag in flags]
    return ", ".join([found.get("brand_raw", "CPU"), f"{torch.get_num_threads()} threads", *sets])


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors that `run` holds at most above what is held before it. It is run twice, on a CPU slowly."""
    run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    memory = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = (event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes))
