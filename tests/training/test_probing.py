"""Probes and R2 find what features hold, and nothing in noise; masks and means depend on the recordings alone."""

import types

import numpy as np
import pytest
import torch
from conftest import DEVICE, tiny_model
from datasets import Audio, Dataset
from transformers import Wav2Vec2FeatureExtractor

from lighthubert_training.data.collators import padded_batches
from lighthubert_training.data.strings import SAMPLING_RATE, Speech, encode_flac
from lighthubert_training.distillation.arguments import ObjectiveArguments
from lighthubert_training.distillation.teacher import Teacher
from lighthubert_training.probing import (
    ProbeBench,
    draw_masks,
    masked_features,
    pooled_features,
    probe_accuracy,
)


EXTRACTOR = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
CLASSES = np.array(["one", "two", "three"] * 40)


def separable(rng: np.random.Generator) -> np.ndarray:
    """Features that differ by the class in one of 8 dimensions, which is small beside the noise in the others."""
    features = rng.standard_normal((len(CLASSES), 8))
    features[:, 3] = 0.01 * (np.unique(CLASSES, return_inverse=True)[1] + 0.1 * features[:, 3])
    return features


def test_a_probe_finds_classes_in_any_scale():
    rng = np.random.default_rng(0)
    assert probe_accuracy(separable(rng), CLASSES, separable(rng), CLASSES) > 0.9


def test_a_probe_guesses_from_noise():
    rng = np.random.default_rng(0)
    train, test = rng.standard_normal((2, len(CLASSES), 8))
    assert 0.15 < probe_accuracy(train, CLASSES, test, CLASSES) < 0.5


def test_pooled_features_are_means_over_true_frames():
    model = tiny_model().eval()
    waveforms = [np.random.default_rng(seed).standard_normal(4000 + 2400 * seed).astype(np.float32) for seed in (0, 1)]
    together = pooled_features(model, padded_batches(EXTRACTOR, waveforms))
    for waveform, pooled in zip(waveforms, together, strict=True):
        inputs = EXTRACTOR(waveform, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_values.to(DEVICE)
        with torch.no_grad():
            alone = model(inputs).last_hidden_state[0].mean(dim=0).cpu()
        np.testing.assert_allclose(pooled, alone, rtol=0, atol=1e-4 * float(alone.abs().max()))


def test_masks_do_not_depend_on_batches():
    model = tiny_model()
    waveforms = [np.ones(4000 + 800 * number, dtype=np.float32) for number in range(5)]

    def rows(batch_size: int) -> list[list[bool]]:
        masks = draw_masks(model, padded_batches(EXTRACTOR, waveforms, batch_size), 0.5, 2)
        return [row[:12].tolist() for mask in masks for row in mask]

    assert rows(2) == rows(5)
    assert len(set(map(tuple, rows(5)))) > 1


def test_masked_features_are_those_of_masked_frames_that_the_model_does_not_see():
    model = tiny_model().eval()
    loud = np.random.default_rng(0).standard_normal(4000).astype(np.float32)
    batches = padded_batches(EXTRACTOR, [loud])
    masks = draw_masks(model, batches, 0.5, 2)
    features = masked_features(model, batches, masks)
    assert features.shape == (int(masks[0].sum()), model.config.hidden_size)
    with torch.no_grad():
        seen = model(batches[0]["input_values"].to(DEVICE)).last_hidden_state.cpu()[masks[0]].numpy()
    assert np.abs(features - seen).max() > 0.1


@pytest.fixture
def bench(tmp_path) -> ProbeBench:
    """Tones whose pitch is the digit and whose noise is the speaker."""
    parts = []
    for part, takes in (("train", 15), ("test", 15)):
        rows = []
        for take in range(takes):
            for digit, speaker in ((0, "soft"), (1, "soft"), (0, "noisy"), (1, "noisy")):
                rng = np.random.default_rng([take, digit, speaker == "noisy", part == "test"])
                tone = np.sin(2 * np.pi * (300 if digit else 2000) * np.arange(4800) / SAMPLING_RATE)
                tone += (0.4 if speaker == "noisy" else 0.02) * rng.standard_normal(len(tone))
                audio = encode_flac(0.1 * tone)
                rows.append({"audio": audio, "text": str(digit), "digit": digit, "speaker": speaker})
        words = Dataset.from_list(rows).cast_column("audio", Audio(decode=False))
        words.to_parquet(tmp_path / f"{part}.parquet")
        parts.append(Speech(words, tmp_path / f"{part}.parquet", tmp_path / f"{part}.parquet"))
    teacher = Teacher(tiny_model(search_space=None), ObjectiveArguments(num_target_layers=1))
    return ProbeBench(*parts, teacher, EXTRACTOR, max_recordings=100)


def test_the_bench_probes_digits_speakers_and_targets(bench):
    row = bench.measure(bench.teacher.model)
    assert row["digit"] > 0.9
    assert row["speaker"] > 0.9
    assert row["r2"] > 0.15


def test_r2_is_the_explained_part_of_the_variance(bench):
    """Targets that are linear in the features, alone, with as much noise, and nothing but noise."""
    model, rng = bench.teacher.model, np.random.default_rng(0)
    parts = [masked_features(model, *part) for part in zip((bench.train_frames, bench.test_frames), bench.masks)]
    weights = rng.standard_normal((parts[0].shape[1], 4))
    linear = [features @ weights for features in parts]
    noise = [linear[0].std(axis=0) * rng.standard_normal(each.shape) for each in linear]
    for share, expected, tolerance in ((0.0, 1.0, 0.02), (1.0, 0.5, 0.2)):
        bench.train_targets, bench.test_targets = (a + share * b for a, b in zip(linear, noise, strict=True))
        assert bench.measure(model)["r2"] == pytest.approx(expected, abs=tolerance)
    bench.train_targets, bench.test_targets = noise
    assert bench.measure(model)["r2"] < 0.1


def test_the_bench_sees_that_features_hold_nothing(bench):
    """A model whose features are noise, other for every recording."""

    class Noise(torch.nn.Module):
        def __init__(self, model: torch.nn.Module):
            super().__init__()
            self._get_feat_extract_output_lengths = model._get_feat_extract_output_lengths
            self.device = model.device
            self.generator = torch.Generator().manual_seed(0)

        def forward(self, input_values, attention_mask, mask_time_indices=None):
            frames = int(self._get_feat_extract_output_lengths(input_values.shape[1]))
            noise = torch.randn(len(input_values), frames, 8, generator=self.generator).to(self.device)
            return types.SimpleNamespace(last_hidden_state=noise)

    row = bench.measure(Noise(bench.teacher.model))
    assert 0.2 <= row["digit"] <= 0.8
    assert 0.15 <= row["speaker"] <= 0.85
    assert row["r2"] < 0.1


def test_labels_that_the_data_lack_are_not_probed(bench):
    bench.test_words = bench.test_words.remove_columns(["digit", "speaker"])
    assert set(bench.measure(bench.teacher.model)) == {"r2"}
