"""Writes the cards in this folder: of the conversions of the three released checkpoints, and of the demonstration.

    python model_cards/render.py                          # all cards, from the JSON files beside them
    python model_cards/render.py --facts                  # the JSON files of the released checkpoints as well
    python model_cards/render.py --demo demo/output/asr   # that of the demonstration as well, from what it left

Every figure in a card is from its JSON file. Those of the released checkpoints are counted from their shapes; no
weights are needed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from lighthubert_training.cards.render import render, save_card
from lighthubert_training.cards.subnet import FACTS_FILE, render_subnet_card
from modeling_lighthubert import LightHubertConfig, LightHubertModel, SearchSpace, Subnet
from modeling_lighthubert.errors import run, user_error
from modeling_lighthubert.files import write_json
from modeling_lighthubert.profiling import macs_per_second


FOLDER = Path(__file__).resolve().parent
RELEASED = {"lighthubert-base": "base", "lighthubert-small": "small", "lighthubert-stage1": None}
"""Preset of the search space of each checkpoint, `None` for one model."""
DEMO = "lighthubert-demo"


def released_facts(name: str) -> dict[str, Any]:
    """Facts of a converted checkpoint, counted from its shape; supernets are trimmed."""
    preset = RELEASED[name]
    space = getattr(SearchSpace, preset)() if preset else None
    config = LightHubertConfig(search_space=space, mask_time_prob=0.65)
    with torch.device("meta"):
        model = LightHubertModel(config.trimmed() if space else config)
    subnets = space.named if space else {"this model": model.subnet}
    return {
        "checkpoint": f"{name.replace('-', '_')}.pt",
        "num_parameters": model.num_parameters(),
        "num_subnets": space.num_subnets if space else None,
        "space": space.to_dict() if space else None,
        "subnets": [subnet_row(each, subnet, model) for each, subnet in subnets.items()],
    }


def subnet_row(name: str, subnet: Subnet, model: LightHubertModel) -> dict[str, Any]:
    """A row of the card: the named subnets have the same heads and FFN units in all layers."""
    return {
        "name": name,
        "hidden_size": subnet.hidden_size,
        "num_hidden_layers": subnet.num_hidden_layers,
        "num_attention_heads": subnet.num_attention_heads[0],
        "intermediate_size": subnet.intermediate_size[0],
        "num_parameters": model.num_subnet_parameters(subnet if model.search_space else None),
        "macs_per_second": macs_per_second(model, subnet),
    }


def render_released(name: str, facts: dict[str, Any]) -> ModelCard:
    return render(
        "released",
        ModelCardData(
            language="en",
            license="mit",  # of the authors' repository
            library_name="transformers",
            pipeline_tag="feature-extraction",
            tags=["speech", "hubert", "lighthubert", *(["once-for-all"] if facts["num_subnets"] else [])],
        ),
        name=name,
        **facts,
    )


def render_demo(facts: dict[str, Any]) -> ModelCard:
    return render_subnet_card(
        facts,
        DEMO,
        "apache-2.0",
        "Spoken digits of a synthesiser, in `demo/speech/train.parquet`; tested on `demo/speech/test.parquet`.",
        dataset="generated spoken digits",
        language="en",
        limits="A demonstration: it has learnt the words of its small training set, and no others.",
    )


def render_card(name: str, facts: dict[str, Any]) -> ModelCard:
    return render_demo(facts) if name == DEMO else render_released(name, facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", action="store_true", help="Count the released checkpoints anew.")
    parser.add_argument("--demo", type=Path, metavar="FOLDER", help="Fine-tuned model of a demonstration.")
    options = parser.parse_args()
    facts = {name: released_facts(name) for name in RELEASED} if options.facts else {}
    if options.demo:
        with user_error(f"--demo {options.demo}: "):
            facts[DEMO] = json.loads((options.demo / FACTS_FILE).read_text())
    for name, content in facts.items():
        write_json(FOLDER / f"{name}.json", content)
    for file in sorted(FOLDER.glob("*.json")):
        save_card(render_card(file.stem, json.loads(file.read_text())), file.with_suffix(".md"))
        print(file.with_suffix(".md"))


if __name__ == "__main__":
    run(main)
