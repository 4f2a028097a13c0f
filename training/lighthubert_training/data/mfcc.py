"""Mel-frequency cepstral coefficients on HuBERT's frames: what HuBERT's first units are clusters of."""

import numpy as np
from scipy.fft import dct
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function


RATE = 16_000
WINDOW, HOP = 400, 320
"""Of a frame, in samples."""


def mfcc(waveform: np.ndarray, normalized: bool = True) -> np.ndarray:
    """13 MFCCs with first and second differences, float32 (num_frames, 39).

    Args:
        waveform: (num_samples) at `RATE`, at least two frames.
        normalized: whether coefficients have zero mean and unit variance over the recording. Their differences keep
            their scale: if they were as large as the coefficients, they would decide about the clusters.
    """
    filters = mel_filter_bank(WINDOW // 2 + 1, 40, 0.0, RATE / 2, RATE, norm="slaney")
    window: np.ndarray = window_function(WINDOW, "hann")
    energies = spectrogram(
        waveform.astype(np.float64), window, WINDOW, HOP, power=2.0, center=False, mel_filters=filters, log_mel="log"
    )
    cepstra = dct(energies.T, norm="ortho")[:, :13]
    if normalized:
        cepstra = (cepstra - cepstra.mean(axis=0)) / (cepstra.std(axis=0) + 1e-5)
    first = np.gradient(cepstra, axis=0)
    return np.concatenate([cepstra, first, np.gradient(first, axis=0)], axis=1).astype(np.float32)
