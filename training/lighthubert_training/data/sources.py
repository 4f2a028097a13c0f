"""Where speech comes from: datasets on the Hub, tables, manifests and folders, as rows of encoded recordings."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import soundfile
from datasets import Audio, Dataset, IterableDataset, Value, concatenate_datasets, load_dataset

from lighthubert_training.data.audio import UNREADABLE, duration, encoded_source, level
from modeling_lighthubert.errors import UserError


AUDIO_SUFFIXES = (".flac", ".mp3", ".ogg", ".opus", ".wav")
MANIFESTS = {".json": "json", ".jsonl": "json", ".csv": "csv"}


@dataclass
class DataArguments:
    """Where the speech comes from, one or several sources together, and which recordings of it count."""

    dataset_name: list[str] | None = field(default=None, metadata={"help": "Datasets on the Hub, or folders of them."})
    dataset_config_name: list[str] | None = field(
        default=None, metadata={"help": "Configuration of each dataset, or one for all."}
    )
    train_split_name: list[str] = field(
        default_factory=lambda: ["train"], metadata={"help": "Split of each dataset to train on, or one for all."}
    )
    eval_split_name: list[str] | None = field(
        default=None, metadata={"help": "Split of each dataset to evaluate on, or one for all."}
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to train on in place of datasets: parquet files, JSON (lines) or CSV files with a column of"
            " paths, manifests of fairseq (.tsv), or folders of audio."
        },
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "What to evaluate on, likewise."})
    streaming: bool = field(default=False, metadata={"help": "Read the training data while it is trained on."})
    audio_column_name: str = field(default="audio", metadata={"help": "Column with the audio."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on no more than this many recordings."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on no more recordings than this."})
    min_duration_in_seconds: float = field(default=0.0, metadata={"help": "Leave out shorter recordings."})
    max_duration_in_seconds: float | None = field(
        default=None, metadata={"help": "Leave out longer recordings, as a whole."}
    )
    min_level_in_db: float | None = field(
        default=None,
        metadata={"help": "Leave out recordings as silent that are softer than this: RMS, relative to full scale."},
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that measure recordings for the three options above."}
    )
    max_unreadable_share: float = field(
        default=0.01,
        metadata={
            "help": "Recordings that cannot be read are named and left out; a larger share of all ends the run."
        },
    )


def load_speech(
    arguments: DataArguments, training: bool, other_columns: Sequence[str] = ()
) -> Dataset | IterableDataset | None:
    """The training or the evaluation part of what `arguments` name, audio still encoded; `None` if nothing is named.

    The columns are that of the audio and `other_columns`. Only training data are streamed.

    Raises:
        UserError: no data to train on, a source without such a column or of an unknown kind, or no recordings.
    """
    streaming = arguments.streaming and training
    limit = arguments.max_train_samples if training else arguments.max_eval_samples
    sources = _load_sources(arguments, training)
    if not sources:
        return None
    columns = [arguments.audio_column_name, *other_columns]
    for name, source in sources.items():
        there = source.column_names or list(next(iter(source), {}))
        for column, option in zip(columns, ("audio_column_name", "text_column_name")):
            if column not in there:
                raise UserError(f"{name} has no column {column!r}: choose --{option} from {there}")
    encoded = [
        source.select_columns(columns).cast_column(arguments.audio_column_name, Audio(decode=False))
        for source in sources.values()
    ]
    speech = concatenate_datasets(encoded)
    if limit is not None:
        speech = speech.take(limit) if streaming else speech.select(range(min(limit, len(speech))))
    speech = _filtered(speech, arguments)
    if not streaming and not len(speech):
        raise UserError(f"no recordings in {', '.join(sources)}, or none that the filters leave")
    return speech


def _load_sources(arguments: DataArguments, training: bool) -> dict[str, Dataset | IterableDataset]:
    """Every source by its name."""
    files = arguments.train_file if training else arguments.validation_file
    streaming = arguments.streaming and training
    if files is not None:
        return {file: _load_file(Path(file), arguments.audio_column_name, streaming) for file in files}
    splits = arguments.train_split_name if training else arguments.eval_split_name
    if arguments.dataset_name is None and training:
        raise UserError("nothing to train on: give --train_file or --dataset_name")
    if arguments.dataset_name is None or arguments.train_file is not None or splits is None:
        return {}
    names = arguments.dataset_name
    configs = _for_each(names, "dataset_config_name", arguments.dataset_config_name or [None])
    splits = _for_each(names, "train_split_name" if training else "eval_split_name", splits)
    return {
        f"{name} ({split})": _load(f"{name} ({split})", name, config, split=split, streaming=streaming)
        for name, config, split in zip(names, configs, splits, strict=True)
    }


def _load(source: str, *names: str | None, **options: Any) -> Dataset | IterableDataset:
    """`datasets.load_dataset`, whose messages do not say which of several sources they mean."""
    try:
        return load_dataset(*names, **options)
    except ValueError as error:
        raise UserError(f"{source} cannot be loaded: {error}") from error


def _for_each(names: Sequence[str], option: str, values: Sequence[str | None]) -> Sequence[str | None]:
    if len(values) not in (1, len(names)):
        raise UserError(f"--{option} has {len(values)} values for {len(names)} datasets: give one for each, or one")
    return values if len(values) == len(names) else [*values] * len(names)


def _load_file(path: Path, column: str, streaming: bool) -> Dataset | IterableDataset:
    """A file of recordings or of their paths, or a folder of audio. Paths are relative to the file."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        found = sorted(str(file) for file in path.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES)
        if not found:
            raise UserError(f"{path} has no audio: {', '.join(AUDIO_SUFFIXES)}")
        dataset = Dataset.from_dict({column: found})
    elif path.suffix == ".parquet":
        return _load(str(path), "parquet", data_files=str(path), split="train", streaming=streaming)
    elif path.suffix == ".tsv":
        # fairseq's: the folder on the first line, then a path and its number of samples on each
        with path.open(encoding="utf-8") as manifest:
            folder = manifest.readline().strip()
        options = {"delimiter": "\t", "names": [column, "num_samples"], "skiprows": 1}
        dataset = _with_folder(_load(str(path), "csv", data_files=str(path), split="train", **options), column, folder)
    elif path.suffix in MANIFESTS:
        dataset = _load(str(path), MANIFESTS[path.suffix], data_files=str(path), split="train")
        dataset = _with_folder(dataset, column, str(path.parent))
    else:
        known = ", ".join([".parquet", *MANIFESTS, ".tsv"])
        raise UserError(f"{path} is of no known kind: give a folder of audio, or a file in {known}")
    return dataset.to_iterable_dataset() if streaming else dataset


def _with_folder(dataset: Dataset, column: str, folder: str) -> Dataset:
    """Paths in `column`, relative to `folder` so far, as they can be opened."""
    if column not in dataset.column_names:
        return dataset
    dataset = dataset.map(lambda path: {column: os.path.join(folder, path)}, input_columns=column)
    return dataset.cast_column(column, Value("string"))


def _filtered(speech: Dataset | IterableDataset, arguments: DataArguments) -> Dataset | IterableDataset:
    """Without recordings that are too short, too long or silent. What cannot be read stays, to be counted later."""
    least, most, loud = (
        arguments.min_duration_in_seconds,
        arguments.max_duration_in_seconds,
        arguments.min_level_in_db,
    )
    if least <= 0 and most is None and loud is None:
        return speech

    def counts(audio: Any) -> bool:
        seconds = duration(audio)
        if seconds == 0:
            return True
        if not least <= seconds <= (most or seconds):
            return False
        try:
            return loud is None or level(soundfile.read(encoded_source(audio))[0]) >= loud
        except UNREADABLE:
            return True

    workers = {} if isinstance(speech, IterableDataset) else {"num_proc": arguments.preprocessing_num_workers}
    return speech.filter(counts, input_columns=arguments.audio_column_name, **workers)
