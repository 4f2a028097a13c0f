"""Any model is scored on ten tasks: the same whether features are kept or not, runs are stopped or not."""

import importlib.util
import json
import runpy
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import run_superb
import torch
from accelerate.state import AcceleratorState
from conftest import stock_settings, tiny_model
from scripts import TRAINING, held, killed, run
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor, WavLMConfig, WavLMModel

from lighthubert_training.superb.recipes import read_settings, task_names
from lighthubert_training.superb.training import STATE_FILE, HeadTraining
from modeling_lighthubert import LightHubertModel
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.export import to_hubert


SETTINGS = stock_settings(num_hidden_layers=2, feat_extract_norm="layer")
STAND_INS = TRAINING.parent / "demo/make_superb_stand_ins.py"


def run_main(script: ModuleType, *options: object) -> None:
    """Runs a script in this process: a new one takes seconds to import what it needs."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(map(str, (script.__file__, *options))))
        script.main()


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Stand-ins for all tasks, of a few recordings each."""
    folder = tmp_path_factory.mktemp("stand-ins")
    spec = importlib.util.spec_from_file_location("make_superb_stand_ins", STAND_INS)
    script = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, script)  # where dataclasses look for the types of their fields
        spec.loader.exec_module(script)
        run_main(script, "--output_dir", folder, "--num_train", 24, "--num_eval", 12)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder of tiny models: two stock ones, and a supernet."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    HubertModel(HubertConfig(**SETTINGS)).save_pretrained(folder / "hubert")
    WavLMModel(WavLMConfig(**SETTINGS)).save_pretrained(folder / "wavlm")
    tiny_model(LightHubertModel).save_pretrained(folder / "supernet")
    for model in folder.iterdir():
        Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(model)
    return folder


def options(model: Path, data: Path, output: Path, *more: object) -> list[object]:
    """Three steps of each head by default."""
    steps = [] if "--max_steps" in more else ["--max_steps", 3]
    named = ["--model_name_or_path", model, "--data_dir", data, "--output_dir", output]
    return [*named, "--variant", "stand_in", "--device", "cpu", *steps, *more]


def score(*words: object) -> dict[str, dict[str, float]]:
    """Test scores of each task, from a run in this process with `options`."""
    run_main(run_superb, *options(*words))
    return scores(words[2])


def results(output: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(output.glob("*/*/seed-*/result.json"))]


def scores(output: Path) -> dict[str, dict[str, float]]:
    return {f"{each['model']} {each['task']} {each['seed']}": each["test"] for each in results(output)}


def test_all_tasks_are_scored_and_stand_in_one_table(models, data, tmp_path, capsys):
    found = score(models / "hubert", data, tmp_path)
    assert set(found) == {f"hubert {task} 0" for task in task_names()}
    metrics = {
        "PR": "per", "ASR": "wer", "ASR, LM": "wer_lm", "KS": "accuracy", "QbE": "mtwv", "SID": "accuracy",
        "ASV": "eer", "SD": "der", "IC": "accuracy", "SF F1": "slot_f1", "SF CER": "slot_value_cer", "ER": "accuracy",
    }  # fmt: skip
    header, _, row = (line.strip("| ").split(" | ") for line in (tmp_path / "table.md").read_text().splitlines())
    assert [title.rsplit(" ", 1)[0] for title in header] == ["model", *metrics, "mean", "overall"]
    tasks = [title.lower()[: 3 if title in ("ASR", "ASR, LM", "QbE", "SID", "ASV") else 2] for title in metrics]
    expected = [found[f"hubert {task} 0"][name] for task, name in zip(tasks, metrics.values(), strict=True)]
    assert row[:-2] == ["hubert", *(f"{100 * value:.2f}" for value in expected)]
    printed = capsys.readouterr().out
    assert f"hubert, ks, seed 0: accuracy {row[4]}\n" in printed and printed.endswith(" |\n")
    for result in results(tmp_path):
        if result["task"] != "qbe":
            assert len(result["folds"]) == (5 if result["task"] == "er" else 1)
            assert [[entry["step"] for entry in fold["history"]] for fold in result["folds"]] == [[3]] * len(
                result["folds"]
            )


def test_subnets_of_a_supernet_are_scored_like_their_cut_models_and_stock_exports(models, data, tmp_path):
    supernet = LightHubertModel.from_pretrained(models / "supernet")
    best = tmp_path / "best.json"
    best.write_text(json.dumps(supernet.search_space.sample(0).to_dict()))
    subnets = ("--subnets", f"largest,smallest,{best}", "--tasks", "ks,sid")
    found = score(models / "supernet", data, tmp_path / "superb", *subnets)
    names = {name.rsplit(" ", 2)[0] for name in found}
    assert names == {"supernet, largest", "supernet, smallest", "supernet, best"}
    cut = supernet.extract_subnet("smallest")
    for name, model in (("cut", cut), ("stock", to_hubert(cut))):
        model.save_pretrained(tmp_path / name)
        shutil.copy(models / "supernet/preprocessor_config.json", tmp_path / name)
        alone = score(tmp_path / name, data, tmp_path / f"superb-{name}", "--tasks", "ks,sid")
        assert list(alone.values()) == [found[f"supernet, smallest {task} 0"] for task in ("ks", "sid")]


def test_kept_features_score_as_computed_ones_do(models, data, tmp_path):
    cache, tasks = ("--cache_dir", tmp_path / "cache"), ("--tasks", "sf,qbe")
    computed = score(models / "hubert", data, tmp_path / "computed", *tasks)
    kept = score(models / "hubert", data, tmp_path / "kept", *tasks, *cache)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("*/*/*.safetensors")}
    again = score(models / "hubert", data, tmp_path / "again", *tasks, *cache)
    assert computed == kept == again
    assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("*/*/*.safetensors")}
    assert len(files) == 24 + 12 + 12 + 2 * (20 + 4)


def test_two_processes_train_what_one_does(models, data, tmp_path):
    more = ("--tasks", "ks,asv,qbe", "--cache_dir", tmp_path / "cache")
    script = (TRAINING / "run_superb.py", *options(models / "hubert", data, tmp_path / "two", *more))
    run(*script, processes=2)
    one, two = score(models / "hubert", data, tmp_path / "one", *more), scores(tmp_path / "two")
    assert two.keys() == one.keys()
    for name, metrics in one.items():
        assert two[name] == pytest.approx(metrics, abs=1e-4)


class Stopped(Exception):
    """In place of a signal."""


@pytest.mark.parametrize("task", ["asr", "asv", "er", "sd"])
def test_a_run_that_was_stopped_anywhere_ends_as_one_that_was_not(models, data, tmp_path, monkeypatch, task):
    more = ("--tasks", task, "--max_steps", 8, "--cache_dir", tmp_path / "cache")
    random_too = {"spec_augment": True} if task == "asr" else {"max_seconds": 0.4}
    monkeypatch.setattr(
        run_superb,
        "read_settings",
        lambda *words, **changes: read_settings(*words, eval_steps=2, **random_too, **changes),
    )
    whole = score(models / "hubert", data, tmp_path / "whole", *more)
    train_step = HeadTraining.train_step

    def stopping(training: HeadTraining, step: int, stored: list):
        if remaining and not remaining.pop():
            raise Stopped
        return train_step(training, step, stored)

    monkeypatch.setattr(HeadTraining, "train_step", stopping)
    for stop in (1, 4, 0, 3):
        remaining = [False, *[True] * stop]
        with pytest.raises(Stopped):
            score(models / "hubert", data, tmp_path / "stopped", *more)
    remaining = []
    assert score(models / "hubert", data, tmp_path / "stopped", *more) == whole
    files = [sorted((tmp_path / name).glob("*/*/*/result.json"))[0] for name in ("whole", "stopped")]
    assert files[0].read_text() == files[1].read_text()
    assert not list((tmp_path / "stopped").glob(f"**/{STATE_FILE}"))


SUPERB = "lighthubert_training.superb"
WINDOWS = [
    (f"{SUPERB}.features:save_file", 3, None),  # two recordings have their features
    ("torch:save", 1, None),  # the state of the first evaluation
    ("torch:save", 2, 50),  # and of the second
    (f"{SUPERB}.scoring:write_json", 1, 120),  # all is trained and tested, and the result is not written
    (f"{SUPERB}.report:write_report", 1, None),  # the result is there, and the state is deleted
]
"""Functions in whose n-th call a run is killed, and the step of the state that is there then."""


def test_a_run_killed_in_each_window_of_its_saves_ends_as_one_that_was_not(models, data, tmp_path):
    more = ("--tasks", "ks", "--max_steps", 120)
    whole = score(models / "hubert", data, tmp_path / "whole", *more)
    output, more = tmp_path / "killed", (*more, "--cache_dir", tmp_path / "cache")
    for function, number, step in WINDOWS:
        killed(function, number, TRAINING / "run_superb.py", *options(models / "hubert", data, output, *more))
        assert [torch.load(state)["step"] for state in output.glob(f"**/{STATE_FILE}")] == ([step] if step else [])
    assert scores(output) == whole
    assert score(models / "hubert", data, output, *more) == whole
    assert (output / "table.md").read_text() == (tmp_path / "whole" / "table.md").read_text()


def test_a_second_run_of_the_same_task_is_refused_and_others_share_the_folder(models, data, tmp_path):
    with held(tmp_path / "hubert" / "ks") as pid:
        with pytest.raises(UserError, match=f"hubert/ks is being written by process {pid} on"):
            score(models / "hubert", data, tmp_path, "--tasks", "ks")
        assert set(score(models / "hubert", data, tmp_path, "--tasks", "sid")) == {"hubert sid 0"}


def test_a_state_of_another_model_is_not_gone_on_from(models, data, tmp_path, monkeypatch):
    more, train_step = ("--tasks", "ks", "--max_steps", 8), HeadTraining.train_step
    monkeypatch.setattr(
        run_superb, "read_settings", lambda *words, **changes: read_settings(*words, eval_steps=2, **changes)
    )

    def stopping(training: HeadTraining, step: int, stored: list):
        if step == 6:
            raise Stopped
        return train_step(training, step, stored)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(HeadTraining, "train_step", stopping)
        score(models / "hubert", data, tmp_path / "stopped", *more)
    assert list((tmp_path / "stopped").glob(f"**/{STATE_FILE}"))
    namesake = shutil.copytree(models / "wavlm", tmp_path / "models/hubert")
    texts = []
    for name in ("stopped", "fresh"):
        score(namesake, data, tmp_path / name, *more)
        texts += [file.read_text() for file in (tmp_path / name).glob("*/*/*/result.json")]
    assert texts[0] == texts[1]


def test_what_is_done_is_not_done_again_and_another_setting_is_refused(models, data, tmp_path, monkeypatch):
    first = score(models / "hubert", data, tmp_path, "--tasks", "ks", "--seeds", 0, 1)
    assert len(first) == 2
    with monkeypatch.context() as patch:
        patch.setattr(HeadTraining, "run", lambda training: pytest.fail("it was trained again"))
        assert score(models / "hubert", data, tmp_path, "--tasks", "ks", "--seeds", 0, 1) == first
    shutil.copytree(data / "ks", tmp_path / "other-data/ks")
    shutil.copytree(models / "wavlm", tmp_path / "models/hubert")
    for model, data_dir, more, other in (
        (models, data, ("--features_dtype", "float16", "--cache_dir", tmp_path / "cache"), "features_dtype"),
        (models, tmp_path / "other-data", (), "data_dir"),
        (models, data, ("--max_steps", 4), "recipe"),
        (models, data, ("--max_unreadable_share", 0.5), "max_unreadable_share"),
        (tmp_path / "models", data, (), "features and num_parameters"),
    ):
        with pytest.raises(UserError, match=f"was made with another {other}: choose another --output_dir"):
            score(model / "hubert", data_dir, tmp_path, "--tasks", "ks", *more)
    assert scores(tmp_path) == first


def test_a_sweep_keeps_the_rate_that_is_best_on_the_dev_part(models, data, tmp_path):
    shared = ("--tasks", "sid", "--max_steps", 30, "--cache_dir", tmp_path / "cache")
    score(models / "hubert", data, tmp_path / "sweep", *shared, "--sweep", "1e-9", "1e-2")
    single = {}
    for rate in (1e-9, 1e-2):
        score(models / "hubert", data, tmp_path / f"{rate:g}", *shared, "--learning_rate", rate)
        single[rate] = results(tmp_path / f"{rate:g}")[0]["folds"][0]
    best = max(single, key=lambda rate: single[rate]["dev"]["accuracy"])
    assert results(tmp_path / "sweep")[0]["folds"] == [single[best]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--tasks", "sing"],
            "there is no task 'sing': choose from asr, asv, er, ic, ks, pr, qbe, sd, sf, sid, or all",
        ),
        (["--tasks", "ks", "--subnets", "smallest"], "no supernet to choose one from"),
        (["--features_dtype", "float16"], "is of features that are kept: give --cache_dir"),
        (["--variant", "huge"], "no task has a variant 'huge': choose from lighthubert_base"),
        (["--max_steps", 0], "--max_steps has to be 1 or more, not 0"),
    ],
)
def test_bad_options_end_with_their_reason(models, data, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        score(models / "hubert", data, tmp_path, *more)


def test_a_mistake_is_one_line_and_status_2(models, tmp_path, monkeypatch, capsys):
    words = options(models / "hubert", tmp_path / "data", tmp_path / "out", "--tasks", "sid")
    monkeypatch.setattr(sys, "argv", list(map(str, ("run_superb.py", *words))))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(run_superb.__file__, run_name="__main__")
    message = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2
    assert message.startswith("error: sid: there is no ") and "Get VoxCeleb1" in message
