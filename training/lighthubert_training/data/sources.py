"""Where speech comes from: datasets on the Hub, tables, manifests and folders, as rows of encoded recordings."""

import csv
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Audio, Dataset, Features, IterableDataset, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError

from lighthubert_training.data.audio import UNREADABLE, duration, level, load_waveform
from lighthubert_training.runs.options import option
from modeling_lighthubert.errors import UserError, user_error


logger = logging.getLogger(__name__)
AUDIO_SUFFIXES = (
    *(".aif", ".aifc", ".aiff", ".au", ".caf", ".flac", ".mp3", ".nist", ".oga", ".ogg", ".opus", ".rf64", ".snd"),
    *(".sph", ".voc", ".w64", ".wav", ".wave"),
)
"""Of files that libsndfile reads. In a folder, they are taken for recordings in any case of the letters."""
OTHER_AUDIO_SUFFIXES = (
    *(".3gp", ".aac", ".ac3", ".amr", ".ape", ".avi", ".m4a", ".m4b", ".mka", ".mkv", ".mov", ".mp4", ".mpc", ".shn"),
    *(".webm", ".wma", ".wv"),
)
"""Of recordings that libsndfile does not read: they count as unreadable, and each says what to do."""
MISSING = ("", "N/A", "NA", "NaN", "None", "nan", "null")
"""No value, in a column of a CSV file that is not text."""
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
        "Training data in place of datasets: parquet, JSON (lines), CSV or .tsv files with a column of paths,"
        " manifests of fairseq (.tsv), or folders of audio. Paths in them are relative to the file.",
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
    arguments: DataArguments, training: bool, other_columns: Sequence[str] = (), text_columns: Sequence[str] = ()
) -> Dataset | IterableDataset | None:
    """The training or the evaluation data of `arguments`, audio still encoded; `None` if none are named.

    The columns are that of the audio, `other_columns`, and `text_columns`, which are read as text: `null` and `007`
    are words, and what is missing is empty. Only training data are streamed.

    Raises:
        UserError: there are no data to train on, a source is of an unknown kind, cannot be loaded, lacks a column, or
            has something else than text in one of `text_columns`, or no recordings are left.
    """
    streaming = arguments.streaming and training
    limit = arguments.max_train_samples if training else arguments.max_eval_samples
    sources = _load_sources(arguments, training, text_columns)
    if not sources:
        return None
    columns = [arguments.audio_column_name, *other_columns, *text_columns]
    for name, source in sources.items():
        there = source.column_names or list(next(iter(source), {}))
        flags = {columns[0]: "audio_column_name"} | dict.fromkeys(text_columns, "text_column_name")
        for column in columns:
            if column not in there:
                advice = f"choose --{flags[column]} from {there}" if column in flags else f"it has {there}"
                raise UserError(f"{name} has no column {column!r}: {advice}")
    chosen = [_with_text(source.select_columns(columns), text_columns, name) for name, source in sources.items()]
    speech = concatenate_datasets([_undecoded(each, columns[0], name) for name, each in zip(sources, chosen)])
    if limit is not None:
        speech = speech.take(limit) if streaming else speech.select(range(min(limit, len(speech))))
    speech = _filtered(speech, arguments)
    if not streaming and not len(speech):
        raise UserError(f"no recordings in {', '.join(sources)}, or none that the filters leave")
    return speech


def count_recordings(arguments: DataArguments) -> int:
    """Recordings that the sources of the evaluation data have, before any are left out."""
    return sum(len(source) for source in _load_sources(arguments, False, ()).values())  # none is streamed


def _undecoded(dataset: Dataset | IterableDataset, column: str, name: str) -> Dataset | IterableDataset:
    """Recordings in `column` as they are stored: `bytes` or `path`. Arrays, datasets would encode with torchcodec."""
    try:
        return dataset.cast_column(column, Audio(decode=False))
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        remedy = "give a column of paths, or of files as bytes"
        raise UserError(f"{name} has no encoded audio in column {column!r}: {remedy} ({error})") from error


def _with_text(dataset: Dataset | IterableDataset, columns: Sequence[str], name: str) -> Dataset | IterableDataset:
    """Strings in each of `columns`."""
    for column in columns:
        if isinstance(dataset, IterableDataset):
            features = dataset.features and Features({**dataset.features, column: Value("string")})
            dataset = dataset.map(
                lambda text, column=column: {column: _as_text(text, column, name)},
                input_columns=column,
                features=features,
            )
        elif getattr(dataset.features[column], "dtype", "") != "string" or dataset.data.column(column).null_count:
            texts = [_as_text(text, column, f"row {row} of {name}") for row, text in enumerate(dataset[column])]
            # not map, which would copy the audio of the rows as well
            dataset = dataset.remove_columns(column).add_column(column, texts, feature=Value("string"))
    return dataset


def _as_text(value: Any, column: str, place: str) -> str:
    """A string or a whole number as text, empty if there is none."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f"{place} has {value!r:.80} in column {column!r}, which is no text: write it as a string")
    return str(value)


def _load_sources(
    arguments: DataArguments, training: bool, text_columns: Sequence[str] = ()
) -> dict[str, Dataset | IterableDataset]:
    """Every source, by the name that messages call it."""
    files = arguments.train_file if training else arguments.validation_file
    streaming = arguments.streaming and training
    if files is not None:
        column = arguments.audio_column_name
        return {file: _load_file(Path(file), column, text_columns, streaming) for file in files}
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


def _load_file(path: Path, column: str, text_columns: Sequence[str], streaming: bool) -> Dataset | IterableDataset:
    """A table with recordings or paths of recordings, relative to the table, in `column`; or a folder of audio."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    kind = TABLES.get(path.suffix.lower())
    if path.is_dir():
        dataset = Dataset.from_dict({column: _find_audio(path)})
    elif kind is None:
        raise UserError(f"{path} is of no known kind: give a folder of audio, or a file in {', '.join(TABLES)}")
    else:
        options: dict[str, Any] = {"data_files": str(path), "split": "train"}
        if kind == "parquet" and not _names_files(path, column):
            return _load(str(path), "parquet", **options, streaming=streaming)
        folder = path.parent
        if kind == "csv":
            with user_error(f"{path} cannot be loaded: "):
                dialect, folder = _csv_dialect(path, column, text_columns)
            options |= dialect
        dataset = _load(str(path), kind, **options)
        _check_rows(dataset, path)
        if kind == "json":
            dataset = _with_written_text(dataset, path, text_columns)
        dataset = _with_folder(dataset, column, folder)
    return dataset.to_iterable_dataset() if streaming else dataset


def _find_audio(folder: Path) -> list[str]:
    """Paths of all recordings below a folder, in order. What is passed over is counted in a warning."""
    files = sorted(str(file) for file in folder.rglob("*") if file.is_file())
    suffixes = {file: Path(file).suffix for file in files}
    found = [file for file in files if suffixes[file].lower() in (*AUDIO_SUFFIXES, *OTHER_AUDIO_SUFFIXES)]
    if others := Counter(suffixes[file] or Path(file).name for file in set(files) - set(found)):
        kinds = ", ".join(f"{kind} ({count})" for kind, count in sorted(others.items())[:20])
        logger.warning(f"{folder}: {others.total()} files are no recordings and are passed over: {kinds}")
    # a name of other bytes can neither be kept in a table nor be written to a transcript
    unnamed = [file for file in found if not file.isascii() and file.encode(errors="replace").decode() != file]
    if unnamed:
        logger.warning(f"left out, because their names are no UTF-8, rename them: {', '.join(map(ascii, unnamed))}")
    if len(found) == len(unnamed):
        raise UserError(f"{folder} has no audio: {', '.join(AUDIO_SUFFIXES)}")
    return [file for file in found if file not in unnamed]


def _csv_dialect(path: Path, column: str, text_columns: Sequence[str]) -> tuple[dict[str, Any], Path]:
    """Options of datasets for a CSV or TSV file, and the folder that the paths in it are relative to.

    The first line of a TSV file is a header, or, if it has no tab and the second has one, the folder of a manifest of
    fairseq, whose lines are a path and its number of samples. Beside the tables of Common Voice is a folder `clips`.
    """
    folder, is_tsv = path.parent, path.suffix.lower() == ".tsv"
    with path.open(encoding="utf-8-sig", newline="") as file:
        first, second = file.readline().rstrip("\r\n"), file.readline()
    options: dict[str, Any] = {}
    if is_tsv and "\t" not in first and "\t" in second:
        names, folder = [column, "num_samples"], folder / first.strip()
        options = {"names": names, "skiprows": 1}
    else:
        names = next(csv.reader([first], delimiter="\t" if is_tsv else ","), [])
        if {"client_id", "path"} <= set(names) and (folder / "clips").is_dir():
            folder /= "clips"
    if is_tsv:  # a quotation mark at the beginning of a sentence is one, and does not swallow the lines behind it
        options |= {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    texts = {column, *text_columns} & set(names)
    options["converters"] = dict.fromkeys(texts, _unquoted if is_tsv else str)
    # of text, nothing stands for a missing value
    options |= {"keep_default_na": False, "na_values": {name: list(MISSING) for name in names if name not in texts}}
    return options, folder


def _unquoted(field: str) -> str:
    """A field of a TSV file without the quotation marks that some programs write around it."""
    inner = field[1:-1]
    is_quoted = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if is_quoted else field


def _check_rows(dataset: Dataset, path: Path) -> None:
    """
    Raises:
        UserError: rows of a table are longer than its header, or are pieces of recordings.
    """
    if "__index_level_0__" in dataset.column_names:  # pandas takes what is too much for names of the rows
        remedy = "put values with a comma in quotation marks"
        raise UserError(f"{path} has rows with more values than its header has columns: {remedy}")
    if {"offset", "duration"} <= set(dataset.column_names) and any(dataset["offset"]):
        remedy = "cut them, and name a file for each row"
        raise UserError(f"{path} names pieces of recordings, by offset and duration, which is not supported: {remedy}")


def _with_written_text(dataset: Dataset, path: Path, columns: Sequence[str]) -> Dataset:
    """A table with the strings in `columns` as its JSON has them: datasets makes dates of some, and null of others."""
    columns = [column for column in columns if column in dataset.column_names]
    if all(getattr(dataset.features[column], "dtype", "") in ("string", "null") for column in columns):
        return dataset
    with user_error(f"{path} cannot be loaded: "):
        text = path.read_text(encoding="utf-8-sig")
        rows = (
            json.loads(text) if text.lstrip().startswith("[") else map(json.loads, filter(str.strip, text.split("\n")))
        )
    written = [[row.get(column) for column in columns] for row in rows]
    for column, values in zip(columns, zip(*written, strict=True), strict=True):
        texts = [_as_text(value, column, f"row {row} of {path}") for row, value in enumerate(values)]
        dataset = dataset.remove_columns(column).add_column(column, texts, feature=Value("string"))
    return dataset


def _names_files(path: Path, column: str) -> bool:
    """Whether a Parquet file has paths in `column`, as text or in rows whose bytes are null. Only its metadata are
    read."""
    with user_error(f"{path} cannot be loaded: "):
        metadata = pyarrow.parquet.read_metadata(path)
    kinds = {metadata.schema.column(at).path: at for at in range(metadata.num_columns)}
    if column in kinds:
        return metadata.schema.column(kinds[column]).logical_type.type == "STRING"
    if f"{column}.bytes" not in kinds:
        return False
    chunks = [metadata.row_group(at).column(kinds[f"{column}.bytes"]) for at in range(metadata.num_row_groups)]
    return any(chunk.statistics is not None and chunk.statistics.null_count for chunk in chunks)


def _with_folder(dataset: Dataset, column: str, folder: Path) -> Dataset:
    """Paths in `column`, relative to `folder` so far, as they can be opened. Rows that have bytes stay as they are."""
    if column not in dataset.column_names:
        return dataset

    def join(audio: Any) -> dict[str, Any]:
        data, path = (audio.get("bytes"), audio.get("path")) if isinstance(audio, Mapping) else (None, audio)
        if data is None:
            path = os.path.join(folder, path) if isinstance(path, str) and path else None
        return {column: {"bytes": data, "path": path}}

    if isinstance(dataset.features[column], Audio):
        dataset = dataset.cast_column(column, Audio(decode=False))
    features = Features({**dataset.features, column: {"bytes": Value("binary"), "path": Value("string")}})
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
            return seconds == 0 or loud is None or level(load_waveform(audio, 16_000)) >= loud
        except UNREADABLE:
            return True

    options: dict[str, Any] = {"input_columns": arguments.audio_column_name}
    if not isinstance(speech, IterableDataset):
        # the cache of datasets knows paths, not the audio behind them, which may have been replaced since
        options |= {"num_proc": arguments.preprocessing_num_workers, "load_from_cache_file": False}
    return speech.filter(is_used, **options)
