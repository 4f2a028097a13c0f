"""From a template and facts to a model card."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from modeling_lighthubert.files import whole_file


TEMPLATES = Path(__file__).parent / "templates"
APACHE_LICENSE = TEMPLATES / "apache-2.0.txt"


def render(template: str, data: ModelCardData, **facts: Any) -> ModelCard:
    """The card of `templates/{template}.md`, with `data` at its head. Every figure in it is one of `facts`."""
    return ModelCard.from_template(data, template_path=str(TEMPLATES / f"{template}.md"), **facts)


def save_card(card: ModelCard, path: Path) -> None:
    """Writes a card, `README.md` of a folder, whole."""
    with whole_file(path) as unfinished:
        card.save(unfinished)


def public_name(name: str | Path) -> str:
    """What a card calls a model or a file: a name on the Hub as it is, of a path on this machine the end."""
    return Path(name).name if Path(name).exists() else str(name)
