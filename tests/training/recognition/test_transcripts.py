"""Transcripts in files: subtitles, the journal that a run goes on from, and evaluations beside their references."""

import json

import pytest

from lighthubert_training.decoding import Word
from lighthubert_training.recognition.transcripts import (
    Journal,
    format_transcript,
    split_into_cues,
    write_evaluation,
    write_results,
)
from modeling_lighthubert.errors import UserError


ENTRY = {
    "name": "talk",
    "text": "a b <c> d",
    "words": [
        {"text": "a", "start": 0.02, "end": 0.5, "confidence": 1.0},
        {"text": "b", "start": 0.6, "end": 1.0, "confidence": 0.5},
        {"text": "<c>", "start": 3.0, "end": 3.2004, "confidence": 0.5},
        {"text": "d", "start": 3661.9999, "end": 3662.5, "confidence": 0.5},
    ],
}


def test_subrip_numbers_its_cues_and_has_commas():
    assert format_transcript(ENTRY, "srt", 10, 5.0) == (
        "1\n00:00:00,020 --> 00:00:01,000\na b\n\n"
        "2\n00:00:03,000 --> 00:00:03,200\n<c>\n\n"
        "3\n01:01:02,000 --> 01:01:02,500\nd\n"
    )


def test_webvtt_has_a_header_and_escapes():
    assert format_transcript(ENTRY, "vtt", 10, 5.0) == (
        "WEBVTT\n\n00:00:00.020 --> 00:00:01.000\na b\n\n"
        "00:00:03.000 --> 00:00:03.200\n&lt;c&gt;\n\n01:01:02.000 --> 01:01:02.500\nd\n"
    )


def test_silence_makes_valid_subtitles():
    silent = {"name": "silent", "text": "", "words": []}
    assert format_transcript(silent, "srt", 10, 5.0) == ""
    assert format_transcript(silent, "vtt", 10, 5.0) == "WEBVTT\n"


def test_cues_are_split_by_words_seconds_and_pauses():
    words = [Word(str(number), number, number + 0.9, 1.0) for number in range(7)]
    assert [len(cue) for cue in split_into_cues(words, 3, 100.0)] == [3, 3, 1]
    assert [len(cue) for cue in split_into_cues(words, 100, 2.0)] == [2, 2, 2, 1]
    assert [len(cue) for cue in split_into_cues(words[:2] + words[4:], 100, 100.0)] == [2, 3]


def test_a_line_without_end_is_dropped(tmp_path):
    path = tmp_path / "all.jsonl"
    path.write_bytes(b'{"name": "a", "text": ""}\n{"name": "b", "error": "?"}\n{"name": "c", "te')
    journal = Journal(path)
    assert (journal.names, journal.errors) == ({"a", "b"}, {"b"})
    journal.add([{"name": "c", "text": "é"}])
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["a", "b", "c"]


@pytest.mark.parametrize("content", ["something else\n", "no end of line", '{"text": "no name"}\n', "[1]\n"])
def test_a_file_with_other_content_is_no_journal(tmp_path, content):
    (tmp_path / "mine.jsonl").write_text(content)
    with pytest.raises(UserError, match="line 1 of .* is no transcript"):
        Journal(tmp_path / "mine.jsonl")
    assert (tmp_path / "mine.jsonl").read_text() == content


def test_a_journal_where_nothing_can_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="transcripts cannot be written"):
        Journal(tmp_path / "file" / "all.jsonl")


def test_a_folder_has_a_file_of_each_recording_that_is_asked_for(tmp_path):
    journal = Journal(tmp_path / "transcripts.jsonl")
    names = ["a/one.wav", "b/one.flac", "table.parquet#3", "other.wav"]
    journal.add([{"name": name, "text": name, "words": []} for name in names])
    write_results(journal, names[:3], tmp_path, "txt", 10, 5.0)
    written = {path.name: path.read_text() for path in tmp_path.glob("*.txt")}
    assert written == {
        "one.txt": "a/one.wav\n",
        "one-2.txt": "b/one.flac\n",
        "table-3.txt": "table.parquet#3\n",
    }


def test_an_evaluation_is_written_with_error_rates_and_alignments(tmp_path):
    hypotheses = {"largest": ["a b", "c"], "smallest": ["a x", ""]}
    write_evaluation(["one", "two"], ["a b", "c"], hypotheses, tmp_path, "eval")
    rows = [json.loads(line) for line in (tmp_path / "eval_transcripts.jsonl").read_text().splitlines()]
    assert [(row["name"], row["subnet"], row["wer"]) for row in rows] == [
        ("one", "largest", 0.0),
        ("two", "largest", 0.0),
        ("one", "smallest", 0.5),
        ("two", "smallest", 1.0),
    ]
    assert (rows[2]["reference"], rows[2]["hypothesis"]) == ("a b", "a x")
    alignments = (tmp_path / "eval_alignments.txt").read_text()
    assert alignments.count("REF: a b") == 2
    assert "HYP: a x" in alignments
