"""The README's code does what stands beside it."""

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import TWO_DEEP, tiny_model
from recognizers import save_processor
from transformers import AutoFeatureExtractor, AutoModel, Wav2Vec2FeatureExtractor

from modeling_lighthubert import LightHubertConfig, LightHubertForCTC, LightHubertModel, SearchSpace
from modeling_lighthubert.files import write_json
from modeling_lighthubert.measured_subnets import SUBNETS_FILE, MeasuredSubnet, MeasuredSubnets
from modeling_lighthubert.profiling import macs_per_second


README = Path(__file__).parents[2] / "README.md"


def code_blocks(heading: str) -> list[str]:
    """Python code under a heading of the README."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)^## ", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def recording(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    soundfile.write("recording.wav", np.random.default_rng(0).normal(size=16_000) * 0.1, 16_000)


@pytest.mark.usefixtures("recording")
def test_subnets_are_chosen_and_cut_and_their_folders_load():
    """On random weights of the real size; the ONNX file, which takes half a minute, is left to other tests."""
    torch.manual_seed(0)
    model = LightHubertModel(LightHubertConfig(search_space=SearchSpace.small())).trim()
    model.save_pretrained("lighthubert-small")
    a_small = SearchSpace.small().named["a_small"]
    costs = {"params": model.num_subnet_parameters(a_small), "macs": macs_per_second(model, a_small)}
    measured = MeasuredSubnets.of(SearchSpace.small(), "loss", [MeasuredSubnet(a_small, 0.5, costs)])
    write_json(f"lighthubert-small/{SUBNETS_FILE}", measured.to_dict())
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained("lighthubert-small")
    names: dict = {}
    figures: list[str] = []
    for block in code_blocks("Use"):
        exec("\n".join(line for line in block.splitlines() if not line.startswith("to_onnx(")), names)
        for code, figure in re.findall(r"^(model\..*)  # ([\d_]+)$", block, re.MULTILINE):
            assert eval(code, names) == int(figure), code
            figures.append(figure)
    assert len(figures) == 2
    for folder in ("a-small", "a-small-hubert"):
        assert AutoModel.from_pretrained(folder).num_parameters() == pytest.approx(26_879_488, rel=0.05)
    assert AutoFeatureExtractor.from_pretrained("a-small").do_normalize


@pytest.mark.usefixtures("recording")
def test_a_pipeline_transcribes_samples_without_ffmpeg(monkeypatch):
    tiny_model(LightHubertForCTC, TWO_DEEP).extract_subnet("smallest").save_pretrained("asr")
    save_processor(Path("asr"))
    monkeypatch.setenv("PATH", "")
    (block,) = code_blocks("The command")
    names: dict = {}
    exec(block, names)
    assert isinstance(eval(block.splitlines()[-1], names)["text"], str)
