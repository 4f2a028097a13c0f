"""Trains the tiny teacher of the demonstration as the first iteration of HuBERT is trained.

    python demo/train_teacher.py --output_dir teacher

Frames of the generated training speech are labelled with k-means clusters of their MFCCs (HuBERT, arXiv 2106.07447,
section 2.1); a small HuBERT learns to predict the clusters of masked frames. The result is a stock `HubertModel`, such
as that in `demo/teacher`.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.fft import dct
from sklearn.cluster import MiniBatchKMeans
from torch import nn
from tqdm import tqdm
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor, get_scheduler, set_seed
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function
from transformers.models.hubert.modeling_hubert import _compute_mask_indices

from lighthubert_training.data.audio import load_waveform
from lighthubert_training.data.collators import pad, padded_batches
from lighthubert_training.data.strings import SAMPLING_RATE, read_parquet
from lighthubert_training.models import true_frames
from lighthubert_training.probing import pooled_features, probe_accuracy
from lighthubert_training.runs.options import OptionParser, option, parse_options
from modeling_lighthubert.errors import run
from modeling_lighthubert.files import require_unused, whole_folder


ROOT = Path(__file__).resolve().parent.parent
WINDOW, HOP = 400, 320  # of HuBERT's frames, in samples
CONFIG = HubertConfig(
    hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512, conv_dim=(64,) * 7,
    feat_extract_norm="layer", num_conv_pos_embeddings=32,
    hidden_dropout=0.0, activation_dropout=0.0, attention_dropout=0.0, layerdrop=0.0,
)  # fmt: skip


@dataclass
class TeacherArguments:
    """Data, units and schedule."""

    output_dir: str = option(help="Folder of the teacher.")
    train_file: str = option(str(ROOT / "demo/speech/train.parquet"), "Parquet file to train on.")
    test_file: str = option(str(ROOT / "demo/speech/test.parquet"), "Parquet file of the digit probe.")
    num_units: int = option(100, "Clusters of MFCCs, as in HuBERT's first iteration.")
    mask_time_prob: float = option(0.5, "Share of frames that are masked.")
    mask_time_length: int = option(6, "Length of a masked span in frames. HuBERT has 10; a digit is about 25 long.")
    max_steps: int = option(2500, "Optimiser steps.")
    batch_size: int = option(16, "Recordings in a batch.")
    learning_rate: float = option(2e-3, "Peak learning rate.")
    seed: int = option(0, "Random seed.")


def read(file: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Waveforms at 16 kHz and digits (-1 for strings) of a corpus."""
    dataset = read_parquet(file)
    return [load_waveform(audio, SAMPLING_RATE) for audio in dataset["audio"]], np.array(dataset["digit"])


def mfcc(waveform: np.ndarray) -> np.ndarray:
    """13 MFCCs with first and second differences, (num_frames, 39), on HuBERT's frames."""
    filters = mel_filter_bank(WINDOW // 2 + 1, 40, 0.0, SAMPLING_RATE / 2, SAMPLING_RATE, norm="slaney")
    window, mel = window_function(WINDOW, "hann"), {"mel_filters": filters, "log_mel": "log"}
    energies = spectrogram(waveform, window, WINDOW, HOP, power=2.0, center=False, **mel)
    cepstra = dct(energies.T, norm="ortho")[:, :13]
    first = np.gradient(cepstra, axis=0)
    features = np.concatenate([cepstra, first, np.gradient(first, axis=0)], axis=1)
    return (features - features.mean(axis=0)) / (features.std(axis=0) + 1e-5)


def cluster_frames(waveforms: list[np.ndarray], num_units: int, seed: int) -> list[torch.Tensor]:
    """The cluster of every frame of every waveform, int64 (num_frames) each."""
    features = [mfcc(waveform) for waveform in tqdm(waveforms, desc="MFCC")]
    clusters = MiniBatchKMeans(num_units, random_state=seed, batch_size=10_000, n_init=5).fit(np.concatenate(features))
    return [torch.from_numpy(clusters.predict(frames)).long() for frames in features]


def draw_batches(lengths: list[int], batch_size: int, rng: random.Random) -> Iterator[list[int]]:
    """Endless batches of indices of recordings of similar length."""
    while True:
        order = rng.sample(range(len(lengths)), len(lengths))
        pools = [order[start : start + 16 * batch_size] for start in range(0, len(order), 16 * batch_size)]
        batches = [
            sorted(pool, key=lengths.__getitem__)[start : start + batch_size]
            for pool in pools
            for start in range(0, len(pool), batch_size)
        ]
        yield from rng.sample(batches, len(batches))


def train(
    model: HubertModel,
    head: nn.Linear,
    waveforms: list[np.ndarray],
    units: list[torch.Tensor],
    extractor: Wav2Vec2FeatureExtractor,
    arguments: TeacherArguments,
) -> float:
    """Masked prediction. Returns the accuracy on masked frames over the last hundred steps."""
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, weight_decay=0.01)
    scheduler = get_scheduler("cosine", optimizer, arguments.max_steps // 10, arguments.max_steps)
    batches = draw_batches(list(map(len, waveforms)), arguments.batch_size, random.Random(arguments.seed))
    bar = tqdm(range(arguments.max_steps), desc="training")
    accuracies, seconds, start = [], 0.0, time.perf_counter()
    for _, indices in zip(bar, batches):
        batch = pad(extractor, [waveforms[index] for index in indices])
        targets = nn.utils.rnn.pad_sequence([units[index] for index in indices], batch_first=True)
        frames = true_frames(model, targets.shape[1], batch["attention_mask"])
        span = min(arguments.mask_time_length, int(frames.sum(-1).min()))
        shape, prob = tuple(frames.shape), arguments.mask_time_prob
        mask = _compute_mask_indices(shape, prob, span, attention_mask=frames.long(), min_masks=2)
        mask = torch.from_numpy(np.asarray(mask)) & frames
        logits = head(model(batch["input_values"], batch["attention_mask"], mask).last_hidden_state[mask])
        loss = nn.functional.cross_entropy(logits, targets[mask])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        accuracies.append(float((logits.argmax(-1) == targets[mask]).float().mean()))
        seconds += float(batch["attention_mask"].sum()) / SAMPLING_RATE
        rate = f"{seconds / (time.perf_counter() - start):.0f} s of audio a second"
        bar.set_postfix_str(f"loss {loss:.3f}, accuracy {np.mean(accuracies[-100:]):.3f}, {rate}", refresh=False)
    return float(np.mean(accuracies[-100:]))


def digit_accuracy(model: HubertModel, extractor: Wav2Vec2FeatureExtractor, *corpora: tuple) -> float:
    """Accuracy of a linear probe for the digit, fitted to one corpus and tested on the other."""
    features, labels = [], []
    for waveforms, digits in corpora:
        words = np.flatnonzero(digits >= 0)
        batches = padded_batches(extractor, [waveforms[index] for index in words])
        features.append(pooled_features(model.eval(), batches))
        labels.append(digits[words])
    return probe_accuracy(features[0], labels[0], features[1], labels[1])


def main() -> None:
    (arguments,) = parse_options(OptionParser(TeacherArguments, description=__doc__))
    require_unused(arguments.output_dir)
    set_seed(arguments.seed)
    start = time.perf_counter()
    corpus, test_corpus = read(arguments.train_file), read(arguments.test_file)
    waveforms, _ = corpus
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    units = cluster_frames(waveforms, arguments.num_units, arguments.seed)
    model, head = HubertModel(CONFIG), nn.Linear(CONFIG.hidden_size, arguments.num_units)
    before = digit_accuracy(model, extractor, corpus, test_corpus)
    accuracy = train(model.train(), head, waveforms, units, extractor, arguments)
    after = digit_accuracy(model, extractor, corpus, test_corpus)
    with whole_folder(arguments.output_dir) as folder:
        model.save_pretrained(folder)
        extractor.save_pretrained(folder)
    print(
        f"{arguments.output_dir}: {model.num_parameters():,} parameters; {accuracy:.1%} of masked frames right;"
        f" digits of new voices {after:.1%} by a linear probe, {before:.1%} from random weights;"
        f" {(time.perf_counter() - start) / 60:.0f} minutes on {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    run(main)
