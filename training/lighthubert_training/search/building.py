"""Builds what a search measures with: the supernet on its device, recordings in batches, and the errors that need no
other job."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from accelerate.utils import send_to_device
from transformers import AutoFeatureExtractor, AutoModelForCTC, Wav2Vec2FeatureExtractor

from lighthubert_training.data.collators import Batch, CTCCollator, label_ids, pad
from lighthubert_training.data.recordings import Recording, SpeechDataset, Unreadable
from lighthubert_training.data.sources import DataArguments, load_speech
from lighthubert_training.search.fitness import CTCError, ProbeError
from modeling_lighthubert import LightHubertModel, LightHubertPreTrainedModel
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.loading import is_supernet, load_model, load_processor


def load_supernet(model_name_or_path: str, head: Any, device: str, dtype: str = "auto", **options: Any) -> Any:
    """A supernet of the class `head`, with all its weights.

    Args:
        dtype: as in `load_model`. To be trained, it has to be float32.
        options: of the model's configuration.

    Raises:
        UserError: it is no supernet, or lacks weights, such as those of the head.
    """
    model, report = load_model(model_name_or_path, None, head, device, dtype, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{model_name_or_path} lacks {missing}: give a supernet with the head that the fitness needs, as it was"
            " distilled (run_distillation.py) or fine-tuned"
        )
    if not is_supernet(model):
        raise UserError(f"{model_name_or_path} is no supernet: there is nothing to choose")
    return model


class LazyBatches(Sequence[Any]):
    """Batches that are made whenever they are asked for, and not kept: any number of them takes the memory of one.

    Args:
        batches: what `make` makes each batch of.
    """

    def __init__(self, batches: Sequence[Any], make: Callable[[Any], Any]):
        self.batches, self.make = batches, make

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        return self.make(self.batches[index])


def read_batches(
    data: DataArguments,
    training: bool,
    sampling_rate: int,
    batch_size: int,
    column: str | None = None,
    num_batches: int | None = None,
    seed: int = 0,
) -> LazyBatches:
    """Readable recordings of a part of the data, in batches: lists of `Recording`, whose items are their places in the
    data.

    Args:
        column: its values, as text, are the labels.
        num_batches: for so many, recordings are drawn at random, and no others are read. Default: all, in their order.

    Raises:
        UserError: no data are named, or too many of the recordings cannot be read.
    """
    speech = load_speech(replace(data, streaming=False), training, (), () if column is None else (column,))
    if speech is None:
        raise UserError("there is no speech to measure on: name it with --validation_file or --eval_split_name")
    dataset = SpeechDataset(speech, data.audio_column_name, sampling_rate, None if column is None else speech[column])
    order = list(range(len(dataset)))
    if num_batches is not None:
        random.Random(seed).shuffle(order)
    unreadable = Unreadable(data.max_unreadable_share, len(dataset))
    found = unreadable.readable(dataset[index]._replace(item=(0, index)) for index in order)
    places = [each.item for each in islice(found, num_batches and num_batches * batch_size)]
    if not places:
        raise UserError("none of the recordings can be read")
    batches = [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
    return LazyBatches(batches, lambda batch: [dataset[item[1]]._replace(item=item) for item in batch])


def to_model(batch: Batch, model: LightHubertPreTrainedModel) -> Batch:
    """A batch on the device of `model`, with audio in its dtype."""
    moved = send_to_device(batch, model.device)
    return {**moved, "input_values": moved["input_values"].to(model.dtype)}


def to_features_and_labels(
    batches: Sequence[Sequence[Recording]], extractor: Wav2Vec2FeatureExtractor, model: LightHubertPreTrainedModel
) -> tuple[list[Batch], list[Any]]:
    """Padded batches on the device of `model`, and the labels of all recordings."""
    padded, labels = [], []
    for batch in batches:
        waveforms = [each.waveform for each in batch if each.waveform is not None]
        padded.append(to_model(pad(extractor, waveforms), model))
        labels += [each.labels for each in batch]
    return padded, labels


def build_ctc_error(
    model_name_or_path: str,
    device: str,
    data: DataArguments,
    text_column_name: str,
    batch_size: int,
    dtype: str = "auto",
) -> CTCError:
    """
    Raises:
        UserError: the model is no supernet with a processor, or there is no speech.
    """
    try:
        processor = load_processor(model_name_or_path)
    except UserError as error:
        message = f"{model_name_or_path} is no CTC model with its processor: fine-tune it first ({error})"
        raise UserError(message) from error
    model, extractor = load_supernet(model_name_or_path, AutoModelForCTC, device, dtype), processor.feature_extractor
    batches = read_batches(data, False, extractor.sampling_rate, batch_size, text_column_name)
    return CTCError(model, processor, *to_features_and_labels(batches, extractor, model))


def ctc_training_batches(
    fitness: CTCError, data: DataArguments, text_column_name: str, batch_size: int, num_batches: int, seed: int
) -> LazyBatches:
    """Batches of training speech, drawn at random, with token ids as `labels`."""
    processor, collate = fitness.processor, CTCCollator(fitness.processor)
    rate = processor.feature_extractor.sampling_rate
    batches = read_batches(data, True, rate, batch_size, text_column_name, num_batches, seed)

    def labelled(batch: list[Recording]) -> Batch:
        ids = label_ids([each.labels for each in batch], processor.tokenizer)
        batch = [each._replace(labels=own) for each, own in zip(batch, ids, strict=True)]
        return to_model(collate(batch), fitness.model)

    return LazyBatches(batches, labelled)


def build_probe_error(
    model_name_or_path: str, device: str, data: DataArguments, label_column_name: str, batch_size: int
) -> ProbeError:
    """
    Raises:
        UserError: the model is no supernet, there is no speech, or nothing to tell apart.
    """
    model = load_supernet(model_name_or_path, LightHubertModel, device)
    extractor = load_processor(model_name_or_path, AutoFeatureExtractor)
    train, test = (
        read_batches(data, training, extractor.sampling_rate, batch_size, label_column_name)
        for training in (True, False)
    )
    parts = [to_features_and_labels(part, extractor, model) for part in (train, test)]
    if len(set(parts[0][1])) < 2:
        raise UserError(f"all training recordings have one {label_column_name}: a probe needs at least two")
    return ProbeError(model, *parts)
