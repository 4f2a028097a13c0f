"""Distilling a HuBERT into a supernet: the teacher's target, the student's masks, the loss, and which subnets train.

Sources are section 2 of the LightHuBERT paper (arXiv 2203.15610) and what its authors answered in issues 4 and 6 of
their repository; what neither says is marked as our choice.
"""

import random
from contextlib import ExitStack

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.models.hubert.modeling_hubert import _compute_mask_indices

from modeling_lighthubert import LightHubertForPreTraining, LightHubertPreTrainedModel, SearchSpace, Subnet


SAMPLING_STRATEGIES = ("largest", "uniform", "sandwich")


class Teacher(nn.Module):
    """A frozen HuBERT-like model (HuBERT, wav2vec 2.0, WavLM, data2vec) that says what the student should predict.

    The target is the mean over the last layers of the feed-forward outputs, before the residual and the final layer
    norm (authors, issue 6). Each layer's output is normalised over the true frames of its recording first, as
    data2vec does for audio; the paper does not say how.

    Args:
        model: the base model, in evaluation mode.
        num_target_layers: how many layers from the top, 8 in the paper.
    """

    def __init__(self, model: PreTrainedModel, num_target_layers: int = 8):
        super().__init__()
        depth = len(model.encoder.layers)
        if not 1 <= num_target_layers <= depth:
            raise ValueError(f"num_target_layers={num_target_layers}, but the teacher has {depth} layers")
        self.model = model.eval().requires_grad_(False)
        self.num_target_layers = num_target_layers

    @property
    def hidden_size(self) -> int:
        return self.model.config.hidden_size

    @torch.no_grad()
    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Target of shape (batch_size, num_frames, hidden_size); padded frames hold zeros.

        Args:
            input_values: (batch_size, num_samples), as the teacher's own feature extractor gives them.
            attention_mask: (batch_size, num_samples), 1 for samples of the recording.
        """
        outputs: list[torch.Tensor] = []
        with ExitStack() as hooks:
            for layer in list(self.model.encoder.layers)[-self.num_target_layers :]:
                handle = layer.feed_forward.register_forward_hook(
                    lambda module, inputs, output: outputs.append(output)
                )
                hooks.callback(handle.remove)
            self.model(input_values, attention_mask=attention_mask)
        frames = true_frames(self.model, outputs[0].shape[1], attention_mask)
        return torch.stack([instance_norm(output, frames) for output in outputs]).mean(dim=0)


def true_frames(model: PreTrainedModel, num_frames: int, attention_mask: torch.Tensor) -> torch.Tensor:
    """Which frames are not padding: bool (batch_size, num_frames)."""
    lengths = model._get_feat_extract_output_lengths(attention_mask.sum(-1))
    return torch.arange(num_frames, device=attention_mask.device) < lengths[:, None]


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
    model: LightHubertPreTrainedModel, attention_mask: torch.Tensor, mask_time_prob: float, mask_time_length: int
) -> torch.Tensor:
    """Frames the student does not see: bool (batch_size, num_frames), from numpy's global random state.

    Spans of `mask_time_length` frames (shorter in shorter batches), static, overlapping, at least 2, to cover up to
    `mask_time_prob` of the true frames.
    """
    num_frames = int(model._get_feat_extract_output_lengths(attention_mask.shape[1]))
    frames = true_frames(model, num_frames, attention_mask)
    span = min(mask_time_length, int(frames.sum(-1).min()))
    mask = _compute_mask_indices(tuple(frames.shape), mask_time_prob, span, attention_mask=frames.long(), min_masks=2)
    return torch.from_numpy(np.asarray(mask)).to(frames.device) & frames


def distillation_loss(prediction: torch.Tensor, target: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Mean absolute error over `frames`.

    Args:
        prediction, target: (batch_size, num_frames, hidden_size of the teacher).
        frames: bool (batch_size, num_frames), the frames that count.
    """
    return F.l1_loss(prediction[frames], target[frames])


def draw_subnets(search_space: SearchSpace | None, sampling: str, seed: int, step: int) -> list[Subnet | None]:
    """The subnets that one optimiser step trains, in order. Depends on `seed` and `step` only, so all processes agree.

    Args:
        search_space: `None` for a student that is one model; then there is nothing to choose.
        sampling: `"largest"` (stage 1), `"uniform"` (one at random: stage 2 of the paper), or `"sandwich"`
            (smallest, one at random, and the largest last; from slimmable networks, not in the paper).
    """
    if search_space is None:
        return [None]
    rng = random.Random(f"{seed}-{step}")
    match sampling:
        case "largest":
            return [search_space.largest]
        case "uniform":
            return [search_space.sample(rng)]
        case "sandwich":
            return [search_space.smallest, search_space.sample(rng), search_space.largest]
    raise ValueError(f"sampling={sampling!r} is not known: choose from {list(SAMPLING_STRATEGIES)}")


def student_loss(
    student: nn.Module,
    batch: dict[str, torch.Tensor],
    target: torch.Tensor,
    mask_time_indices: torch.Tensor,
    frames: torch.Tensor,
) -> torch.Tensor:
    """Loss of the selected subnet on one batch. `student` may be wrapped for distributed training."""
    outputs = student(batch["input_values"], batch["attention_mask"], mask_time_indices)
    return distillation_loss(outputs.predictions[0], target, frames)


@torch.no_grad()
def evaluate(
    student: LightHubertForPreTraining,
    teacher: Teacher,
    batches: list[dict[str, torch.Tensor]],
    mask_time_prob: float,
    mask_time_length: int,
) -> float:
    """Mean loss of the selected subnet on masked frames. Masks are the same at every call."""
    training, state = student.training, np.random.get_state()
    student.eval()
    np.random.seed(0)
    losses = []
    for batch in batches:
        target = teacher(batch["teacher_input_values"], batch["attention_mask"])
        mask = draw_time_mask(student, batch["attention_mask"], mask_time_prob, mask_time_length)
        losses.append(float(student_loss(student, batch, target, mask, mask)))
    np.random.set_state(state)
    student.train(training)
    return sum(losses) / len(losses)
