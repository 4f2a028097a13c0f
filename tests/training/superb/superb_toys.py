"""What tests of SUPERB share: tiny frozen models, and data of a few tones for some of its tasks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import DEVICE, stock_settings
from speech import RATE, TONE, encoded, undecoded
from transformers import (
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)

from lighthubert_training.superb.features import Upstream


SETTINGS = stock_settings(num_hidden_layers=2, feat_extract_norm="layer")
STOCK = {
    "hubert": lambda: HubertModel(HubertConfig(**SETTINGS)),
    "wav2vec2": lambda: Wav2Vec2Model(Wav2Vec2Config(**SETTINGS)),
    "wavlm": lambda: WavLMModel(WavLMConfig(**SETTINGS)),
}
EXTRACTOR = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)


def stock(name: str = "hubert", device: torch.device = DEVICE) -> Upstream:
    """A tiny model, the same ones whenever it is built."""
    torch.manual_seed(0)
    return Upstream(STOCK[name]().to(device), EXTRACTOR, name)


def noise_of(samples: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(samples).astype(np.float32)


def write_part(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """A part of a task's data: a tone for each row."""
    folder.mkdir(parents=True, exist_ok=True)
    audio = {"bytes": encoded(TONE, RATE, format="FLAC"), "path": None}
    undecoded([{"audio": audio, **row} for row in rows]).to_parquet(folder / f"{name}.parquet")


def write_lines(file: Path, *lines: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))


def write_data(folder: Path) -> Path:
    """Data of four recordings a part for identification, verification, phones, emotions and query by example."""
    speakers = [{"speaker": name} for name in "abab"]
    for name in ("train", "dev", "test"):
        write_part(folder / "sid", name, speakers)
        write_part(folder / "pr", name, [{"text": text} for text in ("one", "two one", "one", "two")])
    write_lines(folder / "pr/lexicon.txt", "ONE W AH N", "one W AA N", "", "two T UW")
    write_part(folder / "asv", "train", speakers)
    write_part(folder / "er", "train", [{"emotion": "sad", "fold": fold} for fold in (1, 2, 3, 1, 2, 3, 1, 2, 3)])
    for name in ("dev", "test"):
        write_part(folder / "asv", name, [{"id": f"{name}-{number}"} for number in range(4)])
        trials = (f"{name}-0,{name}-1,1", f"{name}-1,{name}-2,0", f"{name}-2,{name}-3,1")
        write_lines(folder / f"asv/{name}_trials.csv", "enrolment,trial,same", *trials)
        for kind in ("queries", "documents"):
            write_part(folder / "qbe", f"{name}_{kind}", [{"id": f"{kind}-{number}"} for number in range(3)])
        write_lines(
            folder / f"qbe/{name}_pairs.csv", "query,document", "queries-0,documents-2", "queries-2,documents-0"
        )
    return folder


def rewrite_as_files(folder: Path, name: str, labels: list[dict[str, Any]], contents: list[bytes]) -> None:
    """A part in files of audio that a .jsonl names, in place of the Parquet file."""
    (folder / f"{name}.parquet").unlink()
    for number, content in enumerate(contents):
        (folder / f"{number}.flac").write_bytes(content)
    lines = [json.dumps({"audio": f"{number}.flac", **row}) for number, row in enumerate(labels)]
    write_lines(folder / f"{name}.jsonl", *lines)


class Kept(list):
    """Features, as of a `FeatureDataset` that has them all."""

    read = list.__getitem__

    def states(self, indices, stored):
        return list(stored)
