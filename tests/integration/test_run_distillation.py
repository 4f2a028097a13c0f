"""The scripts, run as a user runs them: real files, a few steps of a tiny teacher on generated tones, and real
processes where there are several."""

import json
import re
from pathlib import Path

import pytest
import run_distillation
import torch
from conftest import stock_settings
from hub_server import loopback_hub
from safetensors.torch import load_file
from scripts import SPACE, TRAINING, distil, distillation, run, weights
from transformers import (
    AutoModel,
    HubertConfig,
    HubertModel,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperModel,
)


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


def test_a_supernet_stores_no_more_width_than_its_space_needs(workshop):
    (workshop / "narrow.json").write_text(json.dumps(SPACE | {"hidden_size": [16, 32]}))
    output = distil(workshop, "narrow", "--search_space", workshop / "narrow.json", "--max_steps", 1)
    model = AutoModel.from_pretrained(output)
    assert model.config.hidden_size == model.subnet.hidden_size == 32


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
    results = [json.loads((folder / "eval_results.json").read_text()) for folder in (one, two)]
    assert results[0] == pytest.approx(results[1], abs=1e-5)


def test_processes_with_subnets_of_their_own_end_with_one_supernet(workshop):
    options = ("--max_steps", 3, "--per_device_train_batch_size", 2, "--subnet_per_process", True)
    trained = weights(distil(workshop, "own-subnets", *options, processes=2))
    assert all(torch.isfinite(weight).all() for weight in trained.values())


def test_mixed_precision_trains_weights_in_full_precision(workshop):
    trained = weights(distil(workshop, "bf16", "--max_steps", 2, "--mixed_precision", "bf16"))
    assert all(weight.dtype == torch.float32 and torch.isfinite(weight).all() for weight in trained.values())


def test_a_shared_feature_encoder_trains_what_a_frozen_one_does(workshop):
    frozen, shared = (
        weights(distil(workshop, name, "--max_steps", 3, "--sampling", "sandwich", f"--{name}_feature_encoder"))
        for name in ("freeze", "share")
    )
    start = load_file(workshop / "teacher" / "model.safetensors")
    for name, weight in frozen.items():
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(shared[name], weight, rtol=0, atol=1e-5)
        if "feature_extractor" in name:
            assert torch.equal(shared[name], start[name.removeprefix("hubert.")])


@pytest.fixture(scope="module")
def narrow_space(workshop) -> Path:
    """Half of the channels, or all."""
    file = workshop / "narrow-ear.json"
    file.write_text(json.dumps(SPACE | {"conv_dim": [[8, 16]] * 7}))
    return file


def test_a_warm_up_teaches_the_convolutions_and_nothing_else(workshop, narrow_space):
    options = ("--search_space", narrow_space, "--target", "feature_encoder")
    at_start = distil(workshop, "cold", *options, "--max_steps", 1, "--learning_rate", 0)
    output = distil(workshop, "warm", *options, "--max_steps", 20, "--learning_rate", 1e-2)
    before, after = weights(at_start), weights(output)
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed
    assert all("feature_extractor." in name or "feature_projection." in name for name in changed)
    losses = [json.loads((folder / "eval_results.json").read_text()) for folder in (at_start, output)]
    assert losses[0]["eval_loss_largest"] < 1e-6  # it is the teacher
    assert losses[1]["eval_loss_smallest"] < 0.8 * losses[0]["eval_loss_smallest"]
    distil(workshop, "after-warm", "--search_space", narrow_space, "--student_name_or_path", output, "--max_steps", 1)


def test_a_student_may_start_from_the_folder_of_another_space(workshop, narrow_space):
    """Whose selected subnet is none of its own."""
    first = distil(workshop, "first-space", "--search_space", narrow_space, "--max_steps", 1)
    second = distil(workshop, "second-space", "--student_name_or_path", first, "--max_steps", 1)
    assert AutoModel.from_pretrained(second).search_space.conv_dim is None


def test_a_supernet_warms_up_its_own_narrow_convolutions(workshop, narrow_space):
    """Where it is no longer what its first teacher was, as after stage 1."""
    trained = distil(workshop, "stage-1", "--search_space", narrow_space, "--max_steps", 2, "--learning_rate", 1e-2)
    own = ("--teacher_name_or_path", trained, "--student_name_or_path", trained, "--search_space", narrow_space)
    output = distil(workshop, "own-ear", *own, "--target", "feature_encoder", "--max_steps", 1, "--learning_rate", 0)
    losses = json.loads((output / "eval_results.json").read_text())
    assert losses["eval_loss_largest"] < 1e-6 < losses["eval_loss_smallest"]


def test_a_run_shows_how_it_went(workshop):
    """Losses by class of subnet and on held-out speech in the history, on the plot, in TensorBoard, on the card."""
    options = ("--max_steps", 6, "--sampling", "sandwich", "--logging_steps", 2, "--eval_steps", 4)
    output = distil(workshop, "shown", *options)
    history = json.loads((output / "history.json").read_text())
    training, evaluation = ([entry for entry in history if (name in entry)] for name in ("loss", "eval_loss"))
    assert [entry["step"] for entry in training] == [2, 4, 6]
    assert [entry["step"] for entry in evaluation] == [4, 6]
    measured = {"loss_largest", "loss_random", "loss_smallest", "grad_norm", "learning_rate", "memory_gib"}
    assert set(training[0]) == {"step", "loss", "audio_seconds_per_second", *measured}
    assert set(evaluation[0]) == {"step", "eval_loss"} | {
        f"eval_loss_{name}" for name in ("largest", "smallest", "random_0", "random_1")
    }
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list(output.glob("tensorboard/events.*"))
    card = (output / "README.md").read_text()
    assert "40 smaller HuBERTs" in card.replace("\n", " ")
    assert f"| smallest | {evaluation[-1]['eval_loss_smallest']:.4f} |" in card


@pytest.fixture(scope="module")
def odd_teachers(workshop) -> Path:
    """Models that cannot teach the student of the other tests, in a folder each."""
    torch.manual_seed(1)
    settings = stock_settings(num_hidden_layers=2, feat_extract_norm="layer")
    slow = HubertModel(HubertConfig(**settings | {"conv_stride": (5, 2, 2, 2, 2, 2, 4)}))
    whisper = WhisperConfig(d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
    for name, model in {
        "slow": slow,
        "whisper": WhisperModel(whisper),
        "other": HubertModel(HubertConfig(**settings)),
    }.items():
        model.save_pretrained(workshop / name)
        Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(workshop / name)
    return workshop


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--audio_column_name", "speech"), "no column 'speech': choose --audio_column_name from ['audio', 'text']"),
        (("--train_file", "{}/nothing.parquet"), "nothing.parquet does not exist"),
        (("--max_duration_in_seconds", 0.1), "no recordings in"),
        (("--teacher_name_or_path", "{}/whisper"), "a teacher is a HuBERT, wav2vec 2.0, WavLM or data2vec-audio"),
        (("--teacher_name_or_path", "{}/slow", "--student_name_or_path", "{}/teacher"), "frames of [16000"),
        (("--student_name_or_path", "{}/other", "--share_feature_encoder", True), "differ in weights"),
        (("--learning_rate", 1e30, "--max_steps", 9), "the loss is nan at step"),
        (("--output_dir", "{}/speech.parquet/output"), "cannot be written"),
        (("--num_target_layers", 9), "num_target_layers=9, but the teacher has 2 layers"),
        (("--progressive_shrinking_ratio", 0.5), "have the same feature encoder"),
        (("--progressive_shrinking_ratio", 2), "has to be between 0 and 1"),
        (("--freeze_feature_encoder", True, "--feature_encoder_learning_rate", 1e-4), "nothing there learns"),
        (("--target", "feature_encoder", "--freeze_feature_encoder", True), "frozen or shared has nothing to learn"),
        (("--per_device_train_batch_size", 0), "per_device_train_batch_size=0 has to be at least 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_to_distillation_ends_with_its_reason(workshop, odd_teachers, monkeypatch, options, message):
    options = [str(option).format(workshop) for option in options]
    monkeypatch.setattr("sys.argv", list(map(str, distillation(workshop, "bad-input", "--max_steps", 2, *options))))
    with pytest.raises((ValueError, OSError, FloatingPointError), match=re.escape(message)):
        run_distillation.main()


def test_the_student_is_pushed_to_the_hub_without_its_checkpoints(workshop, monkeypatch):
    with loopback_hub() as hub:
        for name, value in (hub.environment | {"HF_HUB_OFFLINE": "0"}).items():
            monkeypatch.setenv(name, value)
        options = ("--max_steps", 2, "--save_steps", 1, "--push_to_hub", "--hub_model_id", "me/student")
        run(*distillation(workshop, "pushed", *options))  # a new process, for these are read at import
    files = set(hub.repositories["me/student"].files())
    assert {"model.safetensors", "config.json", "README.md", "loss.png", "modeling_lighthubert.py"} <= files
    assert not [name for name in files if "checkpoint" in name]


def test_a_hub_that_cannot_be_reached_loses_nothing(workshop, monkeypatch):
    for name, value in {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)
    output = run(*distillation(workshop, "unpushed", "--max_steps", 1, "--push_to_hub"))
    assert "unpushed could not be pushed" in output
    assert "hf_secret" not in output
    assert (workshop / "unpushed" / "model.safetensors").exists()


# A feature encoder that is elastic


def test_the_convolutions_learn_at_a_rate_of_their_own(workshop):
    start = load_file(workshop / "teacher" / "model.safetensors")
    output = distil(workshop, "slow-ear", "--max_steps", 1, "--feature_encoder_learning_rate", 1e-12)
    trained = weights(output)
    for name in ("feature_extractor.conv_layers.0.conv.weight", "encoder.layers.0.attention.q_proj.weight"):
        moved = (trained[f"hubert.{name}"] - start[name]).abs().max()
        assert moved < 1e-8 if "conv" in name else moved > 1e-6


def test_progressive_shrinking_narrows_the_ear_when_its_share_of_the_steps_is_over(workshop):
    """Before that, even the smallest subnet of a sandwich is one with the widest ear."""
    (workshop / "elastic-ear.json").write_text(json.dumps(SPACE | {"conv_dim": [[8, 16]] * 7}))
    options = ("--search_space", workshop / "elastic-ear.json", "--sampling", "sandwich", "--max_steps", 4)
    output = distil(workshop, "shrinking", *options, "--progressive_shrinking_ratio", 0.5, "--logging_steps", 2)
    before, after = (entry for entry in json.loads((output / "history.json").read_text()) if "loss" in entry)
    assert "loss_largest" in before
    assert "loss_smallest" not in before
    assert "loss_smallest" in after
