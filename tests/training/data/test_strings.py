"""Strings of words: of one speaker, with pauses between them, and the same for a seed; real ones are kept."""

import random

import numpy as np
import pytest
from datasets import Audio, Dataset

from lighthubert_training.data.audio import load_waveform
from lighthubert_training.data.strings import SAMPLING_RATE, encode_flac, join_words, prepare_speech, read_parquet
from modeling_lighthubert.errors import UserError


def spoken(text: str, speaker: str) -> dict:
    """A tenth of a second for each letter, at a level that says who speaks."""
    level = 0.5 if speaker == "loud" else 0.1
    waveform = np.full(len(text) * SAMPLING_RATE // 10, level, dtype=np.float32)
    return {"audio": encode_flac(waveform), "text": text, "speaker": speaker}


def recordings(*texts: str) -> Dataset:
    rows = [spoken(text, speaker) for text in texts for speaker in ("loud", "soft")]
    return Dataset.from_list(rows).cast_column("audio", Audio(decode=False))


def test_strings_are_words_of_one_speaker_with_pauses_behind():
    strings = join_words(recordings("a", "bc", "def"), 20, random.Random(0), num_words=(2, 4), pause=(0.1, 0.2))
    assert {len(row["text"].split()) for row in strings} == {2, 3, 4}
    for row in strings:
        waveform = load_waveform(row["audio"], SAMPLING_RATE)
        level = 0.5 if row["speaker"] == "loud" else 0.1
        is_speech = np.isclose(waveform, level, atol=1e-3)
        assert np.all(is_speech | (waveform == 0))
        num_words, num_letters = len(row["text"].split()), len(row["text"].replace(" ", ""))
        assert is_speech.sum() == num_letters * SAMPLING_RATE // 10
        assert np.diff(is_speech.astype(int), append=0).tolist().count(-1) == num_words
        assert 0.1 * num_words <= (~is_speech).sum() / SAMPLING_RATE <= 0.2 * num_words


def test_a_seed_says_which_strings_are_joined():
    words = recordings("a", "bc", "def")
    one, same, other = (join_words(words, 5, random.Random(seed)).to_list() for seed in (0, 0, 1))
    assert one == same
    assert one != other


def test_words_are_joined_only_where_there_are_no_strings(tmp_path):
    recordings("a", "b").to_parquet(tmp_path / "words.parquet")
    recordings("a", "b", "a b a").to_parquet(tmp_path / "both.parquet")
    joined = prepare_speech(str(tmp_path / "words.parquet"), tmp_path / "one", "train", 7, random.Random(0))
    real = prepare_speech(str(tmp_path / "both.parquet"), tmp_path / "other", "train", 7, random.Random(0))
    assert len(read_parquet(joined.strings_file)) == 7
    assert list(read_parquet(real.strings_file)["text"]) == ["a b a", "a b a"]
    for speech in (joined, real):
        assert list(speech.words["text"]) == ["a", "a", "b", "b"]
        assert len(read_parquet(speech.file)) == 4 + len(read_parquet(speech.strings_file))


def test_files_without_recordings_are_the_users_mistake(tmp_path):
    (tmp_path / "text.parquet").write_text("no table")
    Dataset.from_dict({"audio": [b""], "words": ["a"]}).to_parquet(tmp_path / "words.parquet")
    for name, reason in (("nowhere", "nowhere.parquet"), ("text", "text.parquet"), ("words", "has no column text")):
        with pytest.raises(UserError, match=reason):
            read_parquet(tmp_path / f"{name}.parquet")
