"""Where speech comes from: datasets on the Hub, tables, manifests and folders, as rows of encoded recordings."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow.parquet
import soundfile
from datasets import Audio, Dataset, Features, IterableDataset, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError

from lighthubert_training.data.audio import UNREADABLE, duration, encoded_source, level
from lighthubert_training.runs.options import option
from modeling_lighthubert.errors import UserError, user_error


AUDIO_SUFFIXES = (".flac", ".mp3", ".ogg", ".opus", ".wav")
TABLES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv"}
"""Loader of datasets for each suffix of a table that has or names recordings."""


@dataclass
class DataArguments:
    """Sources of speech, one or several together, and which recordings of them are used."""

    dataset_name: list[str] | None = option(None, "Names of datasets on the Hub, or folders of datasets.")
    dataset_config_name: list[str] | None = option(None, "Configuration of each dataset, or one for all.")
    train_split_name: list[str] = option(["train"], "Split of each dataset to train on, or one for all.")
    eval_split_name: list[str] | None = option(None, "Split of each dataset to evaluate on, or one for all.")
    train_file: list[str] | None = option(
        None,
        "Training data in place of datasets: parquet files, JSON (lines) or CSV files with a column of"
        " paths, manifests of fairseq (.tsv), or folders of audio. Paths in them are relative to the file.",
    )
    validation_file: list[str] | None = option(None, "Evaluation data in place of datasets, in the same forms.")
    streaming: bool = option(False, "Whether training data are read, and downloaded, while the run goes on.")
    audio_column_name: str = option("audio", "Name of the column with the audio.")
    max_train_samples: int | None = option(None, "Number of recordings to train on, the first ones. Default: all.")
    max_eval_samples: int | None = option(None, "Number of recordings to evaluate on, the first ones. Default: all.")
    min_duration_in_seconds: float = option(0.0, "Shortest duration; shorter recordings are left out.")
    max_duration_in_seconds: float | None = option(None, "Longest duration; longer recordings are left out whole.")
    min_level_in_db: float | None = option(None, "Lowest RMS level, full scale is 0; softer recordings are left out.")
    preprocessing_num_workers: int | None = option(None, "Number of processes that measure duration and level.")
    max_unreadable_share: float = option(
        0.01, "Largest share of the recordings, 0 to 1, that may be unreadable: each is named; more end the run."
    )


def load_speech(
    arguments: DataArguments, training: bool, other_columns: Sequence[str] = ()
) -> Dataset | IterableDataset | None:
    """The training or the evaluation data of `arguments`, audio still encoded; `None` if none are named.

    The columns are that of the audio and `other_columns`. Only training data are streamed.

    Raises:
        UserError: there are no data to train on, a source is of an unknown kind, cannot be loaded, or lacks a column,
            or no recordings are left.
    """
    streaming = arguments.streaming and training
    limit = arguments.max_train_samples if training else arguments.max_eval_samples
    sources = _load_sources(arguments, training)
    if not sources:
        return None
    columns = [arguments.audio_column_name, *other_columns]
    for name, source in sources.items():
        there = source.column_names or list(next(iter(source), {}))
        for column, flag in zip_longest(columns, ("audio_column_name", "text_column_name")[: len(columns)]):
            if column not in there:
                advice = f"choose --{flag} from {there}" if flag else f"it has {there}"
                raise UserError(f"{name} has no column {column!r}: {advice}")
    chosen = (source.select_columns(columns) for source in sources.values())
    speech = concatenate_datasets([each.cast_column(columns[0], Audio(decode=False)) for each in chosen])
    if limit is not None:
        speech = speech.take(limit) if streaming else speech.select(range(min(limit, len(speech))))
    speech = _filtered(speech, arguments)
    if not streaming and not len(speech):
        raise UserError(f"no recordings in {', '.join(sources)}, or none that the filters leave")
    return speech


def _load_sources(arguments: DataArguments, training: bool) -> dict[str, Dataset | IterableDataset]:
    """Every source, by the name that messages call it."""
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
    chosen = _for_each(names, "train_split_name" if training else "eval_split_name", splits)
    return {
        f"{name} ({split})": _load(f"{name} ({split})", name, config, split=split, streaming=streaming)
        for name, config, split in zip(names, configs, chosen, strict=True)
    }


def _load(source: str, *names: str | None, **options: Any) -> Dataset | IterableDataset:
    """`datasets.load_dataset`, whose messages do not say which of several sources they are about."""
    try:
        with user_error(f"{source} cannot be loaded: "):
            return load_dataset(*names, **options)
    except DatasetGenerationError as error:  # its cause says what is wrong with the file
        raise UserError(f"{source} cannot be loaded: {error.__cause__ or error}") from error


def _for_each(names: Sequence[str], option: str, values: Sequence[str | None]) -> Sequence[str | None]:
    if len(values) not in (1, len(names)):
        raise UserError(f"--{option} has {len(values)} values for {len(names)} datasets: give one for each, or one")
    return values if len(values) == len(names) else [*values] * len(names)


def _load_file(path: Path, column: str, streaming: bool) -> Dataset | IterableDataset:
    """A table with recordings or paths of recordings, relative to the table, in `column`; or a folder of audio."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        found = sorted(str(file) for file in path.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES)
        if not found:
            raise UserError(f"{path} has no audio: {', '.join(AUDIO_SUFFIXES)}")
        dataset = Dataset.from_dict({column: found})
    elif path.suffix not in TABLES:
        raise UserError(f"{path} is of no known kind: give a folder of audio, or a file in {', '.join(TABLES)}")
    else:
        options: dict[str, Any] = {"data_files": str(path), "split": "train"}
        if path.suffix == ".parquet" and not _names_files(path, column):
            return _load(str(path), "parquet", **options, streaming=streaming)
        folder = path.parent
        if path.suffix == ".tsv":
            # fairseq's: the folder on the first line, then a path and its number of samples on each
            with path.open(encoding="utf-8") as manifest:
                folder /= manifest.readline().strip()
            options |= {"delimiter": "\t", "names": [column, "num_samples"], "skiprows": 1}
        dataset = _with_folder(_load(str(path), TABLES[path.suffix], **options), column, folder)
    return dataset.to_iterable_dataset() if streaming else dataset


def _names_files(path: Path, column: str) -> bool:
    """Whether a Parquet file has paths in `column`, as text or beside bytes that are all null, and no audio. Only its
    metadata are read."""
    with user_error(f"{path} cannot be loaded: "):
        metadata = pyarrow.parquet.read_metadata(path)
    kinds = {metadata.schema.column(at).path: at for at in range(metadata.num_columns)}
    if column in kinds:
        return metadata.schema.column(kinds[column]).logical_type.type == "STRING"
    if f"{column}.bytes" not in kinds:
        return False
    chunks = [metadata.row_group(at).column(kinds[f"{column}.bytes"]) for at in range(metadata.num_row_groups)]
    return all(chunk.statistics is not None and chunk.statistics.null_count == chunk.num_values for chunk in chunks)


def _with_folder(dataset: Dataset, column: str, folder: Path) -> Dataset:
    """Paths in `column`, relative to `folder` so far, as they can be opened."""
    if column not in dataset.column_names:
        return dataset

    def join(audio: Any) -> dict[str, Any]:
        path = audio["path"] if isinstance(audio, Mapping) else audio
        return {column: path and os.path.join(folder, path)}

    if isinstance(dataset.features[column], Audio):
        dataset = dataset.cast_column(column, Audio(decode=False))
    features = Features({**dataset.features, column: Value("string")})
    return dataset.map(join, input_columns=column, features=features)


def _filtered(speech: Dataset | IterableDataset, arguments: DataArguments) -> Dataset | IterableDataset:
    """The recordings that are not too short, too long or silent. Unreadable ones stay: they are counted later."""
    least, most = arguments.min_duration_in_seconds, arguments.max_duration_in_seconds
    loud = arguments.min_level_in_db
    if least <= 0 and most is None and loud is None:
        return speech

    def is_used(audio: Any) -> bool:
        seconds = duration(audio)
        if seconds and not least <= seconds <= (most or seconds):
            return False
        try:
            return seconds == 0 or loud is None or level(soundfile.read(encoded_source(audio))[0]) >= loud
        except UNREADABLE:
            return True

    workers = {} if isinstance(speech, IterableDataset) else {"num_proc": arguments.preprocessing_num_workers}
    return speech.filter(is_used, input_columns=arguments.audio_column_name, **workers)
