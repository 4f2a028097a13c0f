"""What a distillation will cost, told before anything is loaded: memory of a GPU, and hours of GPUs.

A step is made with tensors that have shapes and no numbers, of which the bytes that are alive are counted. Floating
point operations (FLOP) are counted for the teacher and, for each subnet, computed as `profile_subnet` does.
"""

import math
import statistics
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, PreTrainedConfig

from lighthubert_training.data.collators import masks_and_counts
from lighthubert_training.distillation.arguments import DistillationArguments, ObjectiveArguments
from lighthubert_training.distillation.step import training_step
from lighthubert_training.distillation.teacher import Teacher
from lighthubert_training.runs.tables import markdown_table
from lighthubert_training.sampling import draw_subnets
from modeling_lighthubert import LightHubertConfig, LightHubertForPreTraining, Subnet
from modeling_lighthubert.profiling import SAMPLING_RATE, profile_subnet


aten = torch.ops.aten
GPUS, MEMORIES, SHARES = (1, 8, 32), (40, 80), (0.3, 0.4, 0.5)
RECIPE_GPUS = 8
"""Number of GPUs that recipes are written for."""
PEAK_FLOPS = 989e12
"""Of an H100 SXM in bf16, without sparsity, as its data sheet says."""
NUM_DRAWS = 200


@dataclass(frozen=True)
class Estimate:
    """What a batch costs on one GPU.

    Attributes:
        num_recordings, seconds: of a batch; recordings are as long as crops are.
        teacher_parameters, student_parameters: of all weights, of the student's largest subnet.
        weights, peak: bytes of weights and moments of AdamW; and of all tensors at the peak of a step, with the
            largest subnet. What CUDA and its libraries take besides, about 1 GB, is not in it.
        flops: of a batch, in the mean over the subnets that are drawn.
        teacher_flops: of the teacher alone.
    """

    num_recordings: int
    seconds: float
    teacher_parameters: int
    student_parameters: int
    weights: int
    peak: int
    flops: float
    teacher_flops: float


class LiveBytes(TorchDispatchMode):
    """Inside the block, bytes of the tensors that are alive are counted. Where a number is asked for, masks are taken
    to have ones only, and audio to be whole.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is aten._local_scalar_dense.default:
            return getattr(args[0], "is_all", 0)
        is_put = function in (aten.index_put_.default, aten.index_put.default)
        if is_put and any(index is not None and index.dtype == torch.bool for index in args[1]):
            return args[0] if function is aten.index_put_.default else self.counted(args[0].clone())
        outputs = function(*args, **(kwargs or {}))
        if function is aten.all.default:
            outputs.is_all = True
        return self.counted(outputs)

    def counted(self, outputs: Any) -> Any:
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return outputs

    def free(self, storage: int) -> None:
        self.now -= self.sizes.pop(storage)


class FusedAttention(TorchFunctionMode):
    """Inside the block, attention is a kernel that keeps no scores, as on a GPU.

    Args:
        with_dropout: also where there is dropout, for which CPUs have no such kernel.
    """

    def __init__(self, with_dropout: bool):
        super().__init__()
        self.with_dropout = with_dropout

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dropout, scale = kwargs.get("dropout_p", 0.0), kwargs.get("scale")
        if function is not F.scaled_dot_product_attention or (dropout and not self.with_dropout):
            return function(*args, **kwargs)
        return aten._scaled_dot_product_efficient_attention(*args, None, True, dropout, scale=scale)[0]


@contextmanager
def shapes_only(on_gpu: bool = True) -> Iterator[LiveBytes]:
    """Inside the block, tensors that are made have no numbers, and their bytes are counted, as on a GPU or as on a
    CPU."""
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, FusedAttention(with_dropout=on_gpu):
        yield live


def batch_shape(arguments: DistillationArguments) -> tuple[int, float]:
    """Number and seconds of the recordings of a batch whose recordings are as long as crops are."""
    size, seconds = arguments.per_device_train_batch_size, arguments.per_device_train_batch_seconds
    if seconds is None or seconds > size * arguments.crop_seconds:
        return size, arguments.crop_seconds
    number = math.ceil(seconds / arguments.crop_seconds)
    return number, seconds / number


def estimate(
    config: LightHubertConfig,
    teacher_config: PreTrainedConfig,
    arguments: DistillationArguments,
    objective: ObjectiveArguments,
    on_gpu: bool = True,
) -> Estimate:
    """What a batch of a run costs.

    Args:
        config: of the student, a supernet or one model.
        on_gpu: as of `shapes_only`.
    """
    config = config if config.search_space is None else config.trimmed()
    number, seconds = batch_shape(arguments)
    num_samples = int(seconds * SAMPLING_RATE)
    masking = objective.mask_time_prob, objective.mask_time_length
    batch = masks_and_counts([num_samples] * number, config, *masking, seeds=range(number))
    # a CPU has no fp16, of which tensors are as large as of bf16
    accelerator = Accelerator(cpu=True, mixed_precision="no" if arguments.mixed_precision == "no" else "bf16")
    with shapes_only(on_gpu) as live:
        dtypes = {} if arguments.teacher_dtype == "auto" else {"dtype": getattr(torch, arguments.teacher_dtype)}
        teacher = Teacher(AutoModel.from_config(teacher_config, **dtypes), objective)
        student = LightHubertForPreTraining(config).train()
        if arguments.freeze_feature_encoder or arguments.share_feature_encoder:
            student.freeze_feature_encoder()
        moments = [torch.empty_like(weight) for weight in student.parameters() if weight.requires_grad for _ in "mv"]
        held = [*teacher.parameters(), *teacher.buffers(), *student.parameters(), *student.buffers(), *moments]
        weights = sum(tensor.nbytes for tensor in held)
        audio = torch.zeros(number, num_samples)
        batch |= {"input_values": audio, "attention_mask": torch.ones(number, num_samples, dtype=torch.long)}
        batch |= {"teacher_input_values": audio if arguments.share_feature_encoder else audio.clone()}
        batch["mask"] = torch.ones(batch["mask"].shape, dtype=torch.bool)
        with FlopCounterMode(display=False) as counter:
            teacher(batch["teacher_input_values"], batch["attention_mask"])
        flops_of_teacher = counter.get_total_flops()
        largest = student.search_space and student.search_space.largest
        prepared = accelerator.prepare_model(student, device_placement=False, evaluation_mode=True)
        training_step(prepared, teacher, [batch], [largest], accelerator, arguments.share_feature_encoder)
        del moments
    with torch.device("meta"):
        student = LightHubertForPreTraining(config)
    flops = statistics.mean(
        number * sum(student_flops(student, subnet, seconds, arguments) for subnet in subnets)
        for subnets in _draws(student, arguments)
    )
    theirs, ours = (sum(weight.numel() for weight in model.parameters()) for model in (teacher.model, student))
    return Estimate(number, seconds, theirs, ours, weights, live.peak, flops_of_teacher + flops, flops_of_teacher)


def _draws(student: LightHubertForPreTraining, arguments: DistillationArguments) -> Iterator[list[Subnet | None]]:
    """Subnets of many steps."""
    for step in range(1 if student.search_space is None else NUM_DRAWS):
        space, of_step = student.search_space, (arguments.sampling, arguments.seed, step)
        yield draw_subnets(space, *of_step, num_random=arguments.num_random_subnets)


def student_flops(
    student: LightHubertForPreTraining, subnet: Subnet | None, seconds: float, arguments: DistillationArguments
) -> float:
    """Of forward and backward of one recording. Backward is twice forward; a frozen feature encoder has none, and one
    that is shared has been computed by the teacher. (With several subnets a step, one that is frozen is counted for
    each, though it is computed once.)"""
    profile = profile_subnet(student, subnet, seconds)
    encoder = profile.feature_encoder.macs
    of_encoder = 0 if arguments.share_feature_encoder else 1 if arguments.freeze_feature_encoder else 3
    return 2 * (3 * (profile.macs - encoder) + of_encoder * encoder)


def report(found: Estimate, arguments: DistillationArguments) -> str:
    """Markdown: what a batch takes, and the hours of the run on several numbers of GPUs, of which each step has as
    much audio as the recipe's on `RECIPE_GPUS`."""
    accumulated, steps = arguments.gradient_accumulation_steps, arguments.max_steps
    seconds = found.num_recordings * found.seconds
    step_seconds = RECIPE_GPUS * accumulated * seconds
    rows = []
    for gpus in GPUS:
        batches = max(1, math.ceil(step_seconds / gpus / seconds))
        each = step_seconds / gpus / batches
        of_gpu = found.flops * step_seconds / seconds / gpus
        hours = [f"{steps * of_gpu / (share * PEAK_FLOPS) / 3600:.1f}" for share in SHARES]
        memory = found.weights + (found.peak - found.weights) * each / seconds
        fits = ["yes" if memory < 0.9 * size * 1e9 else "no" for size in MEMORIES]
        rows.append([str(gpus), f"{gpus} x {batches} x {each:g} s", f"{memory / 1e9:.1f}", *fits, *hours])
    titles = ["GPUs", "GPUs x accumulation x batch", "GB", *(f"fits in {size} GB" for size in MEMORIES)]
    titles += [f"hours at {share:.0%}" for share in SHARES]
    teacher, student = (f"{number / 1e6:.1f}" for number in (found.teacher_parameters, found.student_parameters))
    precision = arguments.mixed_precision.replace("no", "fp32")
    flops = f"{found.flops / 1e12:.2f}"
    gigabytes = [f"{each / 1e9:.2f}" for each in (found.peak, found.weights)]
    return f"""\
teacher {teacher}, student {student} million parameters; the student runs in {precision}
a batch of {found.num_recordings} recordings of {found.seconds:g} s: {flops} TFLOP in the mean over subnets
{gigabytes[0]} GB at the peak of a step of the largest, of which {gigabytes[1]} are weights and moments of AdamW
{steps} steps of {step_seconds:g} s of audio; hours at a share of {PEAK_FLOPS / 1e12:g} TFLOP/s, the bf16 of an H100:

{markdown_table(titles, rows)}

FLOP of a batch = teacher + sum over subnets of 2 x (3 x MACs of the transformer + n x MACs of the feature encoder),
n = 3 if it learns, 1 if it is frozen, 0 if it is the teacher's
hours = steps x FLOP of a step / (GPUs x share x peak); evaluation, data and communication are not in them
GB grow with the seconds of a batch; what CUDA and its libraries take, about 1 GB, is not in them"""
