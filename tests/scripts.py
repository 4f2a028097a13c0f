"""What tests of the training scripts share: a workshop of tiny parts, and running scripts as a user does."""

import io
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import psutil
import pytest
import run_distillation
import soundfile
import torch
from accelerate.state import AcceleratorState
from conftest import stock_settings
from datasets import Audio, Dataset
from forked import run_forked
from safetensors.torch import load_file
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from lighthubert_training.runs.distributed import locked


TESTS = Path(__file__).parent
TRAINING = TESTS.parent / "training"
SPACE = {
    "hidden_size": [16, 48],
    "num_attention_heads": [4, 12],
    "ffn_ratio": [2, 4],
    "num_hidden_layers": [1, 2],
    "head_dim": 4,
}


PRELOADED = [
    "accelerate",
    "datasets",
    "matplotlib.backends.backend_agg",
    "torch.utils.tensorboard",
    "transformers.models.hubert.modeling_hubert",
    "transformers.models.wav2vec2.processing_wav2vec2",
    "lighthubert_training.cards.speech_recognition",
    "lighthubert_training.cards.supernet",
    "lighthubert_training.distillation.loop",
    "lighthubert_training.recognition.recognizer",
    "lighthubert_training.recognition.trainer",
    "lighthubert_training.runs.plots",
    "lighthubert_training.search.report",
    "lighthubert_training.superb.scoring",
]
"""What the scripts import. A new interpreter takes five seconds for it, and the fork of a process that has it none."""


def environment() -> dict[str, str]:
    """Variables of a script that is run: off the Hub unless a test says otherwise, and on one thread."""
    return {"HF_HUB_OFFLINE": "1"} | os.environ | {"OMP_NUM_THREADS": "1"}


@cache
def fork_context() -> ForkServerContext:
    """Makes processes by forking one that has imported `PRELOADED`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():  # some are read at import
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(*command: object, processes: int = 1, folder: Path | None = None) -> list[ForkServerProcess]:
    """A script in the background, in one process, or in several that `torch.distributed` may join.

    Args:
        folder: for the files `stdout` and `stderr`. Default: nothing that it writes is kept.
    """
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": processes}
    group |= {"LOCAL_WORLD_SIZE": processes}
    output = {number: str(folder / name) if folder else os.devnull for number, name in ((1, "stdout"), (2, "stderr"))}
    members = []
    for rank in range(processes):
        variables = group | {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
        variables = environment() | {name: str(value) for name, value in variables.items()}
        arguments = (list(map(str, command)), variables, output)
        members.append(fork_context().Process(target=run_forked, args=arguments))
        members[-1].start()
    return members


def finish(*command: object, processes: int = 1, seconds: float = 300) -> subprocess.CompletedProcess:
    """Runs a script to its end, which has to come within `seconds`: if a process fails, the others are terminated."""
    with tempfile.TemporaryDirectory() as folder:
        members, deadline = start(*command, processes=processes, folder=Path(folder)), time.monotonic() + seconds
        while running := [member.sentinel for member in members if member.exitcode is None]:
            ended = multiprocessing.connection.wait(running, deadline - time.monotonic())
            for member in members:
                if not ended:
                    member.kill()
                elif any(other.exitcode for other in members):
                    member.terminate()
            assert ended, f"{command[0]} did not end within {seconds} s"
        status = next((member.exitcode for member in members if member.exitcode), 0)
        output = [(Path(folder) / name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(command, status, *output)


def finish_as_a_user(*command: object, processes: int = 1, seconds: float = 300) -> subprocess.CompletedProcess:
    """The same from a command line: in new interpreters, which read their environment at import."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words = [sys.executable, *(launcher if processes > 1 else []), *map(str, command)]
    return subprocess.run(words, env=environment(), capture_output=True, text=True, check=False, timeout=seconds)


def run(*command: object, processes: int = 1, finish: Callable[..., subprocess.CompletedProcess] = finish) -> str:
    """Output of a script that has to succeed."""
    finished = finish(*command, processes=processes)
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-4000:]
    return finished.stdout + finished.stderr


def fails(*command: object, status: int = 2, finish: Callable[..., subprocess.CompletedProcess] = finish) -> str:
    """Standard error of a script that must not succeed."""
    finished = finish(*command)
    assert finished.returncode == status, finished.stderr[-4000:]
    return finished.stderr


def killed(function: str, call: int, *command: object, processes: int = 1) -> None:
    """Runs a script that is killed in a call of `function`, named as in `signalled.py`.

    Args:
        call: which of its calls, from 1.
    """
    finished = finish(TESTS / "signalled.py", "SIGKILL", function, call, *command, processes=processes)
    assert finished.returncode == -signal.SIGKILL, f"it was not killed: {finished.stderr[-4000:]}"


def _hold(folder: Path, name: str, is_held: Event, may_end: Event) -> None:
    with locked(folder, name):
        if not os.fork():  # a worker, which outlives a kill for a moment
            time.sleep(3)
            os._exit(0)
        is_held.set()
        may_end.wait(60)


@contextmanager
def held(folder: Path, name: str = "") -> Iterator[int]:
    """Inside the block, another process has the lock of `folder`, or of the file `name` in it. It is killed at the
    end.

    Yields:
        Its id.
    """
    context = multiprocessing.get_context("fork")
    is_held, may_end = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(folder, name, is_held, may_end))
    other.start()
    assert is_held.wait(30)
    yield other.pid
    other.kill()
    psutil.Process(other.pid).wait(2)


def wait_until(happened: Callable[[], bool], process: ForkServerProcess, seconds: float = 120) -> None:
    """Waits for `happened()`, or for the end of `process`; not longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while process.is_alive() and not happened():
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
