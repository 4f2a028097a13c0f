"""One optimiser step: the gradient of every subnet of the step, over every accumulated batch and every process; and
the evaluation, which computes the same losses without gradients."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from lighthubert_training.data.recordings import item_seed
from lighthubert_training.distillation.losses import matching_layers, prediction_loss, temporal_relation_loss
from lighthubert_training.distillation.teacher import Teacher, TeacherOutputs
from lighthubert_training.models import computed_once, draw_time_mask, has_fixed_feature_encoder, true_lengths
from lighthubert_training.runs.distributed import sum_gradients
from modeling_lighthubert import LightHubertForPreTraining, Subnet
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.search_space import kept_layers


@dataclass
class PreparedBatch:
    """A batch and everything that is computed once per step for all subnets.

    Attributes:
        batch: `input_values`, `attention_mask`, (batch_size, num_samples), and `items`, (batch_size, 2).
        outputs: of the teacher.
        mask: frames that are masked for the student, bool (batch_size, num_frames).
        num_frames: number of frames that the loss is a mean over.
        conv_features: (batch_size, conv_dim, num_frames), of a frozen feature encoder; `None` if it learns, or if
            subnets choose their own part of it.
    """

    batch: Mapping[str, torch.Tensor]
    outputs: TeacherOutputs
    mask: torch.Tensor
    num_frames: int
    conv_features: torch.Tensor | None

    def loss(self, student: LightHubertForPreTraining, teacher: Teacher) -> torch.Tensor:
        """Loss of the selected subnet: the mean over its prediction heads, and the temporal relation, each with its
        weight."""
        objective, batch, outputs = teacher.objective, self.batch, self.outputs
        wants_states = objective.temporal_relation_weight > 0
        inputs = batch["input_values"], batch["attention_mask"], self.mask
        with computed_once(student.hubert.feature_extractor, self.conv_features):
            predicted = student(*inputs, output_hidden_states=wants_states)
        frames = self.mask if objective.loss_frames == "masked" else outputs.frames
        losses = [
            prediction_loss(prediction, target, frames, objective.cosine_weight)
            for prediction, target in zip(predicted.predictions, outputs.targets, strict=True)
        ]
        loss = objective.prediction_weight * torch.stack(losses).mean()
        if not wants_states:
            return loss
        depth, states = student.config.num_hidden_layers, predicted.hidden_states[1:]
        layers = matching_layers(kept_layers(depth, len(states)), depth, len(outputs.hidden_states))
        relations = [
            temporal_relation_loss(state, outputs.hidden_states[layer], outputs.frames)
            for state, layer in zip(states, layers, strict=True)
        ]
        return loss + objective.temporal_relation_weight * torch.stack(relations).mean()


def prepare_batch(
    student: LightHubertForPreTraining,
    teacher: Teacher,
    batch: Mapping[str, torch.Tensor],
    seed: int,
    accelerator: Accelerator,
    share_feature_encoder: bool = False,
) -> PreparedBatch:
    """Runs the teacher, and draws the mask of each recording.

    Args:
        seed: of the masks.
        share_feature_encoder: use the output of the teacher's feature encoder as that of the student's.
    """
    objective = teacher.objective
    outputs = teacher(batch["teacher_input_values"], batch["attention_mask"])
    num_frames = true_lengths(student, batch["attention_mask"]).tolist()
    seeds = [item_seed(seed, *item) for item in batch["items"].tolist()]
    mask = draw_time_mask(num_frames, objective.mask_time_prob, objective.mask_time_length, seeds)
    conv_features = None
    if share_feature_encoder:
        conv_features = outputs.conv_features.to(student.dtype)
    elif has_fixed_feature_encoder(student):
        with torch.no_grad(), accelerator.autocast():
            conv_features = student.hubert.feature_extractor(batch["input_values"])
    count = int(mask.sum()) if objective.loss_frames == "masked" else sum(num_frames)
    return PreparedBatch(batch, outputs, mask.to(batch["attention_mask"].device), count, conv_features)


def training_step(
    student: LightHubertForPreTraining,
    teacher: Teacher,
    batches: Iterable[Mapping[str, torch.Tensor]],
    subnets: Sequence[Subnet | None],
    accelerator: Accelerator,
    seed: int,
    share_feature_encoder: bool = False,
) -> list[float]:
    """Leaves in the student the gradient of the mean loss over `subnets`.

    A loss is a mean over the frames of all batches of all processes: how they are distributed changes nothing.

    Args:
        batches: of this process, accumulated.
        seed, share_feature_encoder: of `prepare_batch`.

    Returns:
        A loss for each subnet; nothing if there is not one recording in the batches of all processes.

    Raises:
        FloatingPointError: a loss is NaN or infinite on some process.
    """
    prepared = [prepare_batch(student, teacher, batch, seed, accelerator, share_feature_encoder) for batch in batches]
    own_frames = torch.tensor(sum(batch.num_frames for batch in prepared), device=accelerator.device)
    num_frames = int(accelerator.reduce(own_frames, "sum"))
    if not num_frames:
        return []
    losses = torch.zeros(len(subnets), device=accelerator.device)
    for number, subnet in enumerate(subnets):
        if subnet is not None:
            student.set_subnet(subnet)
        for batch in prepared:
            loss = batch.loss(student, teacher) * (batch.num_frames / num_frames)
            accelerator.backward(loss / len(subnets))
            losses[number] += loss.detach()
    losses = accelerator.reduce(losses, "sum")
    if not torch.isfinite(losses).all():
        raise FloatingPointError(f"the loss is {float(losses.mean())}")
    sum_gradients(student.parameters(), accelerator)
    return losses.tolist()


@torch.no_grad()
def evaluate(
    student: LightHubertForPreTraining,
    teacher: Teacher,
    batches: Iterable[Mapping[str, torch.Tensor]],
    subnets: Mapping[str, Subnet | None],
    accelerator: Accelerator,
    share_feature_encoder: bool = False,
) -> dict[str, float]:
    """Loss of each of the named `subnets`, a mean over the frames that count in all processes' batches.

    Masks are the same at every call. The selection and the training mode of the student, and torch's random numbers,
    are left as they were, also on an error.

    Raises:
        UserError: there is no frame to evaluate on.
    """
    training, selected = student.training, student.subnet
    sums = torch.zeros(len(subnets) + 1, device=accelerator.device)
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    try:
        student.eval()
        with torch.random.fork_rng(devices):  # HuBERT of older transformers draws one for each layer
            for batch in batches:
                prepared = prepare_batch(student, teacher, batch, 0, accelerator, share_feature_encoder)
                for number, subnet in enumerate(subnets.values()):
                    if subnet is not None:
                        student.set_subnet(subnet)
                    sums[number] += prepared.loss(student, teacher) * prepared.num_frames
                sums[-1] += prepared.num_frames
    finally:
        if student.search_space is not None:
            student.set_subnet(selected)
        student.train(training)
    *losses, num_frames = accelerator.reduce(sums, "sum").tolist()
    if not num_frames:
        raise UserError("none of the recordings to evaluate on can be read")
    return {name: loss / num_frames for name, loss in zip(subnets, losses, strict=True)}
