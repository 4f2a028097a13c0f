"""The teacher: a frozen HuBERT-like model, the targets that are made of its outputs, and the checks that a student can
learn from it."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoFeatureExtractor, AutoModel, PreTrainedModel, Wav2Vec2FeatureExtractor

from lighthubert_training.distillation.arguments import ObjectiveArguments
from lighthubert_training.models import true_frames
from modeling_lighthubert import LightHubertConfig, LightHubertForPreTraining
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.loading import load_model, load_processor


class TeacherOutputs(NamedTuple):
    """What the student learns from.

    Attributes:
        targets: one for each prediction head, (batch_size, num_frames, hidden_size) in fp32; zeros on padding.
        hidden_states: of every layer, the same shape; empty if the objective has no use for them.
        conv_features: output of the feature encoder, (batch_size, conv_dim, num_frames).
        frames: true frames, bool (batch_size, num_frames).
    """

    targets: tuple[torch.Tensor, ...]
    hidden_states: tuple[torch.Tensor, ...]
    conv_features: torch.Tensor
    frames: torch.Tensor


class Teacher(nn.Module):
    """A frozen HuBERT-like model (HuBERT, wav2vec 2.0, WavLM, data2vec) that gives the targets of the student.

    By default the target is the mean over the last layers of the feed-forward outputs, before the residual and the
    final layer norm (authors, issue 6). Each layer's output is normalised over the true frames of its recording
    first, as data2vec does for audio; the paper does not say how.

    Args:
        model: the base model. It runs in evaluation mode and in its own dtype.

    Raises:
        UserError: the model is not of that kind, or lacks the layers that the objective names.
    """

    def __init__(self, model: PreTrainedModel, objective: ObjectiveArguments | None = None):
        super().__init__()
        self.objective = objective or ObjectiveArguments()
        layers = getattr(getattr(model, "encoder", None), "layers", [])
        if not len(layers) or not all(hasattr(layer, "feed_forward") for layer in layers):
            kinds = "a HuBERT, wav2vec 2.0, WavLM or data2vec-audio base model"
            raise UserError(f"a teacher is {kinds}, not {type(model).__name__}")
        depth, asked, num_last = len(layers), self.objective.target_layers, self.objective.num_target_layers
        if asked is not None and max(asked) > depth:
            raise UserError(f"target_layers={asked}, but the teacher has {depth} layers")
        if asked is None and not 1 <= num_last <= depth:
            raise UserError(f"num_target_layers={num_last}, but the teacher has {depth} layers")
        self.model = model.eval().requires_grad_(False)
        self.target_layers = list(range(depth - num_last + 1, depth + 1)) if asked is None else list(asked)

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in evaluation mode."""
        return super().train(False)

    def outputs(self, batch: Mapping[str, Any]) -> TeacherOutputs:
        """Of a batch of a `DistillationCollator`, on the teacher's device."""
        return self(batch["teacher_input_values"], batch["attention_mask"])

    @torch.no_grad()
    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor) -> TeacherOutputs:
        """The targets of a batch.

        Args:
            input_values: (batch_size, num_samples), as the teacher's own feature extractor gives them.
            attention_mask: (batch_size, num_samples), 1 for samples of the recording.
        """
        objective, layers = self.objective, list(self.model.encoder.layers)
        wants_states = objective.target == "hidden_states" or objective.temporal_relation_weight > 0
        modules: dict[int | str, nn.Module] = {"conv_features": self.model.feature_extractor}
        if objective.target == "feed_forward":
            modules |= {number: layers[number - 1].feed_forward for number in self.target_layers}
        with keeping_outputs(modules) as kept:
            outputs = self.model(
                input_values.to(self.model.dtype), attention_mask=attention_mask, output_hidden_states=wants_states
            )
        frames = true_frames(self.model, outputs.last_hidden_state.shape[1], attention_mask)
        states = tuple(state.float() for state in outputs.hidden_states) if wants_states else ()
        if objective.target == "hidden_states":
            kept |= {number: states[number] for number in self.target_layers}
        targets = [normalise(kept[number].float(), frames, objective.target_norm) for number in self.target_layers]
        if objective.target_layers is None:
            targets = [torch.stack(targets).mean(dim=0)]
        states = states[1:] if objective.temporal_relation_weight > 0 else ()
        return TeacherOutputs(tuple(targets), states, kept["conv_features"], frames)


@contextmanager
def keeping_outputs(modules: Mapping[int | str, nn.Module]) -> Iterator[dict[int | str, torch.Tensor]]:
    """Inside the block, the latest output of each of `modules` is kept, by name."""
    kept: dict[int | str, torch.Tensor] = {}
    with ExitStack() as hooks:
        for name, module in modules.items():
            hook = module.register_forward_hook(lambda _, inputs, output, name=name: kept.update({name: output}))
            hooks.callback(hook.remove)
        yield kept


def normalise(hidden_states: torch.Tensor, frames: torch.Tensor, norm: str) -> torch.Tensor:
    """Applies the norm of that name, and writes zeros on frames of padding.

    Args:
        hidden_states: (batch_size, num_frames, hidden_size).
        frames: true frames, bool (batch_size, num_frames).
        norm: `"instance"`, `"layer"` or `"none"`.
    """
    if norm == "instance":
        return instance_norm(hidden_states, frames)
    if norm == "layer":
        hidden_states = F.layer_norm(hidden_states, hidden_states.shape[-1:])
    return hidden_states * frames.unsqueeze(-1)


def instance_norm(hidden_states: torch.Tensor, frames: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Zero mean and unit variance of every feature over a recording's true frames; arguments as in `normalise`."""
    weight = frames.unsqueeze(-1).to(hidden_states.dtype)
    count = weight.sum(dim=1, keepdim=True)
    centred = (hidden_states - (hidden_states * weight).sum(dim=1, keepdim=True) / count) * weight
    variance = centred.square().sum(dim=1, keepdim=True) / count
    return centred * torch.rsqrt(variance + eps)


def build_teacher(
    name_or_path: str, dtype: str = "auto", objective: ObjectiveArguments | None = None
) -> tuple[Teacher, Wav2Vec2FeatureExtractor]:
    """The teacher, and its own feature extractor.

    Raises:
        UserError: there is no such checkpoint, it has no feature extractor, or it is no teacher for `objective`.
    """
    teacher = Teacher(load_model(name_or_path, head=AutoModel, dtype=dtype), objective)
    return teacher, load_processor(name_or_path, AutoFeatureExtractor)


def masking_options(config: Any) -> dict[str, Any]:
    """Options for the configuration of a student, with which it applies the masks that it is given and no others,
    whatever its own `config` says: that of a checkpoint fine-tuned without SpecAugment has no mask embedding."""
    probability = config.mask_time_prob or LightHubertConfig.mask_time_prob
    return {"apply_spec_augment": True, "mask_time_prob": probability, "mask_feature_prob": 0.0}


def check_frame_rates(
    student: LightHubertForPreTraining, teacher: Teacher, extractors: tuple[Wav2Vec2FeatureExtractor, ...]
) -> None:
    """Raises a `UserError` unless student and teacher take the same audio and make the same number of frames of it."""
    rates = [extractor.sampling_rate for extractor in extractors]
    if len(set(rates)) > 1:
        raise UserError(f"student and teacher take audio at {rates} Hz: they cannot be compared")
    samples, models = [16_000, 80_000, 123_456], (student, teacher.model)
    ours, theirs = ([int(each._get_feat_extract_output_lengths(length)) for length in samples] for each in models)
    if ours != theirs:
        raise UserError(
            f"student and teacher make {ours} and {theirs} frames of {samples} samples: they cannot be compared. Start"
            " the student from a model with the convolutions (conv_kernel, conv_stride) of the teacher"
        )


def check_feature_encoder(student: LightHubertForPreTraining, teacher: Teacher) -> None:
    """Raises a `UserError` unless the convolutions are the same and can be computed once for student and teacher."""
    if student.search_space is not None and student.search_space.conv_dim is not None:
        raise UserError("share_feature_encoder: leave it out where subnets choose their own part of the convolutions")
    ours, theirs = (model.feature_extractor.state_dict() for model in (student.hubert, teacher.model))
    differing = []
    for name in ("feat_extract_norm", "feat_extract_activation", "conv_stride"):
        if (own := getattr(student.config, name)) != getattr(teacher.model.config, name, own):
            differing.append(name)
    if ours.keys() != theirs.keys():
        differing.append("layers")
    elif not all(torch.equal(ours[name], theirs[name].to(ours[name].dtype)) for name in ours):
        differing.append("weights")
    if differing:
        raise UserError(
            f"share_feature_encoder: the feature encoders of student and teacher differ in {', '.join(differing)}."
            " Start the student from the teacher, or use freeze_feature_encoder"
        )
