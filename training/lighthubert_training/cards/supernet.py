"""The card of a student of distillation: a supernet, one model, or a subnet that was cut out first."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from lighthubert_training.cards.render import public_name, render, render_text, save_card
from modeling_lighthubert import LightHubertForPreTraining
from modeling_lighthubert.files import write_text
from modeling_lighthubert.measured_subnets import COSTS, MeasuredSubnets
from modeling_lighthubert.profiling import macs_per_second


SUBNETS_PLOT = "subnets.png"
BEGIN, END = "<!-- measured subnets -->", "<!-- end of measured subnets -->"
"""What stands around the part of a card that a search replaces."""


def write_supernet_card(
    student: LightHubertForPreTraining,
    recipe: Mapping[str, Any],
    results: Mapping[str, float],
    folder: Path,
    counts: Mapping[str, int] | None = None,
) -> None:
    """Writes `README.md`: what the student is, what it was trained on, and its losses on held-out speech.

    Args:
        recipe: all options of the run.
        results: distillation loss by name of subnet, or of what it was before the run; empty if it was not evaluated.
        counts: of results, the recordings that they are of, and those that the data have.
    """
    space = student.search_space
    subnets = {"this model": student.subnet} if space is None else space.named
    start, sources = recipe["student_name_or_path"], recipe["train_file"] or recipe["dataset_name"]
    card = render(
        "supernet",
        ModelCardData(library_name="transformers", tags=["speech", "hubert", "lighthubert"]),
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
        teacher=public_name(recipe["teacher_name_or_path"]),
        start=start and public_name(start),
        cut=recipe["subnet"] and public_name(recipe["subnet"]),
        sources=[public_name(source) for source in sources],
        results=results,
        counts=counts,
    )
    save_card(card, folder / "README.md")


def show_measured_subnets(measured: MeasuredSubnets, folder: Path) -> None:
    """Puts a table of measured subnets, and `SUBNETS_PLOT`, into the card of the supernet in a folder, in place of
    those of an earlier search. A folder without a card stays without one."""
    if not (file := folder / "README.md").exists():
        return
    part = render_text("measured_subnets", measured=measured, costs=COSTS, plot=SUBNETS_PLOT)
    part = f"{BEGIN}\n{part.strip()}\n{END}"
    card = file.read_text(encoding="utf-8")
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    write_text(file, before + part + after if begin and end else f"{card.rstrip()}\n\n{part}\n")
