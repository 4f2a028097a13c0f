"""The scripts, run as a user runs them: real files, a few steps of a tiny teacher on generated tones, and real
processes where there are several."""

import json
import re
import shutil
from functools import partial, partialmethod
from pathlib import Path

import pytest
import run_distillation
import torch
import yaml
from conftest import stock_settings
from hub_server import loopback_hub
from safetensors.torch import load_file
from scripts import (
    SPACE,
    TESTS,
    TRAINING,
    call,
    distil,
    distillation,
    fails,
    finish,
    finish_as_a_user,
    killed,
    newest,
    run,
    weights,
)
from transformers import (
    AutoModel,
    HubertConfig,
    HubertModel,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperModel,
)

from modeling_lighthubert import LightHubertForPreTraining
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.export import main as export


def losses(output: Path) -> dict[str, float]:
    return json.loads((output / "eval_results.json").read_text())


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


def recover(workshop: Path, output: str, supernet: Path, *options: object) -> Path:
    """Goes on with one subnet of `supernet`."""
    start = ("--search_space", "none", "--student_name_or_path", supernet)
    return distil(workshop, output, *start, "--max_steps", 4, "--learning_rate", 2e-3, *options)


@pytest.fixture(scope="module")
def recovered(workshop, supernet) -> Path:
    """The smallest subnet of stage 2, distilled further by itself."""
    return recover(workshop, "recovered", supernet, "--subnet", "smallest", "--logging_steps", 1)


def test_a_subnet_goes_on_by_itself_from_the_loss_that_it_has_in_its_supernet(supernet, recovered):
    """With its part of the prediction head."""
    history = json.loads((recovered / "history.json").read_text())
    before, after = (entry for entry in history if "eval_loss" in entry)
    assert before["step"] == 0
    assert before["eval_loss_model"] == pytest.approx(losses(supernet)["eval_loss_smallest"], rel=1e-5)
    assert after["eval_loss_model"] < before["eval_loss_model"]
    head, cut = (weights(folder)["prediction_heads.0.weight"] for folder in (supernet, recovered))
    assert cut.shape == (48, 16)
    assert 0 < (cut - head[:, :16]).abs().max() < 0.01


def test_a_recovered_subnet_is_an_ordinary_cut_model_with_a_card_that_says_what_it_was(supernet, recovered, tmp_path):
    model = AutoModel.from_pretrained(recovered)
    assert model.search_space is None
    assert model.subnet == AutoModel.from_pretrained(supernet).search_space.smallest
    export(["--model_name_or_path", str(recovered), "--output_dir", str(tmp_path / "exported"), "--repeats", "1"])
    assert AutoModel.from_pretrained(tmp_path / "exported").subnet == model.subnet
    card = (recovered / "README.md").read_text().replace("\n", " ")
    assert f"for 4 steps; it began as the subnet smallest of stage2: {model.subnet}" in card
    assert f"| model | {losses(recovered)['eval_loss_model']:.4f} |" in card


def test_a_subnet_in_a_json_file_goes_on(workshop, supernet):
    subnet = AutoModel.from_pretrained(supernet).sample_subnet(3)
    subnet.to_json_file(workshop / "best.json")
    output = recover(workshop, "best", supernet, "--subnet", workshop / "best.json", "--max_steps", 1)
    assert AutoModel.from_pretrained(output).subnet == subnet
    assert "the subnet best.json of stage2" in (output / "README.md").read_text().replace("\n", " ")


def test_a_recovery_that_was_killed_ends_with_the_same_weights_and_with_no_other_subnet(workshop, supernet, recovered):
    start = ("--search_space", "none", "--student_name_or_path", supernet, "--learning_rate", 2e-3)
    steps = ("--max_steps", 4, "--logging_steps", 1, "--save_steps", 1, "--resume_from_checkpoint", "latest")
    command = distillation(workshop, "killed-recovery", *start, *steps, "--subnet")
    killed("lighthubert_training.runs.checkpoints:write_manifest", 3, *command, "smallest")
    assert newest(workshop / "killed-recovery") == 2
    with pytest.raises(UserError, match="subnet was 'smallest' and is 'middle'. Give the same ones"):
        call(run_distillation.main, *command, "middle")
    call(run_distillation.main, *command, "smallest")
    for name, weight in weights(recovered).items():
        assert torch.equal(weights(workshop / "killed-recovery")[name], weight), name
    first, *_ = json.loads((workshop / "killed-recovery" / "history.json").read_text())
    assert (first["step"], "eval_loss_model" in first) == (0, True)


@pytest.mark.parametrize(
    ("subnet", "start", "message"),
    [
        ("27M", "stage2", "subnet '27M' is not known in this search space: choose from ['largest', "),
        ("nothing.json", "stage2", "subnet nothing.json: "),
        ("smallest", "teacher", "is no supernet. Leave it out, or give a supernet as --student_name_or_path"),
        ("smallest", "recovered", "is no supernet. Leave it out, or give a supernet as --student_name_or_path"),
    ],
)
@pytest.mark.usefixtures("recovered")
def test_a_subnet_that_cannot_be_cut_is_refused(workshop, subnet, start, message):
    with pytest.raises(UserError, match=re.escape(message)):
        recover(workshop, "refused", workshop / start, "--subnet", subnet)


def test_a_student_without_a_search_space_is_one_model(workshop):
    output = workshop / "one-model"
    call(
        run_distillation.main,
        *(TRAINING / "run_distillation.py", "--teacher_name_or_path", workshop / "teacher"),
        *("--train_file", workshop / "speech.parquet", "--validation_file", workshop / "speech.parquet"),
        *("--student_name_or_path", "random", "--num_target_layers", 2, "--loss_frames", "all", "--max_steps", 1),
        *("--dataloader_num_workers", 0, "--device", "cpu", "--output_dir", output),
    )
    assert list(losses(output)) == ["eval_loss_model", "eval_num_recordings", "eval_num_available"]
    start = load_file(workshop / "teacher" / "model.safetensors")
    name = "encoder.layers.0.attention.q_proj.weight"
    assert not torch.allclose(weights(output)[f"hubert.{name}"], start[name], atol=0.01)
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


@pytest.mark.parametrize(("processes", "finish"), [(2, finish_as_a_user), (3, finish)], ids=["two", "three"])
def test_processes_with_subnets_of_their_own_end_with_one_supernet(workshop, processes, finish):
    options = ("--per_device_train_batch_size", 2, "--subnet_per_process", True)
    command = distillation(workshop, f"own-subnets-{processes}", "--max_steps", 3, *options)
    output = run(TESTS / "rank_digests.py", *command, processes=processes, finish=finish)
    digests = dict(re.findall(r"weights of rank (\d+): (\w+)", output))
    assert len(digests) == processes
    assert len(set(digests.values())) == 1
    options = ("--per_device_train_batch_size", 2 * processes)
    shared = distil(workshop, f"same-subnets-{processes}", "--max_steps", 3, *options)
    name = "hubert.encoder.layers.0.attention.q_proj.weight"
    own = weights(workshop / f"own-subnets-{processes}")
    assert (own[name] - weights(shared)[name]).abs().max() > 1e-5


@pytest.fixture(scope="module")
def plain(workshop) -> Path:
    """Two steps with nothing special, that others are compared with."""
    return distil(workshop, "plain", "--max_steps", 2)


@pytest.mark.parametrize("precision", [("--mixed_precision", "bf16"), ("--teacher_dtype", "bfloat16")])
def test_half_precision_trains_about_the_same_weights_in_full_precision(workshop, plain, precision):
    """The rounding is there: losses differ by what bfloat16 has, 8 bits, and not by less."""
    output = distil(workshop, precision[0].strip("-"), "--max_steps", 2, *precision)
    assert {weight.dtype for weight in weights(output).values()} == {torch.float32}
    errors = [abs(losses(output)[name] / loss - 1) for name, loss in losses(plain).items()]
    assert 1e-6 < max(errors) < 0.03


def test_compiled_layers_train_the_same_weights(workshop, monkeypatch):
    """Traced in full, and run without code of its own, which would take a minute to generate."""
    choices = {"num_attention_heads": [4], "ffn_ratio": [2], "num_hidden_layers": [1]}
    (workshop / "two-widths.json").write_text(json.dumps(SPACE | choices))
    options = ("--search_space", workshop / "two-widths.json", "--max_steps", 2, "--num_eval_subnets", 0)
    options = (*options, "--num_target_layers", 1)
    plain = distil(workshop, "not-compiled", *options)
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    limit = torch._dynamo.config.recompile_limit
    output = distil(workshop, "compiled", *options, "--torch_compile")
    assert torch._dynamo.config.recompile_limit == limit
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 2, torch._dynamo.utils.counters["stats"]
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()
    for name, weight in weights(plain).items():
        assert torch.equal(weights(output)[name], weight), name
    assert losses(output) == losses(plain)


def test_seconds_bound_a_batch(workshop, plain):
    """No two recordings fit into 0.6 s: the run is that with one recording in a batch."""
    one = distil(workshop, "one-recording", "--max_steps", 2, "--per_device_train_batch_size", 1)
    short = distil(workshop, "short-batches", "--max_steps", 2, "--per_device_train_batch_seconds", 0.6)
    for name, weight in weights(one).items():
        assert torch.equal(weights(short)[name], weight), name
    assert any(not torch.equal(weights(short)[name], weight) for name, weight in weights(plain).items())


def test_recordings_that_cannot_be_read_are_named_and_left_out_up_to_a_share(workshop, plain, caplog):
    folder = workshop / "one-is-broken"
    shutil.copytree(workshop / "recordings", folder)
    whole = (folder / "7.flac").read_bytes()
    (folder / "8.flac").write_bytes(whole[: len(whole) // 2])
    options = ("--max_steps", 2, "--per_device_train_batch_size", 9, "--train_file", folder)
    with pytest.raises(UserError, match="1 of 9 recordings cannot be read, more than .* 0.01.*8.flac"):
        distil(workshop, "broken", *options)
    caplog.clear()
    output = distil(workshop, "broken", *options, "--max_unreadable_share", 0.2)
    (warning,) = [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]
    assert "8.flac" in warning
    for name, weight in weights(plain).items():
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(weights(output)[name], weight, rtol=0, atol=1e-5)


def test_what_several_processes_cannot_read_is_counted_together(workshop):
    """Two of eight recordings, one in the batch of each process, of which each alone would be allowed."""
    folder = workshop / "two-are-broken"
    shutil.copytree(workshop / "recordings", folder)
    for name in ("0.flac", "1.flac"):  # the shortest: next to each other in a step
        (folder / name).write_bytes((folder / name).read_bytes()[:-2000])
    command = distillation(workshop, "together", "--train_file", folder, "--max_unreadable_share", 0.2)
    finished = finish(*command, "--max_steps", 1, "--per_device_train_batch_size", 4, processes=2)
    assert finished.returncode
    assert "error: 2 of 8 recordings cannot be read, more than a share of 0.2" in finished.stderr


def test_runs_that_share_the_outputs_of_their_teacher_end_alike(workshop):
    options = ("--share_feature_encoder", "on", "--max_steps", 3, "--teacher_cache_dir", workshop / "outputs")
    first, second = (weights(distil(workshop, f"kept-{number}", *options)) for number in range(2))
    assert list((workshop / "outputs").rglob("*.safetensors"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = weights(distil(workshop, "not-kept", *options[:4]))
    for name in first:
        torch.testing.assert_close(first[name], other[name], rtol=0, atol=1e-2)


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
    file = workshop / "narrow-encoder.json"
    file.write_text(json.dumps(SPACE | {"conv_dim": [[8, 16]] * 7}))
    return file


def test_a_student_may_start_from_the_folder_of_another_space(workshop, narrow_space):
    """Whose selected subnet is none of its own."""
    first = distil(workshop, "first-space", "--search_space", narrow_space, "--max_steps", 1)
    second = distil(workshop, "second-space", "--student_name_or_path", first, "--max_steps", 1)
    assert AutoModel.from_pretrained(second).search_space.conv_dim is None


@pytest.fixture(scope="module")
def unmasked(workshop) -> dict[str, Path]:
    """A supernet, and the same as it comes out of fine-tuning without SpecAugment, or with SpecAugment of features."""
    start = distil(workshop, "masked", "--max_steps", 1, "--learning_rate", 0.0)
    folders = {"as it was": start}
    changes = {"no time masks": {"mask_time_prob": 0.0}, "no SpecAugment": {"apply_spec_augment": False}}
    for name, changed in (changes | {"masked features": {"mask_feature_prob": 0.5}}).items():
        folders[name] = workshop / name.replace(" ", "-")
        model = LightHubertForPreTraining.from_pretrained(start, **changed)
        model.save_pretrained(folders[name])
        shutil.copy(start / "preprocessor_config.json", folders[name])
    return folders


@pytest.mark.parametrize("name", ["no time masks", "no SpecAugment", "masked features"])
def test_the_masks_of_a_student_are_those_of_the_recipe_wherever_it_starts(workshop, unmasked, name):
    """Where there was no mask embedding it is new, so the loss differs a little; without masks, it would be lower."""
    step = ("--max_steps", 1, "--logging_steps", 1)
    history = {}
    for start in ("as it was", name):
        options = ("--student_name_or_path", unmasked[start], *step)
        output = distil(workshop, f"again from {start} for {name}", *options)
        history[start] = json.loads((output / "history.json").read_text())[0]["loss"]
    rel = 0.05 if name == "no time masks" else 1e-6
    assert history[name] == pytest.approx(history["as it was"], rel=rel)
    config = json.loads((output / "config.json").read_text())
    assert config.get("apply_spec_augment", True) and not config.get("mask_feature_prob")


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
        f"eval_loss_{name}" for name in ("largest", "smallest", "middle", "random_0", "random_1")
    }
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list(output.glob("tensorboard/events.*"))
    card = (output / "README.md").read_text()
    assert "40 smaller HuBERTs" in card.replace("\n", " ")
    assert f"| smallest | {evaluation[-1]['eval_loss_smallest']:.4f} |" in card


@pytest.fixture(scope="module")
def odd_teachers(workshop) -> Path:
    """Models that cannot be the teacher of the other tests' student, in a folder each."""
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
        (
            ("--freeze_feature_encoder", True, "--feature_encoder_learning_rate", 1e-4),
            "the feature encoder is frozen",
        ),
        (("--per_device_train_batch_size", 0), "per_device_train_batch_size=0 has to be at least 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_to_distillation_ends_with_its_reason(workshop, odd_teachers, options, message):
    options = [str(option).format(workshop) for option in options]
    with pytest.raises((UserError, FloatingPointError), match=re.escape(message)):
        distil(workshop, "bad-input", "--max_steps", 2, *options)


def test_a_mistake_of_the_user_is_one_line_and_exit_status_2(workshop):
    message = fails(*distillation(workshop, "mistaken", "--max_steps", "many"), status=2)
    assert message.startswith("error: argument --max_steps")
    assert message.endswith(": invalid int value: 'many' (--help lists the options)\n")
    assert message.count("\n") == 1


def test_recipes_are_found_by_name(workshop):
    with pytest.raises(UserError, match="--config stage3 .*recovery, small_budget, stage1, stage2_base, stage2_small"):
        distil(workshop, "recipe", "--config", "stage3")
    nowhere = workshop / "nowhere"
    with pytest.raises(UserError, match="nowhere does not exist"):
        distil(workshop, "by-name", "--config", "stage2_small", "--student_name_or_path", nowhere)
    options = yaml.safe_load((workshop / "by-name" / "recipe.yaml").read_text())
    assert (options["feat_extract_norm"], options["max_steps"]) == ("layer", 400000)


def test_the_student_is_pushed_to_the_hub_without_its_checkpoints(workshop, monkeypatch):
    with loopback_hub() as hub:
        for name, value in (hub.environment | {"HF_HUB_OFFLINE": "0"}).items():
            monkeypatch.setenv(name, value)
        options = ("--max_steps", 2, "--save_steps", 1, "--push_to_hub", "--hub_model_id", "me/student")
        run(*distillation(workshop, "pushed", *options), finish=finish_as_a_user)
    files = set(hub.repositories["me/student"].files())
    assert {"model.safetensors", "config.json", "README.md", "loss.png", "modeling_lighthubert.py"} <= files
    assert not [name for name in files if "checkpoint" in name]


def test_a_hub_that_cannot_be_reached_loses_nothing(workshop, monkeypatch):
    for name, value in {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)
    command = distillation(workshop, "unpushed", "--max_steps", 1, "--push_to_hub")
    message = fails(*command, status=1, finish=finish_as_a_user)
    assert "unpushed could not be pushed" in message.splitlines()[-1]
    assert "hf_secret" not in message
    assert (workshop / "unpushed" / "model.safetensors").exists()


def test_adamw_averages_squared_gradients_as_hubert_unless_told_otherwise(workshop):
    told = ("--adam_beta2", 0.5, "--adam_epsilon", 1e-3)
    for name, options, expected in (("hubert-adamw", (), (0.98, 1e-6)), ("own-adamw", told, (0.5, 1e-3))):
        output = distil(workshop, name, "--max_steps", 1, "--save_steps", 1, *options)
        state = torch.load(output / "checkpoint-1" / "optimizer.bin", weights_only=True)
        assert {(group["betas"][1], group["eps"]) for group in state["param_groups"]} == {expected}


# A feature encoder that is elastic


def test_the_convolutions_learn_at_a_rate_of_their_own(workshop):
    start = load_file(workshop / "teacher" / "model.safetensors")
    output = distil(workshop, "slow-encoder", "--max_steps", 1, "--feature_encoder_learning_rate", 1e-12)
    trained = weights(output)
    for name in ("feature_extractor.conv_layers.0.conv.weight", "encoder.layers.0.attention.q_proj.weight"):
        moved = (trained[f"hubert.{name}"] - start[name]).abs().max()
        assert moved < 1e-8 if "conv" in name else moved > 1e-6
