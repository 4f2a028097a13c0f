"""Plots are written whole, without pyplot."""

import pytest
from matplotlib.lines import Line2D
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


@pytest.fixture
def lines(monkeypatch) -> dict[str, Line2D]:
    """Those of the figure that is drawn, by label."""
    drawn = {}

    def keep(figure, path):
        (axes,) = figure.axes
        drawn.update({line.get_label(): line for line in axes.lines})

    monkeypatch.setattr("lighthubert_training.runs.plots.save_figure", keep)
    return drawn


def test_a_series_of_one_point_can_be_seen(tmp_path, lines):
    plot_losses([{"step": 10, "loss": 0.5}, {"step": 10, "eval_loss": 0.4}], tmp_path / "loss.png")
    assert {name: line.get_marker() for name, line in lines.items()} == {"loss": "o", "eval_loss": "o"}
    plot_losses([{"step": step, "loss": 0.5} for step in (1, 2)], tmp_path / "loss.png")
    assert lines["loss"].get_marker() == "None"


def test_every_loss_has_a_line_against_its_steps(tmp_path, lines):
    history = [{"step": 10, "loss": 0.5, "grad_norm": 9.0}, {"step": 10, "eval_loss": 0.4}, {"step": 20, "loss": 0.3}]
    plot_losses(history, tmp_path / "loss.png")
    drawn = {name: line.get_xydata().tolist() for name, line in lines.items()}
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
