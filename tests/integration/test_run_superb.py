"""Any model is scored on ten tasks: the same whether features are kept or not, runs are stopped or not."""

import csv
import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import run_superb
import soundfile
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import stock_settings, tiny_model
from datasets import Audio, Dataset, load_dataset
from safetensors.torch import load_file
from scripts import TRAINING, run, start
from transformers import (
    AutoModel,
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)

from lighthubert_training.superb.data import read_recipe, task_names
from lighthubert_training.superb.features import FeatureCache, Recordings, Upstream
from lighthubert_training.superb.report import PUBLISHED, SCORED, overall, superb_score
from lighthubert_training.superb.tasks import TASKS
from lighthubert_training.superb.training import STATE_FILE, HeadTraining
from modeling_lighthubert import LightHubertModel
from modeling_lighthubert.export import to_hubert


sys.path.append(str(Path(__file__).parents[2] / "demo"))

import make_superb_stand_ins


SETTINGS = stock_settings(num_hidden_layers=2, feat_extract_norm="layer")
STOCK = {
    "hubert": lambda: HubertModel(HubertConfig(**SETTINGS)),
    "wav2vec2": lambda: Wav2Vec2Model(Wav2Vec2Config(**SETTINGS)),
    "wavlm": lambda: WavLMModel(WavLMConfig(**SETTINGS)),
}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Stand-ins for all tasks, of a few recordings each."""
    folder = tmp_path_factory.mktemp("stand-ins")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys,
            "argv",
            ["make_superb_stand_ins.py", "--output_dir", str(folder), "--num_train", "24", "--num_eval", "12"],
        )
        make_superb_stand_ins.main()
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder of tiny models: stock ones, and a supernet."""
    folder = tmp_path_factory.mktemp("models")
    for name, build in STOCK.items():
        torch.manual_seed(0)
        build().save_pretrained(folder / name)
    tiny_model(LightHubertModel).save_pretrained(folder / "supernet")
    for model in folder.iterdir():
        Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(model)
    return folder


def command(model: Path, data: Path, output: Path, *more: object) -> list[object]:
    """Three steps of each head by default."""
    return [
        TRAINING / "run_superb.py", "--model_name_or_path", model, "--data_dir", data, "--output_dir", output,
        "--variant", "stand_in", "--cpu", "True", *([] if "--max_steps" in more else ["--max_steps", 3]), *more,
    ]  # fmt: skip


def score(model: Path, data: Path, output: Path, *more: object) -> dict[str, dict[str, float]]:
    """Test scores of each task, from a run in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(map(str, command(model, data, output, *more))))
        run_superb.main()
    return scores(output)


def scores(output: Path) -> dict[str, dict[str, float]]:
    results = [json.loads(file.read_text()) for file in sorted(output.glob("*/*/seed-*/result.json"))]
    return {f"{each['model']} {each['task']} {each['seed']}": each["test"] for each in results}


@pytest.mark.parametrize("model", STOCK)
def test_all_tasks_run_for_any_model_with_hidden_states(models, data, tmp_path, model):
    found = score(models / model, data, tmp_path)
    assert {name.split()[1] for name in found} == set(task_names())
    assert all(np.isfinite(value) for each in found.values() for value in each.values())
    assert set(found[f"{model} asr 0"]) == {"wer", "wer_lm"}
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == (
        "| model | PR ↓ | ASR ↓ | ASR, LM ↓ | KS ↑ | QbE ↑ | SID ↑ | ASV ↓ | SD ↓ | IC ↑ | SF F1 ↑ | SF CER ↓ | ER ↑ |"
        " mean |"
    )
    assert len(lines) == 3 and not any(cell.strip() == "" for cell in lines[2].strip("|").split("|"))
    with (tmp_path / "table.csv").open() as table:
        assert [row["model"] for row in csv.DictReader(table)] == [model]
    assert (tmp_path / "table.png").stat().st_size > 1000


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


@pytest.mark.parametrize("task", task_names())
def test_kept_features_score_as_computed_ones_do(models, data, tmp_path, task):
    options = ("--tasks", task)
    computed = score(models / "hubert", data, tmp_path / "computed", *options)
    kept = score(models / "hubert", data, tmp_path / "kept", *options, "--cache_dir", tmp_path / "cache")
    again = score(models / "hubert", data, tmp_path / "again", *options, "--cache_dir", tmp_path / "cache")
    assert computed == kept == again


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 64
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda file: file.write_bytes(file.read_bytes()[:-100]), id="cut short"),
        pytest.param(flip_a_bit, id="a bit flipped"),
        pytest.param(lambda file: file.write_bytes(b""), id="empty"),
        pytest.param(lambda file: file.unlink(), id="gone"),
    ],
)
def test_a_damaged_entry_is_computed_and_written_anew(models, tmp_path, damage: Callable[[Path], None]):
    cache = FeatureCache(Upstream.from_pretrained(str(models / "hubert")), tmp_path)
    recordings = recordings_of(np.random.default_rng(0).standard_normal(8000), tmp_path, cache)
    expected, (file,) = recordings[0], cache.folder.glob("*/*.safetensors")
    damage(file)
    assert cache.read(recordings.keys[0]) is None
    assert torch.equal(recordings[0], expected)
    assert torch.equal(load_file(file)["hidden_states"], expected)


def recordings_of(waveform: np.ndarray, folder: Path, cache: FeatureCache) -> Recordings:
    soundfile.write(folder / "one.wav", 0.1 * waveform, 16_000, subtype="FLOAT")
    audio = [{"bytes": (folder / "one.wav").read_bytes(), "path": None}]
    return Recordings(Dataset.from_dict({"audio": audio}), cache.upstream, cache)


def test_half_precision_takes_half_the_room_and_differs_by_its_rounding(models, tmp_path):
    upstream = Upstream.from_pretrained(str(models / "hubert"))
    single, half = (FeatureCache(upstream, tmp_path, dtype) for dtype in (torch.float32, torch.float16))
    waveform = np.random.default_rng(0).standard_normal(32_000)
    exact, rounded = (recordings_of(waveform, tmp_path, cache)[0] for cache in (single, half))
    torch.testing.assert_close(rounded, exact, rtol=2**-11, atol=1e-6)
    sizes = [next(cache.folder.glob("*/*.safetensors")).stat().st_size for cache in (single, half)]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.02)
    assert single.bytes_for(2.0) == pytest.approx(sizes[0], rel=0.03)


def test_features_that_half_precision_cannot_hold_are_refused(models, tmp_path):
    model = HubertModel.from_pretrained(models / "hubert")
    model.encoder.layers[1].final_layer_norm.bias.data[0] = 1e5
    upstream = Upstream(model, Wav2Vec2FeatureExtractor(), "loud")
    single, half = (FeatureCache(upstream, tmp_path, dtype) for dtype in (torch.float32, torch.float16))
    waveform = np.random.default_rng(0).standard_normal(8000)
    assert recordings_of(waveform, tmp_path, single)[0].max() > 9e4
    with pytest.raises(ValueError, match=r"loud has features of 1e\+05, more than torch.float16 can hold"):
        recordings_of(waveform, tmp_path, half)[0]
    assert not list(half.folder.glob("*/*"))


def test_what_is_kept_depends_on_weights_settings_and_subnet(models):
    keys = [Upstream.from_pretrained(str(models / name)).key for name in ("hubert", "wavlm", "hubert")]
    keys += [Upstream.from_pretrained(str(models / "supernet"), subnet).key for subnet in ("smallest", "largest")]
    assert keys[0] == keys[2]
    assert len(set(keys)) == 4
    model, extractor = HubertModel.from_pretrained(models / "hubert"), Wav2Vec2FeatureExtractor()
    before = Upstream(model, extractor, "hubert").key
    model.encoder.layers[1].final_layer_norm.bias.data[0] += 1
    assert Upstream(model, extractor, "hubert").key != before


def test_features_that_do_not_fit_on_the_disk_are_not_begun(models, data, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**16))
    with pytest.raises(OSError, match="do not fit in the 0.0 GiB that are free"):
        score(models / "hubert", data, tmp_path / "out", "--tasks", "ks", "--cache_dir", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("**/*.safetensors"))


def test_processes_share_a_cache(models, data, tmp_path):
    runs = [
        start(*command(models / "hubert", data, tmp_path / name, "--tasks", "ks", "--cache_dir", tmp_path / "cache"))
        for name in ("one", "other")
    ]
    assert [process.wait(timeout=120) for process in runs] == [0, 0]
    assert scores(tmp_path / "one") == scores(tmp_path / "other")
    assert scores(tmp_path / "one") == score(models / "hubert", data, tmp_path / "alone", "--tasks", "ks")
    assert not [file for file in (tmp_path / "cache").glob("**/*") if file.is_file() and file.suffix != ".safetensors"]


def test_two_processes_train_what_one_does(models, data, tmp_path):
    options = ("--tasks", "ks,asv,qbe", "--cache_dir", tmp_path / "cache")
    run(*command(models / "hubert", data, tmp_path / "two", *options), processes=2)
    one = score(models / "hubert", data, tmp_path / "one", *options)
    two = scores(tmp_path / "two")
    assert two.keys() == one.keys()
    for name, metrics in one.items():
        assert two[name] == pytest.approx(metrics, abs=1e-4)


@pytest.mark.parametrize("task", ["asr", "asv", "er", "sd"])
def test_a_run_that_was_stopped_anywhere_ends_as_one_that_was_not(models, data, tmp_path, monkeypatch, task):
    options = ("--tasks", task, "--max_steps", 8, "--cache_dir", tmp_path / "cache")
    random_too = {"spec_augment": True} if task == "asr" else {"max_seconds": 0.4}
    monkeypatch.setattr(
        run_superb, "read_recipe", lambda *words, **changes: read_recipe(*words, eval_steps=2, **random_too, **changes)
    )
    whole = score(models / "hubert", data, tmp_path / "whole", *options)
    train_step, stops = HeadTraining.train_step, iter([1, 4, 0, 3])

    def stopping(training: HeadTraining, step: int):
        if remaining and not remaining.pop():
            raise KeyboardInterrupt
        return train_step(training, step)

    monkeypatch.setattr(HeadTraining, "train_step", stopping)
    for stop in stops:
        remaining = [False, *[True] * stop]
        with pytest.raises(KeyboardInterrupt):
            score(models / "hubert", data, tmp_path / "stopped", *options)
    remaining = []
    assert score(models / "hubert", data, tmp_path / "stopped", *options) == whole
    files = [sorted((tmp_path / name).glob("*/*/*/result.json"))[0] for name in ("whole", "stopped")]
    assert files[0].read_text() == files[1].read_text()
    assert not list((tmp_path / "stopped").glob(f"**/{STATE_FILE}"))


def test_a_killed_process_leaves_a_state_to_go_on_from(models, data, tmp_path):
    options = ("--tasks", "ks", "--max_steps", 200, "--cache_dir", tmp_path / "cache")
    process = start(*command(models / "hubert", data, tmp_path / "killed", *options))
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob(f"**/{STATE_FILE}")):
        assert process.poll() is None and time.monotonic() < deadline, "no state was written"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not scores(tmp_path / "killed")
    killed = score(models / "hubert", data, tmp_path / "killed", *options)
    assert killed == score(models / "hubert", data, tmp_path / "whole", *options)


def test_a_state_of_another_model_is_not_gone_on_from(models, data, tmp_path, monkeypatch):
    options, train_step = ("--tasks", "ks", "--max_steps", 8), HeadTraining.train_step
    monkeypatch.setattr(
        run_superb, "read_recipe", lambda *words, **changes: read_recipe(*words, eval_steps=2, **changes)
    )

    def stopping(training: HeadTraining, step: int):
        if step == 6:
            raise KeyboardInterrupt
        return train_step(training, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HeadTraining, "train_step", stopping)
        score(models / "hubert", data, tmp_path / "stopped", *options)
    assert list((tmp_path / "stopped").glob(f"**/{STATE_FILE}"))
    namesake = shutil.copytree(models / "wavlm", tmp_path / "models/hubert")
    results = []
    for name in ("stopped", "fresh"):
        score(namesake, data, tmp_path / name, *options)
        results += [file.read_text() for file in (tmp_path / name).glob("*/*/*/result.json")]
    assert results[0] == results[1]


def test_what_is_done_is_not_done_again_and_another_setting_is_refused(models, data, tmp_path, monkeypatch):
    halved = ("--features_dtype", "float16", "--cache_dir", tmp_path / "cache")
    first = score(models / "hubert", data, tmp_path, "--tasks", "ks", "--seeds", 0, 1)
    assert len(first) == 2
    with monkeypatch.context() as patch:
        patch.setattr(HeadTraining, "run", lambda training: pytest.fail("it was trained again"))
        assert score(models / "hubert", data, tmp_path, "--tasks", "ks", "--seeds", 0, 1) == first
    with pytest.raises(ValueError, match="was made with another features_dtype"):
        score(models / "hubert", data, tmp_path, "--tasks", "ks", *halved)
    shutil.copytree(data / "ks", tmp_path / "other-data/ks")
    with pytest.raises(ValueError, match="was made with another data_dir"):
        score(models / "hubert", tmp_path / "other-data", tmp_path, "--tasks", "ks")
    with pytest.raises(ValueError, match="was made with another recipe"):
        score(models / "hubert", data, tmp_path, "--tasks", "ks", "--max_steps", 4)
    shutil.copytree(models / "wavlm", tmp_path / "models/hubert")
    with pytest.raises(ValueError, match="was made with another features"):
        score(tmp_path / "models/hubert", data, tmp_path, "--tasks", "ks")


def test_a_sweep_keeps_the_rate_that_is_best_on_the_dev_part(models, data, tmp_path):
    shared = ("--tasks", "sid", "--max_steps", 30, "--cache_dir", tmp_path / "cache")
    score(models / "hubert", data, tmp_path, *shared, "--sweep", "1e-9", "1e-2")
    (result,) = (json.loads(file.read_text()) for file in tmp_path.glob("*/*/*/result.json"))
    single = {}
    for rate in (1e-9, 1e-2):
        output = tmp_path / f"{rate:g}"
        score(models / "hubert", data, output, *shared, "--learning_rate", rate)
        (alone,) = (json.loads(file.read_text()) for file in output.glob("*/*/*/result.json"))
        single[rate] = alone["folds"][0]
    best = max(single, key=lambda rate: single[rate]["dev"]["accuracy"])
    assert result["folds"][0] == single[best]


def test_recordings_are_cut_alike_whatever_process_they_fall_to(models, data, tmp_path):
    upstream = Upstream.from_pretrained(str(models / "hubert"))
    (task,) = TASKS["sd"].load_folds(read_recipe("sd", "stand_in", max_seconds=0.4), data)
    recordings = {name: Recordings(part.audio, upstream) for name, part in task.parts.items()}
    training = HeadTraining(task, recordings, upstream, tmp_path, Accelerator(cpu=True), {"seed": 0})
    whole = recordings["train"][3]
    clips = [training.clip(3, random.Random(seed)) for seed in ("0-0-3", "0-0-3", "0-1-3")]
    firsts = [row["first_frame"] for _, row in clips]
    assert firsts[0] == firsts[1] != firsts[2]
    for states, row in clips:
        assert states.shape[1] == 20
        assert torch.equal(states, whole[:, row["first_frame"] : row["first_frame"] + 20])


@pytest.fixture
def two_speakers(models, data):
    """Diarisation, ready to say who speaks in frames of 20 ms."""
    (task,) = TASKS["sd"].load_folds(read_recipe("sd", "stand_in"), data)
    task.build_head(Upstream.from_pretrained(str(models / "hubert")))
    return task


SEGMENTS = [{"speaker": "b", "start": 0.1, "end": 0.2}, {"speaker": "a", "start": 0.16, "end": 0.26}]


def test_who_speaks_in_a_frame_is_told_from_where_the_clip_begins(two_speakers):
    speaking = torch.zeros(15, 2)
    speaking[8:13, 0] = speaking[5:10, 1] = 1.0
    assert torch.equal(two_speakers.targets({"segments": SEGMENTS}, 15), speaking)
    for first in (3, 6, 11):
        row = {"segments": SEGMENTS, "first_frame": first}
        assert torch.equal(two_speakers.targets(row, 4), speaking[first : first + 4])


def test_speakers_may_be_found_in_any_order_but_in_one(two_speakers):
    logits = 20 * (two_speakers.targets({"segments": SEGMENTS}, 15) - 0.5)[None]
    lengths, rows = torch.tensor([15]), [{"segments": SEGMENTS}]
    loss = two_speakers.loss(None, logits, lengths, rows)
    assert loss < 1e-3
    torch.testing.assert_close(two_speakers.loss(None, logits.flip(2), lengths, rows), loss)
    changing = torch.cat([logits[:, :8], logits[:, 8:].flip(2)], dim=1)
    assert two_speakers.loss(None, changing, lengths, rows) > 1


def test_every_fold_is_tested_once_by_a_head_that_never_heard_it(data):
    folds = TASKS["er"].load_folds(read_recipe("er", "stand_in"), data)
    tested = [{row["fold"] for row in fold.parts["test"].rows} for fold in folds]
    assert tested == [{1}, {2}, {3}, {4}, {5}]
    for fold, of_test in zip(folds, tested, strict=True):
        assert {part.name for part in fold.parts.values()} == {"train", "dev", "test"}
        assert not of_test & {row["fold"] for name in ("train", "dev") for row in fold.parts[name].rows}
        assert sum(map(len, fold.parts.values())) == 24


def test_what_the_hub_has_is_taken_where_no_part_lies(data, tmp_path):
    shutil.copytree(data / "pr", tmp_path / "hub")
    (tmp_path / "data/pr").mkdir(parents=True)
    shutil.move(tmp_path / "hub/lexicon.txt", tmp_path / "data/pr")
    hub = {
        "dataset": str(tmp_path / "hub"),
        "config": "default",
        "train": "train",
        "dev": "validation",
        "test": "test",
    }
    (task,) = TASKS["pr"].load_folds(read_recipe("pr", "stand_in", hub=hub), tmp_path / "data")
    assert {name: len(part) for name, part in task.parts.items()} == {"train": 24, "dev": 12, "test": 12}
    shutil.copy(data / "pr/train.parquet", tmp_path / "data/pr")
    with pytest.raises(ValueError, match="there is no .*dev.parquet"):
        TASKS["pr"].load_folds(read_recipe("pr", "stand_in", hub=hub), tmp_path / "data")


# Bad input


def emptied(folder: Path) -> str:
    shutil.rmtree(folder)
    return "there is no .*train.parquet or .*train.csv. Get VoxCeleb1"


def relabelled(folder: Path) -> str:
    rows = load_dataset("parquet", data_files=str(folder / "test.parquet"), split="train")
    rows = rows.cast_column("audio", Audio(decode=False))
    rows = rows.map(lambda row, number: {"speaker": "nobody" if number == 2 else row["speaker"]}, with_indices=True)
    rows.to_parquet(folder / "test.parquet")
    return "recording 2 of the test part has the speaker 'nobody', which no training recording has"


def shortened(folder: Path) -> str:
    rows = load_dataset("parquet", data_files=str(folder / "dev.parquet"), split="train")
    rows = rows.cast_column("audio", Audio(decode=False)).to_list()
    soundfile.write(folder / "short.wav", np.zeros(300, dtype=np.float32), 16_000)
    lines = []
    for number, row in enumerate(rows):
        name = f"{number}.flac"
        (folder / name).write_bytes(row["audio"]["bytes"])
        lines.append({"audio": "short.wav" if number == 1 else name, "speaker": row["speaker"]})
    (folder / "dev.parquet").unlink()
    (folder / "dev.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return r"short.wav \(0.019 s\) gives no features: .*[Mm]end it"


def misnamed(folder: Path) -> str:
    file = folder / "test_trials.csv"
    file.write_text(file.read_text() + "test-0,test-99,0\n")
    return "test_trials.csv names test-99, which the test part lacks"


def without_trials(folder: Path) -> str:
    (folder / "dev_trials.csv").unlink()
    return "there is no .*dev_trials.csv. Get VoxCeleb1"


def without_column(folder: Path) -> str:
    (folder / "test_trials.csv").write_text("enrolment,trial\ntest-0,test-1\n")
    return "lacks same"


def without_lexicon(folder: Path) -> str:
    (folder / "lexicon.txt").unlink()
    return "there is no .*lexicon.txt. Get LibriSpeech"


def without_word(folder: Path) -> str:
    file = folder / "lexicon.txt"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("seven")))
    return "the word 'seven' is not in lexicon.txt"


def of_unknown_query(folder: Path) -> str:
    file = folder / "dev_pairs.csv"
    file.write_text(file.read_text() + "eleven-0,document-0\n")
    return "dev_pairs.csv names eleven-0, which is no query"


@pytest.mark.parametrize(
    ("task", "spoil"),
    [
        ("sid", emptied),
        ("sid", relabelled),
        ("sid", shortened),
        ("asv", misnamed),
        ("asv", without_trials),
        ("asv", without_column),
        ("pr", without_lexicon),
        ("pr", without_word),
        ("qbe", of_unknown_query),
    ],
)
def test_bad_data_end_with_their_reason(models, data, tmp_path, task, spoil):
    shutil.copytree(data / task, tmp_path / "data" / task)
    message = spoil(tmp_path / "data" / task)
    with pytest.raises(ValueError, match=message):
        score(models / "hubert", tmp_path / "data", tmp_path / "out", "--tasks", task)


class Silent(HubertModel):
    """A model that gives no hidden states."""

    def forward(self, *inputs, **options):
        outputs = super().forward(*inputs, **options)
        outputs.hidden_states = None
        return outputs


def test_a_model_without_hidden_states_is_refused():
    model = Silent(HubertConfig(**SETTINGS))
    with pytest.raises(ValueError, match="gives no hidden states"):
        Upstream(model, Wav2Vec2FeatureExtractor(), "silent")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--tasks", "sing"],
            "there is no task 'sing': choose from asr, asv, er, ic, ks, pr, qbe, sd, sf, sid, or all",
        ),
        (["--tasks", "ks", "--subnets", "smallest"], "is no supernet to choose one from"),
        (["--features_dtype", "float16"], "is of features that are kept: give --cache_dir"),
        (["--variant", "huge"], "no task has a variant 'huge': choose from lighthubert_base"),
    ],
)
def test_bad_options_end_with_their_reason(models, data, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        score(models / "hubert", data, tmp_path, *options)


# The table


def test_the_variants_are_the_rates_of_the_authors():
    rates = {
        (task, variant): read_recipe(task, f"lighthubert_{variant}").learning_rate
        for task in task_names()
        for variant in ("base", "small", "stage1")
    }
    expected = dict.fromkeys(("asr", "er", "ic", "ks", "qbe", "sf"), 1e-4) | {"asv": 5e-5, "pr": 5e-4, "sd": 5e-4}
    for (task, variant), rate in rates.items():
        if task == "sid":
            assert rate == {"base": 5e-2, "small": 5e-3, "stage1": 1e-2}[variant]
        else:
            assert rate == expected[task]


def test_the_mean_counts_errors_as_what_they_leave_of_100_and_slot_filling_once():
    known = json.loads(PUBLISHED.read_text())
    hubert = {title: [value] for title, value in known["models"]["HuBERT Base"].items()}
    # by hand, from the row of HuBERT Base
    parts = [100 - 5.41, 100 - 6.42, 96.30, 7.36, 81.42, 100 - 5.11, 100 - 5.88, 98.34, 64.92]
    assert overall(hubert) == pytest.approx((sum(parts) + (88.53 + 100 - 25.20) / 2) / 10)
    assert overall({title: hubert[title] for title in SCORED[:-1]}) is None


def test_the_superb_score_is_0_for_the_lowest_and_1000_for_the_highest():
    known = json.loads(PUBLISHED.read_text())
    lowest, highest = known["lowest"], known["highest"]
    for row, expected in ((lowest, 0.0), (highest, 1000.0)):
        assert superb_score({title: [value] for title, value in row.items()}, lowest, highest) == pytest.approx(
            expected
        )


def test_published_rows_stand_beside_what_was_measured_on_superbs_own_data(models, data, tmp_path):
    score(models / "hubert", data, tmp_path, "--tasks", "ks")
    assert "published" not in (tmp_path / "table.md").read_text()
    result = next(tmp_path.glob("*/*/*/result.json"))
    result.write_text(json.dumps(json.loads(result.read_text()) | {"variant": None}))
    table = run_superb.write_report(tmp_path, None, published=True)
    assert "| LightHuBERT a_small (published) | 6.60 | 8.33 |" in table
    assert table.splitlines()[-1].startswith("| hubert |")


def test_s3prl_would_sum_the_same_hidden_states(models):
    """Its `hubert_local` and ours give the input of the first layer, and the output of each layer."""
    upstream = Upstream.from_pretrained(str(models / "hubert"))
    waveform = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    inputs = upstream.feature_extractor(waveform, sampling_rate=16_000, return_tensors="pt")
    outputs = AutoModel.from_pretrained(models / "hubert").eval()(**inputs, output_hidden_states=True)
    torch.testing.assert_close(upstream(waveform), torch.cat(outputs.hidden_states).detach(), rtol=1e-5, atol=1e-5)
