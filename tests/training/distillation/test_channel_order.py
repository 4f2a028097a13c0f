"""Ordering changes nothing in the full model, and gives narrow subnets what matters most."""

import random

import pytest
import torch
from conftest import DEVICE, FLAVOURS, NARROW, answer, assert_close, noise, tiny_model

from lighthubert_training.distillation.channel_order import ffn_positions, measure_importance, reorder
from modeling_lighthubert import LightHubertForPreTraining, LightHubertModel, feature_encoder


@pytest.mark.parametrize("flavour", [*FLAVOURS, pytest.param({"conv_pos_batch_norm": True}, id="batch norm")])
def test_the_outputs_of_the_full_model_stay(flavour, waveform):
    """With masked frames as well."""
    model = tiny_model(LightHubertForPreTraining, NARROW, **flavour).double()
    mask = torch.zeros(1, 12, dtype=torch.bool).index_fill(1, torch.arange(4, 9), True).to(DEVICE)

    def outputs() -> torch.Tensor:
        return model(waveform.double(), mask_time_indices=mask.clone()).predictions[0]

    expected, states = outputs(), answer(model.base_model, waveform.double())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reorder(model, measure_importance(model, [noise(6400).double(), noise(3200).double()]))
    torch.testing.assert_close(outputs(), expected, rtol=0, atol=1e-10)
    reordered = answer(model.base_model, waveform.double())
    assert not torch.allclose(reordered, states)
    torch.testing.assert_close(reordered.sort(dim=-1).values, states.sort(dim=-1).values, rtol=0, atol=1e-10)
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    for part in (
        *("layers.0.conv", "layers.6.conv", "projection.weight", "q_proj.bias", "output_dense.weight"),
        *("pos_conv_embed", "final_layer_norm.weight", "masked_spec_embed", "prediction_heads.0"),
    ):
        assert any(part in name for name in moved), part


def test_what_was_shuffled_finds_its_way_back(waveform):
    model, rng = tiny_model(LightHubertModel, NARROW), torch.Generator().manual_seed(0)
    recordings = [noise(6400), noise(3200, seed=1)]
    importance = measure_importance(model, recordings)
    reorder(model, importance)
    model.set_subnet("smallest")
    expected = answer(model, waveform)
    reorder(model, {name: torch.rand(len(values), generator=rng) for name, values in importance.items()})
    assert (answer(model, waveform) - expected).abs().max() > 0.1
    reorder(model, measure_importance(model, recordings))
    assert_close(answer(model, waveform), expected)


def test_importance_is_that_of_activations_and_of_what_reads_them():
    model = tiny_model(LightHubertModel, NARROW)
    layer = model.encoder.layers[2]
    with torch.no_grad():
        layer.feed_forward.output_dense.weight[:, 7] = 0  # nothing reads this unit
        layer.attention.v_proj.weight[8:12] = 0  # head 2 gives nothing
        layer.attention.v_proj.bias[8:12] = 0
        model.feature_extractor.conv_layers[3].conv.weight[:, 5] *= 100
        for each in model.encoder.layers:
            each.attention.q_proj.weight[:, 9] *= 100
    importance = measure_importance(model, [noise(6400)])
    assert importance["units 2"].argmin() == 7
    assert importance["heads 2"].argmin() == 2
    assert importance["convolution 2"].argmax() == 5
    assert importance["hidden"].argmax() == 9
    assert len(importance) == 7 + 2 * 6 + 1
    assert model.subnet == NARROW.largest


def test_pieces_in_which_a_recording_is_encoded_do_not_change_the_order(monkeypatch):
    model = tiny_model(LightHubertModel, NARROW).double()
    loud_end = [noise(60_000).double() * torch.linspace(0, 1, 60_000, device=DEVICE).double() ** 8]
    whole = measure_importance(model, loud_end)
    monkeypatch.setitem(feature_encoder.VALUES_AT_ONCE, DEVICE.type, 8192 * model.config.conv_dim[0])  # 2.56 s
    pieces = measure_importance(model, loud_end)
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], rtol=0.05, atol=0)  # edges count twice


def test_units_that_most_subnets_use_come_first():
    positions = ffn_positions(NARROW, 48, 192)
    assert sorted(positions.tolist()) == list(range(192))
    rng, uses = random.Random(0), torch.zeros(192)
    for _ in range(300):
        subnet = NARROW.sample(rng)
        width, size = subnet.hidden_size, subnet.intermediate_size[0]
        used = [unit for unit in range(192) if unit % 48 < width][:size]
        uses[used] += 1
    counts = uses[positions]
    assert torch.all(counts[:-1] >= counts[1:] - 40)  # up to chance
    assert set(positions[:32].tolist()) == {*range(16), *range(48, 64)}  # all subnets have two blocks of 16


def test_measuring_leaves_the_model_as_it_was_also_on_an_error():
    model = tiny_model(LightHubertModel, NARROW).train()
    model.set_subnet("smallest")

    def recordings():
        yield noise(6400)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        measure_importance(model, recordings())
    assert model.training and model.subnet == NARROW.smallest
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
