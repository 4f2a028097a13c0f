"""Plots are written whole, without pyplot."""

import pytest
from scripts import run

from lighthubert_training.runs.plots import new_figure, plot_losses, save_figure


SCRIPT = """
import sys
from pathlib import Path
from lighthubert_training.runs.plots import plot_losses

plot_losses([{"step": 1, "loss": 0.5}, {"step": 2, "eval_loss": 0.4}], Path(sys.argv[1]))
print([name for name in sys.modules if name.startswith(("matplotlib.pyplot", "matplotlib.backends.backend_"))])
"""


@pytest.mark.parametrize("history", [[], [{"step": 1, "loss": 0.5}, {"step": 2, "eval_loss": 0.4}]])
def test_a_history_is_plotted(tmp_path, history):
    plot_losses(history, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_every_loss_has_a_line_against_its_steps(tmp_path, monkeypatch):
    drawn = {}

    def keep(figure, path):
        (axes,) = figure.axes
        drawn.update({line.get_label(): line.get_xydata().tolist() for line in axes.lines})

    monkeypatch.setattr("lighthubert_training.runs.plots.save_figure", keep)
    history = [{"step": 10, "loss": 0.5, "grad_norm": 9.0}, {"step": 10, "eval_loss": 0.4}, {"step": 20, "loss": 0.3}]
    plot_losses(history, tmp_path / "loss.png")
    assert drawn == {"loss": [[10, 0.5], [20, 0.3]], "eval_loss": [[10, 0.4]]}


def test_a_figure_has_panels_side_by_side(tmp_path):
    figure, panels = new_figure(3, (6, 2))
    left = [axes.get_position().x0 for axes in panels]
    assert left == sorted(set(left))
    save_figure(figure, tmp_path / "three.png")
    width, height = (int.from_bytes((tmp_path / "three.png").read_bytes()[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (720, 240)


def test_no_display_is_asked_for(tmp_path):
    """pyplot would choose a window system, and keep every figure."""
    (tmp_path / "plot.py").write_text(SCRIPT)
    assert run(tmp_path / "plot.py", tmp_path / "a.png").strip() == "['matplotlib.backends.backend_agg']"
