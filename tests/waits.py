"""Counts where the CPU would wait for a GPU, without one: tensors on the `meta` device, which have no numbers, stand
for those of a GPU."""

import re
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


TORCH = str(Path(torch.__file__).parent)
aten = torch.ops.aten
SCALAR = aten._local_scalar_dense.default  # item(), tolist(), bool(), int(), float()
SELECTIONS = {  # of as many values as a mask has ones
    aten.nonzero.default: lambda values, *_: values.new_empty((values.numel(), values.ndim), dtype=torch.long),
    aten.masked_select.default: lambda values, *_: values.new_empty(values.numel()),
}
WITH_INDEX = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
CTC = {  # which reads the lengths
    aten._ctc_loss.Tensor: lambda log_probs, *_: (log_probs.new_zeros(log_probs.shape[1]), log_probs),
    aten._ctc_loss_backward.Tensor: lambda grad, log_probs, *_: torch.zeros_like(log_probs),
}


class Waits(TorchDispatchMode):
    """Inside the block, everything that a GPU would be waited for is counted, and goes on with zeros, or with all
    values where a mask selects some.

    Attributes:
        lines: how often each line of source code waits: the innermost one that is not torch's. What becomes of the
            output of a function of torch, which differs among versions of transformers, is left out.
        to_device, to_host: bytes that are copied.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: Counter[str] = Counter()
        self.to_device = self.to_host = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is SCALAR and args[0].is_meta:
            self.count()
            return False if args[0].dtype == torch.bool else 0
        if function is aten._to_copy.default and not args[0].is_meta and kwargs.get("device") == torch.device("meta"):
            self.to_device += args[0].nbytes
        if function is aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            self.count()
            self.to_host += args[0].nbytes
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if function in SELECTIONS | CTC and args[0].is_meta:
            self.count()
            return (SELECTIONS | CTC)[function](*args)
        if function in WITH_INDEX:
            masks = [index for index in args[1] if index is not None and index.is_meta and index.dtype == torch.bool]
            is_fill = function is not aten.index.Tensor and args[2].numel() == 1  # which no device is waited for
            if masks and not is_fill:
                self.count()
                return args[0].flatten(0, masks[0].ndim - 1) if function is aten.index.Tensor else args[0]
        return function(*args, **kwargs)

    def count(self) -> None:
        for frame in reversed(traceback.extract_stack()):
            if not frame.filename.startswith((TORCH, __file__)):
                self.lines[re.sub(r"^(return|\w+ =) (?=nn\.)", "", str(frame.line))] += 1
                return
