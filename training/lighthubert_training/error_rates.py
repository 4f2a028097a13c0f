"""Word and character error rate, which jiwer computes: as functions, and as metrics of `evaluate` for its evaluator.
Nothing is fetched from the Hub, as `evaluate.load("wer")` would.

    from evaluate import evaluator

    evaluator("automatic-speech-recognition").compute(
        model_or_pipeline="asr", data=dataset, metric=WordErrorRate(), input_column="audio", label_column="text"
    )

`dataset` has waveforms at the rate of the model as arrays (`with_format("numpy")`), or, where ffmpeg is installed,
paths.
"""

from collections.abc import Callable, Sequence

import datasets
import evaluate
import jiwer


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Edits between words, or phones, with spaces between, over the number of those in the references."""
    return float(jiwer.wer(list(references), list(hypotheses)))


def character_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Edits between characters, spaces among them, over the number of those in the references."""
    return float(jiwer.cer(list(references), list(hypotheses)))


class ErrorRate(evaluate.Metric):
    """Substitutions, deletions and insertions, over the number of units in the references.

    `compute(predictions=[...], references=[...])` takes transcripts as strings, and gives the rate under the metric's
    name. It may exceed 1.
    """

    rate: Callable[[Sequence[str], Sequence[str]], float]
    unit: str

    def __init__(self, **options):
        super().__init__(keep_in_memory=True, **options)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=f"Edits of {self.unit}s, over the number of {self.unit}s in the references.",
            citation="",
            features=datasets.Features({name: datasets.Value("string") for name in ("predictions", "references")}),
            reference_urls=["https://github.com/jitsi/jiwer"],
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return {self.name: type(self).rate(references, predictions)}


class WordErrorRate(ErrorRate):
    """`wer`, of words between spaces."""

    name, unit, rate = "wer", "word", staticmethod(word_error_rate)


class CharacterErrorRate(ErrorRate):
    """`cer`, of characters, spaces among them."""

    name, unit, rate = "cer", "character", staticmethod(character_error_rate)
