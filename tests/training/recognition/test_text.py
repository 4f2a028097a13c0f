"""Text: normalised transcripts, their vocabulary, and the frames that CTC needs for them."""

import pytest

from lighthubert_training.data.collators import label_ids
from lighthubert_training.recognition.text import (
    TextArguments,
    build_tokenizer,
    num_frames_needed,
    report_unknown_characters,
    unknown_characters,
)
from modeling_lighthubert.errors import UserError


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
    assert TextArguments(**options).normalize(given) == expected


def test_the_vocabulary_is_the_characters_of_the_transcripts(tmp_path):
    tokenizer = build_tokenizer(["ba", "a c", "да"], tmp_path)
    assert tokenizer.get_vocab() == {
        name: index for index, name in enumerate(["<pad>", "<unk>", "|", "a", "b", "c", "а", "д"])
    }
    assert tokenizer.decode(tokenizer("a c да").input_ids, group_tokens=False) == "a c да"


def test_a_transcript_that_spells_a_special_token_is_learnt_letter_by_letter(tmp_path):
    texts = ["a <pad>", "<unk>"]
    tokenizer = build_tokenizer(texts, tmp_path)
    ids = label_ids(texts, tokenizer)
    assert [tokenizer.decode(each, group_tokens=False) for each in ids] == texts
    assert not {tokenizer.pad_token_id, tokenizer.unk_token_id}.intersection(ids[0] + ids[1])
    assert label_ids([], tokenizer) == []


@pytest.mark.parametrize("name", ["new", "given"])
def test_a_transcript_with_the_sign_for_a_space_is_refused_and_shown(tmp_path, name):
    """Its vocabulary had a hole: `|` is there already."""
    with pytest.raises(UserError, match=r"1 of 2 train transcripts .*'\|'.* such as 'a\|b': .*--chars_to_ignore '\|'"):
        if name == "new":
            build_tokenizer(["a", "a|b"], tmp_path)
        else:
            report_unknown_characters(["a", "a|b"], build_tokenizer(["a b"], tmp_path), "train", "keep")
    assert TextArguments(chars_to_ignore=["|"]).normalize("a | b") == "a b"


def test_every_character_of_a_new_vocabulary_has_its_own_number_and_none_is_left_out(tmp_path):
    tokenizer = build_tokenizer(["<pad>", 'say "</s>"', "\u200b0"], tmp_path)
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_unknown_characters_are_counted(tmp_path):
    tokenizer = build_tokenizer(["abc"], tmp_path)
    assert unknown_characters(["a b x", "xy"], tokenizer) == {"x": 2, "y": 1}


def test_letters_known_in_the_other_case_are_pointed_out(tmp_path):
    tokenizer = build_tokenizer(["ABC"], tmp_path)
    with pytest.raises(UserError, match="in the other case: choose --text_case"):
        report_unknown_characters(["abc", "ab"], tokenizer, "train", "keep")


def test_equal_labels_in_a_row_need_a_blank_between_them():
    assert num_frames_needed([]) == 0
    assert num_frames_needed([5, 6, 5]) == 3
    assert num_frames_needed([5, 5, 5, 6]) == 6
