"""Recognition by several subnets of one supernet, from cheap to costly: a recording goes on to the next only where the
confidence of the cheaper one is too low."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import jiwer
import numpy as np
import torch
from transformers import Wav2Vec2Processor

from lighthubert_training.decoding import Alphabet, greedy, words_of
from lighthubert_training.models import computed_once
from lighthubert_training.recognition.recognizer import (
    AcousticModel,
    Piece,
    Recognizer,
    load_config_and_processor,
    load_ctc_model,
    on_device,
    run_model,
)
from modeling_lighthubert.errors import UserError, user_error
from modeling_lighthubert.loading import is_supernet, parse_subnet
from modeling_lighthubert.profiling import profile_subnet


STEPS = ((0, 900, 20), (900, 990, 5), (990, 1001, 1))
THRESHOLDS = tuple(n / 1000 for steps in STEPS for n in range(*steps))
"""Least confidences that are tried. Most transcripts have one near 1."""


@dataclass
class Stage:
    """A subnet of a cascade.

    Attributes:
        macs: per second of audio, without what the stages before it have computed.
        seconds: of audio that it has got.
    """

    name: str
    model: AcousticModel
    macs: float
    seconds: float = 0.0


class CascadeRecognizer(Recognizer):
    """A `Recognizer` that runs the stages in turn. The first gets all recordings, or chunks of long ones; each of the
    others gets those in which the one before it had a confidence below `min_confidence`, in batches of their own.

    Attributes:
        macs_per_second: of audio so far, in the mean.
    """

    batches_at_once = 4  # so that later stages, which get some of the recordings, have full batches

    def __init__(
        self,
        supernet: Any,
        subnets: Sequence[str],
        processor: Wav2Vec2Processor,
        min_confidence: float = 0.9,
        **options: Any,
    ):
        """
        Args:
            supernet: with a CTC head that was fine-tuned once for all.
            subnets: names or JSON files, from cheap to costly.
            min_confidence: 0 to 1, see `confidence_of`.
            options: of `Recognizer`.

        Raises:
            UserError: fewer than two subnets, one that is not in the supernet, one that does not cost more than the
                one before it, or a confidence that is none.
        """
        if not 0.0 <= min_confidence <= 1.0:
            raise UserError(f"min_confidence={min_confidence} has to be from 0 to 1")
        has_one_encoder = supernet.search_space.conv_dim is None
        self.encoder = SharedEncoder(supernet) if has_one_encoder else None
        self.stages, self.min_confidence = build_stages(supernet, subnets, self.encoder), min_confidence
        super().__init__(self.stages[0].model, supernet.config, processor, **options)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, model_name_or_path: str | Path, subnets: Sequence[str], device: str = "cpu", **options: Any
    ) -> Self:
        """
        Args:
            model_name_or_path: a supernet with a processor, and a CTC head that was fine-tuned once for all.
            options: of `CascadeRecognizer`.

        Raises:
            UserError: no supernet, no CTC head, no processor, or subnets that make no cascade.
        """
        config, processor = load_config_and_processor(model_name_or_path)
        if not is_supernet(config):
            raise UserError(f"a cascade is of subnets: {model_name_or_path} is one model, no supernet")
        return cls(load_ctc_model(str(model_name_or_path), device=device), subnets, processor, **options)

    @property
    def macs_per_second(self) -> float:
        macs = sum(stage.macs * stage.seconds for stage in self.stages)
        return macs / self.stages[0].seconds if self.stages[0].seconds else 0.0

    def answer(self, pieces: Sequence[Piece]) -> None:
        at_once = self.batch_size * self.batches_at_once
        for start in range(0, len(pieces), at_once):
            left = list(pieces[start : start + at_once])
            for stage in self.stages:
                self.run_stage(stage, left)
                left = [piece for piece in left if confidence_of(piece.kept, self.alphabet) < self.min_confidence]
            self.forget()

    def forget(self) -> None:
        """Drops the features that the stages have shared."""
        if self.encoder is not None:
            self.encoder.kept.clear()

    def run_stage(self, stage: Stage, pieces: Sequence[Piece]) -> None:
        """Writes what a stage says of each piece where it is kept."""
        self.model = stage.model
        super().answer(pieces)
        stage.seconds += sum(len(piece.samples) for piece in pieces) / self.sampling_rate

    def __str__(self) -> str:
        first = self.stages[0]
        shares = [f"{stage.name} {stage.seconds / (first.seconds or 1.0):.0%}" for stage in self.stages]
        return f"audio that each stage got: {', '.join(shares)}; {self.macs_per_second / 1e6:,.0f} MMAC/s in the mean"


def confidence_of(log_probs: np.ndarray, alphabet: Alphabet) -> float:
    """How sure a model is of its transcript, 0 to 1: the mean confidence of its words; 0 without any.

    Args:
        log_probs: (num_frames, vocab_size).
    """
    words = words_of(greedy(log_probs), log_probs, alphabet, 1.0)
    return float(np.mean([word.confidence for word in words])) if words else 0.0


class SharedEncoder:
    """The feature encoder of a supernet whose subnets all have the same convolutions. What it makes of a waveform is
    kept for the stages that get it again.

    Attributes:
        kept: features (num_channels, num_frames) by the digest of the waveform.
    """

    def __init__(self, supernet: Any):
        self.encoder, self.num_frames = supernet.base_model.feature_extractor, supernet.config.num_frames
        self.kept: dict[bytes, torch.Tensor] = {}

    @torch.inference_mode()
    def __call__(self, audio: torch.Tensor, input_values: np.ndarray, lengths: Sequence[int]) -> torch.Tensor:
        """Features (batch_size, num_channels, num_frames), with zeros where recordings are over.

        Args:
            audio: (batch_size, num_samples), on the device, of which these are `input_values`.
            lengths: samples of each recording.
        """
        rows = [row[:length] for row, length in zip(input_values, lengths, strict=True)]
        digests = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]
        frames = [self.num_frames(length) for length in lengths]
        if not all(digest in self.kept for digest in digests):
            computed = self.encoder(audio)
            self.kept |= {digest: row[:, :n] for digest, row, n in zip(digests, computed, frames, strict=True)}
        first = self.kept[digests[0]]
        features = first.new_zeros(len(rows), len(first), self.num_frames(audio.shape[1]))
        for row, digest, n in zip(features, digests, frames, strict=True):
            row[:, :n] = self.kept[digest]
        return features


def build_stages(supernet: Any, subnets: Sequence[str], encoder: SharedEncoder | None) -> list[Stage]:
    """The stages of a cascade, which share the weights of the supernet and, if it is given, what its feature encoder
    computes.

    Raises:
        UserError: as in `CascadeRecognizer`.
    """
    stages: list[Stage] = []
    costs: list[float] = []
    for name in subnets:
        with user_error(f"cascade {','.join(subnets)}: "):
            model = supernet.with_subnet(parse_subnet(name))
        profile = profile_subnet(model)
        costs.append(profile.macs)
        shared = profile.feature_encoder.macs if stages and encoder is not None else 0
        stages.append(Stage(name, _acoustic_model(model, encoder), profile.macs - shared))
    if len(stages) < 2 or any(after <= before for before, after in zip(costs, costs[1:])):
        told = ", ".join(f"{stage.name} {cost / 1e6:,.0f} MMAC/s" for stage, cost in zip(stages, costs))
        raise UserError(f"a cascade goes from cheap to costly, over two subnets or more, not: {told}")
    return stages


def _acoustic_model(model: Any, encoder: SharedEncoder | None) -> AcousticModel:
    def logits(input_values: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        audio, mask = on_device(model, input_values, attention_mask)
        if encoder is None:
            return run_model(model, audio, mask)
        features = encoder(audio, input_values, attention_mask.sum(-1).tolist())
        with computed_once(model.base_model.feature_extractor, features):
            return run_model(model, audio, mask)

    return logits


class Point(NamedTuple):
    """What a cascade costs and loses at a threshold.

    Attributes:
        wer: word error rate.
        macs: per second of audio, in the mean.
    """

    min_confidence: float
    wer: float
    macs: float


@dataclass
class Calibration:
    """Word errors and MACs of a cascade on labelled recordings, at every one of `THRESHOLDS`."""

    cascade: CascadeRecognizer

    def __post_init__(self) -> None:
        self.edits, self.macs = np.zeros(len(THRESHOLDS)), np.zeros(len(THRESHOLDS))
        self.num_words, self.seconds = 0, 0.0

    def add(self, waveforms: Sequence[np.ndarray], references: Sequence[str]) -> None:
        """All stages transcribe all of these recordings.

        Args:
            waveforms: mono, at the rate of the model, each of shape (num_samples).
        """
        cascade = self.cascade
        outputs: list[list[list[Piece]]] = [[] for _ in waveforms]  # of each recording: the pieces of each stage
        for stage in cascade.stages:
            for waveform, of_stages in zip(waveforms, outputs, strict=True):
                shape = (cascade.num_frames(len(waveform)), cascade.config.vocab_size)
                of_stages.append(list(cascade.pieces(waveform, np.empty(shape, dtype=np.float32))))
            cascade.run_stage(stage, [piece for of_stages in outputs for piece in of_stages[-1]])
        cascade.forget()
        for of_stages, reference in zip(outputs, references, strict=True):
            self._count(of_stages, reference)
            self.num_words += len(reference.split())

    def _count(self, of_stages: Sequence[Sequence[Piece]], reference: str) -> None:
        alphabet, costs = self.cascade.alphabet, np.cumsum([stage.macs for stage in self.cascade.stages])
        confidences = [[confidence_of(piece.kept, alphabet) for piece in pieces] for pieces in of_stages[:-1]]
        seconds = [len(piece.samples) / self.cascade.sampling_rate for piece in of_stages[0]]
        self.seconds += sum(seconds)
        edits: dict[tuple[int, ...], int] = {}
        for at, threshold in enumerate(THRESHOLDS):
            chosen = tuple(
                next((stage for stage, each in enumerate(of_piece) if each >= threshold), len(of_stages) - 1)
                for of_piece in zip(*confidences)
            )
            if chosen not in edits:
                kept = [of_stages[stage][number].kept for number, stage in enumerate(chosen)]
                edits[chosen] = self._edits(kept, reference)
            self.edits[at] += edits[chosen]
            self.macs[at] += sum(costs[stage] * length for stage, length in zip(chosen, seconds, strict=True))

    def _edits(self, kept: Sequence[np.ndarray], reference: str) -> int:
        log_probs = np.concatenate(kept) if kept else np.empty((0, self.cascade.config.vocab_size), np.float32)
        text = self.cascade.transcript(log_probs, 0.0).text
        if not reference:
            return len(text.split())
        words = jiwer.process_words(reference, text)
        return words.substitutions + words.deletions + words.insertions

    def curve(self) -> list[Point]:
        """From the first stage alone to the last one for all but what is certain."""
        rates, macs = self.edits / max(1, self.num_words), self.macs / max(self.seconds, 1e-9)
        return [Point(*map(float, each)) for each in zip(THRESHOLDS, rates, macs, strict=True)]

    def choose(self, max_wer: float | None = None, max_macs: float | None = None) -> Point:
        """The cheapest point with at most `max_wer`, or the one with the fewest errors and at most `max_macs`. By
        default `max_wer` is the word error rate at the highest threshold and half a point.

        Raises:
            UserError: there is none; the message names the nearest.
        """
        curve = self.curve()
        if max_macs is not None:
            if found := [point for point in curve if point.macs <= max_macs]:
                return min(found, key=lambda point: (point.wer, point.macs))
            least = min(point.macs for point in curve)
            told = f"{max_macs / 1e6:,.0f} MMAC/s: the least is {least / 1e6:,.0f}"
            raise UserError(f"no threshold costs at most {told}")
        wanted = curve[-1].wer + 0.005 if max_wer is None else max_wer
        if found := [point for point in curve if point.wer <= wanted]:
            return min(found, key=lambda point: (point.macs, point.wer))
        least = min(point.wer for point in curve)
        raise UserError(f"no threshold has a word error rate of at most {wanted:.2%}: the least is {least:.2%}")
