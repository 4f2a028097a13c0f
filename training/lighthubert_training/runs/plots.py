"""Plots of results as PNG files, drawn without a display and without matplotlib's global state (pyplot)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from modeling_lighthubert.files import whole_file


def new_figure(num_panels: int = 1, size: tuple[float, float] = (8, 4.5)) -> tuple[Figure, list[Axes]]:
    """A figure of `size` inches, width and height, and its panels, side by side, each with a grid."""
    figure = Figure(figsize=size)
    panels = list(figure.subplots(1, num_panels, squeeze=False)[0])
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure, panels


def save_figure(figure: Figure, path: Path, **layout: Any) -> None:
    """Writes a PNG of 120 dots an inch.

    Args:
        layout: options of `tight_layout`.
    """
    figure.tight_layout(**layout)
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=120)


def plot_losses(history: Sequence[dict[str, float]], path: Path) -> None:
    """Plots every entry of a history with `loss` in its name against its `step`: those of evaluations as dashed lines
    with points, those of training as lines, or as a point where there is one entry."""
    figure, (axes,) = new_figure()
    names = dict.fromkeys(name for entry in history for name in entry if "loss" in name)
    for name in names:
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        style: dict[str, Any] = {"marker": "o", "linestyle": "--"} if name.startswith("eval_") else {"linewidth": 1}
        if len(points) == 1:
            style["marker"] = "o"  # a line of one point has no length
        axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.set(xlabel="steps", ylabel="loss")
    if names:
        axes.legend(fontsize="small")
    save_figure(figure, path)
