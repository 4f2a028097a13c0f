"""Costs are what the model really has and does."""

import random

import pytest
import torch
from conftest import NARROW, SIX_DEEP, noise, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.hubert.modeling_hubert import HubertFeatureEncoder

from modeling_lighthubert import (
    LightHubertConfig,
    LightHubertForAudioFrameClassification,
    LightHubertForCTC,
    LightHubertForPreTraining,
    LightHubertModel,
    SearchSpace,
)
from modeling_lighthubert.profiling import format_table, macs_per_second, main, measure_latency, profile_subnet


@pytest.mark.parametrize(
    "head",
    [LightHubertModel, LightHubertForPreTraining, LightHubertForCTC, LightHubertForAudioFrameClassification],
)
@pytest.mark.parametrize("seconds", [0.5, 1.3])
@pytest.mark.parametrize("taps", [16, 15])
@pytest.mark.parametrize("space", [SIX_DEEP, NARROW], ids=["six-deep", "narrow"])
def test_macs_are_what_a_flop_counter_counts(head, seconds, taps, space):
    model = tiny_model(head, space, attn_implementation="eager", num_conv_pos_embeddings=taps)
    for seed in range(3):
        cut = model.extract_subnet(model.search_space.sample(seed))
        counted = HubertFeatureEncoder(cut.config)  # ours runs up to a frame more, to have whole rows
        cut.base_model.feature_extractor.forward = counted.forward
        with FlopCounterMode(display=False) as counter:
            cut(noise(1, int(seconds * 16_000)))
        assert sum(cost.macs for cost in profile_subnet(cut, seconds=seconds)) == counter.get_total_flops() // 2


@pytest.mark.parametrize("head", [LightHubertModel, LightHubertForCTC])
@pytest.mark.parametrize("space", [SIX_DEEP, NARROW], ids=["six-deep", "narrow"])
def test_parameters_of_the_parts_add_up(head, space):
    model = tiny_model(head, space)
    rng = random.Random(0)
    for _ in range(5):
        subnet = model.search_space.sample(rng)
        costs = profile_subnet(model, subnet)
        assert sum(cost.num_parameters for cost in costs) == model.extract_subnet(subnet).num_parameters()


def test_a_supernet_and_its_cut_model_cost_the_same():
    model = tiny_model(LightHubertModel, SIX_DEEP)
    assert profile_subnet(model, "smallest", 2.0) == profile_subnet(model.extract_subnet("smallest"), seconds=2.0)


def test_the_feature_encoder_of_the_real_size_costs_what_is_published():
    """FACTS of the method: 2.45 GMAC for a second, whatever the subnet; 3.59 in all for a_small."""
    model = LightHubertModel(LightHubertConfig(search_space=SearchSpace.small()))
    encoder, *_ = profile_subnet(model, "a_small")
    assert encoder.macs / 1e9 == pytest.approx(2.45, abs=0.005)
    assert macs_per_second(model, "a_small") / 1e9 == pytest.approx(3.59, abs=0.01)


def test_our_space_spans_what_it_says():
    with torch.device("meta"):
        model = LightHubertModel(LightHubertConfig(search_space="tiny_to_base"))
    for subnet, millions, gigamacs in (("smallest", 2.96, 0.295), ("largest", 94.4, 6.91)):
        millions_counted = sum(cost.num_parameters for cost in profile_subnet(model, subnet)) / 1e6
        assert millions_counted == pytest.approx(millions, 0.01)
        assert macs_per_second(model, subnet) / 1e9 == pytest.approx(gigamacs, 0.01)


def test_a_clip_shorter_than_one_frame_is_refused():
    with pytest.raises(ValueError, match="shorter than one frame"):
        profile_subnet(tiny_model(), seconds=0.01)


def test_latency_is_positive_and_the_table_has_every_part():
    model = tiny_model(LightHubertModel, SIX_DEEP).extract_subnet("smallest")
    assert measure_latency(model, 0.1, repeats=3, warm_up=1) > 0
    table = format_table(profile_subnet(model), 1.0)
    for part in ("feature encoder", "position convolution", "layer 3 (4 heads, FFN 32)", "total"):
        assert part in table


def test_the_command_prints_a_table(tmp_path, capsys):
    tiny_model(LightHubertModel, SIX_DEEP).save_pretrained(tmp_path)
    main([str(tmp_path), "--subnet", "smallest", "--seconds", "0.2", "--repeats", "2"])
    printed = capsys.readouterr().out
    assert "hidden_size=16, num_hidden_layers=4" in printed
    assert "real-time factor" in printed
