"""A subnet goes to a Hub with an honest card, once, and from there into programs with and without our package."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import push_subnet
import pytest
from conftest import answer, assert_close, noise, run_without_package, tiny_model
from hub_server import Hub, loopback_hub
from huggingface_hub import HfApi, ModelCard, constants
from scripts import TRAINING, distil

from modeling_lighthubert import LightHubertModel, SearchSpace
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.errors import run as run_as_command
from modeling_lighthubert.export import onnx_runner
from modeling_lighthubert.loading import load_cut_lighthubert


REPOSITORY = "me/small"
PACKAGE = """
import json, sys
import modeling_lighthubert
from transformers import AutoModel

print(json.dumps(AutoModel.from_pretrained(sys.argv[1], revision=sys.argv[2]).num_parameters()))
"""
REMOTE_CODE = """
import json
from transformers import AutoFeatureExtractor, AutoModel

model = AutoModel.from_pretrained("me/small", revision="v1", trust_remote_code=True)
extractor = AutoFeatureExtractor.from_pretrained("me/small", revision="v1")
print(json.dumps([type(model).__module__.split(".")[0], model.num_parameters(), extractor.do_normalize]))
"""
STOCK = """
import json
from transformers import AutoModel

model = AutoModel.from_pretrained("me/small", revision="large")
print(json.dumps([type(model).__name__, model.config.model_type]))
"""


@pytest.fixture(scope="module")
def supernet(workshop) -> Path:
    return distil(workshop, "published", "--max_steps", 1)


@pytest.fixture
def hub():
    with loopback_hub() as hub:
        yield hub


def options(source: Path, *given: object) -> list[str]:
    words = ("--model_name_or_path", source, "--repo_id", REPOSITORY, "--training_data", "Tones.", "--license", "mit")
    words += ("--repeats", 1, "--onnx", "false")  # the exporter is slow
    return [str(word) for word in (TRAINING / "push_subnet.py", *words, *given)]


@pytest.fixture
def push(hub, supernet, tmp_path, monkeypatch, capfd):
    """Runs the script in this process, and returns its exit status and all that it printed."""
    monkeypatch.setenv("HF_TOKEN", hub.environment["HF_TOKEN"])
    # what the environment said is read at import
    monkeypatch.setattr(push_subnet, "HfApi", partial(HfApi, endpoint=hub.url))
    for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(tmp_path)}.items():
        monkeypatch.setattr(constants, name, value)

    def run(*given: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", options(supernet, *given))
        with pytest.raises(SystemExit) as ended:
            run_as_command(push_subnet.main)
        status, said = ended.value.code or 0, "".join(capfd.readouterr())
        assert "hf_secret" not in said
        return status, said

    return run


def push_as_a_user(hub: Hub, folder: Path, source: Path, *given: object) -> tuple[int, str]:
    """The same in a process of its own."""
    environment = {**os.environ, **hub.environment, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "hf")}
    command = [sys.executable, *options(source, *given)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert "hf_secret" not in finished.stdout + finished.stderr
    return finished.returncode, finished.stdout + finished.stderr


def test_a_pushed_subnet_is_loaded_by_its_tag_with_and_without_the_package(hub, supernet, tmp_path):
    given = ("--subnet", "smallest", "--tag", "v1", "--private")
    status, output = push_as_a_user(hub, tmp_path, supernet, *given)
    assert status == 0, output
    assert f"{hub.url}/{REPOSITORY}/commit/" in output
    repository = hub.repositories[REPOSITORY]
    assert repository.private
    assert {"model.safetensors", "preprocessor_config.json", "README.md", "facts.json"} <= set(repository.files("v1"))
    assert not any(b"hf_secret" in content for content in repository.files().values())
    parameters = LightHubertModel.from_pretrained(supernet).num_subnet_parameters("smallest")
    environment = hub.environment | {"HF_HUB_OFFLINE": "0"}
    assert run_without_package(REMOTE_CODE, tmp_path, environment=environment) == [
        "transformers_modules",
        parameters,
        True,
    ]
    environment |= {"HF_HOME": str(tmp_path / "hf-package")}
    command = [sys.executable, "-c", PACKAGE, REPOSITORY, "v1"]
    assert json.loads(subprocess.check_output(command, env=os.environ | environment, timeout=300)) == parameters


def test_onnx_files_lie_beside_the_weights_and_answer_alike(hub, push, supernet, tmp_path):
    for _ in range(2):
        status, output = push("--subnet", "smallest", "--onnx", "true")
        assert status == 0, output
    assert len(hub.repositories[REPOSITORY].commits) == 2  # an empty one, and ours: the exporter repeats itself
    files = hub.repositories[REPOSITORY].files()
    expected = {"onnx/model.onnx", "onnx/model_fp16.onnx", "onnx/model_quantized.onnx"}
    assert {name for name in files if name.startswith("onnx/")} == expected
    (tmp_path / "model.onnx").write_bytes(files["onnx/model.onnx"])
    audio = noise(1, 6000)
    wanted = answer(load_cut_lighthubert(supernet, "smallest").cpu(), audio)
    assert_close(onnx_runner(tmp_path / "model.onnx")(audio), wanted)


def test_what_no_onnx_file_can_hold_is_pushed_without(push, supernet, tmp_path):
    windowed, space = tmp_path / "windowed", SearchSpace((16,), (4,), (2,), (1,), head_dim=4, attention_window=(9,))
    tiny_model(LightHubertModel, space).extract_subnet().save_pretrained(windowed)
    status, output = push("--model_name_or_path", windowed, "--onnx", "true")
    assert status == 2
    assert "attends within a window" in output and "--onnx false leaves the ONNX files out" in output
    assert push("--model_name_or_path", windowed)[0] == 0


def test_pushing_the_same_once_more_makes_no_commit(hub, push):
    for _ in range(2):
        status, output = push("--subnet", "smallest")
        assert status == 0, output
    assert len(hub.repositories[REPOSITORY].commits) == 2  # an empty one, and ours


def test_another_model_is_left_alone_unless_told(hub, push):
    hub.add(REPOSITORY, {"config.json": b"{}", "pytorch_model.bin": b"theirs"})
    status, output = push("--subnet", "smallest")
    assert status == 2
    assert "me/small (main) holds another model" in output
    assert "Traceback" not in output
    assert hub.repositories[REPOSITORY].files() == {"config.json": b"{}", "pytorch_model.bin": b"theirs"}
    status, output = push("--subnet", "smallest", "--create_pr")
    assert status == 0, output
    assert f"{hub.url}/{REPOSITORY}/discussions/1" in output
    assert set(hub.repositories[REPOSITORY].files()) == {"config.json", "pytorch_model.bin"}
    assert "model.safetensors" in hub.repositories[REPOSITORY].files("refs/pr/1")
    status, output = push("--subnet", "smallest", "--overwrite")
    assert status == 0, output
    assert "me/small: all other files on the branch main are deleted" in output
    assert "pytorch_model.bin" not in hub.repositories[REPOSITORY].files()


def test_each_branch_holds_a_model_of_its_own_and_tags_do_not_move(hub, push, tmp_path):
    status, output = push("--subnet", "smallest", "--tag", "v1")
    assert status == 0, output
    stock = ("--subnet", "largest", "--format", "hubert")
    status, output = push(*stock)
    assert status == 2
    assert "holds another model" in output
    status, output = push(*stock, "--revision", "large")
    assert status == 0, output
    repository = hub.repositories[REPOSITORY]
    assert repository.files("v1") == repository.files("main")
    sizes = {ref: len(repository.files(ref)["model.safetensors"]) for ref in ("main", "large")}
    assert sizes["main"] < sizes["large"]
    assert "modeling_lighthubert.py" in repository.files("main")
    assert not [name for name in repository.files("large") if name.endswith(".py")]
    status, output = push(*stock, "--revision", "large", "--tag", "v1")
    assert status == 2
    assert "tags do not move" in output
    environment = hub.environment | {"HF_HUB_OFFLINE": "0"}
    assert run_without_package(STOCK, tmp_path, environment=environment) == ["HubertModel", "hubert"]


@pytest.mark.parametrize("moment", ["upload", "commit"])
def test_a_connection_that_is_lost_leaves_the_last_commit_and_the_same_command_goes_on(hub, push, moment, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the attempts of the client
    hub.cuts_off = moment
    status, output = push("--subnet", "smallest")
    assert status == 1
    assert "It is at its last commit: give the same command once more" in output
    assert "Traceback" not in output
    assert hub.repositories[REPOSITORY].files() == {}
    hub.cuts_off = None
    status, output = push("--subnet", "smallest")
    assert status == 0, output
    assert "model.safetensors" in hub.repositories[REPOSITORY].files()


def test_a_card_has_no_figures_of_other_subnets(hub, push, supernet):
    results = json.loads((supernet / "eval_results.json").read_text())
    assert results["eval_loss_smallest"] != results["eval_loss_largest"]
    status, output = push("--subnet", "smallest", "--results", supernet / "eval_results.json")
    assert status == 0, output
    files = hub.repositories[REPOSITORY].files()
    figures = [{"metric": "loss", "value": results["eval_loss_smallest"], "num_recordings": 8, "num_available": 8}]
    assert json.loads(files["facts.json"])["results"] == figures
    (result,) = ModelCard(files["README.md"].decode()).data.eval_results
    assert result.metric_value == round(results["eval_loss_smallest"], 4)


def test_a_repository_whose_facts_lack_the_speed_is_measured(hub, push):
    status, output = push("--subnet", "smallest")
    assert status == 0, output
    repository = hub.repositories[REPOSITORY]
    facts = json.loads(repository.files()["facts.json"])
    del facts["speed"]
    repository.commit(repository.files() | {"facts.json": json.dumps(facts).encode()}, "main")
    status, output = push("--subnet", "smallest")
    assert status == 0, output
    assert "speed" in json.loads(repository.files()["facts.json"])


def test_a_hub_that_refuses_says_so_in_one_line(hub, push, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # the client compares, before it says what was refused
    hub.add(REPOSITORY, {"README.md": b"# small"})
    hub.read_only = True
    status, output = push("--subnet", "smallest")
    assert status == 1
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: me/small could not be pushed (")
    assert "403 Forbidden" in line
    assert "Traceback" not in output
    assert set(hub.repositories[REPOSITORY].files()) == {"README.md"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--subnet", "tiny"), "tiny"),
        (("--subnet", "nowhere.json"), "nowhere.json"),
        (("--repo_id", "me/small/new"), "Repo id must be"),
        (("--create_pr", "--tag", "v1"), "a pull request has no tag"),
        (("--model_name_or_path", "nowhere/at/all"), "nowhere/at/all does not exist"),
        (("--format", "onnx"), "invalid choice: 'onnx'"),
        (("--repeats", 0), "--repeats has to be at least 1"),
    ],
)
def test_what_cannot_be_published_is_refused_in_one_line(hub, push, given, message):
    status, output = push(*given)
    assert status == 2
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in output
    assert not hub.repositories


def test_weights_under_the_apache_licence_come_with_its_text(hub, push):
    status, output = push("--subnet", "smallest", "--license", "apache-2.0")
    assert status == 0, output
    assert hub.repositories[REPOSITORY].files()["LICENSE"] == (TRAINING.parent / "LICENSE").read_bytes()


def test_a_subnet_without_a_licence_is_not_published(supernet):
    arguments = push_subnet.PushArguments(str(supernet), REPOSITORY, "Tones.", subnet="smallest")
    with pytest.raises(UserError, match="names no licence: give --license"):
        push_subnet.publish(arguments)
