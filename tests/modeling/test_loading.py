"""Claims about the one way to load a model: any checkpoint, a subnet, a head, a device, a dtype."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from conftest import TWO_DEEP, answer, noise, tiny_model
from recognizers import TOKENS, save_processor
from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer, HubertModel

from modeling_lighthubert import (
    LightHubertForCTC,
    LightHubertForPreTraining,
    LightHubertModel,
    SearchSpace,
    loading,
)
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.export import to_hubert
from modeling_lighthubert.loading import (
    is_supernet,
    load_config,
    load_cut_lighthubert,
    load_cut_model,
    load_model,
    load_processor,
    parse_device,
    parse_search_space,
    parse_subnet,
)


SUBNET = TWO_DEEP.sample(3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of all kinds: a fine-tuned supernet, a distilled one, a cut model, a stock HuBERT."""
    root = tmp_path_factory.mktemp("loading")
    ctc = tiny_model(LightHubertForCTC)
    ctc.save_pretrained(root / "ctc")
    tiny_model(LightHubertForPreTraining).save_pretrained(root / "distilled")
    cut = ctc.extract_subnet("smallest")
    cut.save_pretrained(root / "cut")
    to_hubert(cut).save_pretrained(root / "stock")
    ctc.bfloat16().save_pretrained(root / "bfloat16")
    SUBNET.to_json_file(root / "subnet.json")
    (root / "broken.json").write_text("{")
    (root / "empty").mkdir()
    return root


@pytest.fixture
def logged(caplog):
    """What transformers logs."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


# Subnets


@pytest.mark.parametrize(
    "give",
    [
        lambda root: root / "subnet.json",
        lambda root: str(root / "subnet.json"),
        lambda root: SUBNET,
        lambda root: SUBNET.to_dict(),
    ],
    ids=["path", "text", "value", "dict"],
)
def test_a_subnet_is_given_by_file_value_or_dict(folders, give):
    assert load_model(folders / "ctc", give(folders)).subnet == SUBNET
    cut = load_cut_model(folders / "ctc", give(folders))
    assert (cut.subnet, cut.search_space) == (SUBNET, None)


@pytest.mark.parametrize("name", ["largest", "middle", "smallest"])
def test_a_subnet_is_given_by_name(folders, name):
    assert load_model(folders / "ctc", name).subnet == TWO_DEEP.named[name]


def test_by_default_a_checkpoint_selects_its_own_subnet(folders, tmp_path):
    model = load_model(folders / "ctc", "smallest")
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).subnet == TWO_DEEP.smallest


@pytest.mark.parametrize("name", ["cut", "stock"])
def test_one_model_has_no_subnets(folders, name):
    with pytest.raises(UserError, match="^subnet largest: .* is one model, no supernet to choose one from$"):
        load_model(folders / name, "largest")


@pytest.mark.parametrize(
    ("subnet", "message"),
    [
        ("huge", "'huge' is not known in this search space: choose from"),
        ({"hidden_size": 16}, "Subnet needs"),
        (SearchSpace.base().largest, "is not in this search space"),
        ("nowhere.json", "subnet nowhere.json: .*No such file"),
    ],
    ids=["name", "dict", "value", "file"],
)
def test_a_subnet_that_is_not_there_is_refused(folders, subnet, message):
    with pytest.raises(UserError, match=message):
        load_model(folders / "ctc", subnet)


def test_a_broken_file_of_a_subnet_or_a_space_is_named(folders):
    for parse in (parse_subnet, parse_search_space):
        with pytest.raises(UserError, match=r"(subnet|search space) .*broken\.json: "):
            parse(folders / "broken.json")


def test_a_search_space_is_given_by_name_or_file(tmp_path):
    TWO_DEEP.to_json_file(tmp_path / "space.json")
    assert parse_search_space(None) is None
    assert parse_search_space("small") == SearchSpace.small()
    assert parse_search_space(str(tmp_path / "space.json")) == parse_search_space(TWO_DEEP) == TWO_DEEP
    with pytest.raises(UserError, match="search space huge: .*'huge' is not known: choose from"):
        parse_search_space("huge")


# Classes


@pytest.mark.parametrize(
    ("name", "expected"),
    [("ctc", LightHubertForCTC), ("cut", LightHubertForCTC), ("distilled", LightHubertModel), ("stock", HubertModel)],
)
def test_a_checkpoint_of_ours_is_loaded_with_its_head_but_for_those_of_distillation(folders, name, expected):
    model = load_model(folders / name)
    assert type(model) is expected
    assert not model.training


def test_heads_that_are_left_out_on_purpose_are_not_reported(folders, logged):
    _, report = load_model(folders / "distilled", output_loading_info=True)
    assert not any(report.values()), report
    assert not logged.records


def test_a_head_that_is_missing_is_reported(folders, logged):
    load_model(folders / "distilled", head=LightHubertForCTC)
    assert "lm_head.weight" in logged.text


@pytest.mark.parametrize("name", ["ctc", "stock"])
def test_a_head_can_be_asked_for(folders, name):
    model = load_model(folders / name, head=AutoModelForCTC)
    assert answer(model, noise(1, 4000)).shape[-1] == model.config.vocab_size


@pytest.mark.parametrize("load", [load_model, load_cut_model])
def test_the_report_comes_with_the_model(folders, load):
    model, report = load(folders / "ctc", "smallest", output_loading_info=True)
    assert model.subnet == TWO_DEEP.smallest
    assert "missing_keys" in report


def test_options_reach_from_pretrained(folders):
    space = SearchSpace((24, 48), (4, 12), (2, 4), (1, 2), head_dim=4)
    assert load_model(folders / "ctc", search_space=space).search_space == space


def test_a_supernet_is_told_from_one_model_by_model_or_configuration(folders):
    for name, expected in (("ctc", True), ("distilled", True), ("cut", False), ("stock", False)):
        assert is_supernet(load_config(folders / name)) is expected
        assert is_supernet(load_model(folders / name)) is expected


# Cut models


@pytest.mark.parametrize("load", [load_cut_model, load_cut_lighthubert])
def test_a_supernet_is_cut(folders, load):
    selected, cut = load_model(folders / "ctc", SUBNET), load(folders / "ctc", SUBNET)
    assert type(cut) is LightHubertForCTC
    assert not [name for name, module in cut.named_modules() if "elastic" in type(module).__module__]
    assert torch.equal(answer(cut, noise(1, 4000)), answer(selected.extract_subnet(), noise(1, 4000)))


@pytest.mark.parametrize("name", ["cut", "stock"])
def test_one_model_is_not_cut(folders, name):
    one, other = load_model(folders / name), load_cut_model(folders / name)
    assert type(one) is type(other)
    assert torch.equal(answer(one, noise(1, 4000)), answer(other, noise(1, 4000)))


def test_a_model_of_others_is_refused_where_it_has_to_be_one_of_ours(folders):
    with pytest.raises(UserError, match="stock is a HubertForCTC: give a LightHuBERT"):
        load_cut_lighthubert(folders / "stock")


# Dtype and device


def test_the_dtype_is_that_of_the_checkpoint_unless_another_is_asked_for(folders):
    assert load_model(folders / "ctc").dtype is torch.float32
    assert load_model(folders / "bfloat16").dtype is torch.bfloat16
    assert load_cut_model(folders / "bfloat16", "smallest").dtype is torch.bfloat16
    for dtype in ("float32", torch.float32):
        model = load_model(folders / "bfloat16", dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_model_is_put_on_a_device(folders):
    assert load_model(folders / "ctc", device="meta").device.type == "meta"
    assert load_cut_model(folders / "ctc", "smallest", device=torch.device("cpu")).device.type == "cpu"


def test_a_device_that_this_machine_lacks_is_refused(folders):
    lacking = ["gpu", "cuda:99", *([] if torch.cuda.is_available() else ["cuda"])]
    for device in lacking:
        with pytest.raises(UserError, match=f"device {device} cannot be used: "):
            parse_device(device)
        with pytest.raises(UserError, match=f"device {device} cannot be used: "):
            load_model(folders / "ctc", device=device)


# What cannot be loaded


def test_a_path_that_does_not_exist_is_called_so_and_the_hub_is_not_asked(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "cached_file", pytest.fail)
    for path in (
        tmp_path / "nowhere",
        "../nowhere",
        "a/b/nowhere",
        "nowhere",
        "./nowhere",
        "runs/nowhere",
        "nowhere/",
    ):
        with pytest.raises(
            UserError, match=r"nowhere does not exist: give the folder of a checkpoint, or its name on"
        ):
            load_model(path)


def test_a_folder_without_a_checkpoint_is_refused(folders):
    with pytest.raises(UserError, match="empty cannot be loaded: it has no config.json"):
        load_model(folders / "empty")


def test_a_file_in_place_of_its_folder_is_refused(folders):
    for file in ("config.json", "model.safetensors"):
        with pytest.raises(UserError, match=f"{file} is a file: give the folder of a checkpoint, such as .*ctc$"):
            load_model(folders / "ctc" / file)


def test_an_onnx_file_and_its_folder_are_told_from_a_checkpoint(folders, tmp_path):
    folder = copy(folders / "ctc", tmp_path / "exported")
    (folder / "model.safetensors").rename(folder / "model.onnx")
    with pytest.raises(UserError, match="exported cannot be loaded: it has no weights but those of .*model.onnx"):
        load_model(folder)
    with pytest.raises(UserError, match="model.onnx is an ONNX file, which only transcription runs: give the folder"):
        load_model(folder / "model.onnx")


# Processors


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vocab.json", None, "there is no vocab.json in it$"),
        ("tokenizer_config.json", None, "there is no tokenizer_config.json in it$"),
        ("processor_config.json", None, "there is no preprocessor_config.json in it$"),
        ("vocab.json", b"", "Expecting value"),
        ("vocab.json", b"[]", "AttributeError: "),
        ("tokenizer_config.json", b"{", "Expecting property"),
        ("tokenizer_config.json", b'{"tokenizer_class": 5}', "AttributeError: "),
        ("processor_config.json", b'{"feature_extractor": 5}', "AttributeError: "),
    ],
)
def test_a_processor_that_cannot_be_read_is_refused(tmp_path, file, content, message):
    save_processor(tmp_path)
    load_processor(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=f"has no tokenizer and feature extractor that can be read: {message}"):
        load_processor(tmp_path)


def test_a_part_of_a_processor_can_be_asked_for(tmp_path):
    save_processor(tmp_path)
    assert load_processor(tmp_path, AutoFeatureExtractor).sampling_rate == 16_000
    assert len(load_processor(tmp_path, AutoTokenizer)) == len(TOKENS)
    with pytest.raises(UserError, match="nowhere does not exist"):
        load_processor("nowhere", AutoTokenizer)


def copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"", "config.json is no JSON: "),
        ("config.json", b"\xff", "config.json is no JSON: "),
        ("config.json", b'{"a": ' * 200_000, "cannot be loaded: RecursionError"),
        ("config.json", b"[]", "config.json has to be a JSON object, not "),
        ("config.json", b"null", "config.json has to be a JSON object, not None"),
        ("config.json", b'{"model_type": "nothing"}', "cannot be loaded: .*nothing"),
        ("model.safetensors", b"", "cannot be loaded: .*header"),
        ("model.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{", "cannot be loaded: .*header"),
        ("model.safetensors", (2**62).to_bytes(8, "little"), "cannot be loaded: .*header"),
    ],
)
def test_a_damaged_checkpoint_is_refused(folders, tmp_path, file, content, message):
    folder = copy(folders / "ctc", tmp_path / "damaged")
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=f"(?s)damaged.*{message}"):
        load_model(folder)


def test_weights_that_were_cut_off_are_refused(folders, tmp_path):
    folder = copy(folders / "ctc", tmp_path / "damaged")
    os.truncate(folder / "model.safetensors", 20_000)
    with pytest.raises(UserError, match="damaged cannot be loaded: .*incomplete"):
        load_model(folder)


def with_setting(folder: Path, target: Path, name: str, value: object) -> Path:
    """A copy of a checkpoint with another value in its configuration."""
    copy(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {name: value}))
    return target


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", "48"),
        ("hidden_size", -1),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 1e9),
        ("num_prediction_heads", 10**7),
        ("num_labels", 10**9),
        ("vocab_size", 3 * 10**8),
        ("conv_dim", [10**9] * 7),
        ("conv_dim", ["a"] * 7),
        ("conv_stride", [0] * 7),
        ("num_conv_pos_embedding_groups", 0),
        ("head_dim", True),
    ],
)
def test_a_size_that_no_model_has_is_refused_before_anything_is_made(folders, tmp_path, name, value, monkeypatch):
    folder = with_setting(folders / "ctc", tmp_path / "sizes", name, value)
    monkeypatch.setattr(AutoConfig, "from_pretrained", pytest.fail)
    with pytest.raises(UserError, match=f"sizes cannot be loaded: {name} in config.json has to be whole, from "):
        load_model(folder)


def test_layers_that_the_weights_lack_are_not_made_up(folders, tmp_path, monkeypatch):
    folder = with_setting(folders / "cut", tmp_path / "deep", "num_hidden_layers", 900)
    folder = with_setting(folder, tmp_path / "deeper", "subnet", None)
    monkeypatch.setattr(LightHubertForCTC, "from_pretrained", pytest.fail)
    with pytest.raises(UserError, match="config.json names 900 layers, but model.safetensors has 1$"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_act", "nothing"),
        ("architectures", 5),
        ("auto_map", 5),
        ("dtype", "banana"),
        ("id2label", 5),
        ("model_type", []),
        ("model_type", None),
        ("quantization_config", 5),
        ("search_space", 5),
        ("subnet", [16]),
    ],
)
def test_a_setting_of_another_type_is_refused_in_one_line(folders, tmp_path, name, value):
    """Also where transformers fails in its own code; and it does not ask on the terminal whether to run other code."""
    folder = with_setting(folders / "ctc", tmp_path / "types", name, value)
    with pytest.raises(UserError, match="types cannot be loaded: "):
        load_model(folder)


def test_a_configuration_that_contradicts_itself_is_refused(folders, tmp_path):
    folder = copy(folders / "ctc", tmp_path / "contradiction")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 24, "intermediate_size": 96}))
    with pytest.raises(UserError, match="contradiction cannot be loaded: search space hidden_size goes up to 48"):
        load_model(folder)


def test_a_name_that_the_hub_does_not_know_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="nobody/nothing cannot be loaded: "):
        load_model("nobody/nothing")
