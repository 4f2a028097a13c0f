"""One optimiser step: the gradient of every subnet of the step, over every accumulated batch and every process; and
the evaluation, which computes the same losses without gradients."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from lighthubert_training.distillation.losses import matching_layers, prediction_loss, temporal_relation_loss
from lighthubert_training.distillation.teacher import Teacher, TeacherOutputs
from lighthubert_training.models import computed_once, has_fixed_feature_encoder
from lighthubert_training.runs.distributed import sum_gradients, sum_over_processes
from modeling_lighthubert import LightHubertForPreTraining, Subnet
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.search_space import kept_layers


@dataclass
class PreparedBatch:
    """A batch and everything that is computed once per step for all subnets.

    Attributes:
        batch: of a `DistillationCollator`, on the device.
        outputs: of the teacher.
        num_frames: number of frames that the loss is a mean over.
        conv_features: (batch_size, conv_dim, num_frames), of a frozen feature encoder; `None` if it learns, or if
            subnets choose their own part of it.
    """

    batch: Mapping[str, Any]
    outputs: TeacherOutputs
    num_frames: int
    conv_features: torch.Tensor | None

    def loss(self, student: LightHubertForPreTraining, teacher: Teacher) -> torch.Tensor:
        """Loss of the selected subnet: the mean over its prediction heads, and the temporal relation, each with its
        weight."""
        objective, batch, outputs = teacher.objective, self.batch, self.outputs
        wants_states = objective.temporal_relation_weight > 0
        inputs = batch["input_values"], batch["attention_mask"], batch["mask"]
        with computed_once(student.hubert.feature_extractor, self.conv_features):
            predicted = student(*inputs, output_hidden_states=wants_states)
        frames = batch["mask"] if objective.loss_frames == "masked" else outputs.frames
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
    batch: Mapping[str, Any],
    accelerator: Accelerator,
    share_feature_encoder: bool = False,
) -> PreparedBatch:
    """Runs the teacher, and a frozen feature encoder.

    Args:
        share_feature_encoder: use the output of the teacher's feature encoder as that of the student's.
    """
    objective = teacher.objective
    outputs = teacher.outputs(batch)
    conv_features = None
    if share_feature_encoder:
        conv_features = outputs.conv_features.to(student.dtype)
    elif has_fixed_feature_encoder(student):
        with torch.no_grad(), accelerator.autocast():
            conv_features = student.hubert.feature_extractor(batch["input_values"])
    num_frames = batch["num_masked" if objective.loss_frames == "masked" else "num_frames"]
    return PreparedBatch(batch, outputs, num_frames, conv_features)


def training_step(
    student: LightHubertForPreTraining,
    teacher: Teacher,
    batches: Iterable[Mapping[str, Any]],
    subnets: Sequence[Subnet | None],
    accelerator: Accelerator,
    share_feature_encoder: bool = False,
) -> torch.Tensor | None:
    """Leaves in the student the gradient of the mean loss over `subnets`.

    A loss is a mean over the frames of all batches of all processes: how they are distributed changes nothing.

    The device is not waited for: what is counted is counted on the CPU.

    Args:
        batches: of this process, accumulated.
        share_feature_encoder: of `prepare_batch`.

    Returns:
        A loss for each subnet, float32 (num_subnets) on the device, which may be NaN or infinite; `None` if there is
        not one recording in the batches of all processes.
    """
    prepared = [prepare_batch(student, teacher, batch, accelerator, share_feature_encoder) for batch in batches]
    (num_frames,) = sum_over_processes([sum(batch.num_frames for batch in prepared)])
    if not num_frames:
        return None
    losses = torch.zeros(len(subnets), device=accelerator.device)
    for number, subnet in enumerate(subnets):
        if subnet is not None:
            student.set_subnet(subnet)
        for batch in prepared:
            loss = batch.loss(student, teacher) * (batch.num_frames / num_frames)
            accelerator.backward(loss / len(subnets))
            losses[number] += loss.detach()
    losses = accelerator.reduce(losses, "sum")
    sum_gradients(student.parameters(), accelerator)
    return losses


@torch.no_grad()
def evaluate(
    student: LightHubertForPreTraining,
    teacher: Teacher,
    batches: Iterable[Mapping[str, Any]],
    subnets: Mapping[str, Subnet | None],
    accelerator: Accelerator,
    share_feature_encoder: bool = False,
) -> dict[str, float]:
    """Loss of each of the named `subnets`, a mean over the frames that count in all processes' batches.

    The selection and the training mode of the student, and torch's random numbers,
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
                prepared = prepare_batch(student, teacher, batch, accelerator, share_feature_encoder)
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
