"""The log of a training run: losses and speed, on the progress bar, to TensorBoard, and in a history."""

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch
from accelerate import Accelerator


class UnreadValues:
    """What steps have computed on the device, and nobody has read yet: a device that was waited for in every step
    would idle."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, Mapping[str, torch.Tensor], Sequence[str]]] = []

    def add(self, step: int, values: Mapping[str, torch.Tensor], names: Sequence[str]) -> None:
        """
        Args:
            step: number of steps made.
            values: scalars, all on one device.
            names: of the recordings that they were computed from.
        """
        self.steps.append((step, values, names))

    def read(self) -> list[dict[str, float]]:
        """Waits for the values, and returns them, of each step that was added since the last call.

        Raises:
            FloatingPointError: a `loss` is NaN or infinite; the message names the first such step and its recordings.
        """
        steps, self.steps = self.steps, []
        tensors = [value.detach() for _, values, _ in steps for value in values.values()]
        numbers = iter(torch.stack(tensors).tolist() if tensors else ())
        read = [{name: next(numbers) for name in values} for _, values, _ in steps]
        for values, (step, _, names) in zip(read, steps, strict=True):
            if not math.isfinite(loss := values.get("loss", 0.0)):
                raise FloatingPointError(f"the loss is {loss} at step {step}, on {', '.join(names)}")
        return read


class RunLog:
    """Averages what the steps report, and keeps an entry for every `logging_steps`.

    Args:
        state: of an earlier log, to go on from.

    Attributes:
        history: entries with their `step`: `loss`, the same by class of subnet, `grad_norm`, `learning_rate`,
            `audio_seconds_per_second`, `memory_gib` (the most allocated on a GPU, the resident set on a CPU); or,
            of an evaluation, `eval_loss` and `eval_loss_{name}` of each subnet.
        eval_losses: of the last evaluation, by name of subnet; empty before the first.
    """

    def __init__(self, accelerator: Accelerator, logging_steps: int, state: Mapping[str, Any] | None = None):
        state = state or {}
        self.accelerator, self.logging_steps = accelerator, logging_steps
        self.history: list[dict[str, float]] = list(state.get("history", []))
        self.eval_losses: dict[str, float] = dict(state.get("eval_losses", {}))
        self.sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0], state.get("sums", {}))
        self.unread = UnreadValues()
        self.seconds, self.since = 0.0, time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """All that another log goes on from, as JSON. Raises as `read` does."""
        self.read()
        return {"history": self.history, "eval_losses": self.eval_losses, "sums": dict(self.sums)}

    def step(
        self,
        step: int,
        values: Mapping[str, torch.Tensor],
        seconds: float,
        learning_rate: float,
        names: Sequence[str] = (),
    ) -> dict[str, float]:
        """Adds a step, whose values are read where an entry is due.

        Args:
            step: number of steps made.
            values: losses and gradient norm, to be averaged, scalars.
            seconds: of audio, in the batches of all processes.
            names: of the recordings of this process.

        Returns:
            The entry, averages since the one before, if one is due.

        Raises:
            FloatingPointError: as in `read`.
        """
        self.unread.add(step, values, names)
        self.seconds += seconds
        if step % self.logging_steps:
            return {}
        self.read()
        averages = {name: total / count for name, (total, count) in self.sums.items()}
        averages["learning_rate"] = learning_rate
        averages["audio_seconds_per_second"] = self.seconds / (time.perf_counter() - self.since)
        device, own = self.accelerator.device, psutil.Process().memory_info().rss
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else own
        averages["memory_gib"] = memory / 2**30
        self._add(step, averages)
        self.sums.clear()
        self.seconds, self.since = 0.0, time.perf_counter()
        return averages

    def read(self) -> None:
        """Waits for the values of the steps that were made, and adds them up. Raises as `UnreadValues.read`."""
        for values in self.unread.read():
            for name, value in values.items():
                total, count = self.sums[name]
                self.sums[name] = [total + value, count + 1]

    def add_evaluation(self, step: int, losses: Mapping[str, float]) -> float:
        """Adds an evaluation after so many steps, the loss of each subnet, and returns their mean."""
        self.eval_losses, mean = dict(losses), sum(losses.values()) / len(losses)
        self._add(step, {"eval_loss": mean} | {f"eval_loss_{name}": loss for name, loss in losses.items()})
        return mean

    def _add(self, step: int, values: Mapping[str, float]) -> None:
        """Keeps an entry, and sends it to the trackers."""
        self.history.append({"step": step, **values})
        self.accelerator.log(dict(values), step=step)
