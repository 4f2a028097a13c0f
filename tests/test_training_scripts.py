"""The scripts, run as a user runs them: real processes and files, a few steps of a tiny teacher on generated tones."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import stock_settings
from datasets import Audio, Dataset
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCTC, HubertConfig, HubertModel, Wav2Vec2FeatureExtractor, pipeline


pytestmark = pytest.mark.xdist_group("scripts")  # one worker makes what they share
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
    return finished.stdout + finished.stderr


def start(*command: object, processes: int = 1) -> subprocess.Popen:
    """The same in the background, with a process group of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words = [sys.executable, *(launcher if processes > 1 else []), *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(words, env=environment, start_new_session=True, **silent)


def newest(output: Path) -> int:
    """Step of the newest checkpoint, 0 if there is none."""
    return max((int(path.name.partition("-")[2]) for path in output.glob("checkpoint-*")), default=0)


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


def distillation(workshop: Path, output: str, *options: object) -> list[object]:
    """The command, for `run`."""
    return [
        TRAINING / "run_distillation.py",
        *("--train_file", workshop / "speech.parquet", "--validation_file", workshop / "speech.parquet"),
        *("--teacher_name_or_path", workshop / "teacher", "--search_space", workshop / "space.json"),
        *("--num_target_layers", 2, "--output_dir", workshop / output, "--dataloader_num_workers", 0, "--cpu"),
        *options,
    ]


def distil(workshop: Path, output: str, *options: object, processes: int = 1) -> Path:
    run(*distillation(workshop, output, *options), processes=processes)
    return workshop / output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


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


@pytest.mark.parametrize("sampling", ["largest", "uniform", "uniform_size", "sandwich"])
def test_two_processes_train_what_one_trains_with_the_doubled_batch(workshop, sampling):
    """Subnets that drop a layer leave its parameters without gradient, on all processes.

    The bias of the keys has no gradient but rounding errors (softmax does not see it), of which Adam makes full steps.
    """
    options = ("--sampling", sampling, "--max_steps", 3, "--num_random_subnets", 2, "--learning_rate", 1e-4)
    two = distil(workshop, f"two-{sampling}", *options, "--per_device_train_batch_size", 2, processes=2)
    one = distil(workshop, f"one-{sampling}", *options, "--per_device_train_batch_size", 4)
    start = load_file(workshop / "teacher" / "model.safetensors")
    for name, weight in weights(one).items():
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(weights(two)[name], weight, rtol=0, atol=1e-6)
    name = "encoder.layers.0.attention.q_proj.weight"
    assert not torch.equal(weights(one)[f"hubert.{name}"], start[name])


def test_processes_with_subnets_of_their_own_end_with_one_supernet(workshop):
    options = ("--max_steps", 3, "--per_device_train_batch_size", 2, "--subnet_per_process", True)
    trained = weights(distil(workshop, "own-subnets", *options, processes=2))
    assert all(torch.isfinite(weight).all() for weight in trained.values())


def test_mixed_precision_trains_weights_in_full_precision(workshop):
    trained = weights(distil(workshop, "bf16", "--max_steps", 2, "--mixed_precision", "bf16"))
    assert all(weight.dtype == torch.float32 and torch.isfinite(weight).all() for weight in trained.values())


STEPS = ("--sampling", "sandwich", "--max_steps", 30, "--save_steps", 2, "--per_device_train_batch_size", 2)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_again_and_again_ends_with_the_same_weights(workshop, processes):
    uninterrupted = distil(workshop, f"uninterrupted-{processes}", *STEPS, processes=processes)
    output, rng, resumed = workshop / f"killed-{processes}", random.Random(processes), False
    command = distillation(workshop, output.name, *STEPS, "--resume_from_checkpoint", "latest")
    for kill in range(4):
        process = start(*command, processes=processes)
        before = newest(output)
        while process.poll() is None and newest(output) == before:
            if kill % 2 and any(output.glob("unfinished-*")):  # in the middle of a save
                break
            time.sleep(0.002)
        time.sleep(0 if kill % 2 else rng.uniform(0, 0.3))
        resumed = resumed or before > 0
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (output / "model.safetensors").exists(), "it was over before it was killed: more steps are needed"
    run(*command, processes=processes)
    assert resumed
    for name, weight in weights(output).items():
        assert torch.equal(weight, weights(uninterrupted)[name]), name
    assert sorted(path.name for path in output.glob("*checkpoint*")) == ["checkpoint-28", "checkpoint-30"]


def test_sigterm_leaves_a_checkpoint_and_ends_well(workshop):
    output = workshop / "terminated"
    options = ("--max_steps", 500, "--save_steps", 5)
    process = start(*distillation(workshop, "terminated", *options))
    while process.poll() is None and not newest(output):
        time.sleep(0.01)
    process.terminate()
    assert process.wait(timeout=60) == 0
    assert newest(output) >= 5
    assert not (output / "model.safetensors").exists()


def test_a_damaged_checkpoint_falls_back_to_the_one_before(workshop):
    whole = distil(workshop, "whole", *STEPS)
    damaged = workshop / "damaged"
    shutil.copytree(whole, damaged)
    model = damaged / "checkpoint-30" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-100])
    output = run(*distillation(workshop, "damaged", *STEPS, "--resume_from_checkpoint", "latest"))
    assert "checkpoint-30 is damaged" in output
    assert all(torch.equal(weight, weights(whole)[name]) for name, weight in weights(damaged).items())


def test_a_changed_recipe_is_not_resumed(workshop):
    distil(workshop, "recipe", "--max_steps", 2, "--save_steps", 1)
    options = ("--max_steps", 2, "--learning_rate", 0.1, "--resume_from_checkpoint", "latest")
    with pytest.raises(AssertionError, match="learning_rate was 0.0005 and is 0.1"):
        distil(workshop, "recipe", *options)


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
