"""A search reads the recordings that it needs, and no others; and says what is missing."""

import random
import weakref
from pathlib import Path

import pytest
from speech import RATE, TONE, encoded, undecoded

from lighthubert_training.data import recordings
from lighthubert_training.data.sources import DataArguments
from lighthubert_training.search.building import read_batches
from modeling_lighthubert.errors import UserError


@pytest.fixture
def speech(tmp_path) -> Path:
    """Twenty recordings with transcripts, of which number 3 is broken."""
    rows = [
        {"audio": {"bytes": encoded(TONE[: 4000 + index], format="WAV"), "path": f"{index}.wav"}, "text": str(index)}
        for index in range(20)
    ]
    rows[3]["audio"]["bytes"] = b"no audio"
    undecoded(rows).to_parquet(tmp_path / "speech.parquet")
    return tmp_path / "speech.parquet"


def arguments(speech: Path, **options) -> DataArguments:
    return DataArguments(train_file=[str(speech)], validation_file=[str(speech)], **options)


def test_recordings_come_in_their_order_with_their_places_and_labels(speech):
    batches = read_batches(arguments(speech, max_unreadable_share=0.1), False, RATE, 8, "text")
    assert [len(batch) for batch in batches] == [8, 8, 3]
    read = [each for batch in batches for each in batch]
    places = [0, 1, 2, *range(4, 20)]
    assert [each.item for each in read] == [(0, place) for place in places]
    assert [each.labels for each in read] == list(map(str, places))
    assert [len(each.waveform) for each in read] == [4000 + place for place in places]


@pytest.mark.parametrize("streaming", [False, True])
def test_recordings_are_drawn_before_they_are_read(speech, monkeypatch, streaming):
    opened = []
    load = recordings.load_waveform
    monkeypatch.setattr(recordings, "load_waveform", lambda *given: opened.append(1) or load(*given))
    order = list(range(20))
    random.Random(7).shuffle(order)
    expected = [place for place in order if place != 3][:12]
    data = arguments(speech, max_unreadable_share=0.1, streaming=streaming)
    batches = read_batches(data, True, RATE, 4, "text", num_batches=3, seed=7)
    assert len(opened) == order.index(expected[-1]) + 1 < 20
    assert [[each.item[1] for each in batch] for batch in batches] == [expected[:4], expected[4:8], expected[8:]]


def test_batches_are_read_when_their_turn_comes_and_not_kept(speech, monkeypatch):
    batches = read_batches(arguments(speech, max_unreadable_share=0.1), True, RATE, 4, num_batches=3, seed=7)
    opened = []
    load = recordings.load_waveform
    monkeypatch.setattr(recordings, "load_waveform", lambda *given: opened.append(1) or load(*given))
    kept = weakref.ref(batches[0][0].waveform)
    assert len(opened) == 4
    assert kept() is None
    assert [len(each.waveform) for each in batches[2]] == [4000 + each.item[1] for each in batches[2]]


def test_too_many_unreadable_recordings_and_no_speech_end_a_search(speech):
    with pytest.raises(UserError, match="1 of 20 recordings cannot be read"):
        read_batches(arguments(speech), False, RATE, 8)
    with pytest.raises(UserError, match="name it with --validation_file or --eval_split_name"):
        read_batches(DataArguments(train_file=[str(speech)]), False, RATE, 8)
