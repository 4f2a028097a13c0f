"""Attention in windows is full attention with a band for its mask, in memory that does not grow with the square."""

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, SMALL, WINDOWED, answer, assert_close, noise, tiny_model

from modeling_lighthubert import LightHubertForCTC, LightHubertModel, SearchSpace, Subnet
from modeling_lighthubert.export import to_hubert
from modeling_lighthubert.modeling_lighthubert import LightHubertAttention
from modeling_lighthubert.profiling import num_pairs, profile_subnet
from modeling_lighthubert.windowed_attention import windowed_attention


@pytest.mark.parametrize("window", [1, 5, 63, 64, 65, 200])
@pytest.mark.parametrize("num_frames", [1, 64, 149, 300])
@pytest.mark.parametrize("padded", [False, True])
def test_a_window_is_full_attention_with_a_band_for_its_mask(window, num_frames, padded):
    query, key, value = noise(3, 2, 4, num_frames, 8)
    true = torch.ones(2, num_frames, dtype=torch.bool, device=DEVICE)
    true[1, num_frames * 2 // 3 + 1 :] = not padded
    position = torch.arange(num_frames, device=DEVICE)
    mask = ((position[:, None] - position).abs() <= window) & true[:, None, None, :]
    mask |= torch.eye(num_frames, dtype=torch.bool, device=DEVICE)
    expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.3)
    found = windowed_attention(query, key, value, window, true if padded else None, 0.3)
    assert torch.isfinite(found).all()
    kept = true[:, None, :, None].expand_as(found)
    assert_close(found[kept], expected[kept], terms=300)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("stable", [False, True])
def test_selected_cut_and_banded_models_answer_alike(attention, stable, monkeypatch):
    model = tiny_model(LightHubertModel, WINDOWED, attn_implementation=attention, do_stable_layer_norm=stable)
    audio, mask = noise(2, 30_000), torch.ones(2, 30_000, dtype=torch.long, device=DEVICE)
    mask[1, 20_000:] = 0
    rng = random.Random(0)
    for _ in range(5):
        model.sample_subnet(rng)
        selected = answer(model, audio, attention_mask=mask)
        cut = answer(model.extract_subnet(), audio, attention_mask=mask)
        frames = model._get_feat_extract_output_lengths(mask.sum(-1))
        kept = torch.arange(selected.shape[1], device=DEVICE) < frames[:, None]
        assert_close(cut[kept], selected[kept])
        with monkeypatch.context() as patch:
            patch.setattr(LightHubertAttention, "forward", banded)
            assert_close(answer(model, audio, attention_mask=mask)[kept], selected[kept])


def banded(self, hidden_states, attention_mask=None, **kwargs):
    """Full attention under a mask."""
    query, key, value = (
        projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        for projection in (self.q_proj, self.k_proj, self.v_proj)
    )
    position = torch.arange(hidden_states.shape[1], device=DEVICE)
    near = (position[:, None] - position).abs() <= (self.window or len(position))
    true = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    mask = near & true | (position[:, None] == position)
    outputs = F.scaled_dot_product_attention(query, key, value, mask)
    return self.out_proj(outputs.transpose(1, 2).flatten(2)), None


def test_a_frame_depends_on_nothing_beyond_the_windows_of_all_layers():
    subnet = dataclasses.replace(WINDOWED.largest, attention_window=(2, 9))
    model = tiny_model(LightHubertModel, WINDOWED)
    model.set_subnet(subnet)
    hidden = noise(1, 100, 48).requires_grad_()
    states = hidden
    for layer in model.encoder.layers:
        states = layer(states)
        states = states[0] if isinstance(states, tuple) else states
    states[0, 50].square().sum().backward()
    used = hidden.grad[0].abs().sum(dim=-1).nonzero().flatten()
    assert (used.min(), used.max()) == (50 - 11, 50 + 11)


def test_a_window_of_all_frames_changes_nothing(waveform):
    model = tiny_model(LightHubertModel, WINDOWED)
    expected = answer(model, waveform)
    model.set_subnet(dataclasses.replace(WINDOWED.largest, attention_window=(70, 70)))
    assert_close(answer(model, waveform), expected)


def test_windows_are_choices_of_the_space():
    space = dataclasses.replace(WINDOWED, attention_window=None)
    assert WINDOWED.num_subnets == space.num_subnets * 4**2
    assert WINDOWED.largest.attention_window is None
    assert WINDOWED.smallest.attention_window == (2, 2)
    rng, subnet = random.Random(0), WINDOWED.smallest
    drawn = [WINDOWED.sample(rng) for _ in range(60)]
    mutants = [subnet := WINDOWED.mutate(subnet, rng, probability=0.5) for _ in range(60)]
    children = [WINDOWED.crossover(*rng.sample(drawn, 2), rng) for _ in range(60)]
    for made in (drawn, mutants, children):
        assert all(subnet in WINDOWED for subnet in made)
        assert {(subnet.attention_window or (None, None))[1] for subnet in made} == {2, 9, 70, None}
    for subnet in drawn:
        assert Subnet.from_json_string(subnet.to_json_string()) == subnet
    assert SearchSpace.from_json_string(WINDOWED.to_json_string()) == WINDOWED
    assert "attention_window=2" in str(WINDOWED.smallest)
    assert "attention_window" not in SMALL.largest.to_json_string() + SMALL.to_json_string()


def test_a_window_that_is_not_a_choice_is_refused():
    with pytest.raises(ValueError, match=r"attention_window\[1\]=3 is not in this search space"):
        WINDOWED.resolve(dataclasses.replace(WINDOWED.largest, attention_window=(2, 3)))
    with pytest.raises(ValueError, match=r"attention_window\[0\]=4 is not in this search space"):
        SMALL.resolve(dataclasses.replace(SMALL.largest, attention_window=(4,) * 12))
    with pytest.raises(ValueError, match="attention_window needs one value for each layer, but has 3 for 2 layers"):
        dataclasses.replace(WINDOWED.largest, attention_window=(2, 2, 2))


def test_a_stock_hubert_has_no_windows():
    with pytest.raises(ValueError, match="layer 0 attends to no more than 2 frames on each side"):
        to_hubert(tiny_model(LightHubertForCTC, WINDOWED).extract_subnet("smallest"))


def test_macs_of_a_window_are_those_of_its_pairs():
    for num_frames, window in ((10, 3), (10, 12), (50, 1)):
        near = (torch.arange(num_frames)[:, None] - torch.arange(num_frames)).abs() <= window
        assert num_pairs(num_frames, window) == near.sum()
    model = tiny_model(LightHubertModel, WINDOWED)
    windowed = dataclasses.replace(WINDOWED.largest, attention_window=(2, 9))
    near, far = (profile_subnet(model, subnet).macs for subnet in (windowed, WINDOWED.largest))
    assert far - near == sum(2 * 48 * (49**2 - num_pairs(49, window)) for window in (2, 9))
