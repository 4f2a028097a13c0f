"""Whole runs of distillation at the paper's size: do they end, and do they go on after a kill.

    python benchmarks/full_runs.py
    python benchmarks/full_runs.py --device cuda --batch_seconds 350 --kinds plain accumulated

`lighthubert distill` runs the recipes of stage 2 for ten steps with a teacher of the shape of HuBERT Base, which has
random weights, and audio of LibriSpeech's lengths, in fp32 and bf16, with one batch and two in a step, and with two
processes. Another run is killed while it writes its second checkpoint and gone on with: its weights must be those of
the first, bit by bit. Memory is the most that a process held, on a GPU what torch's allocator counts at most. A result
that is in the file is kept: the command goes on where it ended.
"""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Audio, Dataset
from processes import ROOT, device_name, process_memory
from recordings import librispeech_like
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor
from transformers.utils import logging

from lighthubert_training.data.strings import encode_flac
from lighthubert_training.runs.checkpoints import UNFINISHED
from lighthubert_training.runs.distributed import DEVICE_HELP, choose_device
from lighthubert_training.runs.options import OptionParser, option, parse_options
from lighthubert_training.runs.tables import markdown_table
from modeling_lighthubert.errors import run
from modeling_lighthubert.files import write_json


NUM_RECORDINGS = 200
RECIPES = ("stage2_small", "stage2_base")
KINDS = ("plain", "accumulated", "two processes")
SAVE_STEPS = 3


@dataclass
class FullRunsArguments:
    """Which runs are made, and how large."""

    device: str | None = option(None, DEVICE_HELP)
    recipes: list[str] = option(list(RECIPES), "Recipes of distillation.", choices=RECIPES)
    precisions: list[str] = option(["no", "bf16"], "Values of --mixed_precision.", choices=("no", "bf16"))
    kinds: list[str] = option(list(KINDS), "Kinds of run.", choices=KINDS)
    batch_seconds: float = option(87.5, "Seconds of a batch.")
    steps: int = option(10, "Steps of a run.")
    killed: bool = option(True, "Whether a run is killed and gone on with, too.")
    output_dir: str = option(str(ROOT / "benchmarks/output/full_runs"), "Folder of the runs.")
    results_file: str = option(str(ROOT / "benchmarks/results/full_runs.json"), "JSON file of results.")


def make_teacher(folder: Path) -> None:
    """A HuBERT of the shape of HuBERT Base."""
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        HubertModel(HubertConfig()).save_pretrained(folder)
        Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)


def make_speech(file: Path) -> None:
    if not file.exists():
        rows = [{"audio": encode_flac(audio)} for audio in librispeech_like(NUM_RECORDINGS)]
        Dataset.from_list(rows).cast_column("audio", Audio(decode=False)).to_parquet(str(file))


class Runs:
    """Runs of the script, in a folder."""

    def __init__(self, options: FullRunsArguments):
        self.options, self.folder = options, Path(options.output_dir).resolve()
        self.device = torch.device(choose_device(options.device))
        self.folder.mkdir(parents=True, exist_ok=True)
        make_teacher(self.folder / "teacher")
        make_speech(self.folder / "speech.parquet")

    def words(self, recipe: str, precision: str, kind: str) -> list[str]:
        """Options of the script for a run."""
        return [
            f"--config={recipe}",
            f"--teacher_name_or_path={self.folder / 'teacher'}",
            f"--teacher_dtype={'float32' if precision == 'no' else 'bfloat16'}",
            "--student_name_or_path=none",
            "--dataset_name=none",
            f"--train_file={self.folder / 'speech.parquet'}",
            f"--mixed_precision={precision}",
            f"--per_device_train_batch_seconds={self.options.batch_seconds}",
            f"--gradient_accumulation_steps={2 if kind == 'accumulated' else 1}",
            f"--max_steps={self.options.steps}",
            f"--save_steps={SAVE_STEPS}",
            "--save_total_limit=1",
            "--logging_steps=1",
            "--report_to=none",
            "--dataloader_num_workers=2",
            f"--device={self.device.type}",
        ]

    def run(self, words: list[str], output: Path, processes: int, kill: bool = False) -> float:
        """Runs the script, until it ends or, if it is to be killed, until it writes its second checkpoint.

        Returns:
            Mebibytes that a process held at most.

        Raises:
            RuntimeError: the script failed.
        """
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [str(ROOT / "training/run_distillation.py"), *words, f"--output_dir={output}"]
        unfinished, most = output / f"{UNFINISHED}{2 * SAVE_STEPS}", 0.0
        threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes))}
        with (
            output.with_suffix(".log").open("ab") as log,
            subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | threads) as made,
        ):
            while made.poll() is None:
                most = max(most, *(held_at_most(each) for each in family(made.pid)))
                if kill and unfinished.exists():
                    for each in family(made.pid):
                        with contextlib.suppress(psutil.Error):
                            each.kill()
                time.sleep(0.2)
        if made.returncode and not kill:
            raise RuntimeError(f"a run failed: see {output.with_suffix('.log')}")
        return most

    def measure(self, recipe: str, precision: str, kind: str) -> dict[str, Any]:
        """Figures of a run, and whether another one that was killed had the same weights in the end."""
        words, processes = self.words(recipe, precision, kind), 2 if kind == "two processes" else 1
        whole, killed = (self.folder / name for name in ("whole", "killed"))
        for folder in (whole, killed):
            shutil.rmtree(folder, ignore_errors=True)
        most = self.run(words, whole, processes)
        history = json.loads((whole / "history.json").read_text(encoding="utf-8"))
        speeds = sorted(entry["audio_seconds_per_second"] for entry in history if "loss" in entry)
        found = {
            "device": device_name(self.device),
            "torch": torch.__version__,
            "batch_seconds": self.options.batch_seconds,
            "losses": [round(entry["loss"], 4) for entry in history if "loss" in entry],
            "audio_seconds_per_second": round(speeds[len(speeds) // 2], 2),
        }
        if self.device.type == "cuda":
            found["gb"] = round(max(entry["memory_gib"] for entry in history if "loss" in entry) * 2**30 / 1e9, 2)
        else:
            found["gb"] = round(most * 2**20 / 1e9, 2)
        if self.options.killed:
            self.run(words, killed, processes, kill=True)
            if not (killed / f"{UNFINISHED}{2 * SAVE_STEPS}").exists():
                raise RuntimeError("the run was not killed while it wrote a checkpoint: try again")
            self.run([*words, "--resume_from_checkpoint=latest"], killed, processes)
            one, other = (load_file(folder / "model.safetensors") for folder in (whole, killed))
            found["same_weights"] = all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())
        return found


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it has begun."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def held_at_most(process: psutil.Process) -> float:
    """Mebibytes, 0 of a process that has ended."""
    with contextlib.suppress(OSError, KeyError):  # it has ended, or is about to
        return process_memory("VmHWM", process.pid)
    return 0.0


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a line for each run."""
    lines = []
    for name, found in results.items():
        resumed = {True: "yes", False: "no", None: ""}[found.get("same_weights")]
        cells = [f"{found['audio_seconds_per_second']:.3g}", f"{found['gb']:.2f}", resumed]
        lines.append([name, found["device"], f"{found['batch_seconds']:g} s", *cells])
    header = ["run", "device", "batch", "s of audio a second", "GB", "same weights after a kill"]
    return markdown_table(header, lines)


def main() -> None:
    (options,) = parse_options(OptionParser(FullRunsArguments, description=__doc__))
    logging.set_verbosity_error()
    runs, file = Runs(options), Path(options.results_file)
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    names = list(itertools.product(options.recipes, options.precisions, options.kinds))
    for recipe, precision, kind in tqdm(names, desc="runs"):
        name = f"{recipe}, {precision.replace('no', 'fp32')}, {kind}, {runs.device.type}"
        if name not in results or (options.killed and "same_weights" not in results[name]):
            results[name] = runs.measure(recipe, precision, kind)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, results)
    print(table(results))


if __name__ == "__main__":
    run(main)
