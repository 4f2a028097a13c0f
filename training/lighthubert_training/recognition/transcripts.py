"""Transcripts in files: lines of JSON, from which a killed run goes on, text, subtitles, and, of an evaluation, beside
their references."""

import html
import itertools
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jiwer

from lighthubert_training.decoding import Word, text_of
from lighthubert_training.error_rates import word_error_rate
from modeling_lighthubert.errors import UserError, user_error
from modeling_lighthubert.files import write_text


FORMATS = ("jsonl", "txt", "srt", "vtt")


class Journal:
    """Append-only lines of JSON, which are also the state that a killed run goes on from.

    A line is `{"name", "text", "duration", "words": [{"text", "start", "end", "confidence"}]}`, or `{"name", "error"}`
    of a recording that cannot be read. A last line without its end is dropped.

    Attributes:
        names: of all recordings in it.
        errors: names of those that cannot be read.

    Raises:
        UserError: the file cannot be written, or has other content.
    """

    BEGINNING = b'{"name": '

    def __init__(self, path: Path):
        self.path = path
        self.names: set[str] = set()
        self.errors: set[str] = set()
        with user_error("transcripts cannot be written: "):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        with path.open("r+b") as file:
            whole = 0
            for number, line in enumerate(file, start=1):
                try:
                    if not line.endswith(b"\n") and self.BEGINNING.startswith(line[: len(self.BEGINNING)]):
                        break
                    self._note(json.loads(line))
                except (ValueError, TypeError, KeyError) as error:
                    raise UserError(f"line {number} of {path} is no transcript: give another file") from error
                whole += len(line)
            file.truncate(whole)

    def _note(self, entry: dict[str, Any]) -> None:
        self.names.add(entry["name"])
        if "error" in entry:
            self.errors.add(entry["name"])

    def add(self, entries: Sequence[dict[str, Any]]) -> None:
        """Appends a line for each of `entries`.

        Raises:
            UserError: the file cannot be written. The next journal drops what is half written.
        """
        with user_error("transcripts cannot be written: "), self.path.open("ab") as file:
            for entry in entries:
                file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
                self._note(entry)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Its transcripts, without errors."""
        with self.path.open(encoding="utf-8") as lines:
            yield from (entry for entry in map(json.loads, lines) if "error" not in entry)


def format_transcript(entry: dict[str, Any], output_format: str, max_words: int, max_seconds: float) -> str:
    """A transcript of the journal as one of `FORMATS`: a line of JSON, text, SubRip (srt) or WebVTT (vtt)."""
    if output_format == "jsonl":
        return json.dumps(entry, ensure_ascii=False) + "\n"
    if output_format == "txt":
        return entry["text"] + "\n"
    is_srt = output_format == "srt"
    blocks = [] if is_srt else ["WEBVTT\n"]
    cues = split_into_cues([Word(**word) for word in entry["words"]], max_words, max_seconds)
    for number, cue in enumerate(cues, start=1):
        start, end = (_clock(seconds, "," if is_srt else ".") for seconds in (cue[0].start, cue[-1].end))
        text = text_of(cue) if is_srt else html.escape(text_of(cue), quote=False)
        blocks.append((f"{number}\n" if is_srt else "") + f"{start} --> {end}\n{text}\n")
    return "\n".join(blocks)


def split_into_cues(words: Sequence[Word], max_words: int, max_seconds: float, pause: float = 1.0) -> list[list[Word]]:
    """Words that a subtitle shows together: at most `max_words` in `max_seconds`, without a `pause` in seconds."""
    cues: list[list[Word]] = []
    for word in words:
        cue = cues[-1] if cues else []
        fits = cue and len(cue) < max_words and word.end - cue[0].start <= max_seconds
        if fits and word.start - cue[-1].end < pause:
            cue.append(word)
        else:
            cues.append([word])
    return cues


def _clock(seconds: float, comma: str) -> str:
    minutes, milliseconds = divmod(round(1000 * seconds), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}{comma}{milliseconds % 1000:03}"


def write_results(journal: Journal, names: Container[str], output: Path, output_format: str, *limits: Any) -> None:
    """Writes the transcripts of `names` as text or subtitles, with the `limits` of `format_transcript`: to one file,
    which replaces the journal, or, if `output` is a folder, to a file for each recording."""
    entries = (entry for entry in journal if entry["name"] in names)
    texts = ((entry["name"], format_transcript(entry, output_format, *limits)) for entry in entries)
    if not output.is_dir():
        write_text(output, "".join(text for _, text in texts))
        journal.path.unlink()
        return
    taken: set[str] = set()
    for name, text in texts:
        file, _, row = Path(name).name.partition("#")
        stem = Path(file).stem + (row and f"-{row}")
        stems = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        stem = next(stem for stem in stems if stem not in taken)
        taken.add(stem)
        write_text(output / f"{stem}.{output_format}", text)


def write_evaluation(
    names: Sequence[str], references: Sequence[str], hypotheses: Mapping[str, Sequence[str]], folder: Path, part: str
) -> None:
    """Writes reference and hypotheses, by subnet, of every recording as JSON lines, `{part}_transcripts.jsonl`, and
    their alignments as text, `{part}_alignments.txt`."""
    lines, alignments = [], []
    for subnet, texts in hypotheses.items():
        for name, reference, text in zip(names, references, texts, strict=True):
            row = {"name": name, "subnet": subnet, "reference": reference, "hypothesis": text}
            lines.append(json.dumps(row | {"wer": word_error_rate([reference], [text])}, ensure_ascii=False))
        words = jiwer.process_words(list(references), list(texts))
        alignments.append(f"== {subnet}\n\n{jiwer.visualize_alignment(words, skip_correct=False)}")
    write_text(folder / f"{part}_transcripts.jsonl", "\n".join(lines) + "\n")
    write_text(folder / f"{part}_alignments.txt", "\n".join(alignments))
