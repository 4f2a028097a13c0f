"""One optimiser step: gradients of every subnet of the step, over every accumulated batch and every process.

Processes add their gradients up by hand, once a step. DistributedDataParallel would do it while the last backward
pass runs, but subnets leave weights out, others in every pass: with `no_sync` and unused parameters it loses what
earlier passes added (pytorch issue 69031).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from lighthubert_training.data.batches import visit_seed
from lighthubert_training.distillation.teacher import (
    Teacher,
    TeacherAnswer,
    count_frames,
    draw_time_mask,
    has_fixed_feature_encoder,
    num_true_frames,
    student_loss,
)
from modeling_lighthubert import LightHubertForPreTraining, Subnet


@dataclass
class Lesson:
    """A batch with all that the student needs, whichever subnet is selected.

    Attributes:
        batch: `input_values`, `attention_mask`, (batch_size, num_samples), and `visits`, (batch_size, 2).
        answer: the teacher's.
        mask: bool (batch_size, num_frames), frames the student does not see.
        num_frames: frames that the loss is a mean over.
        conv_features: (batch_size, conv_dim, num_frames), of a frozen feature encoder; `None` of one that learns, or
            that subnets have each their part of.
    """

    batch: dict[str, torch.Tensor]
    answer: TeacherAnswer
    mask: torch.Tensor
    num_frames: int
    conv_features: torch.Tensor | None

    def loss(self, student: LightHubertForPreTraining, teacher: Teacher) -> torch.Tensor:
        """Mean loss of the selected subnet."""
        return student_loss(student, self.batch, self.answer, self.mask, teacher.objective, self.conv_features)


def prepare_lesson(
    student: LightHubertForPreTraining,
    teacher: Teacher,
    batch: dict[str, torch.Tensor],
    seed: int,
    accelerator: Accelerator,
    share_feature_encoder: bool = False,
) -> Lesson:
    """Asks the teacher, and draws the mask of each recording.

    Args:
        share_feature_encoder: what the teacher's feature encoder gives is the student's as well.
    """
    objective = teacher.objective
    answer = teacher(batch["teacher_input_values"], batch["attention_mask"])
    num_frames = num_true_frames(student, batch["attention_mask"])
    seeds = [visit_seed(seed, *visit) for visit in batch["visits"].tolist()]
    mask = draw_time_mask(num_frames, objective.mask_time_prob, objective.mask_time_length, seeds)
    conv_features = None
    if share_feature_encoder:
        conv_features = answer.conv_features.to(student.dtype)
    elif has_fixed_feature_encoder(student):
        with torch.no_grad(), accelerator.autocast():
            conv_features = student.hubert.feature_extractor(batch["input_values"])
    return Lesson(
        batch,
        answer,
        mask.to(batch["attention_mask"].device),
        count_frames(objective, mask, num_frames),
        conv_features,
    )


def training_step(
    student: LightHubertForPreTraining,
    teacher: Teacher,
    batches: Iterable[dict[str, torch.Tensor]],
    subnets: Sequence[Subnet | None],
    accelerator: Accelerator,
    seed: int,
    share_feature_encoder: bool = False,
) -> list[float]:
    """Leaves in the student the gradient of the mean loss over `subnets`, and returns the loss of each.

    A loss is a mean over the frames of all batches of all processes: how they are dealt changes nothing.

    Args:
        batches: of this process, accumulated.
        seed: of the masks.
        share_feature_encoder: what the teacher's feature encoder gives is the student's as well.

    Returns:
        A loss for each subnet; nothing if there is not one recording in the batches of all processes.

    Raises:
        FloatingPointError: a loss is NaN or infinite on some process.
    """
    lessons = [prepare_lesson(student, teacher, batch, seed, accelerator, share_feature_encoder) for batch in batches]
    own_frames = torch.tensor(sum(lesson.num_frames for lesson in lessons), device=accelerator.device)
    num_frames = int(accelerator.reduce(own_frames, "sum"))
    if not num_frames:
        return []
    losses = torch.zeros(len(subnets), device=accelerator.device)
    for number, subnet in enumerate(subnets):
        if subnet is not None:
            student.set_subnet(subnet)
        for lesson in lessons:
            loss = lesson.loss(student, teacher) * (lesson.num_frames / num_frames)
            accelerator.backward(loss / len(subnets))
            losses[number] += loss.detach()
    losses = accelerator.reduce(losses, "sum")
    if not torch.isfinite(losses).all():
        raise FloatingPointError(f"the loss is {float(losses.mean())}")
    sum_gradients(student.parameters(), accelerator)
    return losses.tolist()


def sum_gradients(parameters: Iterable[torch.nn.Parameter], accelerator: Accelerator) -> None:
    """Gives every process the sum of all processes' gradients. A weight that no process used keeps none."""
    if accelerator.num_processes == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    used = torch.tensor([float(parameter.grad is not None) for parameter in trained], device=accelerator.device)
    used = accelerator.reduce(used, "sum").tolist()
    shared = [parameter for parameter, count in zip(trained, used, strict=True) if count]
    for parameter in shared:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = accelerator.reduce(torch.cat([parameter.grad.flatten() for parameter in shared]), "sum")
    for parameter, gradient in zip(shared, flat.split([parameter.numel() for parameter in shared]), strict=True):
        parameter.grad.copy_(gradient.view_as(parameter))


@torch.no_grad()
def evaluate(
    student: LightHubertForPreTraining,
    teacher: Teacher,
    batches: Iterable[dict[str, torch.Tensor]],
    subnets: Mapping[str, Subnet | None],
    accelerator: Accelerator,
    share_feature_encoder: bool = False,
) -> dict[str, float]:
    """Loss of each of the named `subnets`, a mean over the frames that count in all processes' batches.

    Masks are the same at every call. The selection and the training mode of the student are left as they were.

    Raises:
        ValueError: there is no frame to evaluate on.
    """
    training, selected = student.training, student.subnet
    student.eval()
    sums = torch.zeros(len(subnets) + 1, device=accelerator.device)
    for batch in batches:
        lesson = prepare_lesson(student, teacher, batch, 0, accelerator, share_feature_encoder)
        for number, subnet in enumerate(subnets.values()):
            if subnet is not None:
                student.set_subnet(subnet)
            sums[number] += lesson.loss(student, teacher) * lesson.num_frames
        sums[-1] += lesson.num_frames
    *losses, num_frames = accelerator.reduce(sums, "sum").tolist()
    if student.search_space is not None:
        student.set_subnet(selected)
    student.train(training)
    if not num_frames:
        raise ValueError("none of the recordings to evaluate on can be read")
    return {name: loss / num_frames for name, loss in zip(subnets, losses, strict=True)}
