"""What a teacher has said of a recording is kept, and is what it would say again."""

from pathlib import Path

import pytest
import torch
from accelerate.utils import send_to_device
from tiny_distillation import padded_batch, tiny_teacher
from waits import Waits

from lighthubert_training.distillation.cache import CachedTeacher


ALL_OUTPUTS = {"temporal_relation_weight": 1.0, "target_layers": [1, 3]}
BATCH = padded_batch()


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


@pytest.mark.parametrize("objective", [{}, ALL_OUTPUTS, {"target": "hidden_states"}], ids=["mean", "all", "states"])
def test_outputs_are_those_of_the_teacher_to_half_precision(tmp_path, objective):
    expected = tiny_teacher(**objective).outputs(BATCH)
    found = CachedTeacher(tiny_teacher(**objective), tmp_path, 10_000).outputs(BATCH)
    assert torch.equal(found.frames, expected.frames)
    for kind in ("targets", "hidden_states"):
        assert len(getattr(found, kind)) == len(getattr(expected, kind))
        for ours, theirs in zip(getattr(found, kind), getattr(expected, kind), strict=True):
            true = expected.frames  # hidden states of padding are anything
            torch.testing.assert_close(ours[true], theirs[true], rtol=1e-2, atol=1e-2)
    features = found.conv_features.transpose(1, 2)[expected.frames]
    torch.testing.assert_close(features, expected.conv_features.transpose(1, 2)[expected.frames], rtol=1e-2, atol=1e-2)


def test_a_recording_is_encoded_once(tmp_path, monkeypatch):
    teacher = CachedTeacher(tiny_teacher(), tmp_path, 10_000)
    first = teacher.outputs(BATCH)
    assert len(files(tmp_path)) == 2
    later = CachedTeacher(tiny_teacher(), tmp_path, 10_000)
    monkeypatch.setattr(later.model, "forward", None)
    again = later.outputs(BATCH | {"waveforms": BATCH["waveforms"][::-1]})
    assert torch.equal(again.targets[0], first.targets[0][[1, 0]])
    assert torch.equal(again.conv_features, first.conv_features[[1, 0]])


def test_what_is_kept_waits_for_no_device(tmp_path):
    CachedTeacher(tiny_teacher(), tmp_path, 10_000).outputs(BATCH)
    teacher = CachedTeacher(tiny_teacher(), tmp_path, 10_000).to("meta")
    with Waits() as waits:
        outputs = teacher.outputs(send_to_device(BATCH, "meta"))
    assert outputs.targets[0].is_meta
    assert not waits.lines


def test_a_damaged_file_is_written_anew(tmp_path):
    expected = CachedTeacher(tiny_teacher(), tmp_path, 10_000).outputs(BATCH)
    whole = files(tmp_path)[0].read_bytes()
    files(tmp_path)[0].write_bytes(whole[: len(whole) // 2])
    assert torch.equal(CachedTeacher(tiny_teacher(), tmp_path, 10_000).outputs(BATCH).targets[0], expected.targets[0])
    assert files(tmp_path)[0].read_bytes() == whole


def test_crops_are_not_kept(tmp_path):
    CachedTeacher(tiny_teacher(), tmp_path, max_samples=6000).outputs(BATCH)
    assert len(files(tmp_path)) == 1


def test_another_teacher_or_target_has_outputs_of_its_own(tmp_path):
    other = tiny_teacher()
    with torch.no_grad():
        other.model.encoder.layers[2].feed_forward.output_dense.bias += 1.0
    for teacher in (tiny_teacher(), tiny_teacher(target_norm="layer"), other):
        CachedTeacher(teacher, tmp_path, 10_000).outputs(BATCH)
    assert len(files(tmp_path)) == 6


def test_masks_and_weights_of_losses_have_no_outputs_of_their_own(tmp_path):
    for objective in ({}, {"mask_time_prob": 0.0, "loss_frames": "all"}, {"cosine_weight": 1.0}):
        CachedTeacher(tiny_teacher(**objective), tmp_path, 10_000).outputs(BATCH)
    assert len(files(tmp_path)) == 2
