"""Training of heads: which recordings a step has, and which part of them."""

import random
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import new_accelerator, noise, small_disk
from speech import TONE, encoded, undecoded
from superb_toys import EXTRACTOR, SETTINGS, Kept
from transformers import HubertConfig, HubertModel
from waits import Waits

from lighthubert_training.superb.data import Part, TaskData
from lighthubert_training.superb.features import FeatureDataset, Upstream, read_ahead
from lighthubert_training.superb.recipes import TaskSettings
from lighthubert_training.superb.tasks import TASKS
from lighthubert_training.superb.training import STATE_FILE, HeadTraining, epoch_order
from modeling_lighthubert.errors import UserError


UPSTREAM = SimpleNamespace(
    num_layers=2, hidden_size=4, sampling_rate=16_000, samples_per_frame=320, seconds_per_frame=0.02
)


@pytest.fixture
def training(tmp_path) -> HeadTraining:
    """Of ten recordings of 30 frames, in batches of three, cropped to 20 frames."""
    part = Part("train", [{"label": str(number)} for number in range(10)], None)
    settings = TaskSettings("ks", "", batch_size=3, max_seconds=0.4)
    task = TASKS["ks"](TaskData(settings), {"train": part}, UPSTREAM)
    features = {"train": Kept(noise(2, 30, 4, seed=number) for number in range(10))}
    return HeadTraining(task, features, tmp_path, new_accelerator(), {"seed": 5})


def test_an_epoch_is_in_an_order_of_its_own_that_is_drawn_once(training):
    epoch_order.cache_clear()
    epochs = [[training.indices(step) for step in range(first, first + 3)] for first in (0, 3)]
    assert epoch_order.cache_info().misses == 2
    for epoch in epochs:
        assert [len(indices) for indices in epoch] == [3, 3, 3]
        assert len(set(sum(epoch, []))) == 9
    assert epochs[0] != epochs[1]
    order = random.Random("5-1").sample(range(10), 10)
    assert epochs[1] == [order[:3], order[3:6], order[6:9]]
    assert training.indices(1) == epochs[0][1]


def test_recordings_are_cropped_alike_whatever_process_they_fall_to(training):
    whole = training.features["train"][3]
    crops = [training.crop(3, whole, random.Random(seed)) for seed in ("0-0-3", "0-0-3", "0-1-3")]
    firsts = [row["first_frame"] for _, row in crops]
    assert firsts[0] == firsts[1] != firsts[2]
    for states, row in crops:
        assert states.shape[1] == 20 and row["label"] == "3"
        assert torch.equal(states, whole[:, row["first_frame"] : row["first_frame"] + 20])


@pytest.mark.parametrize(("higher_is_better", "values"), [(True, [50, 75, 75, 25]), (False, [50, 25, 25, 75])])
def test_the_head_that_is_best_on_the_dev_part_is_kept_the_first_of_equals(training, higher_is_better, values):
    training.task.parts["dev"] = training.task.parts["train"]
    training.task.higher_is_better = {"first": higher_is_better, "second": True}
    training.outputs = lambda part: []
    given = iter(values)
    training.task.scores = lambda outputs, part: {"second": 1, "first": next(given)}
    for step in range(4):
        training.step = step
        training.downstream.weighted_sum.weights.data.fill_(step)
        training.evaluate(torch.zeros(()))
    assert (training.best["step"], training.best["scores"]["first"]) == (1, values[1])
    assert training.best["head"]["weighted_sum.weights"].tolist() == [1, 1]


def test_a_full_disk_is_outlived_unless_it_stays_full(training, monkeypatch, caplog):
    """The state after steps 2 and 5 cannot be written; then those after 6 and 7 as well."""
    monkeypatch.setattr(HeadTraining, "evaluate", lambda training, loss: None)
    training.settings = training.task.settings = replace(training.settings, eval_steps=1, max_steps=8)
    save_state = training.save_state

    def on_a_small_disk():
        with small_disk(1000) if training.step in (2, 5, 6, 7) else nullcontext():
            return save_state()

    monkeypatch.setattr(training, "save_state", on_a_small_disk)
    with pytest.raises(UserError, match="nor could the 2 before: .* go on with the same command"):
        training.run()
    assert training.step == 7
    assert torch.load(training.folder / STATE_FILE)["step"] == 4
    assert caplog.text.count("going on without it") == 3


@pytest.mark.parametrize("content", [b"", b"half", b"PK\x03\x04 and more"])
def test_a_damaged_state_is_named_and_the_head_trained_from_the_beginning(training, caplog, content):
    (training.folder / STATE_FILE).write_bytes(content)
    training.load_state()
    assert training.step == 0
    assert "state.pt is damaged" in caplog.text


def test_a_step_copies_audio_to_the_device_and_no_hidden_states_back(tmp_path, monkeypatch):
    """Of HuBERT Base, 32 recordings of 12.3 s, they were 790 MB each way."""
    accelerator = new_accelerator()
    monkeypatch.setattr(accelerator.state, "device", torch.device("meta"))
    upstream = Upstream(HubertModel(HubertConfig(**SETTINGS)).to("meta"), EXTRACTOR, "meta")
    rows = [{"audio": {"bytes": encoded(TONE, format="WAV"), "path": None}} for _ in range(4)]
    part = Part("train", [{"label": "a"}, {"label": "b"}] * 2, undecoded(rows))
    task = TASKS["ks"](TaskData(settings := TaskSettings("ks", "", batch_size=3)), {"train": part}, upstream)
    features = {"train": FeatureDataset(part.audio, upstream)}
    training = HeadTraining(task, features, tmp_path, accelerator, {"seed": 0})
    with Waits() as waits:
        (stored,) = read_ahead(features["train"], [training.own_indices(0)])
        loss, seconds = training.train_step(0, stored)
    assert loss.is_meta
    assert seconds == pytest.approx(settings.batch_size * 0.5, rel=0.05)
    assert waits.to_device == pytest.approx(settings.batch_size * len(TONE) * 4, rel=0.01), "samples in fp32"
    assert waits.to_host == 0
    assert not waits.lines
