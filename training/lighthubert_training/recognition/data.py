"""Speech for CTC: transcribed recordings to train and to evaluate on, and recordings to transcribe."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from transformers import Wav2Vec2Processor

from lighthubert_training.data.collators import label_ids
from lighthubert_training.data.recordings import (
    Recording,
    SpeechDataset,
    Unreadable,
    durations,
    read_recording,
    recording_name,
    why_unreadable,
)
from lighthubert_training.data.sources import TABLES, DataArguments, count_recordings, load_speech
from lighthubert_training.recognition.text import (
    TextArguments,
    num_frames_needed,
    report_unknown_characters,
    special_characters,
)
from lighthubert_training.runs.options import option
from modeling_lighthubert.errors import UserError


logger = logging.getLogger(__name__)
NOT_READABLE = "no audio that can be read"
SHUFFLE_BUFFER = 1000
"""Rows of a stream that are read before the first is trained on."""


@dataclasses.dataclass
class TestArguments:
    """What `--do_predict` transcribes after training, beside the evaluation data."""

    test_file: list[str] | None = option(None, "Test data, as --validation_file.")
    test_split_name: list[str] | None = option(None, "Split of each dataset to test on.")


class TranscribedSpeech(SpeechDataset):
    """Recordings with transcripts: item i is a `Recording` whose labels are token ids. It may be unreadable.

    Attributes:
        texts: normalised transcripts.
        seconds: of each recording, as its header says; 0 of one without.
        unreadable: counts and names what cannot be read, at most `max_share` of the recordings.
    """

    labels: Sequence[Sequence[int]]

    def __init__(
        self, dataset: Dataset, column: str, texts: Sequence[str], processor: Wav2Vec2Processor, max_share: float = 0.0
    ):
        labels = label_ids(texts, processor.tokenizer)
        super().__init__(dataset, column, processor.feature_extractor.sampling_rate, labels)
        self.texts, self.seconds = list(texts), durations(self)
        self.unreadable = Unreadable(max_share, len(self))

    def select(self, indices: Sequence[int]) -> None:
        """Keeps these recordings alone, in this order."""
        self.audio = self.audio.select(indices)
        for name in ("texts", "seconds", "labels"):
            setattr(self, name, [getattr(self, name)[index] for index in indices])


def leave_out_useless(speech: TranscribedSpeech, model: Any, part: str) -> None:
    """Leaves out, and names, what is of no use: recordings that are unreadable, empty or shorter than a frame, empty
    transcripts, and in training transcripts that are longer than their recording has frames, to which CTC gives an
    infinite loss.

    Of recordings to train on, only the header is read. Those to evaluate on are decoded once, so that all error rates
    of a run are over the same recordings.

    Raises:
        UserError: nothing is left, or too many recordings cannot be read.
    """
    reasons: dict[str, list[int]] = {}
    for index in range(len(speech)):
        if reason := _why_useless(speech, index, model, training=part == "train"):
            reasons.setdefault(reason, []).append(index)
    for reason, indices in reasons.items():
        if reason != NOT_READABLE:  # these are named one by one
            names = ", ".join(map(speech.name, indices[:5]))
            more = f" and {len(indices) - 5} more" if len(indices) > 5 else ""
            logger.warning(f"left out of {part}: {len(indices)} of {len(speech)} recordings, {reason}: {names}{more}")
    useless = {index for indices in reasons.values() for index in indices}
    if len(useless) == len(speech):
        counts = "; ".join(f"{len(indices)}: {reason}" for reason, indices in reasons.items())
        raise UserError(f"no recording of {part} is of use. {counts}")
    if useless:
        speech.select([index for index in range(len(speech)) if index not in useless])


def _why_useless(speech: TranscribedSpeech, index: int, model: Any, training: bool) -> str | None:
    """Why nothing can be done with a recording, `None` if something can."""
    seconds = speech.seconds[index]
    problem = "" if training else speech[index].problem
    if problem or seconds == 0:
        speech.unreadable.add(speech.name(index), problem or why_unreadable(speech.encoded(index)))
        return NOT_READABLE
    num_frames = int(model._get_feat_extract_output_lengths(round(seconds * speech.sampling_rate)))
    if num_frames < 1:
        return "shorter than one frame"
    if not speech.texts[index]:
        return "no transcript"
    if training and num_frames_needed(speech.labels[index]) > num_frames:
        return "a transcript longer than the recording has frames, one for 20 ms"
    return None


class StreamedSpeech(torch.utils.data.IterableDataset):
    """Transcribed recordings of a stream, in its order, some of which may be unreadable. Those without a transcript,
    or with one that is longer than the recording has frames, or has `special_characters`, are left out and named.

    Args:
        model: a PreTrainedModel, which says how many frames it makes of a recording.

    Attributes:
        unreadable: counts and names what cannot be read, at most the share that `data` allows of those read so far.
    """

    def __init__(self, stream: Any, data: DataArguments, text: TextArguments, processor: Any, model: Any):
        self.stream, self.data, self.text, self.processor = stream, data, text, processor
        self.num_frames = model._get_feat_extract_output_lengths
        self.unreadable = Unreadable(data.max_unreadable_share, SHUFFLE_BUFFER)

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[Recording]:
        special = special_characters(self.processor.tokenizer)
        for index, row in enumerate(self.stream):
            audio, text = row[self.data.audio_column_name], self.text.normalize(row[self.text.text_column_name])
            name, (labels,) = recording_name(audio, index), label_ids([text], self.processor.tokenizer)
            if found := special.intersection(text):
                logger.warning(f"left out: {name} ({' '.join(sorted(found))} in its transcript: --chars_to_ignore)")
                continue
            recording = read_recording(audio, self.processor.feature_extractor.sampling_rate, name, labels)
            samples = recording.waveform
            if samples is None or (labels and num_frames_needed(labels) <= int(self.num_frames(len(samples)))):
                yield recording
            else:
                logger.warning(f"left out: {name} (no transcript, or one longer than the recording has frames)")


def load_parts(data: DataArguments, test: TestArguments, text_column_name: str, predict: bool) -> dict[str, Any]:
    """The encoded data: `train`, and, as far as they are given, `eval` and, to `predict`, `test`."""
    parts = {part: load_speech(data, part == "train", (), (text_column_name,)) for part in ("train", "eval")}
    if predict and (test.test_file is not None or test.test_split_name is not None):
        parts["test"] = load_speech(_tested(data, test), False, (), (text_column_name,))
    return {part: dataset for part, dataset in parts.items() if dataset is not None}


def _tested(data: DataArguments, test: TestArguments) -> DataArguments:
    """The test data as evaluation data."""
    names: dict[str, Any] = {"train_file": None} if test.test_file is None else {}
    return dataclasses.replace(
        data, validation_file=test.test_file, eval_split_name=test.test_split_name, max_eval_samples=None, **names
    )


def count_available(data: DataArguments, test: TestArguments, part: str) -> int:
    """Recordings that the sources of a part have, `eval` or `test`, before any are left out."""
    return count_recordings(_tested(data, test) if part == "test" else data)


def describe_sources(data: DataArguments, test: TestArguments) -> dict[str, str]:
    """What the model card calls each part of the data: a name on the Hub, or the last part of a file's path."""

    def name(files: list[str] | None, splits: list[str] | None) -> str:
        if files is not None:
            return ", ".join(Path(file).name for file in files)
        return f"{', '.join(data.dataset_name or [])} ({', '.join(splits or [])})"

    return {
        "train": name(data.train_file, data.train_split_name),
        "eval": name(data.validation_file, data.eval_split_name),
        "test": name(test.test_file, test.test_split_name),
    }


def build_speech(
    parts: Mapping[str, Any], data: DataArguments, text: TextArguments, processor: Any, model: Any, seed: int
) -> dict[str, Any]:
    """Every part of the data with its labels, without what is of no use: `TranscribedSpeech`, or `StreamedSpeech`.

    Args:
        parts: encoded train, eval and test data.
        model: a PreTrainedModel, which says how many frames it makes of a recording.
        seed: of the order of a stream.
    """
    speech: dict[str, Any] = {}
    for part, dataset in parts.items():
        if isinstance(dataset, IterableDataset):
            stream = dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
            speech[part] = StreamedSpeech(stream, data, text, processor, model)
            continue
        texts = [text.normalize(transcript) for transcript in dataset[text.text_column_name]]
        report_unknown_characters(texts, processor.tokenizer, part, text.text_case)
        speech[part] = TranscribedSpeech(dataset, data.audio_column_name, texts, processor, data.max_unreadable_share)
        leave_out_useless(speech[part], model, part)
    return speech


class EncodedRecordings(Mapping[str, Any]):
    """Encoded recordings by name, of which each is read when it is asked for.

    Args:
        column: with the audio.
    """

    def __init__(self, column: str):
        self.column = column
        self.rows: dict[str, tuple[Sequence[Any] | Dataset, int]] = {}

    def add(self, name: str, rows: Sequence[Any] | Dataset) -> None:
        """Names every recording of `rows`, by its path, or by the `name` of its table and the number of its row. One
        that has a name already is not added."""
        for index, path in enumerate(_paths(rows, self.column)):
            self.rows.setdefault(f"{name}#{index}" if path is None else path, (rows, index))

    def __getitem__(self, name: str) -> dict[str, Any]:
        rows, index = self.rows[name]
        return rows[index][self.column]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def _paths(rows: Sequence[Any] | Dataset, column: str) -> Iterator[str | None]:
    """The path of each recording that is a file, without reading those that are not."""
    if not isinstance(rows, Dataset):
        yield from (row[column]["path"] for row in rows)
        return
    for table in rows.select_columns([column]).with_format("arrow").iter(1000):
        contents, paths = (pc.struct_field(table.column(column), name) for name in ("bytes", "path"))
        yield from pc.if_else(pc.is_valid(contents), pa.scalar(None, paths.type), paths).to_pylist()


def find_recordings(inputs: Sequence[str], data: DataArguments) -> EncodedRecordings:
    """Encoded recordings to transcribe by name, each once: files by their paths, those inside tables by the table and
    the number of the row.

    Args:
        inputs: recordings, folders of them, and tables, as for training.
        data: the column with the audio, and datasets whose evaluation part is transcribed as well.

    Raises:
        UserError: an input that is not there, or has no recordings.
    """
    recordings = EncodedRecordings(data.audio_column_name)
    for path in map(Path, inputs):
        is_recording = path.is_file() and path.suffix.lower() not in TABLES
        table = DataArguments(validation_file=[str(path)], audio_column_name=recordings.column)
        row = {recordings.column: {"path": str(path), "bytes": None}}
        recordings.add(str(path), [row] if is_recording else load_speech(table, False))
    if (rows := load_speech(data, False)) is not None:
        recordings.add(", ".join(data.dataset_name or ()), rows)
    return recordings


def load_batches(
    encoded: Mapping[str, Any], names: Iterable[str], sampling_rate: int, batch_size: int, max_seconds: float
) -> Iterator[list[Recording]]:
    """Recordings of these names, decoded, at most `batch_size` and, unless one alone has more, `max_seconds` at a
    time."""
    batch: list[Recording] = []
    seconds = 0.0
    for name in names:
        recording = read_recording(encoded[name], sampling_rate, name)
        length = 0.0 if recording.waveform is None else len(recording.waveform) / sampling_rate
        if batch and (len(batch) == batch_size or seconds + length > max_seconds):
            yield batch
            batch, seconds = [], 0.0
        batch.append(recording)
        seconds += length
    if batch:
        yield batch
