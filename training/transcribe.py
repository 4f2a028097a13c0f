"""Transcribes recordings, or a live stream, with a model fine-tuned with CTC: text, words with times, subtitles.

    python training/transcribe.py --model_name_or_path asr --inputs recording.wav
    python training/transcribe.py --model_name_or_path asr --inputs folder/ test.parquet --output_file all.jsonl
    python training/transcribe.py --model_name_or_path asr --inputs talk.mp3 --output_file talk.srt --lm_path lm.arpa
    arecord -r 16000 -f S16_LE -t raw | python training/transcribe.py --model_name_or_path asr --live
    python training/transcribe.py --model_name_or_path asr --cascade smallest,largest --calibrate_cascade dev.parquet
    python training/transcribe.py --model_name_or_path asr --cascade smallest,largest --inputs recording.wav

A run that was killed goes on where it stopped when it is started again: see `Journal`.
"""

import itertools
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lighthubert_training.data.recordings import SpeechDataset, Unreadable
from lighthubert_training.data.sources import DataArguments, load_speech
from lighthubert_training.decoding import BeamSearch
from lighthubert_training.recognition.cascade import Calibration, CascadeRecognizer
from lighthubert_training.recognition.data import find_recordings, load_batches
from lighthubert_training.recognition.live import LiveTranscriber, transcribe_live
from lighthubert_training.recognition.recognizer import Recognizer
from lighthubert_training.recognition.text import ReferenceArguments
from lighthubert_training.recognition.transcripts import FORMATS, Journal, format_transcript, write_results
from lighthubert_training.runs.distributed import DEVICE_HELP, choose_device, locked
from lighthubert_training.runs.options import OptionParser, option, parse_options, parse_size
from lighthubert_training.runs.tables import markdown_table
from modeling_lighthubert.errors import UserError, run


@dataclass
class RecognitionArguments:
    """What transcribes, and how."""

    model_name_or_path: str = option(help="CTC model with processor, or ONNX file beside config.json and processor.")
    subnet: str | None = option(None, "Subnet of a supernet: a name or a JSON file. Default: the selected.")
    device: str | None = option(None, DEVICE_HELP)
    batch_size: int = option(8, "Recordings, or chunks of them, in a batch.")
    chunk_length_s: float = option(20.0, "Length, in seconds, of the chunks that longer recordings are split into.")
    stride_length_s: float = option(2.0, "Overlap of a chunk with each of its neighbours, in seconds.")
    lm_path: str | None = option(None, "N-gram model (ARPA or KenLM) for beam search. Default: greedy decoding.")
    lexicon: str | None = option(None, "File of all words that beam search may write. Default: unigrams of --lm_path.")
    beam_width: int = option(100, "Hypotheses that beam search keeps.")
    lm_weight: float = option(2.0, "Weight of the language model.")
    word_score: float = option(0.0, "Score added for each word: positive for more words.")


@dataclass
class CascadeArguments:
    """Several subnets in turn, from cheap to costly."""

    cascade: str | None = option(
        None, "Subnets, such as smallest,middle,largest: each transcribes what the one before it is not sure of."
    )
    min_confidence: float = option(0.9, "Confidence from which on a transcript is kept, 0 to 1.")
    calibrate_cascade: list[str] | None = option(
        None, "Labelled data, as --inputs: prints what each --min_confidence costs and loses on them, and chooses one."
    )
    max_wer: float | None = option(
        None, "Word error rate that calibration allows. Default: that of the costliest subnet, and half a point."
    )
    max_macs: str | None = option(None, "MACs per second of audio that calibration allows, such as 150M, instead.")

    def __post_init__(self) -> None:
        if self.calibrate_cascade is not None and self.cascade is None:
            raise ValueError("calibrate_cascade needs a cascade, such as --cascade smallest,largest")
        if self.calibrate_cascade is None and (self.max_wer is not None or self.max_macs is not None):
            raise ValueError("max_wer and max_macs are for --calibrate_cascade")
        if self.max_wer is not None and self.max_macs is not None:
            raise ValueError("give max_wer or max_macs, not both")


@dataclass
class TranscriptionArguments:
    """What is transcribed, and where the transcripts go."""

    inputs: list[str] | None = option(None, "Recordings, folders of them, and parquet, JSON, CSV or .tsv files.")
    dataset_name: str | None = option(None, "Dataset on the Hub.")
    dataset_config_name: str | None = option(None, "Configuration of the dataset.")
    split_name: str = option("test", "Split of the dataset.")
    audio_column_name: str = option("audio", "Column with the audio.")
    max_unreadable_share: float = option(1.0, "Largest share of unreadable recordings; each is named and left out.")
    output_file: str | None = option(None, "File for all transcripts. Default: standard output, or --output_dir.")
    output_dir: str | None = option(None, "Folder for transcripts.jsonl, and a file for each recording.")
    output_format: str | None = option(None, "Format. Default: the suffix of --output_file, or txt.", choices=FORMATS)
    max_cue_words: int = option(12, "Most words of a subtitle.")
    max_cue_seconds: float = option(6.0, "Most seconds of a subtitle.")
    live: bool = option(False, "Transcribe standard input: raw samples, 16 bit, 16 kHz, mono.")
    live_chunk_length_s: float = option(1.0, "Seconds of new audio after which --live transcribes.")

    @property
    def data(self) -> DataArguments:
        """The column with the audio, and the dataset on the Hub, if one is given."""
        return DataArguments(
            dataset_name=self.dataset_name and [self.dataset_name],
            dataset_config_name=self.dataset_config_name and [self.dataset_config_name],
            eval_split_name=[self.split_name],
            audio_column_name=self.audio_column_name,
        )


def build_recognizer(arguments: RecognitionArguments, cascade: CascadeArguments) -> Recognizer:
    name, device = arguments.model_name_or_path, choose_device(arguments.device)
    options: dict[str, Any] = {
        "batch_size": arguments.batch_size,
        "chunk_length_s": arguments.chunk_length_s,
        "stride_length_s": arguments.stride_length_s,
    }
    recognizer: Recognizer
    if cascade.cascade is None:
        recognizer = Recognizer.from_pretrained(name, arguments.subnet, device, **options)
    elif arguments.subnet is not None:
        raise UserError(f"give --subnet {arguments.subnet} or --cascade {cascade.cascade}, not both")
    else:
        options["min_confidence"] = cascade.min_confidence
        recognizer = CascadeRecognizer.from_pretrained(name, cascade.cascade.split(","), device, **options)
    if arguments.lm_path is not None:
        options = (arguments.lexicon, arguments.beam_width, arguments.lm_weight, arguments.word_score)
        recognizer.decoder = BeamSearch(recognizer.alphabet, arguments.lm_path, *options)
    elif arguments.lexicon is not None:
        raise UserError("--lexicon is for beam search: give --lm_path as well")
    return recognizer


def choose_format(arguments: TranscriptionArguments) -> str:
    """The format of the transcripts. Options that contradict each other raise `UserError`, as other suffixes do."""
    if arguments.live == bool(arguments.inputs or arguments.dataset_name):
        raise UserError("give what to transcribe: either --inputs or --dataset_name, or --live")
    if arguments.output_file is not None and (arguments.output_dir is not None or arguments.live):
        raise UserError("--output_file goes neither with --output_dir nor with --live")
    suffix = None if arguments.output_file is None else Path(arguments.output_file).suffix.removeprefix(".")
    chosen = arguments.output_format or suffix or "txt"
    if chosen not in (FORMATS[:2] if arguments.live else FORMATS):
        allowed = "jsonl or txt with --live" if arguments.live else f"one of {', '.join(FORMATS)}"
        raise UserError(f"transcripts have to be {allowed}, not {chosen!r}: choose --output_format")
    return chosen


def transcribe(
    recognizer: Recognizer, encoded: Mapping[str, Any], names: Sequence[str], unreadable: Unreadable
) -> Iterator[list[dict]]:
    """Entries of the journal for recordings of these names, batch by batch. A progress bar shows the speed."""
    batch_size = recognizer.batch_size * recognizer.batches_at_once
    max_seconds = batch_size * recognizer.chunk * recognizer.seconds_per_frame
    begin, seconds = time.monotonic(), 0.0
    loggers = [logging.getLogger("lighthubert_training")]
    with logging_redirect_tqdm(loggers), tqdm(total=len(names), unit="recording") as progress:
        for batch in load_batches(encoded, names, recognizer.sampling_rate, batch_size, max_seconds):
            readable = {each.name: each.waveform for each in unreadable.readable(batch)}
            transcripts = dict(zip(readable, recognizer.transcribe(list(readable.values())), strict=True))
            found = {name: transcript.as_json() for name, transcript in transcripts.items()}
            yield [{"name": each.name} | found.get(each.name, {"error": each.problem}) for each in batch]
            seconds += sum(transcript.duration for transcript in transcripts.values())
            progress.set_postfix_str(f"{seconds / (time.monotonic() - begin):.1f} s of audio per second")
            progress.update(len(batch))


def journal_path(arguments: TranscriptionArguments, output_format: str) -> Path | None:
    """Where the journal is kept; `None` if transcripts are printed."""
    if arguments.output_dir is not None:
        return Path(arguments.output_dir) / "transcripts.jsonl"
    file = arguments.output_file
    return None if file is None else Path(file + ("" if output_format == "jsonl" else ".jsonl"))


def transcribe_all(
    recognizer: Recognizer, encoded: Mapping[str, Any], arguments: TranscriptionArguments, output_format: str
) -> int:
    """Transcribes what is not transcribed yet, and returns the exit status: 1 if nothing could be read."""
    if output_format in ("srt", "vtt") and arguments.output_dir is None and len(encoded) != 1:
        raise UserError(f"{len(encoded)} recordings do not fit into one {output_format} file: give --output_dir")
    path, limits = journal_path(arguments, output_format), (arguments.max_cue_words, arguments.max_cue_seconds)
    journal = None if path is None else Journal(path)
    done = set() if journal is None else journal.names
    unreadable = Unreadable(arguments.max_unreadable_share, len(encoded))
    if journal is not None and done:
        print(f"{journal.path} has {len(done)} recordings already, which are left as they are", file=sys.stderr)
        unreadable.names |= journal.errors & encoded.keys()
    left = [name for name in encoded if name not in done]
    for entries in transcribe(recognizer, encoded, left, unreadable):
        if journal is not None:
            journal.add(entries)
            continue
        for entry in entries:
            if "error" not in entry or output_format == "jsonl":
                print(format_transcript(entry, output_format, *limits), end="", flush=True)
    if journal is not None and output_format != "jsonl":
        output = Path(arguments.output_dir or str(arguments.output_file))
        write_results(journal, encoded, output, output_format, *limits)
    if unreadable.names:
        print(f"{len(unreadable.names)} of {len(encoded)} recordings could not be read", file=sys.stderr)
    return int(len(unreadable.names) == len(encoded))


def calibrate(
    cascade: CascadeRecognizer,
    arguments: CascadeArguments,
    transcription: TranscriptionArguments,
    references: ReferenceArguments,
) -> None:
    """Prints what a cascade costs and loses on labelled data at the thresholds, and the one to choose."""
    column = references.text_column_name
    data = replace(transcription.data, validation_file=arguments.calibrate_cascade)
    found = load_speech(data, False, (), (column,))
    assert found is not None
    texts = [references.normalize(text) for text in found[column]]
    speech = SpeechDataset(found, data.audio_column_name, cascade.sampling_rate, texts)
    unreadable = Unreadable(transcription.max_unreadable_share, len(speech))
    calibration, step = Calibration(cascade), cascade.batch_size * cascade.batches_at_once
    for start in tqdm(range(0, len(speech), step), desc="calibration", unit="batch"):
        batch = map(speech.__getitem__, range(start, min(start + step, len(speech))))
        readable = {each.name: each for each in unreadable.readable(batch)}.values()
        waveforms = [each.waveform for each in readable if each.waveform is not None]
        calibration.add(waveforms, [each.labels for each in readable])
    chosen = calibration.choose(arguments.max_wer, arguments.max_macs and parse_size(arguments.max_macs))
    groups = itertools.groupby(calibration.curve(), key=lambda point: (point.wer, point.macs))
    rows = [[f"{next(points).min_confidence:g}", f"{wer:.2%}", f"{macs / 1e6:,.1f}"] for (wer, macs), points in groups]
    print(markdown_table(("min_confidence", "WER", "MMAC/s"), rows))
    print(
        f"--min_confidence {chosen.min_confidence:g}: word error rate {chosen.wer:.2%},"
        f" {chosen.macs / 1e6:,.1f} MMAC/s, over {len(speech) - len(unreadable.names)} recordings"
    )


def main() -> int:
    kinds = (RecognitionArguments, CascadeArguments, TranscriptionArguments, ReferenceArguments)
    parser = OptionParser(kinds, description=__doc__)
    recognition, cascade, arguments, references = parse_options(parser)
    try:
        if cascade.calibrate_cascade is not None:
            if arguments.inputs or arguments.dataset_name or arguments.live:
                raise UserError("--calibrate_cascade transcribes nothing: leave --inputs, --dataset_name, --live out")
            recognizer = build_recognizer(recognition, cascade)
            assert isinstance(recognizer, CascadeRecognizer)
            calibrate(recognizer, cascade, arguments, references)
            return 0
        output_format = choose_format(arguments)
        if arguments.live:
            if recognition.lm_path is not None:
                raise UserError("--live decodes greedily: leave --lm_path out")
            if cascade.cascade is not None:
                raise UserError("--live transcribes with one subnet: give --subnet in place of --cascade")
            live = LiveTranscriber(build_recognizer(recognition, cascade), arguments.live_chunk_length_s)
            transcribe_live(live, sys.stdin.buffer, output_format)
            return 0
        path = journal_path(arguments, output_format)
        with nullcontext() if path is None else locked(path.parent, path.name):
            encoded = find_recordings(arguments.inputs or [], arguments.data)
            recognizer = build_recognizer(recognition, cascade)
            status = transcribe_all(recognizer, encoded, arguments, output_format)
            if isinstance(recognizer, CascadeRecognizer):
                print(recognizer, file=sys.stderr)
            return status
    except KeyboardInterrupt:
        message = "interrupted: the same command goes on from here if it has --output_file or --output_dir"
        print(message, file=sys.stderr)
        return 130


if __name__ == "__main__":
    run(main)
