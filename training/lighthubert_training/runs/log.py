"""The log of a training run: losses and speed, on the progress bar, to TensorBoard, and in a history."""

import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from accelerate import Accelerator


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
        self.seconds, self.since = 0.0, time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """All that another log goes on from, as JSON."""
        return {"history": self.history, "eval_losses": self.eval_losses, "sums": dict(self.sums)}

    def step(self, step: int, values: Mapping[str, float], seconds: float, learning_rate: float) -> dict[str, float]:
        """Adds a step.

        Args:
            step: number of steps made.
            values: losses and gradient norm, to be averaged.
            seconds: of audio, in the batches of all processes.

        Returns:
            Averages since the last entry.
        """
        for name, value in values.items():
            total, count = self.sums[name]
            self.sums[name] = [total + value, count + 1]
        self.seconds += seconds
        averages = {name: total / count for name, (total, count) in self.sums.items()}
        averages["learning_rate"] = learning_rate
        averages["audio_seconds_per_second"] = self.seconds / (time.perf_counter() - self.since)
        device, own = self.accelerator.device, psutil.Process().memory_info().rss
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else own
        averages["memory_gib"] = memory / 2**30
        if step % self.logging_steps == 0:
            self._add(step, averages)
            self.sums.clear()
            self.seconds, self.since = 0.0, time.perf_counter()
        return averages

    def add_evaluation(self, step: int, losses: Mapping[str, float]) -> float:
        """Adds an evaluation after so many steps, the loss of each subnet, and returns their mean."""
        self.eval_losses, mean = dict(losses), sum(losses.values()) / len(losses)
        self._add(step, {"eval_loss": mean} | {f"eval_loss_{name}": loss for name, loss in losses.items()})
        return mean

    def _add(self, step: int, values: Mapping[str, float]) -> None:
        """Keeps an entry, and sends it to the trackers."""
        self.history.append({"step": step, **values})
        self.accelerator.log(dict(values), step=step)
