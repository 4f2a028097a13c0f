"""Training goes on with the batch that comes next, evaluation has the same batches every time, and what cannot be read
is named before a run begins."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import new_accelerator
from hypothesis import given
from hypothesis import strategies as st
from speech import RATE, TONE, broken_speech, encoded, undecoded
from transformers import Wav2Vec2FeatureExtractor

from lighthubert_training.data.collators import DistillationCollator
from lighthubert_training.data.sources import DataArguments
from lighthubert_training.distillation import loaders
from lighthubert_training.distillation.arguments import DistillationArguments
from lighthubert_training.distillation.loaders import SpeechLoader
from modeling_lighthubert import LightHubertConfig
from modeling_lighthubert.errors import UserError


EXTRACTOR = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
COLLATOR = DistillationCollator(EXTRACTOR, EXTRACTOR, LightHubertConfig(), mask_time_prob=0.65, mask_time_length=2)


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return new_accelerator()


def tones(count: int = 10):
    """Recordings of 3200, 3600, 4000 ... samples."""
    return undecoded(
        [{"audio": {"bytes": encoded(TONE[: 3200 + 400 * at], format="WAV"), "path": None}} for at in range(count)]
    )


def arguments(**options) -> DistillationArguments:
    return DistillationArguments("teacher", "output", dataloader_num_workers=0, **options)


def build(accelerator, start: int | None, max_unreadable_share: float = 0.0, data=None, **options) -> SpeechLoader:
    data_arguments = DataArguments(max_unreadable_share=max_unreadable_share)
    state = None if start is None else {"step": start, "sampler": None}
    return SpeechLoader(arguments(**options), data_arguments, data or tones(), COLLATOR, accelerator, state)


def train_batches(accelerator, options, count: int, start: int = 0) -> list[dict]:
    loader = build(accelerator, start, **options)
    return [batch for batch, _ in zip(loader, range(count))]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_loader_begins_with_the_step_that_it_is_asked_for(accelerator, accumulated):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulated}
    whole = train_batches(accelerator, options, 8 * accumulated)
    resumed = train_batches(accelerator, options, 5 * accumulated, start=3)
    for batch, expected in zip(resumed, whole[3 * accumulated :], strict=True):
        assert batch["names"] == expected["names"]
        assert torch.equal(batch["mask"], expected["mask"])
        assert torch.equal(batch["input_values"], expected["input_values"])


def test_seconds_and_crops_bound_a_batch(accelerator):
    options = {"per_device_train_batch_size": 8, "per_device_train_batch_seconds": 0.6, "crop_seconds": 0.25}
    batches = train_batches(accelerator, options, 12)
    assert all(batch["input_values"].shape[1] <= 0.25 * RATE for batch in batches)
    assert all(batch["input_values"].numel() <= 0.6 * RATE for batch in batches)
    assert {len(batch["names"]) for batch in batches} == {2}


def test_evaluation_reads_every_recording_once_and_the_same_every_time(accelerator):
    loader = build(accelerator, None, per_device_train_batch_size=4)
    first, second = list(loader), list(loader)
    assert [name for batch in first for name in batch["names"]] == [f"recording {index}" for index in range(10)]
    for batch, again in zip(first, second, strict=True):
        assert torch.equal(batch["input_values"], again["input_values"])


def test_batches_of_evaluation_have_the_bounds_of_training_and_recordings_of_similar_length(accelerator):
    """Else a run that trains for days runs out of memory in its first evaluation."""
    lengths = [3200, 6800, 3600, 6400, 4000, 6000]
    data = undecoded([{"audio": {"bytes": encoded(TONE[:length], format="WAV"), "path": None}} for length in lengths])
    options = {"per_device_train_batch_size": 8, "per_device_train_batch_seconds": 0.76}
    batches = [batch["names"] for batch in build(accelerator, None, data=data, **options)]
    assert batches == [[f"recording {index}" for index in batch] for batch in ([0, 2, 4], [5], [3], [1])]


@given(
    lengths=st.lists(st.sampled_from([0.0, 0.3, 1.0, 4.0, 30.0]), max_size=12),
    processes=st.integers(1, 4),
    size=st.integers(1, 4),
    most=st.sampled_from([None, 2.0, 40.0]),
)
def test_processes_evaluate_every_recording_once_within_the_bounds(lengths, processes, size, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaders, "durations", lambda speech, unreadable: lengths)
        options = {"per_device_train_batch_size": size, "per_device_train_batch_seconds": most}
        batches = []
        for rank in range(processes):
            process = SimpleNamespace(device=torch.device("cpu"), process_index=rank, num_processes=processes)
            batches += build(process, None, data=tones(1), **options).batch_sampler
    for batch in batches:
        longest = max(min(lengths[item.index], 20.0) for item in batch)
        assert len(batch) <= size and (len(batch) == 1 or not most or len(batch) * longest <= most)
    read = sorted(item.index for batch in batches for item in batch)
    assert read == [index for index, length in enumerate(lengths) if length]


def test_what_could_not_be_read_before_a_run_was_resumed_counts(accelerator):
    state = {"step": 0, "sampler": None, "unreadable": {"names": ["torn.flac"], "num_recordings": 10}}
    loader = SpeechLoader(
        *(arguments(per_device_train_batch_size=10), DataArguments(max_unreadable_share=0.2)),
        *(broken_speech().audio, COLLATOR, accelerator, state),
    )
    assert loader.unreadable.names == {"torn.flac", "tone-7.flac"}
    with pytest.raises(UserError, match="3 of 10 recordings cannot be read, .* tone-3.flac"):
        list(loader.readable(batch for batch, _ in zip(loader, range(1))))


@pytest.mark.parametrize("start", [0, None], ids=["training", "evaluation"])
def test_recordings_without_a_header_are_counted_before_the_first_batch(accelerator, start):
    unreadable = build(accelerator, start, 0.1, broken_speech().audio).unreadable
    assert unreadable.names == {"tone-7.flac"}
    assert unreadable.num_recordings == 10
    with pytest.raises(UserError, match="1 of 10 recordings cannot be read"):
        build(accelerator, start, 0.05, broken_speech().audio)


def test_streamed_recordings_that_cannot_be_read_are_named_and_too_many_end_the_run(accelerator, caplog):
    stream = broken_speech().audio.to_iterable_dataset()
    loader = build(accelerator, 0, 0.2, stream, per_device_train_batch_size=10)
    batches = list(loader.readable(batch for batch, _ in zip(loader, range(1))))
    assert len(batches[0]["names"]) == 8
    assert loader.unreadable.names == {"tone-3.flac", "tone-7.flac"}
    assert "left out, because it cannot be read: tone-7.flac" in caplog.text
    loader = build(accelerator, 0, 0.1, stream, per_device_train_batch_size=10)
    with pytest.raises(UserError, match="2 of 10 recordings cannot be read"):
        list(loader.readable(batch for batch, _ in zip(loader, range(1))))


def test_a_stream_goes_on_with_as_many_processes(accelerator):
    stream = tones().to_iterable_dataset()
    state = {"step": 1, "sampler": [{"first_step": 0, "epoch": 0, "num_read": 0, "stream": None}] * 2}
    with pytest.raises(UserError, match="the checkpoint is of 2 processes, .* go on with as many"):
        SpeechLoader(arguments(), DataArguments(), stream, COLLATOR, accelerator, state)
    state["sampler"] = build(accelerator, 0, data=stream).states(0)
    resumed = SpeechLoader(arguments(), DataArguments(), stream, COLLATOR, accelerator, state)
    assert next(iter(resumed))["names"]
