"""Claims about the conversion of the authors' checkpoints: what it keeps, what it writes, what it refuses."""

import json
import logging
import os
import pickle
from contextlib import suppress

import pytest
import torch
from conftest import GOLDEN, answer, assert_close, noise
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForPreTraining

from modeling_lighthubert import LightHubertForPreTraining, SearchSpace
from modeling_lighthubert import convert_lighthubert_original_checkpoint_to_pytorch as conversion
from modeling_lighthubert.convert_lighthubert_original_checkpoint_to_pytorch import convert, main, parse_conv_layers
from modeling_lighthubert.errors import UserError


CHECKPOINT = GOLDEN / "checkpoint.pt"
SPACE = SearchSpace.from_dict(json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))["search_space"])
NARROW = SearchSpace((64, 96), (1, 2), (3, 3.5, 4), (10, 11, 12))


@pytest.fixture
def original():
    """The authors' checkpoint, to be changed."""
    return torch.load(CHECKPOINT, weights_only=True)


@pytest.fixture
def written(tmp_path):
    """Writes a checkpoint (anything torch can save), returns its path."""

    def write(checkpoint):
        torch.save(checkpoint, tmp_path / "written.pt")
        return str(tmp_path / "written.pt")

    return write


@pytest.fixture
def command(tmp_path):
    """Runs the command on a checkpoint with the golden search space. The folder it writes is `tmp_path / "out"`."""
    SPACE.to_json_file(tmp_path / "space.json")

    def run(checkpoint_path=CHECKPOINT, *more, space=tmp_path / "space.json", folder=tmp_path / "out"):
        arguments = ["--checkpoint_path", str(checkpoint_path), "--pytorch_dump_folder_path", str(folder)]
        main([*arguments, *(["--search_space", str(space)] if space else []), *more])
        return folder

    return run


def assert_refused(command, tmp_path, message, *arguments, **options):
    """The command fails with `message`, and leaves no folder, not even half of one."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as refused:
        command(*arguments, **options)
    assert message in str(refused.value)
    assert sorted(tmp_path.iterdir()) == before


# What is kept


def test_every_weight_that_has_a_use_is_kept_in_full_precision(original):
    model = convert(str(CHECKPOINT), SPACE)
    theirs = original["model"]
    unused = {name for name in theirs if name.startswith(("label_embs_concat", "final_proj."))}
    assert len(model.state_dict()) == len(theirs) - len(unused)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    for ours, name in {
        "hubert.masked_spec_embed": "mask_emb",
        "prediction_heads.0.weight": "layer_pred_heads.11.weight",
        "hubert.encoder.layers.7.feed_forward.output_dense.weight": "encoder.layers.7.fc2.weight",
        "hubert.encoder.layers.3.attention.out_proj.bias": "encoder.layers.3.self_attn.out_proj.bias",
        "hubert.encoder.pos_conv_embed.conv.parametrizations.weight.original0": "encoder.pos_conv.0.weight_g",
        "hubert.feature_extractor.conv_layers.6.layer_norm.weight": "feature_extractor.conv_layers.6.2.1.weight",
    }.items():
        assert torch.equal(model.state_dict()[ours], theirs[name].float()), ours


def test_what_is_dropped_is_named(caplog):
    logger = logging.getLogger("modeling_lighthubert.convert")
    logger.addHandler(caplog.handler)
    try:
        convert(str(CHECKPOINT), SPACE)
    finally:
        logger.removeHandler(caplog.handler)
    assert "label_embs_concat" in caplog.text
    assert "final_proj.weight" in caplog.text


@pytest.mark.parametrize("name", ["small", "base"])
def test_the_search_space_is_read_off_the_checkpoint(name):
    settings = {"_name": "hubert_pruner", "pruner_supernet": f"/home/somebody/{name}.yaml"}
    assert conversion.find_search_space(settings) == SearchSpace.preset(name)


def test_a_stage_one_checkpoint_is_one_model(original, written):
    original["cfg"]["model"]["_name"] = "student_hubert"
    model = convert(written(original))
    assert model.search_space is None
    assert model.subnet == SPACE.largest
    assert torch.equal(answer(model, noise(1, 4000)), answer(convert(str(CHECKPOINT), SPACE), noise(1, 4000)))


def test_a_stage_one_checkpoint_becomes_a_supernet_where_a_search_space_is_given(original, written):
    original["cfg"]["model"]["_name"] = "student_hubert"
    assert convert(written(original), SPACE).search_space == SPACE


def test_a_checkpoint_without_a_prediction_head_is_converted(original, written):
    del original["model"]["layer_pred_heads.11.weight"]
    assert len(convert(written(original), SPACE).prediction_heads) == 0


def test_a_group_norm_checkpoint_is_read(original, written):
    settings, weights = original["cfg"]["model"], original["model"]
    settings["extractor_mode"] = "default"
    for name in [name for name in weights if ".2.1." in name]:
        tensor = weights.pop(name)
        if ".conv_layers.0." in name:
            weights[name.replace(".2.1.", ".2.")] = tensor
    assert convert(written(original), SPACE).config.feat_extract_norm == "group"


# What is written


def test_the_command_writes_a_folder_that_the_auto_classes_load(command, capsys):
    folder = command()
    assert "parameters" in capsys.readouterr().out
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    assert names >= {
        f"{name}.py" for name in ("configuration_lighthubert", "modeling_lighthubert", "elastic", "search_space")
    }
    model = AutoModelForPreTraining.from_pretrained(folder)
    assert type(model) is LightHubertForPreTraining
    assert torch.equal(answer(model, noise(1, 4000)), answer(convert(str(CHECKPOINT), SPACE), noise(1, 4000)))
    assert AutoModel.from_pretrained(folder, subnet="smallest").search_space == SPACE


def test_the_feature_extractor_normalises_and_gives_the_mask(command):
    extractor = AutoFeatureExtractor.from_pretrained(command())
    assert extractor.do_normalize
    assert extractor.return_attention_mask
    assert extractor.sampling_rate == 16000
    batch = extractor(
        [[3.0] * 800 + [5.0] * 800, [1.0, 2.0] * 400], sampling_rate=16000, padding=True, return_tensors="pt"
    )
    torch.testing.assert_close(batch.input_values[0].mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    assert batch.attention_mask.sum(1).tolist() == [1600, 800]


def test_the_card_says_what_the_folder_holds(command):
    card = (command() / "README.md").read_text(encoding="utf-8")
    assert "7,800,136,704 subnets" in card
    assert "checkpoint.pt" in card
    assert str(GOLDEN) not in card


def test_a_trimmed_folder_is_smaller_and_answers_alike(command, tmp_path):
    NARROW.to_json_file(tmp_path / "narrow.json")
    whole = command(CHECKPOINT, space=tmp_path / "narrow.json", folder=tmp_path / "whole")
    trimmed = command(CHECKPOINT, "--trim", space=tmp_path / "narrow.json", folder=tmp_path / "trimmed")
    assert (trimmed / "model.safetensors").stat().st_size < 0.7 * (whole / "model.safetensors").stat().st_size
    one, other = AutoModelForPreTraining.from_pretrained(whole), AutoModelForPreTraining.from_pretrained(trimmed)
    for subnet in ("smallest", "largest", NARROW.sample(0)):
        one.set_subnet(subnet)
        other.set_subnet(subnet)
        assert_close(answer(other, noise(1, 4000)), answer(one, noise(1, 4000)))


def test_an_empty_folder_is_filled(command, tmp_path):
    (tmp_path / "empty").mkdir()
    assert (command(folder=tmp_path / "empty") / "config.json").is_file()


# The Hub


def test_a_checkpoint_is_fetched_from_the_hub(command, monkeypatch):
    asked = []
    monkeypatch.setattr(conversion, "hf_hub_download", lambda *where: asked.append(where) or str(CHECKPOINT))
    assert (command("mechanicalsea/lighthubert/lighthubert_small.pt") / "config.json").is_file()
    assert asked == [("mechanicalsea/lighthubert", "lighthubert_small.pt")]


def test_a_hub_that_cannot_be_reached_is_a_clear_error(command, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert_refused(command, tmp_path, "somebody/nowhere/file.pt cannot be downloaded: ", "somebody/nowhere/file.pt")


def test_the_folder_is_pushed(command, monkeypatch):
    pushed = {}

    class Api:
        def create_repo(self, repo_id, **kwargs):
            pushed["created"] = repo_id
            return type("Repo", (), {"repo_id": repo_id})()

        def upload_folder(self, *, repo_id, folder_path, **kwargs):
            pushed["uploaded"] = (repo_id, sorted(os.listdir(folder_path)))

    monkeypatch.setattr(conversion, "HfApi", Api)
    folder = command(CHECKPOINT, "--push_to_hub", "me/mine")
    assert pushed == {"created": "me/mine", "uploaded": ("me/mine", sorted(os.listdir(folder)))}
    assert "me/mine" in (folder / "README.md").read_text(encoding="utf-8")


def test_a_hub_that_fails_leaves_the_folder_and_no_success(command, monkeypatch, tmp_path):
    def fail():
        raise OSError("503 Service Unavailable")

    monkeypatch.setattr(conversion, "HfApi", fail)
    with pytest.raises(ConnectionError, match="out is whole, but is not pushed to me/mine: 503"):
        command(CHECKPOINT, "--push_to_hub", "me/mine")
    assert (tmp_path / "out" / "model.safetensors").is_file()


# Bad input


def test_a_missing_file_is_refused(command, tmp_path):
    assert_refused(command, tmp_path, "nothing.pt is no file", tmp_path / "nothing.pt")


class Payload:
    """Unpickled by a careless reader, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("place", ["weights", "settings", "alone", "plain pickle"])
def test_a_pickle_payload_is_refused_and_not_run(place, command, original, tmp_path):
    payload, path = Payload(tmp_path / "attacked"), tmp_path / "hostile.pt"
    if place == "weights":
        original["model"]["mask_emb"] = payload
    elif place == "settings":
        original["cfg"]["model"]["_name"] = payload
    if place == "plain pickle":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload if place == "alone" else original, path)
    assert_refused(command, tmp_path, "holds code beside weights, which is never run", path)
    assert not (tmp_path / "attacked").exists()
    with suppress(RuntimeError):  # a careless reader runs it, whatever else it thinks of the file
        torch.load(path, weights_only=False)
    assert (tmp_path / "attacked").exists()


@pytest.mark.parametrize("kept", [0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(kept, command, tmp_path):
    content = CHECKPOINT.read_bytes()
    (tmp_path / "short.pt").write_bytes(content[: int(len(content) * kept)])
    assert_refused(command, tmp_path, "cannot be read as a checkpoint: it is damaged", tmp_path / "short.pt")


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"weight": torch.zeros(2)},
        [torch.zeros(2)],
        torch.zeros(2),
        {"cfg": None, "model": {}},
        {"cfg": "hubert_pruner", "model": {}},
        {"cfg": {"model": None}, "model": {}},
        {"cfg": {"model": {"_name": "hubert"}}, "model": {}},
        {"cfg": {"model": {"_name": ["hubert_pruner"]}}, "model": {}},
        {"cfg": {"model": {"_name": "hubert_pruner"}}, "model": [1]},
        {"cfg": {"model": {"_name": "hubert_pruner"}}, "model": {"mask_emb": 1}},
    ],
    ids=[
        "state dict",
        "list",
        "tensor",
        "no cfg",
        "text",
        "no model cfg",
        "hubert",
        "odd name",
        "list in it",
        "number in it",
    ],
)
def test_another_model_is_refused(checkpoint, command, written, tmp_path):
    assert_refused(command, tmp_path, "is not a LightHuBERT checkpoint", written(checkpoint))


@pytest.mark.parametrize("setting", ["encoder_layers", "encoder_embed_dim", "conv_feature_layers", "extractor_mode"])
def test_a_missing_setting_is_named(setting, original, command, written, tmp_path):
    del original["cfg"]["model"][setting]
    assert_refused(command, tmp_path, setting, written(original))


def test_a_missing_weight_is_named(original, command, written, tmp_path):
    del original["model"]["encoder.layers.4.fc1.bias"]
    assert_refused(command, tmp_path, "lacks encoder.layers.4.fc1.bias", written(original))


def test_an_unknown_weight_is_named(original, command, written, tmp_path):
    original["model"]["encoder.layers.12.fc1.bias"] = torch.zeros(512)
    assert_refused(command, tmp_path, "does not know: ['encoder.layers.12.fc1.bias']", written(original))


def test_a_weight_of_another_shape_is_named(original, command, written, tmp_path):
    original["model"]["encoder.layers.4.fc1.bias"] = torch.zeros(511)
    message = "encoder.layers.4.fc1.bias has shape (511,), but its settings say (512,)"
    assert_refused(command, tmp_path, message, written(original))


def test_a_search_space_that_the_checkpoint_does_not_name_is_asked_for(original, command, written, tmp_path):
    original["cfg"]["model"]["pruner_supernet"] = "/x/mine.yaml"
    assert_refused(command, tmp_path, "give --search_space", written(original), space=None)


@pytest.mark.parametrize("space", [None, "small", "base"])
def test_a_search_space_wider_than_the_checkpoint_is_refused(space, command, tmp_path):
    assert_refused(command, tmp_path, "but the supernet has only 128", CHECKPOINT, space=space)


def test_a_search_space_that_is_not_the_checkpoints_own_is_told_from_one_that_was_given(command, tmp_path):
    said = "with the search space that its settings name (--search_space: another): search space hidden_size"
    assert_refused(command, tmp_path, said, CHECKPOINT, space=None)


@pytest.mark.parametrize(
    ("name", "value"),
    [("encoder_layers", 10**9), ("encoder_layers", "12"), ("encoder_embed_dim", None), ("conv_pos_groups", 0)],
)
def test_settings_that_make_no_model_are_refused(original, command, written, tmp_path, name, value):
    original["cfg"]["model"][name] = value
    assert_refused(command, tmp_path, "written.pt", written(original))


def test_a_name_that_the_hub_cannot_have_is_refused_before_anything_is_written(command, tmp_path):
    assert_refused(command, tmp_path, "--push_to_hub: Repo id must", CHECKPOINT, "--push_to_hub", "me/a/b")


def test_an_unknown_search_space_is_refused(command, tmp_path):
    assert_refused(command, tmp_path, "'huge' is not known: choose from", CHECKPOINT, space="huge")


@pytest.mark.parametrize("content", ["{", "[1]", '{"hidden_size": [64]}'])
def test_a_bad_search_space_file_is_refused(content, command, tmp_path):
    (tmp_path / "bad.json").write_text(content, encoding="utf-8")
    assert_refused(command, tmp_path, "bad.json: ", CHECKPOINT, space=tmp_path / "bad.json")


def test_stage_one_cannot_be_trimmed(original, command, written, tmp_path):
    original["cfg"]["model"]["_name"] = "student_hubert"
    assert_refused(command, tmp_path, "only a supernet can be trimmed", written(original), "--trim", space=None)


# Convolutions are parsed, never evaluated


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2", [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2),
        (
            "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]",
            [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2,
        ),
        ("[(32,10,5),(32,3,2)]", [(32, 10, 5), (32, 3, 2)]),
    ],
)
def test_convolutions_are_read(text, layers):
    assert parse_conv_layers(text) == layers


@pytest.mark.parametrize(
    "text",
    [
        "__import__('pathlib').Path('attacked').touch()",
        "[__import__('pathlib').Path('attacked').touch()]",
        "[(512,10,5)] + [x for x in [(1,1,1)]]",
        "(lambda: [(512,10,5)])()",
        "[(512,10)]",
        "[(512,10,'5')]",
        "[(512,10,5.5)]",
        "[(512,-10,5)]",
        "[(512,10,5)] * 1000000000",
        "[(512,10,5)] * 99 * 99 * 99",
        "[(512,10,5)] + 3",
        "512",
        "[(512,10,5)",
        "",
        " + ".join(["[(512,10,5)]"] * 5000),
    ],
    ids=lambda text: text[:40],
)
def test_convolutions_that_are_no_list_of_numbers_are_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is not a list of"):
        parse_conv_layers(text)
    assert not (tmp_path / "attacked").exists()


def test_code_in_a_checkpoints_convolutions_is_refused(original, command, written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    original["cfg"]["model"]["conv_feature_layers"] = "__import__('pathlib').Path('attacked').touch() or [(32,10,5)]"
    assert_refused(command, tmp_path, "is not a list of (channels, kernel, stride)", written(original))
    assert not (tmp_path / "attacked").exists()


# Folders


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_there_already_is_not_overwritten(kind, command, tmp_path):
    precious = tmp_path / "there" if kind == "file" else tmp_path / "there" / "precious"
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("precious", encoding="utf-8")
    assert_refused(
        command,
        tmp_path,
        "exists and is not empty: choose another --pytorch_dump_folder_path",
        folder=tmp_path / "there",
    )
    assert precious.read_text(encoding="utf-8") == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["space.json", "there"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failure_while_writing_leaves_nothing(error, command, tmp_path, monkeypatch):
    def fail(self, folder, **kwargs):
        (folder / "config.json").write_text("half", encoding="utf-8")
        raise error

    monkeypatch.setattr(LightHubertForPreTraining, "save_pretrained", fail)
    with pytest.raises(type(error)):
        command()
    assert [path.name for path in tmp_path.iterdir()] == ["space.json"]
