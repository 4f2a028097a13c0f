"""What tests of benchmarks share: the benchmarks as modules, and a tiny teacher with little speech."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE
from speech import RATE, encoded, undecoded
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from modeling_lighthubert import SearchSpace


FOLDER = Path(__file__).parents[2] / "benchmarks"
SHARED = ("common", "comparisons", "ctc", "measures", "processes", "recordings", "rivals", "runner", "shapes")
NAMES = sorted({file.stem for file in FOLDER.glob("*.py")} - set(SHARED))


@pytest.fixture(scope="module", autouse=True)
def benchmarks_on_the_path():
    """Scripts find modules beside them; here their folder is on the path, last, while this module is tested."""
    sys.path.append(str(FOLDER))
    threads = torch.get_num_threads()
    yield
    sys.path.remove(str(FOLDER))
    for name in [name for name in sys.modules if name in SHARED or name.startswith("benchmark_")]:
        del sys.modules[name]
    torch.set_num_threads(threads)


def load(name: str) -> ModuleType:
    """A benchmark as a module, by its path: some are called like modules of others."""
    if name in SHARED:
        return importlib.import_module(name)
    module = f"benchmark_{name}"
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, FOLDER / f"{name}.py")
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    return sys.modules[module]


WORDS = ("due sei", "press one", "press two")


def write_speech(folder: Path) -> None:
    """A folder of little speech, tones whose pitch is the word: known and held-out speakers and languages."""
    rng = np.random.default_rng(0)
    folder.mkdir()

    def row(number: int, **labels: object) -> dict:
        tone = np.sin(2 * np.pi * 300 * (1 + number % 3) * np.arange(9600) / RATE) + 0.1 * rng.standard_normal(9600)
        return {"audio": {"bytes": encoded(0.1 * tone, format="FLAC"), "path": None}, **labels}

    for part in ("train", "test"):
        digits = [row(n, digit=n % 3, speaker=speaker) for n in range(9) for speaker in ("ann", "theo", "zoe")]
        prompts = [row(n, text=WORDS[n % 3], language="it" if n % 3 == 0 else "en") for n in range(12)]
        slots = [row(n, slots=json.dumps({"size": f"size {n % 3}"})) for n in range(6)]
        for corpus, rows in {"digits": digits, "prompts": prompts, "commands": slots}.items():
            undecoded(rows).to_parquet(folder / f"{corpus}-{part}.parquet")
    undecoded([row(n, speaker="zoe") for n in range(3)]).to_parquet(folder / "prompts-unlabelled.parquet")


def tiny_bench_arguments(tmp_path: Path) -> Any:
    """Of a benchmark on a teacher with random weights, all in one folder."""
    write_speech(tmp_path / "speech")
    config = HubertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, conv_dim=(16,) * 7,
        feat_extract_norm="layer", num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=8,
    )  # fmt: skip
    space = SearchSpace((16, 24, 32), (2, 4), (1, 2, 3), (2, 3), head_dim=8)
    HubertModel(config).save_pretrained(tmp_path / "teacher")
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(tmp_path / "teacher")
    space.to_json_file(tmp_path / "space.json")
    return load("common").BenchArguments(
        speech_dir=str(tmp_path / "speech"), teacher_name_or_path=str(tmp_path / "teacher"), held_out_speaker="theo",
        search_space=str(tmp_path / "space.json"), output_dir=str(tmp_path / "output"), held_out_language="it",
        results_file=str(tmp_path / "results/gains.json"), passes=2, seeds=[0], label_minutes=[0.05],
        steps_of_minutes=[2], phone_steps=2, measures=["r2", "probes", "phones", "recognition"], device=str(DEVICE),
    )  # fmt: skip
