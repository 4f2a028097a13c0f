"""A small HuBERT is trained in iterations, each on the units of the one before; a run that is killed goes on."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from datasets import Audio, Dataset
from safetensors.torch import load_file
from scripts import call, fails, killed
from torch.nn.functional import cross_entropy
from transformers import AutoFeatureExtractor, AutoModel, HubertModel

from lighthubert_training.data.strings import SAMPLING_RATE, encode_flac
from modeling_lighthubert import LightHubertModel
from modeling_lighthubert.errors import UserError


SCRIPT = Path(__file__).parents[2] / "demo" / "train_teacher.py"
CHECKPOINTS = "lighthubert_training.runs.checkpoints"


def load_script() -> ModuleType:
    """The script as a module. Its folder is not on the path of the tests."""
    spec = importlib.util.spec_from_file_location("train_teacher", SCRIPT)
    sys.modules["train_teacher"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["train_teacher"])
    return sys.modules["train_teacher"]


train_teacher = load_script()


def speech(seconds: float, seed: int = 0) -> np.ndarray:
    """Tones of a tenth of a second each, and a little noise, (num_samples) at 16 kHz."""
    rng, count = np.random.default_rng(seed), int(seconds * SAMPLING_RATE)
    pitch = np.repeat(rng.choice([200, 500, 1200, 3000], count // 1600 + 1), 1600)[:count]
    tones = np.sin(2 * np.pi * np.cumsum(pitch) / SAMPLING_RATE)
    return (0.3 * tones + 0.02 * rng.standard_normal(count)).astype(np.float32)


def write_speech(file: Path, *recordings: tuple[str, float]) -> Path:
    """A Parquet file of recordings, each a speaker and a length in seconds."""
    rows = [
        {"audio": encode_flac(speech(seconds, seed)), "speaker": speaker}
        for seed, (speaker, seconds) in enumerate(recordings)
    ]
    Dataset.from_list(rows).cast_column("audio", Audio(decode=False)).to_parquet(file)
    return file


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """Eight recordings of 0.6 to 1.3 s, of two speakers."""
    recordings = [("even" if index % 2 == 0 else "odd", 0.6 + 0.1 * index) for index in range(8)]
    return write_speech(tmp_path_factory.mktemp("speech") / "speech.parquet", *recordings)


def command(file: Path, output_dir: Path, *options: object) -> list[object]:
    """Two iterations of two steps, of a tiny model on recordings that are changed in every way."""
    return [
        *(SCRIPT, "--train_files", file, "--output_dir", output_dir, "--num_units", 4, 6, "--max_steps", 2, 2),
        *("--hidden_size", 32, "--num_hidden_layers", 2, "--num_attention_heads", 2, "--intermediate_size", 64),
        *("--conv_channels", 16, "--unit_layer", 1, "--batch_seconds", 3, "--crop_seconds", 1.1, "--save_steps", 1),
        *("--speeds", 0.9, 1.0, 1.1, "--noise_prob", 0.5, "--gain_db", 6, "--device", "cpu"),
        *options,
    ]


@pytest.fixture(scope="module")
def trained(file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "output"
    call(train_teacher.main, *command(file, folder))
    return folder


def test_the_teacher_is_a_stock_hubert_in_half_precision_with_its_feature_extractor(trained):
    teacher = AutoModel.from_pretrained(trained / "teacher", dtype="auto")
    assert type(teacher) is HubertModel
    assert teacher.dtype == torch.float16
    assert (teacher.config.hidden_size, teacher.config.num_hidden_layers) == (32, 2)
    audio = AutoFeatureExtractor.from_pretrained(trained / "teacher")(
        speech(0.5), sampling_rate=SAMPLING_RATE, return_tensors="pt"
    )
    assert torch.isfinite(teacher.float()(**audio).last_hidden_state).all()
    history = json.loads((trained / "teacher" / "history.json").read_text())
    assert [entries[-1]["step"] for entries in history.values()] == [2, 2]


def units_of(output_dir: Path, iteration: int) -> np.ndarray:
    return np.load(output_dir / f"iteration-{iteration}" / "units.npy")


def test_the_units_of_the_first_iteration_are_clusters_of_mfccs(file, trained):
    waveforms = train_teacher.read([file], 0.0)
    clusters = train_teacher.cluster_frames(map(train_teacher.mfcc, waveforms), 4, 0)
    assert np.array_equal(np.concatenate(clusters), units_of(trained, 1))
    assert set(units_of(trained, 1)) == {0, 1, 2, 3}


def test_the_units_of_the_second_iteration_are_clusters_of_what_the_first_has_learned(file, trained):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    arguments = train_teacher.TeacherArguments("output", **sizes, conv_channels=16, unit_layer=1)
    waveforms, model = train_teacher.read([file], 0.0), LightHubertModel(arguments.config())
    extractor = AutoFeatureExtractor.from_pretrained(trained / "teacher")

    def clusters() -> np.ndarray:
        features = train_teacher.layer_features(model, 1, waveforms, extractor)
        return np.concatenate(train_teacher.cluster_frames(features, 6, 0))

    assert not np.array_equal(clusters(), units_of(trained, 2))
    learned = load_file(trained / "iteration-1" / "checkpoint-2" / "model.safetensors")
    state = {name.removeprefix("model."): weight for name, weight in learned.items() if name.startswith("model.")}
    model.load_state_dict(state)
    assert np.array_equal(clusters(), units_of(trained, 2))


@pytest.mark.parametrize("layer", [1, 2])
def test_features_are_the_output_of_the_layer_that_is_named(trained, layer):
    model, kept = LightHubertModel.from_pretrained(trained / "teacher", dtype=torch.float32), []
    model.encoder.layers[layer - 1].register_forward_hook(lambda _, inputs, output: kept.append(output[0]))
    extractor = AutoFeatureExtractor.from_pretrained(trained / "teacher")
    (features,) = train_teacher.layer_features(model, layer, [speech(0.5)], extractor)
    assert features.shape == (24, 32)
    assert np.array_equal(features, kept[0].reshape(24, 32).numpy())


def test_frames_that_are_not_masked_count_as_much_as_is_asked_for_and_padding_never(trained):
    audio = torch.from_numpy(speech(0.5)).repeat(2, 1)
    attention_mask = torch.ones_like(audio, dtype=torch.int64)
    attention_mask[1, 4000:] = 0
    units, mask = torch.randint(4, (2, 24)), torch.arange(24).repeat(2, 1) < 6
    units[1, 12:] = -1  # padding
    model = LightHubertModel.from_pretrained(trained / "teacher", dtype=torch.float32)
    learner = train_teacher.MaskedPrediction(model, 4, 0.5).eval()
    logits = learner.head(model(audio, attention_mask, mask).last_hidden_state)
    masked, seen = (cross_entropy(logits[kind], units[kind]) for kind in (mask, ~mask & (units >= 0)))
    loss, accuracy = learner(audio, attention_mask, mask, units)
    assert loss.item() == pytest.approx((masked + 0.5 * seen).item(), rel=1e-5)
    assert accuracy.item() == pytest.approx((logits[mask].argmax(-1) == units[mask]).float().mean().item())
    learner.unmasked_weight = 0.0
    assert learner(audio, attention_mask, mask, units)[0].item() == pytest.approx(masked.item(), rel=1e-5)


WINDOWS = [
    ("numpy:save", 1, []),  # the units of the first iteration are found, and not yet kept
    (f"{CHECKPOINTS}:write_manifest", 2, ["iteration-1/checkpoint-1"]),
    ("numpy:save", 1, ["iteration-1/checkpoint-2"]),  # those of the second
    (f"{CHECKPOINTS}:write_manifest", 2, ["iteration-1/checkpoint-2", "iteration-2/checkpoint-1"]),
    ("modeling_lighthubert.export:to_hubert", 1, ["iteration-1/checkpoint-2", "iteration-2/checkpoint-2"]),
]
"""A function, the call of it in which a run is killed, and the checkpoints then."""


def test_a_run_that_is_killed_in_either_iteration_ends_with_the_same_weights(file, trained, tmp_path):
    for function, number, left in WINDOWS:
        killed(function, number, *command(file, tmp_path))
        assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("iteration-?/checkpoint-*")) == left
    call(train_teacher.main, *command(file, tmp_path))
    for name in ("teacher", "iteration-1/checkpoint-2", "iteration-2/checkpoint-2"):
        found, expected = (load_file(folder / name / "model.safetensors") for folder in (tmp_path, trained))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], weight) for key, weight in expected.items()), name
    assert np.array_equal(units_of(tmp_path, 2), units_of(trained, 2))


def test_a_run_does_not_go_on_with_other_options(file, tmp_path):
    """Not even before its first checkpoint, when the units are all there is."""
    killed(f"{CHECKPOINTS}:write_manifest", 1, *command(file, tmp_path))
    assert units_of(tmp_path, 1).size
    message = fails(*command(file, tmp_path, "--num_units", 5, 6, "--seed", 1))
    assert message.splitlines()[-1].startswith("error: ")
    assert "was made with other options (num_units, seed): give the same ones" in message.splitlines()[-1]


def test_a_folder_with_a_teacher_is_refused(file, trained):
    with pytest.raises(UserError, match="teacher exists and is not empty: choose another --output_dir"):
        call(train_teacher.main, *command(file, trained))


def test_a_mistaken_file_can_be_corrected(file, tmp_path):
    with pytest.raises(UserError, match="nothing.parquet"):
        call(train_teacher.main, *command(tmp_path / "nothing.parquet", tmp_path / "output"))
    call(train_teacher.main, *command(file, tmp_path / "output", "--max_steps", 1, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num_units", 4), r"num_units=\[4\] and max_steps=\[2, 2\]: give one for each iteration"),
        (("--unit_layer", 3), "unit_layer=3 is not one of the 2 layers"),
    ],
)
def test_impossible_options_are_refused(file, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        call(train_teacher.main, *command(file, tmp_path, *options))


def test_short_recordings_of_a_speaker_are_joined_and_long_ones_are_not(tmp_path):
    recordings = [("one", 0.4), ("other", 0.3), ("other", 1.5), ("one", 0.4), ("one", 0.4), ("one", 0.2)]
    file = write_speech(tmp_path / "speech.parquet", *recordings)
    pieces = train_teacher.read([file], 1.0)
    assert [len(piece) / SAMPLING_RATE for piece in pieces] == pytest.approx([1.5, 1.2, 0.3, 0.2])
    alone = train_teacher.read([file], 0.0)
    assert [len(piece) / SAMPLING_RATE for piece in alone] == pytest.approx([seconds for _, seconds in recordings])
    assert np.array_equal(pieces[1], np.concatenate([alone[0], alone[3], alone[4]]))


# What a recording is changed to


def perturbed(seconds: float = 2.0, seed: str = "a", **options: object) -> tuple[np.ndarray, np.ndarray]:
    """A recording whose units are the numbers of its frames, as it is used in training."""
    waveform = speech(seconds)
    units = np.arange((len(waveform) - 400) // 320 + 1)
    return train_teacher.perturb(waveform, units, train_teacher.TeacherArguments("output", **options), seed)


def test_a_seed_says_how_a_recording_is_changed():
    options = {"speeds": [0.9, 1.0, 1.1], "noise_prob": 0.5, "gain_db": 6.0, "crop_seconds": 1.0}
    waveform, units = perturbed(seed="a", **options)
    again, units_again = perturbed(seed="a", **options)
    assert np.array_equal(waveform, again) and np.array_equal(units, units_again)
    assert len({perturbed(seed=seed, **options)[0].tobytes() for seed in "abc"}) == 3


@pytest.mark.parametrize("crop_seconds", [1.0, 15.0], ids=["cropped", "whole"])
@pytest.mark.parametrize("speed", [0.9, 1.0, 1.1])
def test_there_is_a_unit_for_every_frame_that_the_model_makes(speed, crop_seconds):
    """It is that of the frame at the same place of the clean recording."""
    waveform, units = perturbed(speeds=[speed], crop_seconds=crop_seconds)
    assert len(waveform) == pytest.approx(min(2.0 / speed, crop_seconds) * SAMPLING_RATE, abs=320)
    model = LightHubertModel(train_teacher.TeacherArguments("output").config())
    assert len(units) == int(model._get_feat_extract_output_lengths(len(waveform)))
    assert units - units[0] == pytest.approx(speed * np.arange(len(units)), abs=0.6)  # half a frame, by rounding


def test_a_crop_has_the_units_of_its_own_frames():
    clean, _ = perturbed()
    waveform, units = perturbed(crop_seconds=1.0)
    assert np.array_equal(waveform, clean[units[0] * 320 :][:SAMPLING_RATE])
    assert np.array_equal(units, np.arange(units[0], units[0] + 49))


def decibels(ratio: np.ndarray | float) -> np.ndarray:
    return 20 * np.log10(ratio)


@pytest.mark.parametrize("seed", "abcdefgh")
def test_noise_is_5_to_30_decibels_below_the_speech(seed):
    clean, _ = perturbed()
    noisy, _ = perturbed(seed=seed, noise_prob=1.0)
    assert 5 <= decibels(clean.std() / (noisy - clean).std()) <= 30


def test_a_share_of_the_recordings_has_noise():
    clean, _ = perturbed(0.5)
    quiet = [np.array_equal(perturbed(0.5, str(seed), noise_prob=0.25)[0], clean) for seed in range(200)]
    assert 0.6 < np.mean(quiet) < 0.9


@pytest.mark.parametrize("seed", "abcdefgh")
def test_the_level_changes_along_a_line_between_ends_that_are_in_range(seed):
    clean, _ = perturbed()
    changed, _ = perturbed(seed=seed, gain_db=6.0)
    is_heard = np.abs(clean) > 0.1
    gain = decibels(changed[is_heard] / clean[is_heard])
    slope, start = np.polyfit(np.flatnonzero(is_heard) / len(clean), gain, 1)
    assert gain == pytest.approx(start + slope * np.flatnonzero(is_heard) / len(clean), abs=0.01)
    assert max(abs(start), abs(start + slope)) <= 6.01
    assert abs(slope) > 0.1
