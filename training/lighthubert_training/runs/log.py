"""What a training run reports: losses and speed, on the progress bar, to TensorBoard, and in a history."""

import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from accelerate import Accelerator


class RunLog:
    """Averages what the steps report, and keeps an entry of every `logging_steps`.

    Attributes:
        history: entries with their `step`: `loss`, the same by class of subnet, `grad_norm`, `learning_rate`,
            `audio_seconds_per_second`, `memory_gib`; or, of an evaluation, `eval_loss` and that of each subnet.
    """

    def __init__(self, accelerator: Accelerator, logging_steps: int, state: Mapping[str, Any] | None = None):
        state = state or {"history": [], "sums": {}}
        self.accelerator, self.logging_steps = accelerator, logging_steps
        self.history: list[dict[str, float]] = list(state["history"])
        self.sums = defaultdict(lambda: [0.0, 0], state["sums"])
        self.seconds, self.since = 0.0, time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {"history": self.history, "sums": dict(self.sums)}

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
        averages["memory_gib"] = peak_memory(self.accelerator.device) / 2**30
        if step % self.logging_steps == 0:
            self.add(step, averages)
            self.sums.clear()
            self.seconds, self.since = 0.0, time.perf_counter()
        return averages

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Keeps an entry, and sends it to the trackers."""
        self.history.append({"step": step, **values})
        self.accelerator.log(dict(values), step=step)


def peak_memory(device: torch.device) -> int:
    """Bytes: of a GPU, the most that was allocated; of a CPU, what the process holds."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
