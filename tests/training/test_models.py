"""A frozen feature encoder is recognised, and is replaced by its output for as long as a block lasts; masks tell
frames from padding, and hide spans that follow from a recording's seed and length alone."""

import pytest
import torch
from conftest import DEVICE, NARROW, TWO_DEEP, noise, tiny_model

from lighthubert_training.models import (
    computed_once,
    draw_time_mask,
    frame_mask,
    has_fixed_feature_encoder,
    true_frames,
    true_lengths,
)
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


# Masks


def test_frames_up_to_the_length_are_true():
    mask = frame_mask(torch.tensor([0, 2, 3]), 3)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[False] * 3, [True, True, False], [True] * 3]


def test_true_frames_are_those_that_the_recording_alone_would_have():
    model, samples = tiny_model(), [400, 719, 720, 4000]
    attention_mask = torch.zeros(4, 4000, dtype=torch.int32, device=DEVICE)
    for row, count in enumerate(samples):
        attention_mask[row, :count] = 1
    with torch.no_grad():
        frames = [model(torch.zeros(1, count, device=DEVICE)).last_hidden_state.shape[1] for count in samples]
    assert frames == [1, 1, 2, 12]
    assert true_lengths(model, attention_mask).tolist() == frames
    assert torch.equal(true_frames(model, 12, attention_mask), frame_mask(torch.tensor(frames, device=DEVICE), 12))


def test_masks_stay_inside_the_recording_and_cover_their_share():
    num_frames = [199] * 40 + [99] * 40
    mask = draw_time_mask(num_frames, 0.65, 10, range(80))
    assert mask.shape == (80, 199)
    assert mask.dtype == torch.bool
    assert not mask[40:, 99:].any()
    assert 0.35 < mask.sum() / sum(num_frames) < 0.65  # spans overlap, so fewer frames than asked for


def test_masked_frames_come_in_spans():
    mask = draw_time_mask([199] * 20, 0.2, 10, range(20)).int()
    edges = torch.nn.functional.pad(mask, (1, 1)).diff()
    for row in edges:
        starts, ends = (row == 1).nonzero().flatten(), (row == -1).nonzero().flatten()
        assert (ends - starts >= 10).all()


def test_a_recording_with_room_for_them_has_at_least_two_spans():
    mask = draw_time_mask([40] * 50, 1e-9, 5, range(50))
    assert set(mask.sum(-1).tolist()) <= set(range(6, 11))
    assert 10 in mask.sum(-1)


def test_the_mask_of_a_recording_depends_on_its_seed_and_not_on_the_batch():
    together = draw_time_mask([50, 80], 0.5, 10, ["a", "b"])
    assert torch.equal(together[:1, :50], draw_time_mask([50], 0.5, 10, ["a"]))
    assert not torch.equal(together[:1, :50], draw_time_mask([50], 0.5, 10, ["c"]))


@pytest.mark.parametrize("length", [1, 4, 9])
def test_clips_shorter_than_a_span_are_one_span(length):
    mask = draw_time_mask([length], 0.65, 10, [0])
    assert mask.shape == (1, length)
    assert mask.all()


def test_nothing_is_masked_without_a_probability():
    assert not draw_time_mask([50, 3], 0.0, 10, [0, 1]).any()
