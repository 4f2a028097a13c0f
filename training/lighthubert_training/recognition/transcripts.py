"""Transcripts as they are kept and shown: lines of JSON that a killed run goes on from, text, and subtitles."""

import html
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lighthubert_training.decoding import Transcript, Word, text_of


FORMATS = ("jsonl", "txt", "srt", "vtt")


class Journal:
    """Transcripts as lines of JSON, each written when it is there: what a run that was killed goes on from.

    A line is `{"name", "text", "duration", "words": [{"text", "start", "end", "confidence"}]}`, or `{"name", "error"}`
    of a recording that cannot be read. A last line without its end is dropped.

    Attributes:
        names: of all recordings in it; `errors`: of those that cannot be read.

    Raises:
        ValueError: the file has other content.
    """

    BEGINNING = b'{"name": '

    def __init__(self, path: Path):
        self.path, self.names, self.errors = path, set(), set()
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
                    raise ValueError(
                        f"line {number} of {path} is no transcript: give a file that this script wrote, or a new one"
                    ) from error
                whole += len(line)
            file.truncate(whole)

    def _note(self, entry: dict[str, Any]) -> None:
        self.names.add(entry["name"])
        if "error" in entry:
            self.errors.add(entry["name"])

    def add(self, entries: Sequence[dict[str, Any]]) -> None:
        with self.path.open("ab") as file:
            for entry in entries:
                file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
                self._note(entry)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Its transcripts, without errors."""
        with self.path.open(encoding="utf-8") as lines:
            yield from (entry for entry in map(json.loads, lines) if "error" not in entry)


def as_json(name: str, transcript: Transcript) -> dict[str, Any]:
    return {
        "name": name,
        "text": transcript.text,
        "duration": round(transcript.duration, 3),
        "words": [word_as_json(word) for word in transcript.words],
    }


def word_as_json(word: Word) -> dict[str, Any]:
    return {"text": word.text} | {name: round(getattr(word, name), 3) for name in ("start", "end", "confidence")}


def formatted(entry: dict[str, Any], output_format: str, max_words: int, max_seconds: float) -> str:
    """A transcript of the journal as a text file, as SubRip (srt) or WebVTT (vtt)."""
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
    """Words that are shown together: no more than `max_words` and `max_seconds`, and none beyond a pause."""
    cues: list[list[Word]] = []
    for word in words:
        cue = cues[-1] if cues else []
        if (
            cue
            and len(cue) < max_words
            and word.end - cue[0].start <= max_seconds
            and word.start - cue[-1].end < pause
        ):
            cue.append(word)
        else:
            cues.append([word])
    return cues


def _clock(seconds: float, comma: str) -> str:
    milliseconds = round(1000 * seconds)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}{comma}{milliseconds % 1000:03}"
