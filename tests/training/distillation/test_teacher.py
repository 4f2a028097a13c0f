"""Targets, masks, losses and the draw of subnets are what the paper and the docstrings say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TWO_DEEP, noise, randomise, stock_settings, tiny_model
from transformers import (
    Data2VecAudioConfig,
    Data2VecAudioModel,
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperModel,
)

from lighthubert_training.distillation.teacher import (
    ObjectiveArguments,
    Teacher,
    draw_time_mask,
    instance_norm,
    matching_layers,
    prediction_loss,
    student_loss,
    temporal_relation_loss,
    true_frames,
)
from modeling_lighthubert import LightHubertForPreTraining, SearchSpace, Subnet


FAMILIES = [
    pytest.param(*family, id=name)
    for name, family in {
        "hubert": (HubertModel, HubertConfig, {"feat_extract_norm": "layer"}),
        "hubert-group": (HubertModel, HubertConfig, {"feat_extract_norm": "group"}),
        "hubert-stable": (HubertModel, HubertConfig, {"feat_extract_norm": "layer", "do_stable_layer_norm": True}),
        "wav2vec2": (Wav2Vec2Model, Wav2Vec2Config, {"feat_extract_norm": "layer"}),
        "wavlm": (WavLMModel, WavLMConfig, {"feat_extract_norm": "layer"}),
        "data2vec": (Data2VecAudioModel, Data2VecAudioConfig, {}),
    }.items()
]


def tiny_teacher(model=HubertModel, config=HubertConfig, changes=None, **objective) -> Teacher:
    torch.manual_seed(0)
    settings = stock_settings(num_hidden_layers=3, **(changes or {"feat_extract_norm": "layer"}))
    return Teacher(randomise(model(config(**settings))), ObjectiveArguments(**({"num_target_layers": 2} | objective)))


def tiny_student(search_space: SearchSpace = TWO_DEEP, **changes) -> LightHubertForPreTraining:
    settings = {"teacher_hidden_size": 48, "num_prediction_heads": 1} | changes
    return tiny_model(LightHubertForPreTraining, search_space, **settings)


def padded_batch() -> dict[str, torch.Tensor]:
    """Two recordings, of 18 and 9 frames; the padding is noise, which must not matter."""
    mask = torch.ones(2, 6000, dtype=torch.long)
    mask[1, 3200:] = 0
    return {"input_values": noise(2, 6000), "teacher_input_values": noise(2, 6000, seed=1), "attention_mask": mask}


@pytest.mark.parametrize(("model", "config", "changes"), FAMILIES)
def test_the_target_is_the_mean_of_normalised_feed_forward_outputs(model, config, changes):
    """Of a recording alone, by hand: what the feed-forward layers were seen to give, normalised and averaged."""
    teacher, batch = tiny_teacher(model, config, changes), padded_batch()
    # group norm sees padding, and so do the stacked position convolutions of data2vec
    pads = changes.get("feat_extract_norm") == "layer"
    lengths = (6000, 3200 if pads else 6000)
    batch["attention_mask"][1, lengths[1] :] = 0
    batch["attention_mask"][1, : lengths[1]] = 1
    (target,) = teacher(batch["teacher_input_values"], batch["attention_mask"]).targets
    seen = []
    for layer in teacher.model.encoder.layers[1:]:
        layer.feed_forward.output_dropout.register_forward_hook(lambda *call: seen.append(call[2]))
    for row, samples in enumerate(lengths):
        with torch.no_grad():
            teacher.model(batch["teacher_input_values"][row : row + 1, :samples])
        expected = sum((out - out.mean(1)) / (out.var(1, unbiased=False) + 1e-5).sqrt() for out in seen[-2:]) / 2
        frames = expected.shape[1]
        torch.testing.assert_close(target[row : row + 1, :frames], expected, rtol=0, atol=1e-4)
        assert not target[row, frames:].any()


def test_hidden_states_can_be_the_target_with_a_head_for_each_layer():
    objective = {"target": "hidden_states", "target_layers": [0, 3], "target_norm": "none"}
    teacher, batch = tiny_teacher(**objective), padded_batch()
    first, last = teacher(batch["teacher_input_values"], batch["attention_mask"]).targets
    with torch.no_grad():
        states = teacher.model(batch["teacher_input_values"][:1], output_hidden_states=True).hidden_states
    torch.testing.assert_close(first[:1], states[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(last[:1], states[3], rtol=0, atol=1e-5)


def test_a_teacher_in_half_precision_gives_targets_in_full():
    teacher, batch = tiny_teacher(), padded_batch()
    teacher.to(torch.bfloat16)
    (target,) = teacher(batch["teacher_input_values"], batch["attention_mask"]).targets
    assert target.dtype == torch.float32


def test_other_kinds_of_models_are_refused_as_teachers():
    settings = {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1}
    whisper = WhisperModel(WhisperConfig(encoder_attention_heads=2, decoder_attention_heads=2, **settings))
    with pytest.raises(ValueError, match="a teacher is a HuBERT, .* not WhisperModel"):
        Teacher(whisper)


def test_the_teacher_is_frozen_and_keeps_no_hooks():
    teacher, batch = tiny_teacher(), padded_batch()
    (target,) = teacher.train()(batch["teacher_input_values"], batch["attention_mask"]).targets
    assert not target.requires_grad
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(not layer.feed_forward._forward_hooks for layer in teacher.model.encoder.layers)


def test_instance_norm_ignores_padding():
    hidden_states, frames = noise(1, 10, 4), torch.arange(10)[None] < 6
    normalised = instance_norm(hidden_states, frames)
    torch.testing.assert_close(normalised[:, :6].mean(dim=1), torch.zeros(1, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalised[:, :6].var(dim=1, unbiased=False), torch.ones(1, 4), rtol=0, atol=1e-3)
    assert normalised[:, 6:].abs().max() == 0


def test_masks_stay_inside_the_recording_and_cover_their_share():
    num_frames = [199] * 40 + [99] * 40
    mask = draw_time_mask(num_frames, 0.65, 10, range(80))
    assert not mask[40:, 99:].any()
    assert 0.35 < mask.sum() / sum(num_frames) < 0.65  # spans overlap, so fewer frames than asked for


def test_the_mask_of_a_recording_depends_on_its_seed_and_not_on_the_batch():
    together = draw_time_mask([50, 80], 0.5, 10, ["a", "b"])
    assert torch.equal(together[:1, :50], draw_time_mask([50], 0.5, 10, ["a"]))
    assert not torch.equal(together[:1, :50], draw_time_mask([50], 0.5, 10, ["c"]))


def test_masks_shrink_for_clips_shorter_than_a_span():
    mask = draw_time_mask([4], 0.65, 10, [0])
    assert mask.shape == (1, 4)
    assert mask.any()


def test_the_loss_is_the_mean_absolute_error_of_the_frames_that_count():
    prediction, target = torch.tensor([[[1.0, 2.0], [5.0, 5.0]]]), torch.tensor([[[0.0, 4.0], [100.0, 100.0]]])
    assert float(prediction_loss(prediction, target, torch.tensor([[True, False]]))) == 1.5


def test_the_cosine_loss_is_minus_log_sigmoid_of_the_angle():
    prediction, target = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 3.0]]])
    loss = prediction_loss(prediction, target, torch.tensor([[True]]), cosine_weight=2.0)
    assert float(loss) == pytest.approx(3.0 + 2.0 * np.log(2.0))


def test_temporal_relation_compares_pairs_of_true_frames_whatever_the_widths():
    student = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])
    teacher = torch.tensor([[[1.0, 0.0, 0.0], [5.0, 0.0, 0.0], [1.0, 2.0, 3.0]]])
    frames = torch.tensor([[True, True, False]])
    # the frames are alike to the teacher, and at a right angle to the student: two of the four pairs are off by one
    assert float(temporal_relation_loss(student, teacher, frames)) == pytest.approx(0.5)
    assert float(temporal_relation_loss(3 * teacher, teacher, frames)) == pytest.approx(0.0, abs=1e-6)


def test_layers_match_those_of_the_teacher_at_the_same_height():
    assert matching_layers(range(12), 12, 12) == list(range(12))
    assert matching_layers((0, 1, 2), 3, 12) == [3, 7, 11]
    assert matching_layers((0, 2), 4, 2) == [0, 1]


@pytest.mark.parametrize(
    "options", [{}, {"loss_frames": "all", "cosine_weight": 1.0}, {"temporal_relation_weight": 1}]
)
def test_every_objective_trains_every_subnet(options):
    teacher, batch, student = tiny_teacher(**options), padded_batch(), tiny_student()
    answer = teacher(batch["teacher_input_values"], batch["attention_mask"])
    mask = true_frames(student, 18, batch["attention_mask"]) & (torch.arange(18) % 2 == 0)
    for name in ("smallest", "largest"):
        student.set_subnet(name)
        loss = student_loss(student, batch, answer, mask, teacher.objective)
        loss.backward()
        assert loss > 0
    assert torch.isfinite(student.prediction_heads[0].weight.grad).all()


@pytest.mark.parametrize("options", [{}, {"cosine_weight": 1.0}, {"target": "feature_encoder"}])
@torch.no_grad()
def test_a_padded_batch_gives_the_mean_over_the_same_clips_alone(options):
    student, batch, teacher = tiny_student(), padded_batch(), tiny_teacher(loss_frames="all", **options)
    answer = teacher(batch["teacher_input_values"], batch["attention_mask"])
    frames = true_frames(student, 18, batch["attention_mask"])
    mask = frames & ((torch.arange(18) % 3 == 0) | (teacher.objective.target == "feature_encoder"))
    together = student_loss(student, batch, answer, mask, teacher.objective)
    alone, count = 0.0, 0
    for row, samples in enumerate((6000, 3200)):
        single = {name: tensor[row : row + 1, :samples] for name, tensor in batch.items()}
        single_answer = teacher(single["teacher_input_values"], single["attention_mask"])
        length = single_answer.targets[0].shape[1]
        loss = student_loss(student, single, single_answer, mask[row : row + 1, :length], teacher.objective)
        alone, count = alone + float(loss) * length, count + length
    assert float(together) == pytest.approx(alone / count, abs=1e-5)


@pytest.mark.parametrize(("model", "config", "changes"), FAMILIES)
@torch.no_grad()
def test_the_target_of_a_warm_up_is_what_goes_into_the_position_convolution(model, config, changes):
    teacher, batch = tiny_teacher(model, config, changes, target="feature_encoder"), padded_batch()
    inputs = []
    handle = teacher.model.feature_projection.register_forward_hook(lambda _, given, output: inputs.append(output))
    teacher.model(batch["teacher_input_values"], batch["attention_mask"])
    handle.remove()
    expected = inputs[0][0] if isinstance(inputs[0], tuple) else inputs[0]
    answer = teacher(batch["teacher_input_values"], batch["attention_mask"])
    frames = true_frames(teacher.model, 18, batch["attention_mask"])  # the model empties the others
    torch.testing.assert_close(answer.targets[0][frames], expected[frames])


def test_a_warm_up_trains_narrow_convolutions_and_asks_nothing_of_those_of_the_teacher():
    """The error of a subnet is that of the first of its teacher's features, in true frames."""
    space = replace(TWO_DEEP, conv_dim=((8, 16),) * 7)
    teacher, batch, student = tiny_teacher(target="feature_encoder"), padded_batch(), tiny_student(space)
    batch["input_values"] = batch["teacher_input_values"]
    answer = teacher(batch["teacher_input_values"], batch["attention_mask"])
    base = student.hubert
    base.feature_extractor.load_state_dict(teacher.model.feature_extractor.state_dict())
    base.feature_projection.load_state_dict(teacher.model.feature_projection.state_dict())
    mask = torch.zeros(2, 18, dtype=torch.bool)
    for width in space.hidden_size:
        subnet = Subnet.uniform(width, 1, 4, 2 * width, head_dim=4)
        student.set_subnet(replace(subnet, conv_dim=(16,) * 7))
        assert student_loss(student, batch, answer, mask, teacher.objective) < 1e-10
        student.set_subnet(replace(subnet, conv_dim=(8,) * 7))
        loss = student_loss(student, batch, answer, mask, teacher.objective)
        features = base.feature_projection(base.feature_extractor(batch["input_values"]).transpose(1, 2))
        frames = true_frames(student, 18, batch["attention_mask"])
        expected = (features - answer.targets[0][..., :width])[frames].square().mean()
        torch.testing.assert_close(loss, expected)
        assert loss > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "feature_encoder", "target_layers": [1]}, "feature_encoder has no layers"),
        ({"target_layers": [0]}, "feed_forward are counted from 1"),
        ({"target_layers": []}, "counted from 1"),
        ({"mask_time_prob": 1.5}, "between 0 and 1"),
        ({"mask_time_prob": 0.0}, "no frame would count"),
        ({"target_layers": [4]}, "the teacher has 3 layers"),
        ({"num_target_layers": 8}, "num_target_layers=8, but the teacher has 3 layers"),
    ],
)
def test_impossible_objectives_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_teacher(**options)
