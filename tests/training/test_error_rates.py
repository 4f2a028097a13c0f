"""Error rates, as functions and as metrics of `evaluate`."""

from lighthubert_training.error_rates import (
    CharacterErrorRate,
    WordErrorRate,
    character_error_rate,
    word_error_rate,
)


def test_error_rates_are_edits_over_the_units_of_the_references():
    references, hypotheses = ["a b", "dd"], ["a c", ""]
    assert word_error_rate(references, hypotheses) == 2 / 3
    assert character_error_rate(references, hypotheses) == 3 / 5
    assert WordErrorRate().compute(predictions=hypotheses, references=references) == {"wer": 2 / 3}
    assert CharacterErrorRate().compute(predictions=hypotheses, references=references) == {"cer": 3 / 5}


def test_error_rates_may_exceed_one():
    assert word_error_rate(["a"], ["b c d"]) == 3.0
