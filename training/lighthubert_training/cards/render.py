"""From a template and facts to a model card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from modeling_lighthubert.files import whole_file


TEMPLATES = Path(__file__).parent / "templates"
APACHE_LICENSE = TEMPLATES / "apache-2.0.txt"
"""The text of the licence, to be copied beside weights under it."""
NUM_RECORDINGS, NUM_AVAILABLE = "num_recordings", "num_available"
"""What results call the number of recordings that they are of, and of those that the data have."""
MOST_LEFT_OUT = 0.01
"""Share of the data that results may leave out, such as recordings that cannot be read, and still be of the data."""


def is_partial(result: Mapping[str, Any]) -> bool:
    """Whether a result with both numbers is of too few recordings to be published as one of the data."""
    available = result.get(NUM_AVAILABLE, 0)
    return result.get(NUM_RECORDINGS, available) < (1 - MOST_LEFT_OUT) * available


def render(template: str, data: ModelCardData, **facts: Any) -> ModelCard:
    """The card that `templates/{template}.md` and `facts` make, with `data` as its metadata.

    Raises:
        jinja2.UndefinedError: the template uses a fact that was not given.
    """
    return ModelCard(render_text(template, card_data=data.to_yaml(), **facts))


def render_text(template: str, **facts: Any) -> str:
    """What `templates/{template}.md` and `facts` make, as in `render`."""
    # without autoescape: a card is Markdown, of facts of our own
    templates = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined)
    return templates.get_template(f"{template}.md").render(**facts)


def save_card(card: ModelCard, path: Path) -> None:
    """Writes a card, such as `README.md` of a folder; it is whole or not there."""
    with whole_file(path) as unfinished:
        card.save(unfinished)


def public_name(name: str | Path) -> str:
    """What a card calls a model or a file: the last part of a path on this machine, any other name as it is."""
    path = Path(name)
    return path.resolve().name if path.exists() else str(name)
