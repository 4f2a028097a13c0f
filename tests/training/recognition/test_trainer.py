"""Fine-tuning: what it does with recordings that cannot be read, checkpoints, and devices."""

import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import small_disk, tiny_model
from recognizers import save_processor
from run_speech_recognition_ctc import KINDS
from speech import RATE, TONE, encoded, undecoded
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from waits import Waits

from lighthubert_training.data.collators import CTCCollator
from lighthubert_training.data.sources import DataArguments
from lighthubert_training.recognition import trainer as trainer_module
from lighthubert_training.recognition.arguments import CTCArguments, ModelArguments, find_start
from lighthubert_training.recognition.data import SHUFFLE_BUFFER, StreamedSpeech, TranscribedSpeech
from lighthubert_training.recognition.text import TextArguments
from lighthubert_training.recognition.trainer import CTCTrainer, begin_with_blanks, shorten_mask_spans
from lighthubert_training.runs import checkpoints as checkpoints_module
from lighthubert_training.runs.checkpoints import checkpoint_damage, write_manifest
from lighthubert_training.runs.options import OptionParser, parse_options
from modeling_lighthubert import LightHubertForCTC
from modeling_lighthubert.errors import UserError


WHOLE = encoded(TONE, format="FLAC")
TORN = WHOLE[: len(WHOLE) // 2]


class InOrder:
    """In place of `EpochSampler`: batches that a test chooses."""

    batches: list[list[int]] = []

    def __init__(self, seconds, **options):
        pass

    def set_epoch(self, epoch: int) -> None:
        pass

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class Recorded(TrainerCallback):
    """Weights after each step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model, **given):
        self.weights.append({name: weight.clone() for name, weight in model.state_dict().items()})


def build_trainer(
    folder: Path, share: float = 1.0, torn: tuple[int, ...] = (1, 4), streamed: bool = False, **options
) -> CTCTrainer:
    """Of a tiny model and six recordings of increasing length, of which those that are `torn` cannot be read."""
    processor, texts = save_processor(folder / "processor"), ["a", "b", "ab", "ba", "c", "ca"]
    files = [encoded(TONE[: 4000 + 500 * number], format="FLAC") for number in range(6)]
    files = [file[: len(file) // 2] if number in torn else file for number, file in enumerate(files)]
    rows = [{"audio": {"path": f"{number}.flac", "bytes": file}} for number, file in enumerate(files)]
    data = undecoded([row | {"text": text} for row, text in zip(rows, texts, strict=True)])
    speech = TranscribedSpeech(data, "audio", texts, processor, share)
    model = tiny_model(LightHubertForCTC, None, mask_time_prob=0.0, ctc_loss_reduction="sum", pad_token_id=0)
    settings = {"output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    settings |= {"lr_scheduler_type": "constant", "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no"}
    if streamed:
        arguments = DataArguments(max_unreadable_share=share)
        speech = StreamedSpeech(data.to_iterable_dataset(), arguments, TextArguments(), processor, model)
        settings |= {"accelerator_config": {"dispatch_batches": False}}
    arguments = TrainingArguments(**(settings | {"remove_unused_columns": False, "num_train_epochs": 1} | options))
    return CTCTrainer(
        ctc=CTCArguments(),
        model=model,
        args=arguments,
        data_collator=CTCCollator(processor),
        train_dataset=speech,
        eval_dataset=None if streamed else speech,
        processing_class=processor,
    )


def train(trainer: CTCTrainer, monkeypatch, *batches: list[int]) -> list[dict[str, torch.Tensor]]:
    """Weights after each step on these batches."""
    monkeypatch.setattr(trainer_module, "EpochSampler", InOrder)
    monkeypatch.setattr(InOrder, "batches", list(batches))
    trainer.add_callback(recorded := Recorded())
    trainer.train()
    return recorded.weights


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


# Recordings that cannot be read


def scale_gradients(trainer: CTCTrainer, monkeypatch) -> None:
    """Lets a trainer on the CPU scale gradients as it does in fp16 on a GPU."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.accelerator.native_amp = True
    monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
    assert trainer.accelerator.mixed_precision == "fp16"


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_without_a_readable_recording_changes_nothing_and_no_other_step(tmp_path, monkeypatch, caplog, scaled):
    trainer = build_trainer(tmp_path)
    if scaled:
        scale_gradients(trainer, monkeypatch)
    weights = train(trainer, monkeypatch, [0, 2], [1, 4], [3, 5])
    assert same(weights[1], weights[0]) and not same(weights[2], weights[1])
    history = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    assert history[1] == (0.0, 0.0) and min(history[0] + history[2]) > 0
    without = build_trainer(tmp_path)
    if scaled:
        scale_gradients(without, monkeypatch)
    assert same(train(without, monkeypatch, [0, 2], [3, 5])[1], weights[2])
    assert [caplog.text.count(f"cannot be read: {number}.flac") for number in range(6)] == [0, 1, 0, 0, 1, 0]


def test_a_batch_is_that_of_its_readable_recordings(tmp_path, monkeypatch):
    weights = train(build_trainer(tmp_path), monkeypatch, [0, 1, 2], [4, 3])
    without = train(build_trainer(tmp_path), monkeypatch, [0, 2], [3])
    assert all(map(same, weights, without))


def test_an_accumulated_batch_without_a_readable_recording_leaves_the_step_to_the_others(tmp_path, monkeypatch):
    for batches in ([[0, 2], [1]], [[4], [0, 2]]):
        accumulated = train(build_trainer(tmp_path, gradient_accumulation_steps=2), monkeypatch, *batches)
        assert len(accumulated) == 1
        assert same(accumulated[0], train(build_trainer(tmp_path), monkeypatch, [0, 2])[0])


def test_more_unreadable_recordings_than_allowed_end_training(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"2 of 6 recordings cannot be read, more than a share of 0\.2; .* 4\.flac"):
        train(build_trainer(tmp_path, share=0.2), monkeypatch, [0, 1], [2, 4], [3, 5])


def test_what_could_not_be_read_before_training_was_resumed_counts(tmp_path, monkeypatch):
    options = {"share": 0.2, "save_strategy": "steps", "save_steps": 1}
    train(build_trainer(tmp_path, max_steps=1, **options), monkeypatch, [0, 1], [2, 4])
    resumed = build_trainer(tmp_path, max_steps=2, **options)
    with pytest.raises(UserError, match=r"2 of 6 recordings cannot be read, more than a share of 0\.2; .* 4\.flac"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_recordings_of_a_stream_are_counted_with_those_read_so_far(tmp_path, caplog):
    trainer = build_trainer(tmp_path, streamed=True, max_steps=2, per_device_train_batch_size=2, share=0.001)
    trainer.train()
    assert "cannot be read: 1.flac" in caplog.text and "4.flac" not in caplog.text
    assert trainer.train_dataset.unreadable.num_recordings == SHUFFLE_BUFFER + 4
    with pytest.raises(UserError, match="2 of 1006 recordings cannot be read"):
        build_trainer(tmp_path, streamed=True, max_steps=3, per_device_train_batch_size=2, share=0.001).train()


def test_a_recording_that_cannot_be_evaluated_any_more_is_no_silent_omission(tmp_path):
    trainer = build_trainer(tmp_path)
    with pytest.raises(UserError, match="1.flac could be read when the run began, and cannot be any more"):
        trainer.evaluate(trainer.train_dataset)


# Loaders and checkpoints


def test_loaders_are_made_anew_without_a_trace(tmp_path):
    trainer = build_trainer(tmp_path, torn=(), per_device_train_batch_size=2)
    callbacks = len(trainer.callback_handler.callbacks)
    first, second = trainer.get_train_dataloader(), trainer.get_train_dataloader()
    assert len(trainer.callback_handler.callbacks) == callbacks
    order = [batch["names"] for batch in first]
    second.set_epoch(1)
    other = [batch["names"] for batch in second]
    assert sorted(map(sorted, order)) == sorted(map(sorted, other))
    assert order != other


def test_a_checkpoint_is_whole_before_an_older_one_is_deleted(tmp_path, monkeypatch):
    trainer = build_trainer(tmp_path, torn=(), save_strategy="steps", save_steps=1, save_total_limit=1, max_steps=3)
    rotate, found = trainer_module.rotate_checkpoints, []

    def watched(folder, *given, **options):
        found.append({path.name: checkpoint_damage(path) for path in Path(folder).glob("*checkpoint-*")})
        rotate(folder, *given, **options)

    monkeypatch.setattr(trainer_module, "rotate_checkpoints", watched)
    trainer.train()
    assert found[1:] == [{f"checkpoint-{step}": None for step in (step, step + 1)} for step in (1, 2)]
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["checkpoint-3"]
    assert (trainer.args.save_total_limit, trainer.args.output_dir) == (1, str(tmp_path))


SAVES = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6, "per_device_train_batch_size": 6}


def test_a_checkpoint_is_not_there_before_it_is_whole(tmp_path, monkeypatch):
    trainer = build_trainer(tmp_path, torn=(), **SAVES)

    def stopped(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints_module, "write_manifest", stopped)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["unfinished-checkpoint-1"]
    assert find_start(tmp_path, "latest") is None
    monkeypatch.undo()
    build_trainer(tmp_path, torn=(), **SAVES).train()
    assert not list(tmp_path.glob("unfinished-*"))


def test_a_full_disk_leaves_the_last_checkpoint_and_training_goes_on(tmp_path, monkeypatch, caplog):
    trainer = build_trainer(tmp_path, torn=(), save_total_limit=1, **SAVES)
    save_optimizer = trainer._save_optimizer_and_scheduler

    def on_a_small_disk(folder):
        with nullcontext() if trainer.state.global_step in (1, 3) else small_disk(10_000):
            save_optimizer(folder)

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", on_a_small_disk)
    with pytest.raises(
        UserError, match="checkpoint-6 could not be written .* go on with --resume_from_checkpoint latest"
    ):
        trainer.train()
    assert "checkpoint-2 could not be written" in caplog.text and "checkpoint-3 could" not in caplog.text
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["checkpoint-3"]
    assert checkpoint_damage(tmp_path / "checkpoint-3") is None
    assert find_start(tmp_path, "latest") == tmp_path / "checkpoint-3"


def test_the_best_checkpoint_is_known_by_its_place(tmp_path):
    options = SAVES | {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "learning_rate": 0.0}
    trainer = build_trainer(tmp_path, torn=(), metric_for_best_model="loss", load_best_model_at_end=True, **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("early", [False, True], ids=["all steps", "stopped early"])
def test_a_finished_run_stays_finished(tmp_path, early):
    """Resumed at its end, which lies in the middle of an epoch, it trains nothing more."""
    options = SAVES | {"max_steps": 3, "per_device_train_batch_size": 3}
    if early:
        options |= {"max_steps": 9, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
        options |= {"load_best_model_at_end": True, "learning_rate": 0.0}

    def build() -> CTCTrainer:
        trainer = build_trainer(tmp_path, torn=(), **options)
        trainer.add_callback(EarlyStoppingCallback(2)) if early else None
        return trainer

    trainer = build()
    trainer.train()
    assert trainer.state.global_step == 3
    for _ in range(2):
        again = build()
        again.add_callback(recorded := Recorded())
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert (again.state.global_step, recorded.weights) == (3, [])
        assert same(again.model.state_dict(), trainer.model.state_dict())
    if early:
        again = build()
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert again.state.global_step == 3, "the evaluations before count"


def test_a_teacher_that_fails_leaves_the_model_in_training(tmp_path, monkeypatch):
    trainer = build_trainer(tmp_path, torn=())
    trainer.model = tiny_model(LightHubertForCTC).train()
    monkeypatch.setattr(LightHubertForCTC, "forward", lambda *given, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.posteriors_of_the_largest({"input_values": torch.zeros(1, 4000), "attention_mask": None})
    assert trainer.model.training


def test_parts_of_weights_on_each_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(UserError, match="weights have to be whole on every process"):
        build_trainer(tmp_path)


def test_a_used_folder_is_gone_on_with_or_refused(tmp_path):
    assert find_start(tmp_path, None) is None
    assert find_start(tmp_path, "latest") is None
    (tmp_path / "model.safetensors").touch()
    for resume in (None, "latest"):
        with pytest.raises(UserError, match="has model.safetensors of an earlier run: .* or choose another"):
            find_start(tmp_path, resume)
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        write_manifest(tmp_path / f"checkpoint-{step}")
    assert find_start(tmp_path, "latest") == tmp_path / "checkpoint-10"
    assert find_start(tmp_path, str(tmp_path / "checkpoint-5")) == tmp_path / "checkpoint-5"
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has checkpoint-10 of an earlier run: .* --resume_from_checkpoint latest"):
        find_start(tmp_path, None)


# Models and devices


def test_a_new_output_layer_gives_blanks_nine_tenths():
    layer = torch.nn.Linear(4, 12)
    begin_with_blanks(layer, 3)
    probabilities = layer(torch.zeros(4)).softmax(dim=-1)
    assert probabilities[3].item() == pytest.approx(0.9)
    assert probabilities[[0, 11]].tolist() == pytest.approx([0.1 / 11] * 2)


def test_masked_spans_of_other_models_are_no_longer_than_the_shortest_recording(tmp_path):
    speech, ours = build_trainer(tmp_path, torn=()).train_dataset, tiny_model(LightHubertForCTC, None)
    stock = torch.nn.Module()
    stock.config, stock._get_feat_extract_output_lengths = ours.config, ours._get_feat_extract_output_lengths
    shorten_mask_spans(ours, speech)
    assert ours.config.mask_time_length == 10
    speech.seconds = [0.1]
    shorten_mask_spans(stock, speech)
    assert stock.config.mask_time_length == (RATE // 10 - 80) // 320


def parse_device(*words: str) -> TrainingArguments:
    given = ["--model_name_or_path", "model", "--output_dir", "out", *words]
    return parse_options(OptionParser(KINDS), "recognition", given)[-1]


def test_the_cpu_can_be_chosen_and_what_is_no_device_here_is_refused():
    assert parse_device("--device", "cpu").use_cpu
    assert not parse_device().use_cpu
    with pytest.raises(UserError, match="--device elsewhere is no device: give cpu, cuda, or a GPU"):
        parse_device("--device", "elsewhere")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda: no such GPU can be used here"):
            parse_device("--config", "ctc_small_budget", "--device", "cuda")


def test_a_numbered_gpu_is_the_only_one_that_trainer_sees(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: os.environ["CUDA_VISIBLE_DEVICES"] != "")
    words = ["--model_name_or_path", "model", "--device", "cuda:2"]
    for visible, expected in (("0,1,2,3", "2"), ("5,6,7", "7"), ("5,6", None), ("", None)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with nullcontext() if expected else pytest.raises(UserError, match="--device cuda:2: no such GPU"):
            (arguments,) = parse_options(OptionParser(ModelArguments), None, words)
            assert (arguments.device, os.environ["CUDA_VISIBLE_DEVICES"]) == ("cuda:2", expected)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    parse_options(OptionParser(ModelArguments), None, words)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"


def test_a_step_waits_for_its_device_in_transformers_and_in_the_loss_alone(tmp_path, monkeypatch):
    trainer = build_trainer(tmp_path, torn=(), per_device_train_batch_size=2)
    trainer.model.to("meta")
    monkeypatch.setitem(vars(trainer.args), "_setup_devices", torch.device("meta"))
    loader = iter(trainer.get_train_dataloader())
    with Waits() as waits:
        batches, num_items = trainer.get_batch_samples(loader, 2, torch.device("meta"))
        for batch in batches:
            trainer.training_step(trainer.model, batch, num_items)
    assert set(waits.lines) == {
        "and (padding_mask is None or padding_mask.all())",
        "if labels is not None and labels.max() >= self.config.vocab_size:",
        "flattened_targets = labels.masked_select(labels_mask)",
        "nn.functional.ctc_loss(",
        "loss.backward(**kwargs)",  # of ctc_loss
    }
    assert set(waits.lines.values()) == {len(batches)}
