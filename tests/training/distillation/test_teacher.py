"""Targets are what the paper and the docstrings say, and a student that cannot be compared with them is refused."""

import pytest
import torch
from conftest import NARROW, assert_close, noise
from tiny_distillation import padded_batch, tiny_student, tiny_teacher
from transformers import (
    Data2VecAudioConfig,
    Data2VecAudioModel,
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperModel,
)

from lighthubert_training.distillation.arguments import ObjectiveArguments
from lighthubert_training.distillation.teacher import (
    Teacher,
    build_teacher,
    check_feature_encoder,
    check_frame_rates,
    instance_norm,
    normalise,
)
from modeling_lighthubert.errors import UserError


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
        assert_close(target[row : row + 1, :frames], expected)
        assert not target[row, frames:].any()


def test_hidden_states_can_be_the_target_with_a_head_for_each_layer():
    objective = {"target": "hidden_states", "target_layers": [0, 3], "target_norm": "none"}
    teacher, batch = tiny_teacher(**objective), padded_batch()
    first, last = teacher(batch["teacher_input_values"], batch["attention_mask"]).targets
    with torch.no_grad():
        states = teacher.model(batch["teacher_input_values"][:1], output_hidden_states=True).hidden_states
    assert_close(first[:1], states[0])
    assert_close(last[:1], states[3])


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
    hidden_states, frames = noise(1, 10, 4).cpu(), torch.arange(10)[None] < 6
    normalised = instance_norm(hidden_states, frames)
    torch.testing.assert_close(normalised[:, :6].mean(dim=1), torch.zeros(1, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalised[:, :6].var(dim=1, unbiased=False), torch.ones(1, 4), rtol=0, atol=1e-3)
    assert normalised[:, 6:].abs().max() == 0


def test_layer_norm_is_over_the_features_of_a_frame():
    hidden_states, frames = noise(1, 10, 4).cpu(), torch.arange(10)[None] < 6
    normalised = normalise(hidden_states, frames, "layer")
    assert_close(normalised[:, :6].mean(dim=-1) + 1, torch.ones(1, 6))
    assert not normalised[:, 6:].any()
    assert torch.equal(normalise(hidden_states, frames, "none")[:, :6], hidden_states[:, :6])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_layers": [4]}, "the teacher has 3 layers"),
        ({"num_target_layers": 8}, "num_target_layers=8, but the teacher has 3 layers"),
        ({"num_target_layers": 0}, "num_target_layers=0, but the teacher has 3 layers"),
    ],
)
def test_layers_that_the_teacher_lacks_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        tiny_teacher(**options)


# Built from a checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A teacher in half precision, with its feature extractor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_teacher().model.to(torch.bfloat16).save_pretrained(folder / "teacher")
    tiny_teacher().model.save_pretrained(folder / "without-extractor")
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder / "teacher")
    return folder


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)],
)
def test_a_teacher_runs_in_the_precision_of_its_weights_or_in_another(checkpoint, dtype, expected):
    teacher, extractor = build_teacher(str(checkpoint / "teacher"), dtype, ObjectiveArguments(num_target_layers=1))
    assert {weight.dtype for weight in teacher.parameters()} == {expected}
    assert teacher.target_layers == [3]
    assert not extractor.do_normalize


def test_a_teacher_without_a_feature_extractor_is_refused(checkpoint):
    with pytest.raises(UserError, match="without-extractor has no feature extractor"):
        build_teacher(str(checkpoint / "without-extractor"), objective=ObjectiveArguments(num_target_layers=1))


# Compared with the student


def extractors(*rates: int) -> tuple[Wav2Vec2FeatureExtractor, ...]:
    return tuple(Wav2Vec2FeatureExtractor(sampling_rate=rate) for rate in rates)


def test_student_and_teacher_have_to_take_the_same_audio():
    check_frame_rates(tiny_student(), tiny_teacher(), extractors(16_000, 16_000))
    with pytest.raises(UserError, match=r"take audio at \[16000, 8000\] Hz"):
        check_frame_rates(tiny_student(), tiny_teacher(), extractors(16_000, 8_000))
    slow = tiny_teacher(changes={"conv_stride": (5, 2, 2, 2, 2, 2, 4)})
    with pytest.raises(UserError, match=r"make \[49, .*\] and \[25, .*\] frames of \[16000"):
        check_frame_rates(tiny_student(), slow, extractors(16_000, 16_000))


def test_a_feature_encoder_is_shared_by_models_that_have_the_same():
    teacher, student = tiny_teacher(), tiny_student(feat_extract_norm="layer", conv_bias=False)
    with pytest.raises(UserError, match="differ in weights"):
        check_feature_encoder(student, teacher)
    student.hubert.feature_extractor.load_state_dict(teacher.model.feature_extractor.state_dict())
    check_feature_encoder(student, teacher)
    with pytest.raises(UserError, match="differ in feat_extract_norm, layers"):
        check_feature_encoder(tiny_student(feat_extract_norm="group"), teacher)
    with pytest.raises(UserError, match="subnets choose their own part"):
        check_feature_encoder(tiny_student(NARROW), teacher)
