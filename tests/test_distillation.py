"""Targets, masks, losses and the draw of subnets are what the paper and the docstrings say."""

import numpy as np
import pytest
import torch
from conftest import SIX_DEEP, TWO_DEEP, noise, randomise, stock_settings, tiny_model
from transformers import HubertConfig, HubertModel

from modeling_lighthubert import LightHubertForPreTraining

from distillation import (
    Teacher,
    distillation_loss,
    draw_subnets,
    draw_time_mask,
    evaluate,
    instance_norm,
    student_loss,
    true_frames,
)


def tiny_teacher(stable: bool = False, num_target_layers: int = 2) -> Teacher:
    torch.manual_seed(0)
    settings = stock_settings(
        num_hidden_layers=3, hidden_size=48, feat_extract_norm="layer", do_stable_layer_norm=stable
    )
    return Teacher(randomise(HubertModel(HubertConfig(**settings))), num_target_layers)


def padded_batch() -> dict[str, torch.Tensor]:
    """Two recordings, of 18 and 9 frames; the padding is noise, which must not matter."""
    mask = torch.ones(2, 6000, dtype=torch.long)
    mask[1, 3200:] = 0
    return {"input_values": noise(2, 6000), "teacher_input_values": noise(2, 6000, seed=1), "attention_mask": mask}


@pytest.mark.parametrize("stable", [False, True])
def test_the_target_is_the_mean_of_normalised_feed_forward_outputs(stable):
    """Computed once more by hand, from what the layers before the last two give."""
    teacher, batch = tiny_teacher(stable), padded_batch()
    target = teacher(batch["teacher_input_values"], batch["attention_mask"])
    recording = batch["teacher_input_values"][1:, :3200]
    with torch.no_grad():
        states = teacher.model(recording, output_hidden_states=True).hidden_states
        outputs = []
        for layer, state in zip(teacher.model.encoder.layers[1:], states[1:], strict=False):
            if stable:
                state = state + layer.attention(layer.layer_norm(state))[0]
                output = layer.feed_forward(layer.final_layer_norm(state))
            else:
                output = layer.feed_forward(layer.layer_norm(state + layer.attention(state)[0]))
            centred = output - output.mean(dim=1, keepdim=True)
            outputs.append(centred / (output.var(dim=1, keepdim=True, unbiased=False) + 1e-5).sqrt())
    frames = outputs[0].shape[1]
    torch.testing.assert_close(target[1:, :frames], sum(outputs) / 2, rtol=0, atol=1e-4)
    assert target[1, frames:].abs().max() == 0


def test_the_teacher_is_frozen_and_keeps_no_hooks():
    teacher, batch = tiny_teacher(), padded_batch()
    target = teacher(batch["teacher_input_values"], batch["attention_mask"])
    assert not target.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(not layer.feed_forward._forward_hooks for layer in teacher.model.encoder.layers)


def test_more_target_layers_than_the_teacher_has_are_refused():
    with pytest.raises(ValueError, match="num_target_layers=8, but the teacher has 3 layers"):
        tiny_teacher(num_target_layers=8)


def test_instance_norm_ignores_padding():
    hidden_states, frames = noise(1, 10, 4), torch.arange(10)[None] < 6
    normalised = instance_norm(hidden_states, frames)
    torch.testing.assert_close(normalised[:, :6].mean(dim=1), torch.zeros(1, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalised[:, :6].var(dim=1, unbiased=False), torch.ones(1, 4), rtol=0, atol=1e-3)
    assert normalised[:, 6:].abs().max() == 0


def test_masks_stay_inside_the_recording_and_cover_their_share():
    model = tiny_model(LightHubertForPreTraining, TWO_DEEP)
    mask = torch.ones(8, 64_000, dtype=torch.long)
    mask[:4, 32_000:] = 0
    np.random.seed(0)
    frames = true_frames(model, 199, mask)
    drawn = torch.stack([draw_time_mask(model, mask, 0.65, 10) for _ in range(10)])
    assert not (drawn & ~frames).any()
    share = drawn.sum() / (10 * frames.sum())
    assert 0.35 < share < 0.65  # spans overlap, so fewer frames than asked for


def test_masks_shrink_for_clips_shorter_than_a_span():
    model = tiny_model(LightHubertForPreTraining, TWO_DEEP)
    mask = draw_time_mask(model, torch.ones(1, 1500, dtype=torch.long), 0.65, 10)
    assert mask.shape == (1, 4)
    assert mask.any()


def test_the_loss_is_the_mean_absolute_error_of_the_frames_that_count():
    prediction, target = torch.tensor([[[1.0, 2.0], [5.0, 5.0]]]), torch.tensor([[[0.0, 4.0], [100.0, 100.0]]])
    assert float(distillation_loss(prediction, target, torch.tensor([[True, False]]))) == 1.5


@torch.no_grad()
def test_a_padded_batch_gives_the_mean_over_the_same_clips_alone():
    student, teacher, batch = tiny_model(LightHubertForPreTraining, TWO_DEEP), tiny_teacher(), padded_batch()
    student.config.teacher_hidden_size = 48
    student.prediction_heads = torch.nn.ModuleList([torch.nn.Linear(48, 48, bias=False)])
    target = teacher(batch["teacher_input_values"], batch["attention_mask"])
    frames = true_frames(student, target.shape[1], batch["attention_mask"])
    mask = frames & (torch.arange(frames.shape[1]) % 3 == 0)
    together = student_loss(student, batch, target, mask, frames)
    alone, count = 0.0, 0
    for row, samples in enumerate((6000, 3200)):
        single = {name: tensor[row : row + 1, :samples] for name, tensor in batch.items()}
        single_target = teacher(single["teacher_input_values"], single["attention_mask"])
        length = single_target.shape[1]
        whole = torch.ones(1, length, dtype=torch.bool)
        alone += float(student_loss(student, single, single_target, mask[row : row + 1, :length], whole)) * length
        count += length
    assert float(together) == pytest.approx(alone / count, abs=1e-5)


def test_the_draw_depends_on_seed_and_step_only():
    drawn = [draw_subnets(SIX_DEEP, "uniform", 0, step) for step in range(20)]
    assert drawn == [draw_subnets(SIX_DEEP, "uniform", 0, step) for step in range(20)]
    assert len({subnets[0] for subnets in drawn}) > 15
    assert drawn[0] != draw_subnets(SIX_DEEP, "uniform", 1, 0)


def test_sampling_strategies_draw_what_they_are_named_for():
    assert draw_subnets(SIX_DEEP, "largest", 0, 3) == [SIX_DEEP.largest]
    smallest, random_one, largest = draw_subnets(SIX_DEEP, "sandwich", 0, 3)
    assert (smallest, largest) == (SIX_DEEP.smallest, SIX_DEEP.largest)
    assert random_one in SIX_DEEP
    assert draw_subnets(None, "uniform", 0, 0) == [None]
    with pytest.raises(ValueError, match="sampling='best' is not known"):
        draw_subnets(SIX_DEEP, "best", 0, 0)


def test_evaluation_repeats_itself_and_leaves_random_state_alone():
    teacher, batch = tiny_teacher(), padded_batch()
    student = tiny_model(LightHubertForPreTraining, TWO_DEEP, teacher_hidden_size=48)
    np.random.seed(5)
    first = evaluate(student.train(), teacher, [batch], 0.5, 4)
    drawn = np.random.rand()
    np.random.seed(5)
    assert drawn == np.random.rand()
    assert first == evaluate(student, teacher, [batch], 0.5, 4)
    assert student.training
