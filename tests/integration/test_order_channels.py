"""The script that orders channels, run on a teacher and on generated speech."""

import shutil

import order_channels
import pytest
import torch
from conftest import answer, assert_close
from scripts import TRAINING, call, distil, held, killed, weights
from transformers import AutoModel, Wav2Vec2FeatureExtractor

from modeling_lighthubert import LightHubertForPreTraining
from modeling_lighthubert.errors import UserError


@pytest.fixture
def order(workshop):
    """Runs the script on the speech of the workshop, three recordings unless told otherwise."""

    def run(output, *more) -> None:
        options = ("--train_file", workshop / "speech.parquet", "--output_dir", output, "--num_recordings", 3, *more)
        call(order_channels.main, TRAINING / "order_channels.py", "--device", "cpu", *options)

    return run


def test_a_teacher_becomes_an_ordered_supernet(workshop, tmp_path, order, waveform):
    order(
        tmp_path / "ordered", "--model_name_or_path", workshop / "teacher", "--search_space", workshop / "space.json"
    )
    ordered, teacher = (AutoModel.from_pretrained(folder) for folder in (tmp_path / "ordered", workshop / "teacher"))
    states = [answer(model, waveform).sort(dim=-1).values for model in (ordered, teacher)]
    assert_close(*states)  # the same channels in another order
    assert ordered.search_space is not None
    ours, theirs = weights(tmp_path / "ordered"), weights(workshop / "teacher")
    name = "encoder.layers.0.attention.q_proj.weight"
    assert not torch.equal(ours[name], theirs[name])
    convolutions = [name for name in theirs if name.startswith("feature_extractor")]
    assert all(torch.equal(ours[name], theirs[name]) for name in convolutions), "no subnet chooses their channels"
    Wav2Vec2FeatureExtractor.from_pretrained(tmp_path / "ordered")


def test_a_supernet_keeps_its_predictions_and_its_selected_subnet(workshop, tmp_path, order, waveform):
    supernet = distil(workshop, "to-be-ordered", "--max_steps", 1)
    order(tmp_path / "ordered", "--model_name_or_path", supernet)
    before, after = weights(supernet), weights(tmp_path / "ordered")
    assert before.keys() == after.keys()
    models = [LightHubertForPreTraining.from_pretrained(folder) for folder in (supernet, tmp_path / "ordered")]
    for model in models:
        model.set_subnet("largest")
    assert_close(*(answer(model, waveform) for model in models))
    assert AutoModel.from_pretrained(tmp_path / "ordered").subnet == AutoModel.from_pretrained(supernet).subnet


def test_a_model_without_subnets_is_refused(workshop, tmp_path, order):
    with pytest.raises(UserError, match="is no supernet: give --search_space"):
        order(tmp_path / "ordered", "--model_name_or_path", workshop / "teacher")


def test_a_used_folder_is_refused_before_anything_is_computed(tmp_path, order):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="exists and is not empty: choose another --output_dir"):
        order(tmp_path, "--model_name_or_path", "no/such-model")


def test_a_second_run_to_the_same_folder_is_refused(workshop, tmp_path, order):
    with (
        held(tmp_path, "ordered") as pid,
        pytest.raises(UserError, match=f"is being written by process {pid}"),
    ):
        order(tmp_path / "ordered", "--model_name_or_path", workshop / "teacher")


def test_a_stream_is_refused(workshop, tmp_path, order):
    with pytest.raises(UserError, match="--streaming: recordings are drawn at random"):
        order(tmp_path / "ordered", "--model_name_or_path", workshop / "teacher", "--streaming", True)


def test_recordings_that_cannot_be_read_are_left_out_up_to_a_share(workshop, tmp_path, order):
    shutil.copytree(workshop / "recordings", tmp_path / "speech")
    (tmp_path / "speech" / "8.flac").write_bytes(b"no audio")
    model = ("--model_name_or_path", workshop / "teacher", "--search_space", workshop / "space.json")
    options = (*model, "--train_file", tmp_path / "speech", "--num_recordings", 9)
    with pytest.raises(UserError, match="1 of 9 recordings cannot be read, more than .* 0.01.*8.flac"):
        order(tmp_path / "ordered", *options)
    order(tmp_path / "ordered", *options, "--max_unreadable_share", 0.2)
    order(tmp_path / "expected", *model, "--num_recordings", 8)
    for name, weight in weights(tmp_path / "expected").items():
        assert torch.equal(weights(tmp_path / "ordered")[name], weight), name


@pytest.mark.parametrize("function", ["modeling_lighthubert.files:give_permissions", "pathlib:Path.replace"])
def test_a_killed_run_leaves_no_folder_and_the_next_ends_as_if_it_had_not_been(workshop, tmp_path, order, function):
    options = ("--model_name_or_path", workshop / "teacher", "--search_space", workshop / "space.json")
    words = ("--train_file", workshop / "speech.parquet", "--num_recordings", 3, "--device", "cpu")
    killed(function, 1, TRAINING / "order_channels.py", "--output_dir", tmp_path / "ordered", *options, *words)
    assert not (tmp_path / "ordered").exists()
    for name in ("ordered", "undisturbed"):
        order(tmp_path / name, *options)
    ordered, expected = weights(tmp_path / "ordered"), weights(tmp_path / "undisturbed")
    assert all(torch.equal(ordered[name], weight) for name, weight in expected.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ordered", "undisturbed"]
