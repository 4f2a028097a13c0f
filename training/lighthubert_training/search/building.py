"""Builds what a search measures with: the supernet on its device, recordings in padded batches, and the errors that
need nothing else."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from accelerate.utils import send_to_device
from transformers import (
    AutoFeatureExtractor,
    AutoModelForCTC,
    PreTrainedModel,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)

from lighthubert_training.data.collators import Batch, CTCCollator, padded_batches
from lighthubert_training.data.recordings import Recording, SpeechDataset, Unreadable
from lighthubert_training.data.sources import DataArguments, load_speech
from lighthubert_training.search.fitness import CTCError, ProbeError
from modeling_lighthubert import LightHubertModel
from modeling_lighthubert.errors import UserError, user_error
from modeling_lighthubert.loading import is_supernet, load_model


def read_recordings(
    data: DataArguments,
    training: bool,
    sampling_rate: int,
    column: str | None = None,
    number: int | None = None,
    seed: int = 0,
) -> list[Recording]:
    """Readable recordings of a part of the data. Their items are their places in it.

    Args:
        column: its values are the labels.
        number: so many are drawn at random, and no others are read. Default: all, in their order.

    Raises:
        UserError: no data are named, or none or too few of the recordings can be read.
    """
    speech = load_speech(replace(data, streaming=False), training, () if column is None else (column,))
    if speech is None:
        raise UserError("there is no speech to measure on: name it with --validation_file or --eval_split_name")
    labels = None if column is None else speech[column]
    dataset = SpeechDataset(speech, data.audio_column_name, sampling_rate, labels)
    order = list(range(len(dataset)))
    if number is not None:
        random.Random(seed).shuffle(order)
    unreadable = Unreadable(data.max_unreadable_share, len(dataset))
    found = unreadable.readable(dataset[index]._replace(item=(0, index)) for index in order)
    recordings = list(islice(found, number))
    if not recordings:
        raise UserError("none of the recordings can be read")
    return recordings


def to_model(batch: Batch, model: PreTrainedModel) -> Batch:
    """A batch on the device of `model`, with audio in its dtype."""
    moved = send_to_device(batch, model.device)
    return {**moved, "input_values": moved["input_values"].to(model.dtype)}


def load_supernet(model_name_or_path: str, head: Any, device: str) -> Any:
    """
    Args:
        head: class of the model.

    Raises:
        UserError: it is no supernet, or lacks weights, such as those of the head.
    """
    model, report = load_model(model_name_or_path, head=head, device=device, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{model_name_or_path} lacks {missing}: give a supernet with the head that the fitness needs, as it was"
            " distilled (run_distillation.py) or fine-tuned"
        )
    if not is_supernet(model):
        raise UserError(f"{model_name_or_path} is no supernet: there is nothing to choose")
    return model


def build_ctc_error(
    model_name_or_path: str, device: str, data: DataArguments, text_column_name: str, batch_size: int
) -> CTCError:
    """
    Raises:
        UserError: no supernet with its processor, or no speech.
    """
    try:
        processor = Wav2Vec2Processor.from_pretrained(model_name_or_path)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{model_name_or_path} is no CTC model with its processor: fine-tune it first ({error})"
        ) from error
    model, extractor = load_supernet(model_name_or_path, AutoModelForCTC, device), processor.feature_extractor
    recordings = read_recordings(data, False, extractor.sampling_rate, text_column_name)
    batches = batches_for(model, extractor, recordings, batch_size)
    return CTCError(model, processor, batches, [each.labels for each in recordings])


def ctc_training_batches(
    fitness: CTCError, data: DataArguments, text_column_name: str, batch_size: int, num_batches: int, seed: int
) -> list[Batch]:
    """Batches of training speech, drawn at random, with token ids as `labels`."""
    processor, collate = fitness.processor, CTCCollator(fitness.processor)
    rate = processor.feature_extractor.sampling_rate
    recordings = [
        each._replace(labels=processor.tokenizer(each.labels).input_ids)
        for each in read_recordings(data, True, rate, text_column_name, num_batches * batch_size, seed)
    ]
    return [
        to_model(collate(recordings[start : start + batch_size]), fitness.model)
        for start in range(0, len(recordings), batch_size)
    ]


def build_probe_error(
    model_name_or_path: str, device: str, data: DataArguments, label_column_name: str, batch_size: int
) -> ProbeError:
    """
    Raises:
        UserError: no supernet, or no speech.
    """
    model = load_supernet(model_name_or_path, LightHubertModel, device)
    with user_error():
        extractor = AutoFeatureExtractor.from_pretrained(model_name_or_path)
    parts = []
    for training in (True, False):
        recordings = read_recordings(data, training, extractor.sampling_rate, label_column_name)
        parts.append((batches_for(model, extractor, recordings, batch_size), [each.labels for each in recordings]))
    return ProbeError(model, *parts)


def batches_for(
    model: PreTrainedModel, extractor: Wav2Vec2FeatureExtractor, recordings: Sequence[Recording], batch_size: int
) -> list[Batch]:
    """Padded batches on the device of `model`."""
    waveforms = [each.waveform for each in recordings if each.waveform is not None]
    return [to_model(batch, model) for batch in padded_batches(extractor, waveforms, batch_size)]
