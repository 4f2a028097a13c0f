"""Distilling a HuBERT into a supernet: the teacher's targets, the student's masks, and the loss between them.

Sources are section 2 of the LightHuBERT paper (arXiv 2203.15610) and what its authors answered in issues 4 and 6 of
their repository; what neither says is marked as our choice. The options cover what related methods do as well:

| method | target | layers | normalisation | loss |
|---|---|---|---|---|
| LightHuBERT | feed_forward | mean of the last 8 | instance (as data2vec; not published) | L1, masked frames |
| DistilHuBERT, arXiv 2110.01900 | hidden_states | 4, 8, 12, a head each | none | L1 + cosine, all frames |
| DPHuBERT, arXiv 2305.17651 | hidden_states | 0, 4, 8, 12, a head each | none | L1 + cosine, all frames |
| STaRHuBERT, arXiv 2312.09040 | temporal relation of every layer | all | frames of length 1 (our choice) | squared |
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from modeling_lighthubert import LightHubertForPreTraining, LightHubertPreTrainedModel
from modeling_lighthubert.search_space import kept_layers


@dataclass
class ObjectiveArguments:
    """What the student predicts, and how its error counts. Defaults are the paper's where it gives them."""

    target: str = field(
        default="feed_forward",
        metadata={
            "help": "Part of a teacher's layer: its feed-forward output before the residual, or its hidden states. Or"
            " what its feature encoder and projection give: warms up the convolutions of narrow subnets, and nothing"
            " else learns; the teacher is what the student starts from.",
            "choices": ("feed_forward", "hidden_states", "feature_encoder"),
        },
    )
    num_target_layers: int = field(
        default=8, metadata={"help": "Teacher layers, from the top, whose mean is the target."}
    )
    target_layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "Teacher layers, the first is 1, each predicted by a head of its own, in place of the mean. Hidden"
            " states have 0 too: what goes into the first layer."
        },
    )
    target_norm: str = field(
        default="instance",
        metadata={
            "help": "Normalisation of each layer before the mean: over time (instance), over features (layer), none.",
            "choices": ("instance", "layer", "none"),
        },
    )
    mask_time_prob: float = field(default=0.65, metadata={"help": "Share of frames the student does not see."})
    mask_time_length: int = field(default=10, metadata={"help": "Length of a masked span in frames."})
    loss_frames: str = field(
        default="masked", metadata={"help": "Frames whose error counts.", "choices": ("masked", "all")}
    )
    cosine_weight: float = field(default=0.0, metadata={"help": "Weight of the cosine loss beside L1."})
    temporal_relation_weight: float = field(
        default=0.0, metadata={"help": "Weight of the loss between the frames' similarities, layer by layer."}
    )

    def __post_init__(self) -> None:
        first = 0 if self.target == "hidden_states" else 1
        if self.target_layers is not None and (not self.target_layers or min(self.target_layers) < first):
            raise ValueError(f"target_layers={self.target_layers}: {self.target} are counted from {first}")
        if not 0.0 <= self.mask_time_prob <= 1.0:
            raise ValueError(f"mask_time_prob={self.mask_time_prob} has to be between 0 and 1")
        if self.target == "feature_encoder":
            if self.target_layers is not None or self.temporal_relation_weight > 0 or self.cosine_weight > 0:
                raise ValueError(
                    "the target feature_encoder has no layers: leave out target_layers, cosine_weight and"
                    " temporal_relation_weight"
                )
            self.loss_frames = "all"  # masks come after the feature encoder
        if self.loss_frames == "masked" and self.mask_time_prob == 0.0:
            raise ValueError("no frame would count: loss_frames='masked' needs mask_time_prob above 0")

    @property
    def num_prediction_heads(self) -> int:
        return 1 if self.target_layers is None else len(self.target_layers)


class TeacherAnswer(NamedTuple):
    """What the student learns from.

    Attributes:
        targets: one for each prediction head, (batch_size, num_frames, hidden_size) in fp32; zeros on padding, but for
            the output of the projection, where that is the target.
        hidden_states: of every layer, the same shape; empty if the objective has no use for them.
        conv_features: output of the feature encoder, (batch_size, conv_dim, num_frames).
        frames: which are no padding, bool (batch_size, num_frames).
    """

    targets: tuple[torch.Tensor, ...]
    hidden_states: tuple[torch.Tensor, ...]
    conv_features: torch.Tensor
    frames: torch.Tensor


class Teacher(nn.Module):
    """A frozen HuBERT-like model (HuBERT, wav2vec 2.0, WavLM, data2vec) that says what the student should predict.

    By default the target is the mean over the last layers of the feed-forward outputs, before the residual and the
    final layer norm (authors, issue 6). Each layer's output is normalised over the true frames of its recording
    first, as data2vec does for audio; the paper does not say how.

    Args:
        model: the base model. It runs in evaluation mode and in its own dtype.

    Raises:
        ValueError: not a model of that kind, or one without the layers that the objective names.
    """

    def __init__(self, model: PreTrainedModel, objective: ObjectiveArguments | None = None):
        super().__init__()
        self.objective = objective or ObjectiveArguments()
        layers = getattr(getattr(model, "encoder", None), "layers", [])
        if not len(layers) or not all(hasattr(layer, "feed_forward") for layer in layers):
            raise ValueError(
                f"a teacher is a HuBERT, wav2vec 2.0, WavLM or data2vec-audio base model, not {type(model).__name__}"
            )
        depth, asked = len(layers), self.objective.target_layers
        if asked is not None and max(asked) > depth:
            raise ValueError(f"target_layers={asked}, but the teacher has {depth} layers")
        if asked is None and not 1 <= self.objective.num_target_layers <= depth:
            raise ValueError(
                f"num_target_layers={self.objective.num_target_layers}, but the teacher has {depth} layers"
            )
        self.model = model.eval().requires_grad_(False)
        last = range(depth - self.objective.num_target_layers + 1, depth + 1)
        self.target_layers = list(last) if asked is None else list(asked)

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in evaluation mode."""
        return super().train(False)

    @property
    def hidden_size(self) -> int:
        return self.model.config.hidden_size

    @torch.no_grad()
    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor) -> TeacherAnswer:
        """The targets of a batch.

        Args:
            input_values: (batch_size, num_samples), as the teacher's own feature extractor gives them.
            attention_mask: (batch_size, num_samples), 1 for samples of the recording.
        """
        objective = self.objective
        if objective.target == "feature_encoder":
            conv_features = self.model.feature_extractor(input_values.to(self.model.dtype))
            frames = true_frames(self.model, conv_features.shape[-1], attention_mask)
            return TeacherAnswer((projected(self.model, conv_features).float(),), (), conv_features, frames)
        layers = list(self.model.encoder.layers)
        outputs: dict[int | str, torch.Tensor] = {}

        def keep(name: int | str):
            def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
                outputs[name] = output

            return hook

        wants_states = objective.target == "hidden_states" or objective.temporal_relation_weight > 0
        with ExitStack() as hooks:
            handle = self.model.feature_extractor.register_forward_hook(keep("conv_features"))
            hooks.callback(handle.remove)
            if objective.target == "feed_forward":
                for number in self.target_layers:
                    handle = layers[number - 1].feed_forward.register_forward_hook(keep(number))
                    hooks.callback(handle.remove)
            answer = self.model(
                input_values.to(self.model.dtype), attention_mask=attention_mask, output_hidden_states=wants_states
            )
        frames = true_frames(self.model, answer.last_hidden_state.shape[1], attention_mask)
        states = tuple(state.float() for state in answer.hidden_states) if wants_states else ()
        if objective.target == "hidden_states":
            outputs |= {number: states[number] for number in self.target_layers}
        targets = [normalised(outputs[number].float(), frames, objective.target_norm) for number in self.target_layers]
        if objective.target_layers is None:
            targets = [torch.stack(targets).mean(dim=0)]
        states = states[1:] if objective.temporal_relation_weight > 0 else ()
        return TeacherAnswer(tuple(targets), states, outputs["conv_features"], frames)


def projected(model: PreTrainedModel, conv_features: torch.Tensor) -> torch.Tensor:
    """What the first layer is made of: the projection of `conv_features`, (batch_size, num_frames, hidden_size)."""
    outputs = model.feature_projection(conv_features.transpose(1, 2))
    return outputs[0] if isinstance(outputs, tuple) else outputs  # wav2vec 2.0 gives what it normalised as well


def true_frames(model: PreTrainedModel, num_frames: int, attention_mask: torch.Tensor) -> torch.Tensor:
    """Which frames are not padding: bool (batch_size, num_frames)."""
    lengths = model._get_feat_extract_output_lengths(attention_mask.sum(-1))
    return torch.arange(num_frames, device=attention_mask.device) < lengths[:, None]


def normalised(hidden_states: torch.Tensor, frames: torch.Tensor, norm: str) -> torch.Tensor:
    """`hidden_states` after the norm of that name, and zeros on frames of padding.

    Args:
        hidden_states: (batch_size, num_frames, hidden_size).
        frames: bool (batch_size, num_frames).
        norm: `"instance"`, `"layer"` or `"none"`.
    """
    if norm == "instance":
        return instance_norm(hidden_states, frames)
    if norm == "layer":
        hidden_states = F.layer_norm(hidden_states, hidden_states.shape[-1:])
    return hidden_states * frames.unsqueeze(-1)


def instance_norm(hidden_states: torch.Tensor, frames: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Zero mean and unit variance of every feature over the true `frames` of its recording; zeros elsewhere.

    Args:
        hidden_states: (batch_size, num_frames, hidden_size).
        frames: bool (batch_size, num_frames).
    """
    weight = frames.unsqueeze(-1).to(hidden_states.dtype)
    count = weight.sum(dim=1, keepdim=True)
    centred = (hidden_states - (hidden_states * weight).sum(dim=1, keepdim=True) / count) * weight
    variance = centred.square().sum(dim=1, keepdim=True) / count
    return centred * torch.rsqrt(variance + eps)


def draw_time_mask(
    num_frames: Sequence[int], mask_time_prob: float, mask_time_length: int, seeds: Sequence[int | str]
) -> torch.Tensor:
    """Frames the student does not see: bool (batch_size, most frames).

    Spans of `mask_time_length` frames (shorter in shorter recordings), static, overlapping, at least 2 where there is
    room, to cover up to `mask_time_prob` of the frames: fairseq's, with the released code's settings by default. A
    recording's mask depends on its seed and its length, not on the batch.

    Args:
        num_frames: of each recording, without padding.
        seeds: of each recording.
    """
    mask = torch.zeros(len(num_frames), max(num_frames), dtype=torch.bool)
    if mask_time_prob == 0.0:
        return mask
    for row, (count, seed) in enumerate(zip(num_frames, seeds, strict=True)):
        rng = random.Random(seed)
        span = min(mask_time_length, count)
        num_spans = max(2, int(mask_time_prob * count / span + rng.random()))
        for start in rng.sample(range(count - span + 1), min(num_spans, count // span)):
            mask[row, start : start + span] = True
    return mask


def num_true_frames(model: PreTrainedModel, attention_mask: torch.Tensor) -> list[int]:
    """Frames of each recording without its padding."""
    return model._get_feat_extract_output_lengths(attention_mask.sum(-1)).tolist()


def prediction_loss(
    prediction: torch.Tensor, target: torch.Tensor, frames: torch.Tensor, cosine_weight: float = 0.0
) -> torch.Tensor:
    """Mean absolute error over `frames`, plus `cosine_weight` times minus log sigmoid of the cosine (DistilHuBERT).

    Args:
        prediction, target: (batch_size, num_frames, hidden_size of the teacher).
        frames: bool (batch_size, num_frames), the frames that count.
    """
    prediction = prediction.float()
    loss = F.l1_loss(prediction, target, reduction="none").mean(dim=-1)
    if cosine_weight > 0:
        loss = loss - cosine_weight * F.logsigmoid(F.cosine_similarity(prediction, target, dim=-1))
    return loss[frames].mean()


def temporal_relation_loss(student: torch.Tensor, teacher: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the cosine similarities between all pairs of true frames of a recording (Gram
    matrices over time, arXiv 2312.09040; frames of length 1 are our choice). The widths may differ.

    Args:
        student, teacher: (batch_size, num_frames, any width).
        frames: bool (batch_size, num_frames), the true frames.
    """
    similarities = [
        unit @ unit.transpose(1, 2) for unit in (F.normalize(states.float(), dim=-1) for states in (student, teacher))
    ]
    pairs = frames[:, :, None] & frames[:, None, :]
    return F.mse_loss(similarities[0][pairs], similarities[1][pairs])


def matching_layers(student_layers: Sequence[int], student_depth: int, teacher_depth: int) -> list[int]:
    """For each of the student's layers (0-based, of `student_depth`), the teacher's (0-based) at the same height."""
    return [math.ceil((layer + 1) * teacher_depth / student_depth) - 1 for layer in student_layers]


def has_fixed_feature_encoder(model: LightHubertPreTrainedModel) -> bool:
    """Whether the convolutions give the same for all subnets and in all steps: nothing there learns, or is to be
    chosen."""
    learns = any(parameter.requires_grad for parameter in model.base_model.feature_extractor.parameters())
    return not learns and (model.search_space is None or model.search_space.conv_dim is None)


@contextmanager
def answering(module: nn.Module, output: torch.Tensor) -> Iterator[None]:
    """Inside the block `module` gives `output`, and computes nothing."""
    module.forward = lambda *inputs: output
    try:
        yield
    finally:
        del module.forward


def student_loss(
    student: LightHubertForPreTraining,
    batch: dict[str, torch.Tensor],
    answer: TeacherAnswer,
    mask_time_indices: torch.Tensor,
    objective: ObjectiveArguments,
    conv_features: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss of the selected subnet on one batch: the mean over its prediction heads, and the temporal relation.

    Args:
        batch: `input_values` and `attention_mask`, (batch_size, num_samples).
        answer: of the teacher to this batch.
        mask_time_indices: bool (batch_size, num_frames), frames that the student does not see.
        conv_features: of this batch, where the student's frozen feature encoder need not compute them once more.
    """
    if objective.target == "feature_encoder":
        return feature_encoder_loss(student, batch, answer)
    wants_states = objective.temporal_relation_weight > 0
    encoder = student.hubert.feature_extractor
    with nullcontext() if conv_features is None else answering(encoder, conv_features):
        outputs = student(
            batch["input_values"], batch["attention_mask"], mask_time_indices, output_hidden_states=wants_states
        )
    frames = mask_time_indices if objective.loss_frames == "masked" else answer.frames
    losses = [
        prediction_loss(prediction, target, frames, objective.cosine_weight)
        for prediction, target in zip(outputs.predictions, answer.targets, strict=True)
    ]
    loss = torch.stack(losses).mean()
    if not wants_states:
        return loss
    depth, states = student.config.num_hidden_layers, outputs.hidden_states[1:]
    layers = matching_layers(kept_layers(depth, len(states)), depth, len(answer.hidden_states))
    relations = [
        temporal_relation_loss(state, answer.hidden_states[layer], answer.frames)
        for state, layer in zip(states, layers, strict=True)
    ]
    return loss + objective.temporal_relation_weight * torch.stack(relations).mean()


def feature_encoder_loss(
    student: LightHubertForPreTraining, batch: dict[str, torch.Tensor], answer: TeacherAnswer
) -> torch.Tensor:
    """Mean squared difference between the student's projected features and the teacher's. A subnet that is narrower
    than the teacher learns the first of its features.

    It is ours, for narrow feature encoders: benchmarks/narrow_ear.py says what it is worth.
    """
    features = projected(student.hubert, student.hubert.feature_extractor(batch["input_values"])).float()
    target = answer.targets[0][..., : features.shape[-1]][answer.frames]
    return F.mse_loss(features[answer.frames], target)


def count_frames(objective: ObjectiveArguments, mask: torch.Tensor, num_frames: Sequence[int]) -> int:
    """How many frames of a batch the loss is a mean over."""
    return int(mask.sum()) if objective.loss_frames == "masked" else sum(num_frames)
