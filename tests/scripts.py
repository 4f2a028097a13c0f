"""What tests of the training scripts share: a workshop of tiny parts, and running scripts as a user does."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import run_distillation
import soundfile
import torch
from accelerate.state import AcceleratorState
from conftest import stock_settings
from datasets import Audio, Dataset
from safetensors.torch import load_file
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor


TESTS = Path(__file__).parent
TRAINING = TESTS.parent / "training"
SPACE = {
    "hidden_size": [16, 48],
    "num_attention_heads": [4, 12],
    "ffn_ratio": [2, 4],
    "num_hidden_layers": [1, 2],
    "head_dim": 4,
}


def python(*command: object, processes: int = 1, check: bool = True) -> list[str]:
    """The command line of a Python script, on one process or several.

    Args:
        check: of several, each checks at its end that it has left their group.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    launcher += [str(TESTS / "one_of_several.py")] if check else []
    return [sys.executable, *(launcher if processes > 1 else []), *map(str, command)]


def environment() -> dict[str, str]:
    """Variables of a script that is run: off the Hub unless a test says otherwise, and on one thread."""
    return {"HF_HUB_OFFLINE": "1"} | os.environ | {"OMP_NUM_THREADS": "1"}


def finish(words: list[str], seconds: float = 1800) -> subprocess.CompletedProcess:
    """Runs a command line to its end, which has to come within `seconds`."""
    return subprocess.run(words, env=environment(), capture_output=True, text=True, check=False, timeout=seconds)


def run(*command: object, processes: int = 1) -> str:
    """Output of a Python script, on one process or several."""
    finished = finish(python(*command, processes=processes))
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-4000:]
    return finished.stdout + finished.stderr


def fails(*command: object, status: int = 2) -> str:
    """Standard error of a script that must not succeed."""
    finished = finish(python(*command))
    assert finished.returncode == status, finished.stderr[-4000:]
    return finished.stderr


def killed(function: str, call: int, *command: object, processes: int = 1) -> None:
    """Runs a script that is killed in a call of `function`, named as in `signalled.py`.

    Args:
        call: which of its calls, from 1.
    """
    signalled = (TESTS / "signalled.py", "SIGKILL", function, call)
    finished = finish(python(*signalled, *command, processes=processes, check=False), seconds=300)
    expected = -signal.SIGKILL if processes == 1 else 1  # the status of the launcher
    assert finished.returncode == expected, f"it was not killed: {finished.stderr[-4000:]}"


def start(*command: object, processes: int = 1) -> subprocess.Popen:
    """A script in the background, with a process group of its own."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    words = python(*command, processes=processes, check=False)
    return subprocess.Popen(words, env=environment(), start_new_session=True, **silent)


def wait_until(happened: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    """Waits for `happened()`, or for the end of `process`; not longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and not happened():
        assert time.monotonic() < deadline, f"it did not happen within {seconds} s"
        time.sleep(0.01)


def newest(output: Path) -> int:
    """Step of the newest checkpoint, 0 if there is none."""
    return max((int(path.name.partition("-")[2]) for path in output.glob("checkpoint-*")), default=0)


def make_workshop(folder: Path) -> None:
    """A tiny teacher, a search space, and eight recordings, in parquet and in files: a high or a low tone each."""
    torch.manual_seed(0)
    teacher = HubertModel(HubertConfig(**stock_settings(num_hidden_layers=2, feat_extract_norm="layer")))
    teacher.save_pretrained(folder / "teacher")
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder / "teacher")
    (folder / "space.json").write_text(json.dumps(SPACE))
    rows, rng = [], np.random.default_rng(0)
    for index in range(8):
        time = np.arange(6000 + 400 * index) / 16_000
        tone = np.sin(2 * np.pi * (200 if index % 2 else 1200) * time) + 0.05 * rng.standard_normal(len(time))
        file = io.BytesIO()
        soundfile.write(file, tone.astype(np.float32) * 0.5, 16_000, format="FLAC")
        (folder / "recordings").mkdir(exist_ok=True)
        (folder / "recordings" / f"{index}.flac").write_bytes(file.getvalue())
        text = "low" if index % 2 else "high"
        rows.append({"audio": {"bytes": file.getvalue(), "path": None}, "text": text})
    Dataset.from_list(rows).cast_column("audio", Audio(decode=False)).to_parquet(folder / "speech.parquet")


def distillation(workshop: Path, output: str, *options: object) -> list[object]:
    """The command, for `run`."""
    return [
        TRAINING / "run_distillation.py",
        *("--train_file", workshop / "speech.parquet", "--validation_file", workshop / "speech.parquet"),
        *("--teacher_name_or_path", workshop / "teacher", "--search_space", workshop / "space.json"),
        *(
            "--num_target_layers",
            2,
            "--output_dir",
            workshop / output,
            "--dataloader_num_workers",
            0,
            "--device",
            "cpu",
        ),
        *options,
    ]


def call(main: Callable[[], object], *command: object) -> None:
    """Runs the `main` of a script in this process, with its command line: a new process takes seconds to import."""
    AcceleratorState._reset_state(reset_partial_state=True)  # else it is still that of the run before
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", list(map(str, command)))
            main()
    finally:
        torch.set_num_threads(threads)


def distil(workshop: Path, output: str, *options: object, processes: int = 1) -> Path:
    """Distils the teacher of the workshop, and returns the folder of the student."""
    command = distillation(workshop, output, *options)
    if processes > 1:
        run(*command, processes=processes)
    else:
        call(run_distillation.main, *command)
    return workshop / output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
