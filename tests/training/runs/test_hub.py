"""What a run made goes to the Hub without its checkpoints, and a Hub that fails says so in two sentences."""

import time
from functools import partial
from pathlib import Path

import pytest
from hub_server import Hub, loopback_hub
from huggingface_hub import HfApi, constants

from lighthubert_training.runs import hub as runs_hub
from lighthubert_training.runs.hub import check_push, push_folder, reaching_hub, without_token
from modeling_lighthubert.errors import UserError


@pytest.fixture
def hub(monkeypatch):
    with loopback_hub() as hub:
        monkeypatch.setenv("HF_TOKEN", hub.environment["HF_TOKEN"])
        # what the environment said is read at import
        monkeypatch.setattr(runs_hub, "HfApi", partial(HfApi, endpoint=hub.url))
        for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the attempts of the client
        yield hub


@pytest.fixture
def folder(tmp_path) -> Path:
    """What a run leaves."""
    names = ["config.json", "model.safetensors", "README.md", "loss.png", "checkpoint-2/model.safetensors"]
    names += ["unfinished-checkpoint-4/model.safetensors", ".unfinished-1-config.json", "training_args.bin"]
    names += ["tensorboard/events", "runs/now/events"]
    for name in names:
        (tmp_path / "small" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "small" / name).write_text(name)
    return tmp_path / "small"


def test_a_folder_is_pushed_without_checkpoints_and_logs(hub: Hub, folder):
    push_folder(folder, "me/lighthubert")
    pushed = hub.repositories["me/lighthubert"].files()
    assert set(pushed) == {"config.json", "model.safetensors", "README.md", "loss.png"}
    assert pushed["config.json"] == b"config.json"


def test_the_repository_is_called_like_the_folder_unless_told(hub: Hub, folder, monkeypatch):
    monkeypatch.chdir(folder)
    push_folder(Path("."), None)
    assert "config.json" in hub.repositories["me/small"].files()


def test_a_push_that_fails_says_where_the_model_is_and_what_sends_it(hub: Hub, folder):
    hub.cuts_off = "commit"
    message = rf"^me/a could not be pushed \(.+\). The model is in {folder}: `hf upload me/a {folder}` sends it$"
    with pytest.raises(ConnectionError, match=message):
        push_folder(folder, "me/a")
    assert (folder / "checkpoint-2" / "model.safetensors").exists()
    assert hub.repositories["me/a"].files() == {}


def test_a_name_that_the_hub_cannot_have_is_the_users_mistake(hub: Hub, folder):
    with pytest.raises(UserError, match="me/a/b could not be pushed: Repo id must be"):
        push_folder(folder, "me/a/b")
    assert not hub.repositories


def test_what_the_hub_would_refuse_after_a_run_is_refused_before_it(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    check_push(folder, None)
    with pytest.raises(UserError, match="--push_to_hub: Repo id must be"):
        check_push(folder, "me/a/b")
    monkeypatch.setattr(runs_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="--push_to_hub: nobody is logged in. Do so with `hf auth login`"):
        check_push(folder, "me/a")


def test_what_the_client_says_is_shown_without_the_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(ConnectionError) as caught, reaching_hub("me/a was not found", "Try again"):
        raise RuntimeError("refused: Bearer hf_secret")
    assert str(caught.value) == "me/a was not found (refused: Bearer ***). Try again"


@pytest.mark.parametrize("error", [UserError("no such model"), TypeError("a bug"), KeyError("a bug")])
def test_mistakes_that_are_not_the_hubs_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, reaching_hub("", ""):
        raise error
    assert caught.value is error


def test_text_without_a_token_stays_as_it_is(monkeypatch):
    assert without_token("nothing secret") == "nothing secret"
    monkeypatch.setattr(runs_hub, "get_token", lambda: None)
    assert without_token("hf_secret") == "hf_secret"
