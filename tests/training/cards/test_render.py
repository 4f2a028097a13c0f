"""Every template renders with the facts of its caller, and one that lacks a fact is an error."""

import json
from pathlib import Path

import pytest
from conftest import TWO_DEEP, tiny_model
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import UndefinedError

from lighthubert_training.cards.render import APACHE_LICENSE, TEMPLATES, public_name, render, save_card
from lighthubert_training.cards.speech_recognition import write_recognition_card
from modeling_lighthubert import LightHubertForCTC
from modeling_lighthubert.export import to_hubert


ROOT = Path(__file__).parents[3]


def test_the_templates_are_those_that_have_a_caller():
    """Each is rendered here or in the module of its card."""
    names = {"citation", "measured_subnets", "released", "speech_recognition", "subnet", "supernet"}
    assert {file.stem for file in TEMPLATES.glob("*.md")} == names


def test_a_fact_that_nobody_gives_is_an_error():
    with pytest.raises(UndefinedError, match="'name' is undefined"):
        render("speech_recognition", ModelCardData())


def test_a_released_checkpoint_has_a_card():
    facts = json.loads((ROOT / "model_cards" / "lighthubert-stage1.json").read_text())
    card = str(render("released", ModelCardData(license="mit"), name="stage1", **facts))
    assert "license: mit" in card
    assert f"{facts['num_parameters']:,} parameters" in card
    assert card.count("@inproceedings{wang2022lighthubert") == 1
    assert "{Hidden-Unit" not in card and "Hidden-Unit {BERT}}" in card


@pytest.mark.parametrize("kind", ["supernet", "cut", "hubert"])
def test_a_fine_tuned_model_has_a_card_with_its_error_rates(tmp_path, kind):
    model = tiny_model(LightHubertForCTC, TWO_DEEP)
    if kind != "supernet":
        model = model.extract_subnet("smallest")
    if kind == "hubert":
        model = to_hubert(model)
    metrics = {"test_wer": 0.25, "test_cer": 0.125, "test_num_recordings": 99, "test_num_available": 100}
    if kind == "supernet":
        metrics |= {"test_wer_smallest": 0.5, "test_cer_smallest": 0.375}
    sources = {"train": "tones.parquet", "test": "more.parquet"}
    write_recognition_card(model, "me/start", sources, {"test": metrics}, tmp_path / "asr")
    card = ModelCard.load(tmp_path / "asr" / "README.md")
    assert [result.metric_value for result in card.data.eval_results] == [0.25, 0.125]
    assert f"{model.num_parameters():,} parameters" in card.text
    subnet = "mean" if kind == "supernet" else "this model"
    assert f"| more.parquet | 99 of 100 | {subnet} | 25.00 % | 12.50 % |" in card.text
    assert ("| | | smallest | 50.00 % | 37.50 % |" in card.text) is (kind == "supernet")
    assert ("MACs" in card.text) is (kind != "hubert")
    assert "me/start, on tones.parquet" in card.text
    assert "{{" not in str(card) and "None" not in str(card)


def test_a_card_is_written_whole(tmp_path):
    card = ModelCard("---\nlicense: mit\n---\n\n# small")
    save_card(card, tmp_path / "new" / "README.md")
    assert ModelCard.load(tmp_path / "new" / "README.md").data.license == "mit"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["README.md"]


def test_a_card_does_not_give_paths_of_this_machine_away(tmp_path, monkeypatch):
    (tmp_path / "private" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "private" / "model")
    assert public_name(str(tmp_path / "private" / "model")) == public_name(".") == "model"
    assert public_name("me/model") == "me/model"


def test_the_licence_is_that_of_the_repository():
    assert APACHE_LICENSE.read_text() == (ROOT / "LICENSE").read_text()
