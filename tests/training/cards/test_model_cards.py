"""The cards in model_cards/ say what their JSON files say, those say what the checkpoints are, and the Hub would take
them."""

import json
import runpy
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData


FOLDER = Path(__file__).parents[3] / "model_cards"
SCRIPT = runpy.run_path(str(FOLDER / "render.py"))
CARDS = sorted(file.stem for file in FOLDER.glob("*.json"))


@pytest.mark.parametrize("name", SCRIPT["RELEASED"])
def test_the_figures_of_a_released_checkpoint_are_counted_from_its_shape(name):
    assert json.loads((FOLDER / f"{name}.json").read_text()) == json.loads(json.dumps(SCRIPT["released_facts"](name)))


@pytest.mark.parametrize("name", CARDS)
def test_a_card_is_what_its_figures_give(name):
    card = SCRIPT["render_card"](name, json.loads((FOLDER / f"{name}.json").read_text()))
    assert (FOLDER / f"{name}.md").read_text() == str(card)


@pytest.mark.parametrize("name", CARDS)
def test_the_metadata_of_a_card_is_valid(name):
    data = ModelCard.load(FOLDER / f"{name}.md").data
    assert data.license in ("mit", "apache-2.0")
    assert data.library_name == "transformers"
    assert data.pipeline_tag in ("feature-extraction", "automatic-speech-recognition")
    parsed = ModelCardData(**data.to_dict(), ignore_metadata_errors=False)
    assert parsed.to_dict() == data.to_dict()
    assert all(isinstance(result.metric_value, float) for result in data.eval_results or [])


def test_the_released_supernets_hold_what_the_paper_says():
    """Trimmed: a cut model of the small space, a_small, has 26,879,488 parameters."""
    small = json.loads((FOLDER / "lighthubert-small.json").read_text())
    assert small["num_subnets"] == 951_892_141_473
    assert {subnet["name"]: subnet["num_parameters"] for subnet in small["subnets"]}["a_small"] == 26_879_488
    assert json.loads((FOLDER / "lighthubert-base.json").read_text())["num_subnets"] == 6_530_347_008
