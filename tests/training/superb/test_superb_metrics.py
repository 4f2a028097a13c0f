"""The metrics of SUPERB give what their definitions give by hand, and say where there is nothing to measure."""

import numpy as np
import pytest

from lighthubert_training.superb.metrics import (
    FALSE_ALARM_WEIGHT,
    Turn,
    accuracy,
    diarization_error_rate,
    equal_error_rate,
    maximum_term_weighted_value,
    slot_f1,
    slot_value_error_rate,
    slots_of,
)


@pytest.mark.parametrize(
    ("same_speaker", "two_speakers", "expected"),
    [
        pytest.param([0.9, 0.8], [0.2, 0.1], 0.0, id="apart"),
        pytest.param([0.1, 0.2], [0.8, 0.9], 1.0, id="the wrong way round"),
        pytest.param([0.9, 0.4], [0.6, 0.1], 0.5, id="one of two on each side"),
        pytest.param([0.9, 0.8, 0.3], [0.7, 0.2, 0.1], 1 / 3, id="one of three on each side"),
        pytest.param([0.5, 0.5], [0.5, 0.5], 0.5, id="all alike"),
        # from a threshold of 0.9 (1/2 missed, none accepted) to 0.6 (1/2 missed, 2/3 accepted): on the line at 1/2
        pytest.param([0.9, 0.1], [0.6, 0.6, 0.0], 0.5, id="between two thresholds"),
        pytest.param([0.9], [0.9, 0.2, 0.2, 0.2], 0.2, id="one threshold for both"),
    ],
)
def test_equal_error_rate(same_speaker, two_speakers, expected):
    same = [True] * len(same_speaker) + [False] * len(two_speakers)
    assert equal_error_rate(same, same_speaker + two_speakers) == pytest.approx(expected)


@pytest.mark.parametrize("same", [[True, True], [False, False], []])
def test_trials_of_one_kind_have_no_equal_error_rate(same):
    with pytest.raises(ValueError, match="trials of one speaker and trials of two"):
        equal_error_rate(same, [0.5] * len(same))


@pytest.mark.parametrize(
    ("relevant", "scores", "expected"),
    [
        pytest.param([[1, 0, 0], [0, 1, 0]], [[2, 0, 0], [0, 2, 0]], 1.0, id="all found"),
        pytest.param([[1, 0, 0]], [[0, 1, 1]], 0.0, id="nothing found"),
        pytest.param([[1, 0], [1, 0]], [[3, 0], [0, 2]], 0.5, id="one query of two"),
        pytest.param([[1, 0, 1, 0]], [[0.9, 0.8, 0.7, 0.1]], 0.5, id="one of two before a false alarm"),
        pytest.param([[1] + [0] * 100], [[1, 2] + [0] * 99], 1 - FALSE_ALARM_WEIGHT / 100, id="worth a false alarm"),
        pytest.param([[1] + [0] * 100], [[1, 1] + [0] * 99], 1 - FALSE_ALARM_WEIGHT / 100, id="equal scores together"),
        pytest.param([[1, 0], [0, 0]], [[2, 0], [9, 9]], 1.0, id="a query that occurs nowhere does not count"),
        pytest.param([[1, 1]], [[0, 0]], 1.0, id="it occurs everywhere"),
    ],
)
def test_maximum_term_weighted_value(relevant, scores, expected):
    value = maximum_term_weighted_value(np.array(relevant, dtype=bool), np.array(scores, dtype=float))
    assert value == pytest.approx(expected)


def test_the_weight_of_a_false_alarm_is_that_of_quesst_2014():
    assert pytest.approx(12.49) == FALSE_ALARM_WEIGHT


def test_queries_that_occur_nowhere_have_no_value():
    with pytest.raises(ValueError, match="no query occurs"):
        maximum_term_weighted_value(np.zeros((2, 3), dtype=bool), np.zeros((2, 3)))


A, B = "a", "b"


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        pytest.param([(A, 0, 4), (B, 4, 8)], [("1", 0, 4), ("0", 4, 8)], 0.0, id="other names"),
        pytest.param([(A, 0, 4), (B, 4, 8)], [], 1.0, id="all missed"),
        pytest.param([(A, 0, 8)], [("0", 0, 4)], 0.5, id="half missed, one speaker"),
        pytest.param([(A, 0, 8)], [("0", 0, 10)], 0.25, id="false alarm, one speaker"),
        pytest.param([(A, 0, 4), (B, 4, 8)], [("0", 0, 8)], 0.5, id="confused"),
        pytest.param([(A, 0, 8), (B, 0, 8)], [("0", 0, 8)], 0.5, id="one of two who speak at once"),
        pytest.param([(A, 0, 6), (B, 4, 10)], [("0", 0, 6), ("1", 6, 10)], 2 / 12, id="an overlap missed"),
    ],
)
def test_diarization_error_rate(reference, hypothesis, expected):
    turns = [[Turn(*turn) for turn in each] for each in (reference, hypothesis)]
    assert diarization_error_rate([turns[0]], [turns[1]], [10.0]) == pytest.approx(expected)


def test_diarization_errors_of_recordings_count_by_their_seconds():
    long, short = [Turn(A, 0, 9)], [Turn(A, 0, 1)]
    assert diarization_error_rate([long, short], [long, []], [10.0, 1.0]) == pytest.approx(0.1)
    assert diarization_error_rate([short, []], [short, [Turn("0", 0, 0.5)]], [1.0, 1.0]) == pytest.approx(0.5)


def test_silence_has_no_diarization_error_rate():
    with pytest.raises(ValueError, match="nobody speaks"):
        diarization_error_rate([[]], [[Turn("0", 0, 1)]], [1.0])


@pytest.mark.parametrize(
    ("references", "hypotheses", "expected"),
    [([1, 2], [1, 2], 1.0), ([("a", "b"), ("a", "c")], [("a", "b"), ("a", "d")], 0.5), (["a"], ["b"], 0.0)],
)
def test_accuracy(references, hypotheses, expected):
    assert accuracy(references, hypotheses) == expected


PLAY = "play B-artist the beatles E-artist on B-service spotify E-service"


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        (PLAY, {"artist": ["the beatles"], "service": ["spotify"]}),
        ("B-a one E-a and B-a two E-a", {"a": ["one", "two"]}),
        ("B-a one two", {}),
        ("B-a E-a", {"a": [""]}),
        ("one E-a B-b two E-c three", {}),
        ("", {}),
    ],
)
def test_slots_of_a_text(text, slots):
    assert slots_of(text) == slots


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        pytest.param(PLAY, PLAY, 1.0, id="the same"),
        pytest.param(PLAY, "B-artist abba E-artist", 2 / 3, id="one of two kinds, whatever its value"),
        pytest.param(PLAY, "B-artist x E-artist B-city y E-city", 0.5, id="one right, one wrong"),
        pytest.param(PLAY, "", 0.0, id="empty hypothesis"),
        pytest.param("play it", "", 1.0, id="no slots, none found"),
        pytest.param("play it", "B-artist it E-artist", 0.0, id="no slots, one found"),
    ],
)
def test_slot_f1(reference, hypothesis, expected):
    assert slot_f1([reference], [hypothesis]) == pytest.approx(expected)


def test_slot_f1_is_the_mean_over_texts():
    assert slot_f1([PLAY, PLAY], [PLAY, ""]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        pytest.param(PLAY, PLAY, 0.0, id="the same"),
        pytest.param(PLAY, "", 1.0, id="empty hypothesis"),
        pytest.param("B-a four E-a", "B-a five E-a", 0.75, id="three of four characters"),
        pytest.param("B-a four E-a", "B-b four E-b", 1.0, id="in another slot"),
        pytest.param("B-a four E-a", "B-a nine E-a B-a four E-a", 0.0, id="the nearest of two"),
        pytest.param("B-a ab E-a B-b abcdef E-b", "B-a ab E-a", 0.75, id="by characters"),
    ],
)
def test_slot_value_error_rate(reference, hypothesis, expected):
    assert slot_value_error_rate([reference], [hypothesis]) == pytest.approx(expected)


def test_texts_without_slots_have_no_values():
    with pytest.raises(ValueError, match="no reference has a slot"):
        slot_value_error_rate(["play it"], ["B-a it E-a"])
