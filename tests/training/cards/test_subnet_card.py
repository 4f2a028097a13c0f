"""The card of a cut subnet says what it is in measured facts, and the figures in it are those of the subnet."""

import json
import platform
import re
from dataclasses import replace

import pytest
import torch
from conftest import NARROW, WINDOWED, tiny_model
from huggingface_hub import ModelCard

from lighthubert_training.cards.subnet import (
    measured_speed,
    read_results,
    render_subnet_card,
    subnet_facts,
    training_figures,
)
from modeling_lighthubert import (
    LightHubertForAudioFrameClassification,
    LightHubertForCTC,
    LightHubertForSequenceClassification,
    LightHubertModel,
)
from modeling_lighthubert.errors import UserError


SPEED = {
    "seconds": 5.0,
    "real_time_factor": 0.0123,
    "times_the_largest": 3.21,
    "dtype": "float32",
    "threads": 2,
    "machine": "a computer",
    "torch": "2.0",
}


@pytest.mark.parametrize("form", ["transformers", "hubert"])
@pytest.mark.parametrize("head", [LightHubertModel, LightHubertForCTC, LightHubertForSequenceClassification])
def test_a_card_says_what_the_model_is_and_its_metadata_is_valid(head, form):
    model = tiny_model(head, replace(NARROW, attention_window=(9, None))).extract_subnet("smallest")
    facts = subnet_facts(model, "me/supernet", form) | {
        "teacher": "me/teacher",
        "speed": SPEED,
        "results": [
            {"metric": "wer", "value": 0.1234, "num_recordings": 99, "num_available": 100},
            {"metric": "loss", "value": 0.5},
        ],
    }
    card = render_subnet_card(facts, "me/small", "mit", "Tones.", dataset="tones", language="en")
    read = ModelCard(str(card))  # parses the metadata anew
    assert read.data.license == "mit"
    assert read.data.pipeline_tag == facts["pipeline_tag"]
    assert [result.metric_value for result in read.data.eval_results] == [0.1234, 0.5]
    assert "| wer | 12.34 % | 99 of 100 |" in read.text
    assert "| loss | 0.5000 | number not known |" in read.text
    text = " ".join(read.text.split())
    for figure in (f"{model.num_parameters():,}", "0.0123", "3.21", "4, 4, 4", "me/supernet", "me/teacher", "Tones."):
        assert figure in text
    assert ("trust_remote_code" in text) is (form == "transformers")
    assert ("modeling_lighthubert" in text) is (form == "transformers")
    assert "{{" not in text and "None" not in text
    (code,) = re.findall(r"```python\n(.*?)```", str(card), flags=re.DOTALL)
    compile(code, "card", "exec")
    assert code.count('"me/small"') >= 1


def test_a_card_of_what_is_not_known_says_so():
    facts = subnet_facts(tiny_model(LightHubertModel, WINDOWED).extract_subnet("smallest"), "me/supernet")
    text = str(render_subnet_card(facts, "me/small", "mit", "Tones."))
    assert "It was not evaluated." in text
    assert "teacher" not in text
    assert "Speed was measured" not in text
    assert "A stock HuBERT" not in text  # it has windows
    assert "None" not in text
    assert "Own limits." in str(render_subnet_card(facts, "me/small", "mit", "Tones.", limits="Own limits."))


@pytest.mark.parametrize(
    ("head", "pipeline_tag"),
    [
        (LightHubertModel, "feature-extraction"),
        (LightHubertForCTC, "automatic-speech-recognition"),
        (LightHubertForSequenceClassification, "audio-classification"),
        (LightHubertForAudioFrameClassification, "feature-extraction"),
    ],
)
def test_facts_are_those_of_the_cut_model_and_survive_json(head, pipeline_tag):
    model = tiny_model(head).extract_subnet("smallest")
    facts = subnet_facts(model, "me/supernet", "hubert")
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["pipeline_tag"], facts["cut_from"], facts["form"]) == (pipeline_tag, "me/supernet", "hubert")
    assert facts["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert facts["subnet"] == model.subnet.to_dict()
    assert facts["hubert_exportable"] is True


def test_speed_is_measured_with_the_conditions_it_holds_for():
    model = tiny_model().cpu()

    def run(audio: torch.Tensor) -> torch.Tensor:
        return model(audio).last_hidden_state

    speed = measured_speed(lambda audio: audio, run, "bfloat16", repeats=2, seconds=0.1)
    assert set(speed) == set(SPEED)
    assert speed["times_the_largest"] > 10  # than doing nothing
    assert 0 < speed["real_time_factor"] < 1
    assert (speed["seconds"], speed["dtype"], speed["threads"]) == (0.1, "bfloat16", torch.get_num_threads())
    assert speed["machine"] in (platform.processor(), platform.machine()) and speed["machine"]


def test_results_are_read_from_what_a_search_and_a_training_run_leave(tmp_path):
    subnet = NARROW.smallest.to_dict()
    search, run = tmp_path / "results.json", tmp_path / "eval_results.json"
    found = {"fitness": "distillation loss", "best": {"subnet": subnet, "error": 0.5}}
    search.write_text(json.dumps(found | {"num_recordings": 7, "num_available": 7}))
    run.write_text(json.dumps({"eval_wer": 0.25, "eval_runtime": 3.0, "eval_samples_per_second": 2.0, "epoch": 1.0}))
    assert read_results([str(search), str(run)], subnet) == [
        {"metric": "distillation loss", "value": 0.5, "num_recordings": 7, "num_available": 7},
        {"metric": "wer", "value": 0.25},
    ]
    with pytest.raises(UserError, match="is about another subnet"):
        read_results([str(search)], NARROW.largest.to_dict())
    run.write_text(json.dumps({"eval_wer": 0.25, "eval_wer_smallest": 0.3, "eval_wer_largest": 0.2}))
    assert read_results([str(run)], subnet, ["smallest"]) == [{"metric": "wer", "value": 0.3}]
    with pytest.raises(UserError, match="has no figures of this subnet"):
        read_results([str(run)], subnet, [])
    run.write_text("{}")
    with pytest.raises(UserError, match="has no figures"):
        read_results([str(run)], subnet)
    run.write_text("[]")
    with pytest.raises(UserError, match="is no JSON object"):
        read_results([str(run)], subnet)
    with pytest.raises(UserError, match="cannot be read"):
        read_results([str(tmp_path / "nothing.json")], subnet)


def test_a_result_of_a_part_of_the_data_is_not_published_as_one_of_all(tmp_path):
    run, counts = tmp_path / "eval_results.json", {"num_recordings": 10, "num_available": 108}
    run.write_text(json.dumps({"eval_wer": 0.02} | {f"eval_{name}": count for name, count in counts.items()}))
    with pytest.raises(UserError, match="is of 10 of 108 recordings, .* with --max_eval_samples none"):
        read_results([str(run)], {})
    facts = subnet_facts(tiny_model(LightHubertForCTC).extract_subnet("smallest"), "me/supernet")
    facts["results"] = [{"metric": "wer", "value": 0.02} | counts]
    card = render_subnet_card(facts, "me/small", "mit", "Tones.")
    assert card.data.eval_results is None
    assert "| wer | 2.00 % | 10 of 108 |" in card.text


def test_results_of_a_training_run_are_told_apart_by_part_metric_and_subnet():
    results = {
        **{"train_loss": 9.0, "train_runtime": 9.0, "epoch": 2.0, "eval_runtime": 9.0, "eval_steps_per_second": 9.0},
        **{"eval_loss": 0.1, "eval_loss_a_small": 0.2, "eval_loss_smallest": 0.3, "test_wer_a_small": 0.4},
    }
    results |= {"eval_num_recordings": 7, "eval_num_available": 7, "test_num_recordings": 8, "test_num_available": 9}

    def figures(names):
        return {each["metric"]: (each["value"], each["num_available"]) for each in training_figures(results, names)}

    assert figures(["a_small", "alias"]) == {"loss": (0.2, 7), "wer": (0.4, 9)}
    assert figures(["alias", "smallest"]) == {"loss": (0.3, 7)}
    assert figures([]) == {}
    every = {"loss": (0.1, 7), "loss_a_small": (0.2, 7), "loss_smallest": (0.3, 7), "wer_a_small": (0.4, 9)}
    assert figures(None) == every
