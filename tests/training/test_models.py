"""A frozen feature encoder is recognised, and is replaced by its output for as long as a block lasts."""

import pytest
import torch
from conftest import NARROW, TWO_DEEP, noise, tiny_model

from lighthubert_training.models import computed_once, has_fixed_feature_encoder
from modeling_lighthubert import LightHubertForCTC, LightHubertModel


@pytest.mark.parametrize("head", [LightHubertModel, LightHubertForCTC])
def test_a_feature_encoder_is_fixed_if_it_is_frozen_and_the_same_in_all_subnets(head):
    for space, frozen, fixed in ((TWO_DEEP, True, True), (TWO_DEEP, False, False), (NARROW, True, False)):
        model = tiny_model(head, space)
        if frozen:
            model.base_model.feature_extractor._freeze_parameters()
        assert has_fixed_feature_encoder(model) is fixed
    cut = tiny_model(head, NARROW).extract_subnet("smallest")
    cut.base_model.feature_extractor._freeze_parameters()
    assert has_fixed_feature_encoder(cut)


def test_inside_the_block_a_module_returns_the_constant_and_computes_nothing(waveform):
    model = tiny_model()
    encoder = model.feature_extractor
    computed = []
    encoder.conv_layers[0].register_forward_hook(lambda *given: computed.append(1))
    with torch.no_grad():
        features = encoder(waveform)
        expected = model(waveform).last_hidden_state
        computed.clear()
        with computed_once(encoder, features):
            assert encoder(noise(1, 9)) is features
            inside = model(waveform).last_hidden_state
            assert not computed
        after = encoder(2 * waveform)
    assert torch.equal(inside, expected)
    assert computed
    assert not torch.equal(after, features)


def test_the_module_computes_again_after_an_error():
    module = torch.nn.ReLU()
    with pytest.raises(RuntimeError, match="in the block"), computed_once(module, torch.zeros(1)):
        raise RuntimeError("in the block")
    assert module(torch.ones(2)).tolist() == [1.0, 1.0]
    assert "forward" not in vars(module)


def test_without_an_output_nothing_changes():
    module = torch.nn.ReLU()
    with computed_once(module, None):
        assert module(torch.ones(2)).tolist() == [1.0, 1.0]
