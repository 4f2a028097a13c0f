"""The scripts, run as a user runs them: real processes and files, a few steps of a tiny teacher on generated tones."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import stock_settings
from datasets import Audio, Dataset
from transformers import AutoModel, AutoModelForCTC, HubertConfig, HubertModel, Wav2Vec2FeatureExtractor, pipeline


TRAINING = Path(__file__).parent.parent / "training"
SPACE = {
    "hidden_size": [16, 48],
    "num_attention_heads": [4, 12],
    "ffn_ratio": [2, 4],
    "num_hidden_layers": [1, 2],
    "head_dim": 4,
}


def run(*command: object, processes: int = 1) -> str:
    """Output of a Python script, on one process or several."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words = [sys.executable, *(launcher if processes > 1 else []), *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-4000:]
    return finished.stdout


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder with a tiny teacher, a search space, and eight recordings: a high or a low tone, named so."""
    folder = tmp_path_factory.mktemp("workshop")
    torch.manual_seed(0)
    teacher = HubertModel(HubertConfig(**stock_settings(num_hidden_layers=2, feat_extract_norm="layer")))
    teacher.save_pretrained(folder / "teacher")
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder / "teacher")
    (folder / "space.json").write_text(json.dumps(SPACE))
    rows, rng = [], np.random.default_rng(0)
    for index in range(8):
        time = np.arange(6000 + 400 * index) / 16_000
        tone = np.sin(2 * np.pi * (200 if index % 2 else 1200) * time) + 0.05 * rng.standard_normal(len(time))
        file = io.BytesIO()
        soundfile.write(file, tone.astype(np.float32) * 0.5, 16_000, format="FLAC")
        text = "low" if index % 2 else "high"
        rows.append({"audio": {"bytes": file.getvalue(), "path": None}, "text": text})
    Dataset.from_list(rows).cast_column("audio", Audio(decode=False)).to_parquet(folder / "speech.parquet")
    return folder


def distil(workshop: Path, output: str, *options: object, processes: int = 1) -> Path:
    run(
        TRAINING / "run_distillation.py",
        *("--train_file", workshop / "speech.parquet", "--validation_file", workshop / "speech.parquet"),
        *("--teacher_name_or_path", workshop / "teacher", "--search_space", workshop / "space.json"),
        *("--num_target_layers", 2, "--output_dir", workshop / output, "--dataloader_num_workers", 0, "--cpu"),
        *options,
        processes=processes,
    )
    return workshop / output


@pytest.fixture(scope="module")
def supernet(workshop) -> Path:
    """What both stages give."""
    stage1 = distil(workshop, "stage1", "--sampling", "largest", "--max_steps", 30, "--learning_rate", 2e-3)
    return distil(workshop, "stage2", "--student_name_or_path", stage1, "--sampling", "sandwich", "--max_steps", 4)


def test_stage_1_lowers_the_loss_that_stage_2_starts_from(workshop, supernet):
    untrained = distil(workshop, "untrained", "--max_steps", 1, "--learning_rate", 0.0)
    loss = {
        name: json.loads((workshop / name / "eval_results.json").read_text())["eval_loss_largest"]
        for name in ("untrained", "stage1", "stage2")
    }
    assert untrained.is_dir()
    assert loss["stage1"] < 0.9 * loss["untrained"]
    assert loss["stage2"] < 0.9 * loss["untrained"]


def test_the_supernet_is_saved_with_its_space_and_feature_extractor(supernet):
    model = AutoModel.from_pretrained(supernet)
    assert model.search_space.num_subnets == 2 * (4 + 16)
    assert model.subnet == model.search_space.largest
    assert Wav2Vec2FeatureExtractor.from_pretrained(supernet).do_normalize


def test_a_student_without_a_search_space_is_one_model(workshop):
    output = workshop / "one-model"
    run(
        TRAINING / "run_distillation.py",
        *("--train_file", workshop / "speech.parquet", "--teacher_name_or_path", workshop / "teacher"),
        *("--student_name_or_path", "random", "--num_target_layers", 2, "--loss_frames", "all", "--max_steps", 1),
        *("--dataloader_num_workers", 0, "--cpu", "--output_dir", output),
    )
    assert AutoModel.from_pretrained(output).search_space is None


@pytest.mark.parametrize("sampling", ["uniform", "sandwich"])
def test_two_processes_end_with_one_supernet(workshop, sampling):
    """Subnets that drop a layer leave its parameters without gradient, which DDP must not choke on."""
    options = ("--sampling", sampling, "--max_steps", 3, "--per_device_train_batch_size", 2)
    output = distil(workshop, f"two-processes-{sampling}", *options, processes=2)
    trained, start = AutoModel.from_pretrained(output), AutoModel.from_pretrained(workshop / "teacher")
    assert all(torch.isfinite(parameter).all() for parameter in trained.parameters())
    moved = trained.encoder.layers[0].attention.q_proj.weight - start.encoder.layers[0].attention.q_proj.weight
    assert moved.abs().max() > 0


def test_ctc_cuts_fine_tunes_and_transcribes(workshop, supernet):
    output = workshop / "asr"
    run(
        TRAINING / "run_speech_recognition_ctc.py",
        *("--model_name_or_path", supernet, "--subnet", "smallest", "--output_dir", output, "--use_cpu"),
        *("--train_file", workshop / "speech.parquet", "--validation_file", workshop / "speech.parquet"),
        *("--max_steps", 250, "--learning_rate", 5e-3, "--warmup_steps", 5, "--mask_time_prob", 0.0),
        *("--save_strategy", "no", "--report_to", "none"),
    )
    assert AutoModelForCTC.from_pretrained(output).config.hidden_size == 16
    results = json.loads((output / "eval_results.json").read_text())
    assert results["eval_cer"] < 0.1, results
    recogniser = pipeline("automatic-speech-recognition", model=str(output))
    tone = np.sin(2 * np.pi * 200 * np.arange(8000) / 16_000).astype(np.float32) * 0.5
    assert recogniser(tone)["text"] == "low"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--text_column_name", "words"), "no column 'words'"),
        (("--subnet", "huge"), "subnet 'huge' is not known"),
    ],
)
def test_bad_input_ends_with_its_reason(workshop, supernet, options, message):
    command = [
        *(sys.executable, TRAINING / "run_speech_recognition_ctc.py", "--model_name_or_path", supernet),
        *("--train_file", workshop / "speech.parquet", "--output_dir", workshop / "bad", "--use_cpu", *options),
    ]
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert finished.returncode != 0
    assert message in finished.stderr
