"""Transcribes recordings, or a live stream, with a model fine-tuned with CTC: text, words with times, subtitles.

    python training/transcribe.py --model_name_or_path asr --inputs recording.wav
    python training/transcribe.py --model_name_or_path asr --inputs folder/ test.parquet --output_file all.jsonl
    python training/transcribe.py --model_name_or_path asr --inputs talk.mp3 --output_file talk.srt --lm_path lm.arpa
    arecord -r 16000 -f S16_LE -t raw | python training/transcribe.py --model_name_or_path asr --live

A run that was killed goes on where it stopped when it is started again: see `Journal`.
"""

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from lighthubert_training.data.sources import MANIFESTS, UNREADABLE, DataArguments, load_speech, load_waveform
from lighthubert_training.decoding import BeamSearch
from lighthubert_training.recognition.live import LiveTranscriber, transcribe_live
from lighthubert_training.recognition.recognizer import Recognizer
from lighthubert_training.recognition.transcripts import FORMATS, Journal, as_json, formatted
from lighthubert_training.runs.options import parse_recipe


@dataclass
class RecognitionArguments:
    """What transcribes, and how."""

    model_name_or_path: str = field(
        metadata={"help": "Model with a CTC head and its processor, or an ONNX file beside config.json and processor."}
    )
    subnet: str | None = field(
        default=None, metadata={"help": "Subnet of a supernet: a name or a JSON file. Default: the selected."}
    )
    device: str | None = field(default=None, metadata={"help": "Default: a GPU, if there is one."})
    batch_size: int = field(default=8, metadata={"help": "Pieces of audio that the model hears together."})
    chunk_length_s: float = field(default=20.0, metadata={"help": "Longer recordings are heard in chunks so long."})
    stride_length_s: float = field(default=2.0, metadata={"help": "What a chunk shares with each neighbour."})
    lm_path: str | None = field(
        default=None, metadata={"help": "N-gram model (ARPA or KenLM) for beam search. Default: greedy decoding."}
    )
    lexicon: str | None = field(
        default=None, metadata={"help": "File with the words that there are. Default: the unigrams of --lm_path."}
    )
    beam_width: int = field(default=100, metadata={"help": "Hypotheses that beam search keeps."})
    lm_weight: float = field(default=2.0, metadata={"help": "Weight of the language model."})
    word_score: float = field(default=0.0, metadata={"help": "Added for each word: positive for more words."})


@dataclass
class TranscriptionArguments:
    """What is transcribed, and where the transcripts go."""

    inputs: list[str] | None = field(
        default=None,
        metadata={"help": "Recordings, folders of them, and parquet, JSON, CSV or .tsv files as for training."},
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Dataset on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    split_name: str = field(default="test", metadata={"help": "Its split."})
    audio_column_name: str = field(default="audio", metadata={"help": "Column with the audio."})
    output_file: str | None = field(
        default=None, metadata={"help": "Where all transcripts go. Default: standard output, or --output_dir."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for transcripts.jsonl, and a file for each recording."}
    )
    output_format: str | None = field(
        default=None,
        metadata={"help": "Default: the suffix of --output_file, or txt.", "choices": FORMATS},
    )
    max_cue_words: int = field(default=12, metadata={"help": "Words of a subtitle."})
    max_cue_seconds: float = field(default=6.0, metadata={"help": "Seconds of a subtitle."})
    live: bool = field(
        default=False, metadata={"help": "Transcribe standard input: raw samples, 16 bit, 16 kHz, mono."}
    )
    live_chunk_length_s: float = field(default=1.0, metadata={"help": "How often --live listens."})


# What is transcribed


class Source(NamedTuple):
    """A recording, encoded, and the name that it has in transcripts and messages."""

    name: str
    audio: Any


def find_recordings(arguments: TranscriptionArguments) -> Iterator[Source]:
    """All recordings, each once: files by their paths, those inside tables by the table and the number of the row.

    Raises:
        ValueError: an input that is not there, or has no recordings.
    """
    column, seen = arguments.audio_column_name, set()
    for name, rows in _tables(arguments):
        for index, row in enumerate(rows):
            audio = row[column]
            is_path = audio.get("bytes") is None and audio.get("path")
            source = Source(str(audio["path"]) if is_path else f"{name}#{index}", audio)
            if source.name not in seen:
                seen.add(source.name)
                yield source


def _tables(arguments: TranscriptionArguments) -> Iterator[tuple[str, Any]]:
    """Rows with audio of each input."""
    column = arguments.audio_column_name
    for name in arguments.inputs or []:
        path = Path(name)
        if path.is_file() and path.suffix not in (".parquet", ".tsv", *MANIFESTS):
            yield name, [{column: {"path": str(path), "bytes": None}}]
        else:
            yield str(path), load_speech(DataArguments(validation_file=[name], audio_column_name=column), False)
    if arguments.dataset_name is not None:
        config = arguments.dataset_config_name
        data = DataArguments(
            dataset_name=[arguments.dataset_name],
            dataset_config_name=None if config is None else [config],
            eval_split_name=[arguments.split_name],
            audio_column_name=column,
        )
        yield arguments.dataset_name, load_speech(data, False)


class Loaded(NamedTuple):
    """A recording as samples (num_samples), or why there are none."""

    name: str
    waveform: np.ndarray | None
    error: str = ""


def load_batches(
    sources: Sequence[Source], sampling_rate: int, batch_size: int, max_seconds: float
) -> Iterator[list[Loaded]]:
    """At most `batch_size` recordings, and `max_seconds` of audio unless one alone has more."""
    batch: list[Loaded] = []
    seconds = 0.0
    for source in sources:
        try:
            loaded = Loaded(source.name, load_waveform(source.audio, sampling_rate))
        except (*UNREADABLE, TypeError) as error:  # TypeError: soundfile, of a file without header
            loaded = Loaded(source.name, None, str(error))
        length = 0.0 if loaded.waveform is None else len(loaded.waveform) / sampling_rate
        if batch and (len(batch) == batch_size or seconds + length > max_seconds):
            yield batch
            batch, seconds = [], 0.0
        batch.append(loaded)
        seconds += length
    if batch:
        yield batch


# Where transcripts go


def write_results(journal: Journal, names: set[str], arguments: TranscriptionArguments, output_format: str) -> None:
    """Writes what is not the journal itself: each file at once, so that it is whole or not there."""
    limits = (arguments.max_cue_words, arguments.max_cue_seconds)
    entries = (entry for entry in journal if entry["name"] in names)
    if arguments.output_dir is None and output_format != "jsonl":
        _write(Path(arguments.output_file), "".join(formatted(entry, output_format, *limits) for entry in entries))
        journal.path.unlink()
    elif arguments.output_dir is not None and output_format != "jsonl":
        taken: set[str] = set()
        for entry in entries:
            file, _, row = Path(entry["name"]).name.partition("#")
            stem = Path(file).stem + (row and f"-{row}")
            stems = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
            stem = next(stem for stem in stems if stem not in taken)
            taken.add(stem)
            _write(Path(arguments.output_dir) / f"{stem}.{output_format}", formatted(entry, output_format, *limits))


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


# The script


def build_recognizer(arguments: RecognitionArguments) -> Recognizer:
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    recognizer = Recognizer.from_pretrained(
        arguments.model_name_or_path,
        arguments.subnet,
        device,
        batch_size=arguments.batch_size,
        chunk_length_s=arguments.chunk_length_s,
        stride_length_s=arguments.stride_length_s,
    )
    if arguments.lm_path is not None:
        options = (arguments.lexicon, arguments.beam_width, arguments.lm_weight, arguments.word_score)
        recognizer.decoder = BeamSearch(recognizer.processor.tokenizer, arguments.lm_path, *options)
    elif arguments.lexicon is not None:
        raise ValueError("--lexicon is for beam search: give --lm_path as well")
    return recognizer


def choose_format(arguments: TranscriptionArguments) -> str:
    """
    Raises:
        ValueError: options that contradict each other, or a suffix that is no format.
    """
    if arguments.live == bool(arguments.inputs or arguments.dataset_name):
        raise ValueError("give what to transcribe: either --inputs or --dataset_name, or --live")
    if arguments.output_file is not None and (arguments.output_dir is not None or arguments.live):
        raise ValueError("--output_file goes neither with --output_dir nor with --live")
    suffix = None if arguments.output_file is None else Path(arguments.output_file).suffix.removeprefix(".")
    chosen = arguments.output_format or suffix or "txt"
    if chosen not in (FORMATS[:2] if arguments.live else FORMATS):
        allowed = "jsonl or txt with --live" if arguments.live else f"one of {', '.join(FORMATS)}"
        raise ValueError(f"transcripts have to be {allowed}, not {chosen!r}: choose --output_format")
    return chosen


def open_journal(arguments: TranscriptionArguments, output_format: str) -> Journal | None:
    if arguments.output_dir is not None:
        return Journal(Path(arguments.output_dir) / "transcripts.jsonl")
    if arguments.output_file is None:
        return None
    return Journal(Path(arguments.output_file + ("" if output_format == "jsonl" else ".jsonl")))


def transcribe(recognizer: Recognizer, sources: Sequence[Source]) -> Iterator[list[dict[str, Any]]]:
    """What the journal says of each recording, batch by batch. Shows how fast it goes."""
    max_seconds = recognizer.batch_size * recognizer.chunk * recognizer.seconds_per_frame
    begin, seconds = time.monotonic(), 0.0
    with tqdm(total=len(sources), unit="recording") as progress:
        for batch in load_batches(sources, recognizer.sampling_rate, recognizer.batch_size, max_seconds):
            readable = [loaded for loaded in batch if loaded.waveform is not None]
            transcripts = recognizer.transcribe([loaded.waveform for loaded in readable])
            by_name = {loaded.name: transcript for loaded, transcript in zip(readable, transcripts)}
            for loaded in batch:
                if loaded.waveform is None:
                    tqdm.write(f"passed over, it cannot be read: {loaded.name} ({loaded.error})", file=sys.stderr)
            yield [
                as_json(each.name, by_name[each.name])
                if each.name in by_name
                else {"name": each.name, "error": each.error}
                for each in batch
            ]
            seconds += sum(transcript.duration for transcript in transcripts)
            progress.set_postfix_str(f"{seconds / (time.monotonic() - begin):.1f} s of audio per second")
            progress.update(len(batch))


def transcribe_all(
    recognizer: Recognizer, sources: Sequence[Source], arguments: TranscriptionArguments, output_format: str
) -> int:
    """Transcribes what is not transcribed yet, and returns the status to exit with: 1 if nothing could be read."""
    if output_format in ("srt", "vtt") and arguments.output_dir is None and len(sources) != 1:
        raise ValueError(f"{len(sources)} recordings do not fit into one {output_format} file: give --output_dir")
    journal = open_journal(arguments, output_format)
    done = set() if journal is None else journal.names
    if done:
        print(f"{journal.path} has {len(done)} recordings already, which are left as they are", file=sys.stderr)
    errors = set() if journal is None else journal.errors
    for entries in transcribe(recognizer, [source for source in sources if source.name not in done]):
        if journal is not None:
            journal.add(entries)
            continue
        errors |= {entry["name"] for entry in entries if "error" in entry}
        for entry in entries:
            if "error" not in entry or output_format == "jsonl":
                cues = (arguments.max_cue_words, arguments.max_cue_seconds)
                print(formatted(entry, output_format, *cues), end="", flush=True)
    names = {source.name for source in sources}
    if journal is not None:
        write_results(journal, names, arguments, output_format)
    if errors & names:
        print(f"{len(errors & names)} of {len(names)} recordings could not be read", file=sys.stderr)
    return int(errors >= names)


def main() -> None:
    parser = HfArgumentParser((RecognitionArguments, TranscriptionArguments), description=__doc__.splitlines()[0])
    recognition, arguments = parse_recipe(parser)
    try:
        output_format = choose_format(arguments)
        if arguments.live:
            if recognition.lm_path is not None:
                raise ValueError("--live decodes greedily: leave --lm_path out")
            live = LiveTranscriber(build_recognizer(recognition), arguments.live_chunk_length_s)
            transcribe_live(live, sys.stdin.buffer, output_format)
            return
        sources = list(find_recordings(arguments))
        status = transcribe_all(build_recognizer(recognition), sources, arguments, output_format)
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from here, if it has --output_file or --output_dir")
    sys.exit(status)


if __name__ == "__main__":
    main()
