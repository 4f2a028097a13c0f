"""An item of data becomes a recording, or a named problem; and too many problems end a run."""

import json
import pickle

import numpy as np
import pytest
from speech import RATE, TONE, at_hand, broken_speech, encoded, undecoded

from lighthubert_training.data import recordings
from lighthubert_training.data.audio import duration
from lighthubert_training.data.recordings import (
    CroppedRecordings,
    Item,
    Recording,
    SpeechDataset,
    Unreadable,
    durations,
    read_recording,
    recording_name,
)
from modeling_lighthubert.errors import UserError


WHOLE = encoded(TONE, format="FLAC")
FLOAT = encoded(TONE, format="WAV", subtype="FLOAT")  # without loss


def test_a_recording_has_its_name_its_waveform_and_its_labels():
    recording = read_recording({"bytes": FLOAT, "path": None}, RATE, "tone", [1, 2])
    assert (recording.name, recording.problem, recording.labels) == ("tone", "", [1, 2])
    assert recording.waveform.dtype == np.float32
    np.testing.assert_array_equal(recording.waveform, TONE)


@pytest.mark.parametrize(
    "audio",
    [
        *(b"", b"no audio", b"RIFF", WHOLE[:30], WHOLE[: len(WHOLE) // 2], "nowhere.flac", None, {"bytes": None}),
        encoded(TONE[:0], format="WAV"),
        encoded(np.float32([0.5, np.nan]), format="WAV", subtype="FLOAT"),
    ],
    ids=[
        *("nothing", "text", "magic", "half-a-header", "cut-off", "no-file", "none", "empty-row"),
        *("no-samples", "nan"),
    ],
)
def test_what_cannot_be_read_is_a_problem_and_no_exception(audio):
    recording = read_recording(audio, RATE, "broken", "labels")
    assert recording.waveform is None
    assert recording.problem
    assert (recording.name, recording.labels) == ("broken", "labels")


def test_a_recording_is_called_by_its_path_where_it_has_one():
    assert recording_name({"bytes": b"", "path": "a/b.flac"}, 3) == "a/b.flac"
    for nameless in ({"bytes": b"", "path": None}, {"bytes": b""}, None):
        assert recording_name(nameless, 3) == "recording 3"


def test_item_i_of_a_dataset_is_recording_i_with_label_i():
    speech = broken_speech(labels=range(100, 110))
    assert len(speech) == len(list(speech)) == 10
    assert [recording.labels for recording in speech] == list(range(100, 110))
    assert [index for index, recording in enumerate(speech) if recording.waveform is None] == [3, 7]
    assert speech.name(7) == speech[7].name == "tone-7.flac"
    assert speech.encoded(7)["bytes"] == b"no audio"
    assert broken_speech()[0].labels is None


def test_recordings_are_resampled():
    speech = at_hand([{"audio": {"bytes": encoded(TONE[::2], RATE // 2, format="WAV"), "path": None}}] * 2)
    assert [len(recording.waveform) for recording in speech] == [len(TONE)] * 2


def test_durations_come_from_headers_alone_and_what_has_none_says_why(caplog):
    assert durations(broken_speech()) == [0.5] * 7 + [0.0] + [0.5] * 2
    durations(broken_speech(), Unreadable(0.1))
    assert "cannot be read: tone-7.flac (not in a format that libsndfile reads: convert it" in caplog.text


def test_durations_of_files_are_kept_until_one_of_them_changes(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(recordings, "DURATIONS", tmp_path / "kept")
    monkeypatch.setattr(recordings, "duration", lambda audio: read.append(audio["path"]) or duration(audio))
    files = [tmp_path / f"{number}.wav" for number in range(3)]
    for file in files:
        file.write_bytes(encoded(TONE[:4000], format="WAV"))

    def seconds() -> list[float]:
        rows = [{"audio": {"bytes": None, "path": str(file)}} for file in files]
        return durations(SpeechDataset(undecoded(rows), "audio", RATE))

    assert seconds() == seconds() == [0.25] * 3
    assert len(read) == 3
    files[1].write_bytes(encoded(TONE, format="WAV"))
    assert seconds() == [0.25, 0.5, 0.25]
    files[2].unlink()
    assert seconds() == seconds() == [0.25, 0.5, 0.0], "what may come back is looked for each time"
    assert len(read) == 12


# What is drawn in training


def test_long_recordings_are_cropped_alike_whenever_the_same_item_is_read():
    items = CroppedRecordings(broken_speech(), RATE, crop_seconds=0.1, seed=0)
    recording = items[Item(3, 1)]
    assert (recording.item, recording.name, len(recording.waveform)) == ((3, 1), "tone-1.flac", 1600)
    np.testing.assert_array_equal(recording.waveform, items[Item(3, 1)].waveform)
    assert not np.array_equal(recording.waveform, items[Item(4, 1)].waveform)


def test_a_crop_is_a_piece_of_the_recording():
    items = CroppedRecordings(at_hand([{"audio": {"bytes": FLOAT, "path": None}}]), RATE, crop_seconds=0.1, seed=0)
    pieces = [items[Item(epoch, 0)].waveform for epoch in range(5)]
    windows = np.lib.stride_tricks.sliding_window_view(TONE, 1600)
    assert all((windows == piece).all(axis=1).any() for piece in pieces)


def test_short_recordings_stay_as_they_are():
    items = CroppedRecordings(at_hand([{"audio": {"bytes": FLOAT, "path": None}}]), RATE, crop_seconds=0.5, seed=0)
    np.testing.assert_array_equal(items[Item(0, 0)].waveform, TONE)


def test_an_item_may_bring_its_audio():
    recording = CroppedRecordings(None, RATE, 1.0, seed=0)[Item(0, 5, {"bytes": FLOAT, "path": None})]
    assert (recording.name, recording.item) == ("recording 5", (0, 5))
    np.testing.assert_array_equal(recording.waveform, TONE)


def test_an_unreadable_item_is_a_problem_of_its_epoch_and_index():
    recording = CroppedRecordings(broken_speech(), RATE, 0.1, seed=0)[Item(2, 7)]
    assert (recording.waveform, recording.name, recording.item) == (None, "tone-7.flac", (2, 7))
    assert recording.problem


def test_items_travel_to_workers():
    item = Item(1, 2, {"bytes": b"3", "path": None})
    assert pickle.loads(pickle.dumps(item)) == item


# The policy


def test_an_unreadable_recording_is_named_once_with_its_reason(caplog):
    unreadable = Unreadable(max_share=0.1, num_recordings=10)
    for _ in range(2):
        unreadable.add("tone-7.flac", "cut off")
    assert [record.getMessage() for record in caplog.records] == [
        "left out, because it cannot be read: tone-7.flac (cut off)"
    ]
    assert caplog.records[0].name.startswith("lighthubert_training.")


def test_more_unreadable_recordings_than_allowed_end_the_run():
    unreadable = Unreadable(max_share=0.2, num_recordings=10)
    for name in ("one", "two", "one"):
        unreadable.add(name, "cut off")
    with pytest.raises(UserError, match=r"3 of 10 recordings cannot be read.*share of 0.2; .* three \(no header\)"):
        unreadable.add("three", "no header")


def test_a_share_of_zero_allows_none_and_of_one_allows_all():
    with pytest.raises(UserError, match="1 of 10 recordings cannot be read"):
        Unreadable(0.0, 10).add("one", "cut off")
    tolerant = Unreadable(1.0, 2)
    for name in ("one", "two"):
        tolerant.add(name, "cut off")
    assert tolerant.names == {"one", "two"}


def test_what_an_earlier_part_of_a_run_left_out_counts(caplog):
    earlier = Unreadable(0.2, 10)
    for name in ("one", "two"):
        earlier.add(name, "cut off")
    state = json.loads(json.dumps(earlier.state_dict()))
    caplog.clear()
    resumed = Unreadable(0.2, 9)
    resumed.load_state_dict(state)
    resumed.add("one", "cut off")
    assert (resumed.num_recordings, caplog.text) == (10, "")
    with pytest.raises(UserError, match=r"3 of 10 recordings cannot be read.*; the last was three"):
        resumed.add("three", "no header")


def test_readable_recordings_pass_in_order_and_the_others_are_counted():
    recordings = [Recording("a", TONE), Recording("b", None, "cut off"), Recording("c", TONE)]
    unreadable = Unreadable(0.5, 3)
    assert [recording.name for recording in unreadable.readable(recordings)] == ["a", "c"]
    assert unreadable.names == {"b"}
    with pytest.raises(UserError, match="b"):
        list(Unreadable(0.1, 3).readable(recordings))
