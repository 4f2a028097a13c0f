"""Memory and hours of a distillation, which are told from shapes alone."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from conftest import TWO_DEEP, new_accelerator, stock_settings
from scripts import fails, run
from torch.utils.flop_counter import FlopCounterMode
from transformers import HubertConfig

from lighthubert_training.distillation.arguments import DistillationArguments, ObjectiveArguments
from lighthubert_training.distillation.estimate import (
    Estimate,
    LiveBytes,
    batch_shape,
    estimate,
    report,
    shapes_only,
    student_flops,
)
from modeling_lighthubert import LightHubertConfig, LightHubertForPreTraining


OBJECTIVE = ObjectiveArguments(num_target_layers=2)
ARGUMENTS = DistillationArguments("teacher", "output", per_device_train_batch_size=2, crop_seconds=2.0)
TEACHER = HubertConfig(**stock_settings(num_hidden_layers=3, feat_extract_norm="layer"))
STUDENT = LightHubertConfig(**stock_settings(), search_space=TWO_DEEP, teacher_hidden_size=48)


@pytest.fixture(autouse=True)
def accelerator() -> Accelerator:
    return new_accelerator("cpu")


def told(config: LightHubertConfig = STUDENT, **options) -> Estimate:
    return estimate(config, TEACHER, replace(ARGUMENTS, **options), OBJECTIVE)


def test_bytes_are_counted_while_a_tensor_is_alive():
    with LiveBytes() as live:
        numbers = torch.zeros(1000)
        _ = numbers.view(10, 100) + 1
        del _
    assert live.peak == 8000
    assert live.now == 4000


def test_tensors_without_numbers_take_the_bytes_of_those_with_them():
    def step() -> None:
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        layer(torch.zeros(2, 50, 32)).sum().backward()

    with shapes_only(on_gpu=False) as told:
        step()
    with LiveBytes() as real:
        step()
    assert told.peak == pytest.approx(real.peak, rel=0.01)


@pytest.mark.parametrize(
    ("size", "seconds", "expected"),
    [(8, None, (8, 20.0)), (64, 87.5, (5, 17.5)), (4, 87.5, (4, 20.0)), (64, 10.0, (1, 10.0))],
)
def test_recordings_of_a_batch_are_as_long_as_crops(size, seconds, expected):
    arguments = DistillationArguments(
        "teacher", "output", per_device_train_batch_size=size, per_device_train_batch_seconds=seconds
    )
    assert batch_shape(arguments) == expected


def test_what_costs_more_is_told_to_cost_more():
    whole = told()
    twice = told(per_device_train_batch_size=4)
    assert twice.weights == whole.weights
    assert twice.peak - twice.weights == pytest.approx(2 * (whole.peak - whole.weights), rel=0.1)
    assert twice.flops == pytest.approx(2 * whole.flops)
    frozen, shared = told(freeze_feature_encoder=True), told(share_feature_encoder=True)
    assert shared.peak <= frozen.peak < whole.peak
    assert shared.flops < frozen.flops < whole.flops
    assert frozen.weights < whole.weights, "no moments"
    assert told(sampling="sandwich").flops > told(sampling="largest").flops > whole.flops


def test_attention_with_dropout_keeps_its_scores_on_a_cpu_alone():
    config = LightHubertConfig(**stock_settings(attention_dropout=0.1), teacher_hidden_size=48)
    gpu, cpu = (estimate(config, TEACHER, ARGUMENTS, OBJECTIVE, on_gpu=each) for each in (True, False))
    assert cpu.peak > gpu.peak


def test_operations_are_those_that_torch_counts():
    settings = stock_settings(num_conv_pos_embedding_groups=1)  # torch counts the backward of groups too often
    config = LightHubertConfig(**settings, teacher_hidden_size=48)
    with torch.device("meta"):
        student = LightHubertForPreTraining(config).train()
    with FlopCounterMode(display=False) as counter:
        student(torch.empty(1, 32_000, device="meta")).predictions[0].sum().backward()
    assert student_flops(student, None, 2.0, ARGUMENTS) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_hours_follow_from_the_operations():
    found = Estimate(10, 10.0, 2_000_000, 1_000_000, 10**9, peak=38 * 10**9, flops=989e12, teacher_flops=400e12)
    arguments = replace(ARGUMENTS, max_steps=3600, gradient_accumulation_steps=2)
    lines = report(found, arguments).splitlines()
    one, eight, many = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[7:10])
    # 16 batches of a second at the peak
    assert one == ["1", "1 x 16 x 100 s", "38.0", "no", "yes", "53.3", "40.0", "32.0"]
    assert eight == ["8", "8 x 2 x 100 s", "38.0", "no", "yes", "6.7", "5.0", "4.0"]
    assert many == ["32", "32 x 1 x 50 s", "19.5", "yes", "yes", "1.7", "1.2", "1.0"]


def test_a_recipe_is_estimated_before_anything_is_loaded_or_written(tmp_path):
    HubertConfig().save_pretrained(tmp_path / "teacher")  # of HuBERT Base, without weights
    words = [f"--teacher_name_or_path={tmp_path / 'teacher'}", "--estimate"]
    told = run("training/run_distillation.py", "--config=stage2_small", *words)
    assert "stage1 cannot be read: taken to be of the teacher's shape" in told
    assert "| 32 |" in told
    assert "supernet does not exist" in fails("training/run_distillation.py", "--config=recovery", *words)
    TEACHER.save_pretrained(tmp_path / "teacher")
    words = [*words, "--config=stage2_small", "--num_target_layers=2"]
    assert "search space num_hidden_layers goes up to 12" in fails("training/run_distillation.py", *words)
    words = [f"--teacher_name_or_path={tmp_path / 'teacher'}"]
    assert "required: --output_dir" in fails("training/run_distillation.py", *words)
