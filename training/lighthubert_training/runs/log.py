"""What a run tells: losses and speed, on the progress bar, to TensorBoard and in a history; their plot; the card."""

import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import psutil
import torch
from accelerate import Accelerator
from huggingface_hub import ModelCard, ModelCardData

from modeling_lighthubert import LightHubertForPreTraining
from modeling_lighthubert.profiling import macs_per_second


matplotlib.use("Agg")
from matplotlib import pyplot


CARD_TEMPLATE = Path(__file__).parents[1] / "cards/templates/supernet.md"


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


def plot_losses(history: list[dict[str, float]], path: Path) -> None:
    """Losses against steps as a PNG: of training by class of subnet, of evaluation by subnet."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    names = dict.fromkeys(name for entry in history for name in entry if "loss" in name)
    for name in names:
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        style = {"marker": "o", "linestyle": "--"} if name.startswith("eval_") else {"linewidth": 1}
        axes.plot(*zip(*points), label=name, **style)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="steps", ylabel="loss")
    axes.grid(alpha=0.3)
    if names:
        axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_card(
    student: LightHubertForPreTraining, recipe: Mapping[str, Any], results: Mapping[str, float], folder: Path
) -> None:
    """The model card, `README.md`: what the student is, what it learnt from, and its losses on held-out speech."""
    space = student.search_space
    subnets = {"this model": student.subnet} if space is None else space.named

    def public(name: str) -> str:  # a name on the Hub as it is, of the paths of this machine the end
        return Path(name).name if Path(name).exists() else name

    sources = recipe["train_file"] or recipe["dataset_name"]
    card = ModelCard.from_template(
        ModelCardData(library_name="transformers", tags=["speech", "hubert", "lighthubert"]),
        template_path=CARD_TEMPLATE,
        name=folder.resolve().name,
        space=space,
        subnets={
            name: (
                subnet,
                student.hubert.num_subnet_parameters(None if space is None else subnet),
                macs_per_second(student.hubert, subnet),
            )
            for name, subnet in subnets.items()
        },
        recipe=recipe,
        teacher=public(recipe["teacher_name_or_path"]),
        start=recipe["student_name_or_path"] and public(recipe["student_name_or_path"]),
        sources=[public(source) for source in sources],
        results=results,
    )
    card.save(folder / "README.md")
