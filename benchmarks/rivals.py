"""Models that people would use in the place of a LightHuBERT, at full size with random weights: encoders, and the
greedy search of those that write text."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)


NUM_TOKENS = 20
"""That 5 s of speech are written in: 13 words, at 160 a minute, and one and a half tokens for each."""
Call = Callable[[Any, torch.Tensor], object]
"""Runs a model on audio (batch_size, num_samples), float32."""


@dataclass(frozen=True)
class Rival:
    """A model that is built by `build`, and how it is run."""

    build: Callable[[], PreTrainedModel]
    call: Call


def whisper_features(audio: torch.Tensor) -> torch.Tensor:
    """Log-mel frames (batch_size, num_mel_bins, 3000): 30 s, however short the audio is."""
    extractor: Any = WhisperFeatureExtractor()
    return extractor(list(audio.numpy()), sampling_rate=16_000, return_tensors="pt").input_features


def greedy(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    return model.generate(inputs, do_sample=False, min_new_tokens=NUM_TOKENS, max_new_tokens=NUM_TOKENS)


def whisper() -> PreTrainedModel:
    return WhisperForConditionalGeneration(WhisperConfig())  # the defaults are those of tiny


def moonshine() -> PreTrainedModel:
    return MoonshineForConditionalGeneration(MoonshineConfig())  # here, too


RIVALS = {
    "wav2vec 2.0 Base": Rival(lambda: Wav2Vec2Model(Wav2Vec2Config()), lambda model, audio: model(audio)),
    "Whisper tiny, encoder": Rival(
        lambda: whisper().get_encoder(), lambda model, audio: model(whisper_features(audio))
    ),
    f"Whisper tiny, {NUM_TOKENS} tokens": Rival(whisper, lambda model, audio: greedy(model, whisper_features(audio))),
    "Moonshine tiny, encoder": Rival(lambda: moonshine().get_encoder(), lambda model, audio: model(audio)),
    f"Moonshine tiny, {NUM_TOKENS} tokens": Rival(moonshine, greedy),
}


@cache
def rival_gigamacs(name: str, seconds: float) -> float:
    """Multiply-accumulates for a second of audio, in clips of `seconds`, counted by running the model once."""
    model: Any = RIVALS[name].build().eval()
    model.set_attn_implementation("eager")  # which consists of products that are counted
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        RIVALS[name].call(model, torch.randn(1, int(16_000 * seconds)))
    return counter.get_total_flops() / 2 / seconds / 1e9
