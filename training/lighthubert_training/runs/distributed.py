"""Devices and processes: one accelerator for every script, and what processes do together."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import patch_environment

from modeling_lighthubert.errors import UserError
from modeling_lighthubert.loading import parse_device


DEVICE_HELP = "Device to run on, such as cpu or cuda:1. Default: a GPU if there is one."


def build_accelerator(device: str | None = None, **options: Any) -> Accelerator:
    """Accelerate's `Accelerator` on `device`. Without a number, such as `cuda`, every process takes its own.

    Args:
        device: default: Accelerate's choice, a GPU for each process if there are any.
        options: of `Accelerator`.

    Raises:
        UserError: there is no such device.
    """
    numbered = {"ACCELERATE_TORCH_DEVICE": str(parse_device(device))} if device and ":" in device else {}
    with patch_environment(**numbered):
        accelerator = Accelerator(cpu=device == "cpu", **options)
    if device and accelerator.device.type != device.partition(":")[0]:
        raise UserError(f"--device {device} cannot be used: what there is is {accelerator.device.type}")
    return accelerator


def choose_device(device: str | None = None) -> str:
    """The device of a script of one process: `device`, by default a GPU if there is one.

    Raises:
        UserError: there is no such device.
    """
    return str(parse_device(device)) if device else "cuda" if torch.cuda.is_available() else "cpu"


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is set on any process. All processes call it."""
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


def sum_gradients(parameters: Iterable[torch.nn.Parameter], accelerator: Accelerator) -> None:
    """Gives every process the sum of all processes' gradients. A weight that no process used keeps none.

    It is called once a step, by all processes with the same parameters. DistributedDataParallel would do it while the
    last backward pass runs, but subnets leave weights out, others in every pass: with `no_sync` and unused parameters
    it loses what earlier passes added (https://github.com/pytorch/pytorch/issues/69031).
    """
    if accelerator.num_processes == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    uses = torch.tensor([float(parameter.grad is not None) for parameter in trained], device=accelerator.device)
    uses = accelerator.reduce(uses, "sum").tolist()
    gradients = []
    for parameter, count in zip(trained, uses, strict=True):
        if count:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(parameter.grad)
    if not gradients:
        return
    total = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
    for gradient, part in zip(gradients, total.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
