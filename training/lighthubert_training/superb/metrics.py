"""The metrics of SUPERB's tasks, as fractions. jiwer, scikit-learn and pyannote.metrics count; what no library has,
term-weighted values and slots, is written here from its definition."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from sklearn.metrics import roc_curve

from lighthubert_training.error_rates import character_error_rate


FALSE_ALARM_WEIGHT = 1.0 * (1 - 0.0008) / (100.0 * 0.0008)
"""What a false alarm costs in place of a miss in QUESST 2014: (C_fa / C_miss) (1 / P_target - 1), with costs of 1 and
100 and a target in every 1250 pairs."""


def equal_error_rate(same: Sequence[bool], scores: Sequence[float]) -> float:
    """Where as large a share of the wrong pairs is accepted as of the right pairs is rejected, between the two nearest
    thresholds on a straight line.

    Args:
        same: whether each trial is of one speaker.
        scores: of each trial, higher for the same.

    Raises:
        ValueError: all trials are of one kind.
    """
    if len(set(map(bool, same))) < 2:
        raise ValueError("an equal error rate needs trials of one speaker and trials of two")
    false_alarms, hits, _ = roc_curve(np.asarray(same, dtype=bool), scores, drop_intermediate=False)
    gaps = 1.0 - hits - false_alarms  # from 1, where nothing is accepted, to -1
    after = int(np.argmax(gaps <= 0))
    share = gaps[after - 1] / (gaps[after - 1] - gaps[after])
    return float(false_alarms[after - 1] + share * (false_alarms[after] - false_alarms[after - 1]))


def maximum_term_weighted_value(relevant: np.ndarray, scores: np.ndarray) -> float:
    """The best that one threshold for all queries gives: the mean over queries of 1 - P_miss - beta P_fa, at least 0
    (nothing is found). Queries that occur nowhere do not count (QUESST 2014, where a recording as a whole is found).

    Args:
        relevant: bool (num_queries, num_documents), whether the query occurs.
        scores: of the same shape, higher for a likelier occurrence.

    Raises:
        ValueError: no query occurs anywhere.
    """
    occurring = relevant.any(axis=1)
    if not occurring.any():
        raise ValueError("no query occurs in any document: there is nothing to find")
    relevant, scores = relevant[occurring], scores[occurring]
    num_relevant = relevant.sum(axis=1, keepdims=True)
    num_others = np.maximum(relevant.shape[1] - num_relevant, 1)
    gains = np.where(relevant, 1 / num_relevant, -FALSE_ALARM_WEIGHT / num_others)
    order = np.argsort(-scores, axis=None, kind="stable")
    values, ordered = gains.ravel()[order].cumsum() / len(relevant), scores.ravel()[order]
    at_thresholds = values[np.append(ordered[:-1] != ordered[1:], True)]  # equal scores are found together
    return max(0.0, float(at_thresholds.max()))


class Turn(NamedTuple):
    """Seconds in which a speaker talks."""

    speaker: str
    start: float
    end: float


def diarization_error_rate(
    references: Sequence[Sequence[Turn]], hypotheses: Sequence[Sequence[Turn]], seconds: Sequence[float]
) -> float:
    """Seconds that are missed, falsely found or given to the wrong speaker, over those that are spoken, of all
    recordings together; overlaps count, without a collar. Speakers of a hypothesis may have any names.

    Args:
        seconds: length of each recording.

    Raises:
        ValueError: nobody speaks in any reference.
    """
    from pyannote.core import Annotation, Segment, Timeline
    from pyannote.metrics.diarization import DiarizationErrorRate

    def annotation(turns: Sequence[Turn]) -> Annotation:
        found = Annotation()
        for number, turn in enumerate(turns):
            found[Segment(turn.start, turn.end), number] = turn.speaker
        return found

    if not any(references):
        raise ValueError("nobody speaks in the reference: there is no diarisation error rate")
    metric = DiarizationErrorRate(collar=0.0, skip_overlap=False)
    for reference, hypothesis, length in zip(references, hypotheses, seconds, strict=True):
        metric(annotation(reference), annotation(hypothesis), uem=Timeline([Segment(0.0, length)]))
    return float(abs(metric))


def accuracy(references: Iterable[object], hypotheses: Iterable[object]) -> float:
    return float(np.mean([one == other for one, other in zip(references, hypotheses, strict=True)]))


def slots_of(text: str) -> dict[str, list[str]]:
    """Values of each slot in a text like `play B-artist the beatles E-artist`. A slot without its end has none."""
    slots: dict[str, list[str]] = {}
    for slot, value in re.findall(r"(?<!\S)B-(\S+) (.*?) ?E-\1(?!\S)", text):
        slots.setdefault(slot, []).append(value)
    return slots


def slot_f1(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Mean over texts of the F1 of the kinds of slots that are named; 1 where there are none, and none are found."""
    scores = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        expected, found = set(slots_of(reference)), set(slots_of(hypothesis))
        both = len(expected) + len(found)
        scores.append(2 * len(expected & found) / both if both else 1.0)
    return float(np.mean(scores))


def slot_value_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Edits between characters of the values of slots, over the characters of the references'. A value is compared
    with the nearest that its slot was given; with nothing, if it was given none.

    Raises:
        ValueError: no reference has a slot.
    """
    expected, found = [], []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        given = slots_of(hypothesis)
        for slot, values in slots_of(reference).items():
            for value in values:
                candidates = given.get(slot, [""])
                expected.append(value)
                found.append(min(candidates, key=lambda candidate: character_error_rate([value], [candidate])))
    if not expected:
        raise ValueError("no reference has a slot: there are no values to compare")
    return character_error_rate(expected, found)
