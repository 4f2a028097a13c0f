"""Text, vocabulary, labels and batches of transcribed speech."""

import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Processor

from lighthubert_training.recognition.data import (
    CTCCollator,
    EpochSampler,
    TextArguments,
    build_tokenizer,
    num_frames_needed,
    report_unknown_characters,
    unknown_characters,
)


@pytest.mark.parametrize(
    ("options", "given", "expected"),
    [
        ({}, " Two\twords\n", "Two words"),
        ({"text_case": "upper"}, "straße", "STRASSE"),
        ({"text_case": "lower"}, "ÅNGSTRÖM", "ångström"),
        ({"chars_to_ignore": [",", "?!"]}, "well, what?!", "well what"),
        ({}, "e\u0301te\u0301", "\u00e9t\u00e9"),  # composed, so that one sound has one label
    ],
)
def test_transcripts_are_normalised(options, given, expected):
    assert TextArguments(**options).normalised(given) == expected


def test_the_vocabulary_is_the_characters_of_the_transcripts(tmp_path):
    tokenizer = build_tokenizer(["ba", "a c", "да"], tmp_path)
    assert tokenizer.get_vocab() == {
        name: index for index, name in enumerate(["<pad>", "<unk>", "|", "a", "b", "c", "а", "д"])
    }
    assert tokenizer.decode(tokenizer("a c да").input_ids, group_tokens=False) == "a c да"


def test_unknown_characters_are_counted(tmp_path):
    tokenizer = build_tokenizer(["abc"], tmp_path)
    assert unknown_characters(["a b x", "xy"], tokenizer) == {"x": 2, "y": 1}


def test_letters_known_in_the_other_case_are_pointed_out(tmp_path):
    tokenizer = build_tokenizer(["ABC"], tmp_path)
    with pytest.raises(ValueError, match="in the other case: choose --text_case"):
        report_unknown_characters(["abc", "ab"], tokenizer, "train", "keep")


def test_equal_labels_in_a_row_need_a_blank_between_them():
    assert num_frames_needed([]) == 0
    assert num_frames_needed([5, 6, 5]) == 3
    assert num_frames_needed([5, 5, 5, 6]) == 6


SECONDS = [1.0 + 0.1 * (index * 7 % 40) for index in range(40)]


def sampler(**options) -> EpochSampler:
    return EpochSampler(SECONDS, crop_seconds=float("inf"), seed=3, **{"max_batch_seconds": None, **options})


def test_an_epoch_visits_every_recording_once_in_batches_of_similar_length():
    batches = list(sampler(batch_size=4))
    assert sorted(index for batch in batches for index in batch) == list(range(40))
    assert all(
        max(SECONDS[index] for index in batch) - min(SECONDS[index] for index in batch) < 0.5 for batch in batches
    )


def test_epochs_have_the_same_batches_in_another_order():
    one = sampler(batch_size=4)
    first = list(one)
    one.set_epoch(1)
    second = list(one)
    assert first != second
    assert sorted(map(sorted, first)) == sorted(map(sorted, second))
    assert len(one) == len(first)


def test_no_batch_holds_more_seconds_than_allowed():
    for batch in sampler(batch_size=40, max_batch_seconds=8.0):
        assert len(batch) * max(SECONDS[index] for index in batch) <= 8.0


def test_shares_of_processes_and_accumulation_make_up_the_same_steps():
    whole = list(sampler(batch_size=8))
    shares = [list(sampler(batch_size=2, shares=range(2 * rank, 2 * rank + 2), num_shares=4)) for rank in range(2)]
    for step, batch in enumerate(whole):
        dealt = [index for share in shares for part in share[2 * step : 2 * step + 2] for index in part]
        assert sorted(dealt) == sorted(batch)


def test_labels_are_padded_with_what_the_loss_leaves_out(tmp_path):
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    processor = Wav2Vec2Processor(feature_extractor=extractor, tokenizer=build_tokenizer(["abc"], tmp_path))
    items = [
        {"input_values": torch.randn(500).numpy(), "labels": [3, 4, 5], "name": "one"},
        {"input_values": torch.randn(800).numpy(), "labels": [3], "name": "two"},
    ]
    batch = CTCCollator(processor)(items)
    assert batch["labels"].tolist() == [[3, 4, 5], [3, -100, -100]]
    assert batch["attention_mask"].sum(-1).tolist() == [500, 800]
    assert batch["names"] == ["one", "two"]
