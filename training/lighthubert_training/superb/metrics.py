"""Metrics of SUPERB's tasks, as fractions. jiwer, scikit-learn and pyannote.metrics compute them; term-weighted values
and metrics of slots, which no library has, are written here from their definitions."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import roc_curve

from lighthubert_training.error_rates import character_error_rate
from modeling_lighthubert.errors import UserError, optional_module


FALSE_ALARM_WEIGHT = 1.0 * (1 - 0.0008) / (100.0 * 0.0008)
"""Cost of a false alarm in relation to a miss in QUESST 2014: (C_fa / C_miss) (1 / P_target - 1), with costs of 1 and
100, and one target in 1250 pairs."""


def equal_error_rate(same: Sequence[bool], scores: Sequence[float]) -> float:
    """Equal error rate (EER): where false acceptance and false rejection rate are equal, linearly interpolated between
    the two nearest thresholds.

    Args:
        same: whether each trial is of one speaker.
        scores: of each trial, higher for the same speaker.

    Raises:
        UserError: all trials are of one kind.
    """
    if len(set(map(bool, same))) < 2:
        raise UserError("an equal error rate needs trials of one speaker and trials of two")
    false_alarms, hits, _ = roc_curve(np.asarray(same, dtype=bool), scores, drop_intermediate=False)
    gaps = 1.0 - hits - false_alarms  # from 1, where nothing is accepted, to -1
    after = int(np.argmax(gaps <= 0))
    fraction = gaps[after - 1] / (gaps[after - 1] - gaps[after])
    return float(false_alarms[after - 1] + fraction * (false_alarms[after] - false_alarms[after - 1]))


def maximum_term_weighted_value(relevant: np.ndarray, scores: np.ndarray) -> float:
    """Maximum term-weighted value (MTWV) of QUESST 2014: the mean over queries of 1 - P_miss - beta P_fa at the best
    threshold for all of them, at least 0, where nothing is found. Queries that occur nowhere do not count.

    Args:
        relevant: bool (num_queries, num_documents), whether the query occurs in the document.
        scores: of the same shape, higher where it is likelier.

    Raises:
        UserError: no query occurs anywhere.
    """
    occurring = relevant.any(axis=1)
    if not occurring.any():
        raise UserError("no query occurs in any document: there is nothing to find")
    relevant, scores = relevant[occurring], scores[occurring]
    num_relevant = relevant.sum(axis=1, keepdims=True)
    num_others = np.maximum(relevant.shape[1] - num_relevant, 1)
    gains = np.where(relevant, 1 / num_relevant, -FALSE_ALARM_WEIGHT / num_others)
    order = np.argsort(-scores, axis=None, kind="stable")
    values, ordered = gains.ravel()[order].cumsum() / len(relevant), scores.ravel()[order]
    at_thresholds = values[np.append(ordered[:-1] != ordered[1:], True)]  # equal scores are found together
    return max(0.0, float(at_thresholds.max()))


class Turn(NamedTuple):
    """An interval, in seconds, in which a speaker talks."""

    speaker: str
    start: float
    end: float


def diarization_error_rate(
    references: Sequence[Sequence[Turn]], hypotheses: Sequence[Sequence[Turn]], seconds: Sequence[float]
) -> float:
    """Diarisation error rate (DER) of all recordings together: seconds of missed speech, false alarms and confused
    speakers, over the seconds of speech. Overlaps count, there is no collar, and names of speakers do not matter.

    Args:
        seconds: length of each recording.

    Raises:
        UserError: nobody speaks in any reference.
    """
    core, diarization = (
        optional_module(f"pyannote.{name}", "superb", "diarisation") for name in ("core", "metrics.diarization")
    )

    def annotation(turns: Sequence[Turn]) -> Any:
        found = core.Annotation()
        for number, turn in enumerate(turns):
            found[core.Segment(turn.start, turn.end), number] = turn.speaker
        return found

    if not any(references):
        raise UserError("nobody speaks in the reference: there is no diarisation error rate")
    metric = diarization.DiarizationErrorRate(collar=0.0, skip_overlap=False)
    for reference, hypothesis, length in zip(references, hypotheses, seconds, strict=True):
        metric(annotation(reference), annotation(hypothesis), uem=core.Timeline([core.Segment(0.0, length)]))
    return float(abs(metric))


def accuracy(references: Iterable[object], hypotheses: Iterable[object]) -> float:
    """Fraction of hypotheses that equal their references."""
    return float(np.mean([one == other for one, other in zip(references, hypotheses, strict=True)]))


def slots_of(text: str) -> dict[str, list[str]]:
    """Values of each slot in a text like `play B-artist the beatles E-artist`. A slot that does not end has none."""
    slots: dict[str, list[str]] = {}
    for slot, value in re.findall(r"(?<!\S)B-(\S+) (.*?) ?E-\1(?!\S)", text):
        slots.setdefault(slot, []).append(value)
    return slots


def slot_f1(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Mean over texts of the F1 of the names of slots, whatever their values; 1 where both texts have no slot."""
    scores = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        expected, found = set(slots_of(reference)), set(slots_of(hypothesis))
        both = len(expected) + len(found)
        scores.append(2 * len(expected & found) / both if both else 1.0)
    return float(np.mean(scores))


def slot_value_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Character error rate of the values of slots. A value is compared with the nearest one of the same slot in the
    hypothesis; with an empty text, if that slot has none.

    Raises:
        UserError: no reference has a slot.
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
        raise UserError("no reference has a slot: there are no values to compare")
    return character_error_rate(expected, found)
