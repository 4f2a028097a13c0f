"""What tests of recognition share: a processor, noise that a model gives different letters, and a model that reads the
letters of a path from its samples."""

import json
from pathlib import Path

import numpy as np
from transformers import HubertConfig, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

from lighthubert_training.recognition.recognizer import Recognizer


TOKENS = ["<pad>", "|", "<unk>", *"abcdefghi"]
FRAME = 320


def save_processor(folder: Path, **extractor) -> Wav2Vec2Processor:
    """A processor of `TOKENS` in `folder`, which normalises audio by default."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), bos_token=None, eos_token=None)
    extractor = Wav2Vec2FeatureExtractor(**({"do_normalize": True, "return_attention_mask": True} | extractor))
    Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer).save_pretrained(folder)
    return Wav2Vec2Processor.from_pretrained(folder)


def babble(seconds: float, sampling_rate: int = 16_000, seed: int = 0) -> np.ndarray:
    """Half-second stretches of different noise: a random model gives each another letter."""
    rng, samples = np.random.default_rng(seed), int(seconds * sampling_rate)
    parts = [rng.normal(size=sampling_rate // 2) * rng.uniform(0.01, 1) for _ in range(int(seconds * 2) + 1)]
    smooth = [np.convolve(part, np.ones(width) / width, "same") for width, part in enumerate(parts, start=1)]
    return np.concatenate(smooth)[:samples].astype(np.float32)


class Reader:
    """A model that gives a letter where the samples of a frame are its number in hundredths: see `say`."""

    def __init__(self):
        self.longest = 0

    def __call__(self, input_values: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        self.longest = max(self.longest, input_values.shape[1])
        num_frames = (input_values.shape[1] - 400) // FRAME + 1
        ids = np.rint(input_values[:, 200::FRAME][:, :num_frames] * 100).astype(int)
        return 9 * np.eye(len(TOKENS), dtype=np.float32)[ids.clip(0, len(TOKENS) - 1)]


def say(path: str) -> np.ndarray:
    """A recording in which `Reader` reads a path, "_" for the blank."""
    ids = [TOKENS.index("<pad>" if token == "_" else token) for token in path]
    return np.append(np.repeat(ids, FRAME), np.zeros(80)).astype(np.float32) / 100


def build_reader(folder: Path) -> Recognizer:
    """A recognizer of what `say` writes."""
    config = HubertConfig(vocab_size=len(TOKENS), feat_extract_norm="layer")
    return Recognizer(Reader(), config, save_processor(folder, do_normalize=False))
