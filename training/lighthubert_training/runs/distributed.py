"""Devices and processes: one accelerator for every script, and what processes do together."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator


DEVICE_HELP = "Device to run on, such as cpu or cuda:1. Default: a GPU if there is one."


def build_accelerator(device: str | None = None, **options: Any) -> Accelerator:
    """Accelerate's `Accelerator` on `device` (default: its own choice, a GPU for each process if there are any)."""
    if device not in (None, "cpu"):
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    return Accelerator(cpu=device == "cpu", **options)


def choose_device(device: str | None = None) -> str:
    """The device of a script of one process: `device`, else a GPU if there is one."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is set on any process. All processes call it."""
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


def sum_gradients(parameters: Iterable[torch.nn.Parameter], accelerator: Accelerator) -> None:
    """Gives every process the sum of all processes' gradients. A weight that no process used keeps none.

    It is called once a step. DistributedDataParallel would do it while the last backward pass runs, but subnets leave
    weights out, others in every pass: with `no_sync` and unused parameters it loses what earlier passes added
    (pytorch issue 69031).
    """
    if accelerator.num_processes == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    used = torch.tensor([float(parameter.grad is not None) for parameter in trained], device=accelerator.device)
    used = accelerator.reduce(used, "sum").tolist()
    shared = [parameter for parameter, count in zip(trained, used, strict=True) if count]
    for parameter in shared:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = accelerator.reduce(torch.cat([parameter.grad.flatten() for parameter in shared]), "sum")
    for parameter, gradient in zip(shared, flat.split([parameter.numel() for parameter in shared]), strict=True):
        parameter.grad.copy_(gradient.view_as(parameter))
