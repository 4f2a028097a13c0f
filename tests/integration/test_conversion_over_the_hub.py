"""Conversion from a Hub to a Hub, over real HTTP, and what comes back from there without the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN, run_without_package
from hub_server import Hub, loopback_hub


CONVERTER = "modeling_lighthubert.convert_lighthubert_original_checkpoint_to_pytorch"

LOAD = """
import json
from transformers import AutoFeatureExtractor, AutoModel

model = AutoModel.from_pretrained("me/lighthubert", trust_remote_code=True)
extractor = AutoFeatureExtractor.from_pretrained("me/lighthubert")
model.set_subnet("smallest")
print(json.dumps([model.subnet.hidden_size, model.search_space.num_subnets, extractor.do_normalize]))
"""


@pytest.fixture
def hub():
    with loopback_hub() as hub:
        hub.add("mechanicalsea/lighthubert", {"lighthubert_small.pt": (GOLDEN / "checkpoint.pt").read_bytes()})
        yield hub


def convert(hub: Hub, tmp_path: Path, checkpoint: str, *options: str) -> subprocess.CompletedProcess:
    space = tmp_path / "space.json"
    space.write_text(json.dumps(json.loads((GOLDEN / "cases.json").read_text())["search_space"]))
    command = [sys.executable, "-m", CONVERTER, "--checkpoint_path", checkpoint, "--search_space", str(space)]
    command += ["--pytorch_dump_folder_path", str(tmp_path / "out"), *options]
    environment = {**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "hf")}
    environment.pop("HF_HUB_OFFLINE", None)
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert "hf_secret" not in finished.stdout + finished.stderr, "the token is printed"
    return finished


def test_a_checkpoint_on_the_hub_is_converted_pushed_and_loaded_from_there(hub, tmp_path):
    finished = convert(
        hub, tmp_path, "mechanicalsea/lighthubert/lighthubert_small.pt", "--push_to_hub", "me/lighthubert"
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    pushed = hub.repositories["me/lighthubert"].files()
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= set(pushed)
    assert "modeling_lighthubert.py" in pushed
    assert b"7,800,136,704 subnets" in pushed["README.md"]
    loaded = run_without_package(LOAD, tmp_path, environment=hub.environment | {"HF_HUB_OFFLINE": "0"})
    assert loaded == [64, 7_800_136_704, True]


def test_a_file_that_the_hub_does_not_have_gives_a_clear_error(hub, tmp_path):
    finished = convert(hub, tmp_path, "mechanicalsea/lighthubert/lighthubert_large.pt")
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: ") or "\nerror: " in finished.stderr
    assert "lighthubert_large.pt" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "out").exists()
