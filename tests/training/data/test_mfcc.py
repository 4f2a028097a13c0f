"""MFCCs on HuBERT's frames."""

import numpy as np
import pytest
from transformers import HubertConfig, HubertModel

from lighthubert_training.data.mfcc import HOP, RATE, WINDOW, mfcc


NOISE = np.random.default_rng(0).standard_normal(RATE).astype(np.float32)


@pytest.mark.parametrize("num_samples", [WINDOW + HOP, 8000, RATE - 1])
def test_frames_are_those_of_a_hubert(num_samples):
    features = mfcc(NOISE[:num_samples])
    assert features.dtype == np.float32
    assert features.shape == (HubertModel(HubertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16))._get_feat_extract_output_lengths(num_samples), 39)  # fmt: skip


def test_normalised_coefficients_do_not_know_the_level():
    np.testing.assert_allclose(mfcc(NOISE), mfcc(0.1 * NOISE), atol=1e-3)
    assert np.abs(mfcc(NOISE, normalized=False) - mfcc(0.1 * NOISE, normalized=False)).max() > 1
    coefficients = mfcc(NOISE)[:, :13]
    np.testing.assert_allclose(coefficients.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(coefficients.std(axis=0), 1, atol=1e-3)
