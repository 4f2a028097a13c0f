"""A checkpoint that was saved in bfloat16 or float16 goes through every command as one in float32 does."""

import json
from pathlib import Path

import order_channels
import push_subnet
import pytest
import run_distillation
import run_speech_recognition_ctc
import run_subnet_search
import run_superb
import torch
import transcribe
from conftest import TWO_DEEP, tiny_model
from datasets import Dataset
from recognizers import save_processor
from scripts import call, distillation, weights

from modeling_lighthubert import LightHubertForCTC, LightHubertForPreTraining, export, profiling
from modeling_lighthubert.errors import UserError


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(scope="module", params=DTYPES)
def half(request, tmp_path_factory) -> Path:
    """A fine-tuned and a distilled supernet, saved in 16 bits, in folders `ctc` and `distilled`."""
    folder = tmp_path_factory.mktemp(request.param)
    for name, head in (("ctc", LightHubertForCTC), ("distilled", LightHubertForPreTraining)):
        model = tiny_model(head, TWO_DEEP, num_prediction_heads=1, teacher_hidden_size=48)
        model.to(DTYPES[request.param]).save_pretrained(folder / name)
        save_processor(folder / name)
    return folder


def dtypes(folder: Path) -> set[torch.dtype]:
    return {weight.dtype for weight in weights(folder).values()}


def test_transcribe(half, workshop, tmp_path):
    given = ("--model_name_or_path", half / "ctc", "--inputs", workshop / "recordings", "--device", "cpu")
    call(transcribe.main, "transcribe.py", *given, "--output_file", tmp_path / "all.jsonl")
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == 8
    assert "error" not in (tmp_path / "all.jsonl").read_text()


@pytest.mark.parametrize("kind", [("--subnet", "smallest"), ("--once_for_all", True)], ids=["cut", "once_for_all"])
def test_fine_tune_in_fp32(half, workshop, tmp_path, kind):
    speech = workshop / "speech.parquet"
    given = ("--model_name_or_path", half / "distilled", "--train_file", speech, "--validation_file", speech, *kind)
    quiet = ("--use_cpu", "--report_to", "none", "--disable_tqdm", True)
    command = ("run_speech_recognition_ctc.py", *given, *quiet, "--max_steps", 1, "--output_dir", tmp_path / "asr")
    call(run_speech_recognition_ctc.main, *command)
    assert dtypes(tmp_path / "asr") == {torch.float32}


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_distil_in_fp32(half, workshop, tmp_path, shared):
    """From a teacher in 16 bits as well, whose feature encoder the student may use."""
    given = ("--student_name_or_path", half / "ctc", "--teacher_name_or_path", half / "ctc", "--max_steps", 1)
    options = ("--share_feature_encoder", shared, "--output_dir", tmp_path / "student")
    call(run_distillation.main, *distillation(workshop, "", *given, *options))
    assert dtypes(tmp_path / "student") == {torch.float32}


@pytest.mark.parametrize("fitness", ["distillation", "ctc", "probe"])
def test_search(half, workshop, tmp_path, fitness, monkeypatch):
    """Subnets that are trained further for the report are trained in fp32."""
    trained = []
    monkeypatch.setattr(
        "torch.optim.AdamW.step",
        lambda optimizer, *_: trained.extend(
            each.dtype for group in optimizer.param_groups for each in group["params"]
        ),
    )
    speech = workshop / "speech.parquet"
    given = ("--model_name_or_path", half / ("ctc" if fitness == "ctc" else "distilled"), "--fitness", fitness)
    teacher = ("--teacher_name_or_path", half / "ctc", "--num_target_layers", 2) if fitness == "distillation" else ()
    report = () if fitness == "probe" else ("--report", True, "--report_subnets", 5, "--report_steps", 1)
    call(
        run_subnet_search.main,
        *("run_subnet_search.py", *given, *teacher, *report, "--train_file", speech, "--validation_file", speech),
        *("--label_column_name", "text", "--num_evaluations", 5, "--population_size", 2, "--device", "cpu"),
        *("--output_dir", tmp_path / "search"),
    )
    assert json.loads((tmp_path / "search" / "results.json").read_text())["num_evaluations"] == 5
    assert set(trained) == ({torch.float32} if report else set())


def test_order(half, workshop, tmp_path):
    given = ("--model_name_or_path", half / "distilled", "--train_file", workshop / "speech.parquet")
    call(order_channels.main, "order_channels.py", *given, "--device", "cpu", "--output_dir", tmp_path / "ordered")
    assert dtypes(tmp_path / "ordered") == dtypes(half / "distilled")


def test_superb(half, workshop, tmp_path):
    speech = Dataset.from_parquet(str(workshop / "speech.parquet")).rename_column("text", "label")
    for part in ("train", "dev", "test"):
        speech.to_parquet(tmp_path / "data" / "ks" / f"{part}.parquet")
    given = ("--model_name_or_path", half / "distilled", "--subnets", "smallest", "--tasks", "ks", "--max_steps", 1)
    folders = ("--data_dir", tmp_path / "data", "--output_dir", tmp_path / "superb")
    call(run_superb.main, "run_superb.py", *given, *folders, "--variant", "stand_in", "--device", "cpu")
    assert list((tmp_path / "superb").glob("*/ks/seed-0/result.json"))


@pytest.mark.parametrize("form", ["transformers", "hubert"])
def test_push(half, tmp_path, form):
    arguments = push_subnet.PushArguments(
        *(str(half / "ctc"), "me/small", "Tones.", "smallest"), license="mit", repeats=1, format=form, dtype="bfloat16"
    )
    push_subnet.Publication(arguments).write(tmp_path, None)
    assert dtypes(tmp_path) == {torch.bfloat16}
    assert json.loads((tmp_path / "facts.json").read_text())["speed"]["times_the_largest"] > 0


def options(half: Path, *more: object) -> list[str]:
    return list(map(str, ("--model_name_or_path", half / "ctc", "--subnet", "smallest", "--repeats", 1, *more)))


@pytest.mark.parametrize("form", ["transformers", "hubert"])
def test_export(half, tmp_path, form, capsys):
    export.main([*options(half, "--output_dir", tmp_path / "small"), "--format", form])
    assert "difference from the cut model" in capsys.readouterr().out


def test_export_to_onnx_is_of_fp32(half, tmp_path, monkeypatch):
    """An export in earnest takes half a minute."""

    def to_onnx(model, *_):
        raise UserError(f"exported in {model.dtype}")

    monkeypatch.setattr(export, "to_onnx", to_onnx)
    with pytest.raises(UserError, match="exported in torch.float32"):
        export.main([*options(half, "--output_dir", tmp_path / "small"), "--format", "onnx"])


def test_profile(half, capsys):
    profiling.main(options(half))
    assert half.name.rstrip("0123456789") in capsys.readouterr().out
