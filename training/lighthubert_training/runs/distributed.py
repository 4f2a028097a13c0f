"""Devices and processes: one accelerator for every script, what the processes of a run do together, and what keeps
two runs apart."""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list, patch_environment

from modeling_lighthubert.errors import UserError
from modeling_lighthubert.loading import parse_device


logger = logging.getLogger(__name__)
T = TypeVar("T")
DEVICE_HELP = "Device to run on, such as cpu or cuda:1. Default: a GPU if there is one."


def build_accelerator(device: str | None = None, **options: Any) -> Accelerator:
    """Accelerate's `Accelerator` on `device`. Without a number, such as `cuda`, every process takes its own.

    Args:
        device: default: Accelerate's choice, a GPU for each process if there are any.
        options: of `Accelerator`.

    Raises:
        UserError: there is no such device.
    """
    if device == "cpu":
        hide_gpus_from_processes()
    numbered = {"ACCELERATE_TORCH_DEVICE": str(parse_device(device))} if device and ":" in device else {}
    with patch_environment(**numbered):
        accelerator = Accelerator(cpu=device == "cpu", **options)
    if device and accelerator.device.type != device.partition(":")[0]:
        raise UserError(f"--device {device} cannot be used: what there is is {accelerator.device.type}")
    return accelerator


def hide_gpus_from_processes() -> None:
    """Several processes on CPUs see no GPU from here on. At a barrier, Accelerate 1.15 names the GPU with the number
    of the process, if the machine has any, and fails where there are fewer of them than processes."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def choose_device(device: str | None = None) -> str:
    """The device of a script of one process: `device`, by default a GPU if there is one.

    Raises:
        UserError: there is no such device.
    """
    return str(parse_device(device)) if device else "cuda" if torch.cuda.is_available() else "cpu"


def require_whole_weights(accelerator: Accelerator) -> None:
    """Raises a `UserError` where processes keep parts of the weights: subnets take theirs out of whole ones."""
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UserError("weights have to be whole on every process: use data parallelism, not FSDP or DeepSpeed")


@cache
def _group_of_cpus() -> Any:
    """Of all processes: what they say to each other there waits for no GPU."""
    return torch.distributed.new_group(backend="gloo")


def sum_over_processes(counts: Sequence[int]) -> list[int]:
    """Sums of what each process counted. All processes call it, with as many counts."""
    if PartialState().num_processes == 1:
        return list(counts)
    sums = torch.tensor(counts)
    torch.distributed.all_reduce(sums, group=_group_of_cpus())
    return sums.tolist()


def any_process(flag: bool) -> bool:
    """Whether `flag` is set on any process. All processes call it."""
    return sum_over_processes([int(flag)]) != [0]


def on_main_process(function: Callable[[], T]) -> T:
    """What `function` returns on the main process, which alone calls it, to all processes. All of them call this.

    Raises:
        UserError: of `function`, on all processes.
    """
    outcome: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            outcome = [function()]
        except UserError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


@contextmanager
def locked(folder: Path, name: str = "") -> Iterator[None]:
    """Inside the block, no other process is inside one of the same `folder`, which is made, or of the file `name` in
    it. The lock ends with its process, however that ends.

    Raises:
        UserError: another process is inside; the message names it. Or the folder cannot be written.
    """
    path = folder / f".{name}.lock" if name else folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _lock(path)
    except BlockingIOError as error:
        raise UserError(
            f"{folder / name} is being written by {error}: wait until it has ended, or choose another output"
        ) from None
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}") from error
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock(path: Path) -> TextIO:
    """The file, made and locked; a `BlockingIOError` names the process that has the lock."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forked workers would inherit, and keep, a flock
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                with file:
                    file.seek(0)
                    raise BlockingIOError(file.read() or "another process") from None
            logger.warning(f"{path} cannot be locked ({error}): see to it that no other run writes there")
            return file
        if path.exists() and os.path.samefile(path, file.fileno()):
            return file
        file.close()  # the process that had the lock has deleted it since


@contextmanager
def locked_by_main_process(folder: Path) -> Iterator[None]:
    """`locked(folder)` by the main process, for all processes. All of them call it."""
    with ExitStack() as stack:
        on_main_process(lambda: stack.enter_context(locked(folder)))
        yield


def sum_gradients(parameters: Iterable[torch.nn.Parameter], accelerator: Accelerator) -> None:
    """Gives every process the sum of all processes' gradients. A weight that no process used keeps none.

    It is called once a step, by all processes with the same parameters. DistributedDataParallel would do it while the
    last backward pass runs, but subnets leave weights out, others in every pass: with `no_sync` and unused parameters
    it loses what earlier passes added (https://github.com/pytorch/pytorch/issues/69031).
    """
    if accelerator.num_processes == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    uses = sum_over_processes([int(parameter.grad is not None) for parameter in trained])
    bucket: list[torch.Tensor] = []
    for number, (parameter, count) in enumerate(zip(trained, uses, strict=True), start=1):
        if count:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            bucket.append(parameter.grad)
        if number == len(trained) or sum(gradient.numel() for gradient in bucket) >= BUCKET_SIZE:
            _sum_bucket(bucket, accelerator)
            bucket = []


BUCKET_SIZE = 2**22
"""Numbers that processes sum at once: so many, and those of the last weight, are in memory a second time."""


def _sum_bucket(gradients: Sequence[torch.Tensor], accelerator: Accelerator) -> None:
    if not gradients:
        return
    total = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
    for gradient, part in zip(gradients, total.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
