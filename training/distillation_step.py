"""One optimiser step: gradients of every subnet of the step, over every accumulated batch and every process.

Processes add their gradients up by hand, once a step. DistributedDataParallel would do it while the last backward
pass runs, but subnets leave weights out, others in every pass: with `no_sync` and unused parameters it loses what
earlier passes added (pytorch issue 69031).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from modeling_lighthubert import LightHubertForPreTraining, Subnet

from distillation import Teacher, TeacherAnswer, count_frames, draw_time_mask, num_true_frames, student_loss
from speech_data import visit_seed


@dataclass
class Lesson:
    """A batch with all that the student needs.

    Attributes:
        batch: `input_values`, `attention_mask`, (batch_size, num_samples), and `visits`, (batch_size, 2).
        answer: the teacher's.
        mask: bool (batch_size, num_frames), frames the student does not see.
        num_frames: frames that the loss is a mean over.
    """

    batch: dict[str, torch.Tensor]
    answer: TeacherAnswer
    mask: torch.Tensor
    num_frames: int


def prepare_lesson(
    student: LightHubertForPreTraining, teacher: Teacher, batch: dict[str, torch.Tensor], seed: int
) -> Lesson:
    """Asks the teacher, and draws the mask of each recording."""
    objective = teacher.objective
    answer = teacher(batch["teacher_input_values"], batch["attention_mask"])
    num_frames = num_true_frames(student, batch["attention_mask"])
    seeds = [visit_seed(seed, visit) for visit in batch["visits"].tolist()]
    mask = draw_time_mask(num_frames, objective.mask_time_prob, objective.mask_time_length, seeds)
    return Lesson(batch, answer, mask.to(batch["attention_mask"].device), count_frames(objective, mask, num_frames))


def training_step(
    student: LightHubertForPreTraining,
    teacher: Teacher,
    batches: Iterable[dict[str, torch.Tensor]],
    subnets: Sequence[Subnet | None],
    accelerator: Accelerator,
    seed: int,
) -> float:
    """Leaves in the student the gradient of the mean loss over `subnets`, and returns that loss.

    The loss is a mean over the frames of all batches of all processes: how they are dealt changes nothing.

    Args:
        batches: of this process, accumulated.
        seed: of the masks.

    Raises:
        FloatingPointError: the loss is NaN or infinite on some process.
    """
    lessons = [prepare_lesson(student, teacher, batch, seed) for batch in batches]
    own_frames = torch.tensor(sum(lesson.num_frames for lesson in lessons), device=accelerator.device)
    num_frames = int(accelerator.reduce(own_frames, "sum"))
    total = torch.zeros((), device=accelerator.device)
    for subnet in subnets:
        if subnet is not None:
            student.set_subnet(subnet)
        for lesson in lessons:
            loss = student_loss(student, lesson.batch, lesson.answer, lesson.mask, teacher.objective)
            loss = loss * (lesson.num_frames / num_frames / len(subnets))
            accelerator.backward(loss)
            total += loss.detach()
    total = accelerator.reduce(total, "sum")
    if not torch.isfinite(total):
        raise FloatingPointError(f"the loss is {float(total)}")
    sum_gradients(student.parameters(), accelerator)
    return float(total)


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
