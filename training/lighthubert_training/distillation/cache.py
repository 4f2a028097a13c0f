"""The outputs of a frozen teacher, computed once for each recording and kept on disk, in half precision.

A recording is encoded alone, so that what is kept does not depend on a batch. Several runs, at once or one after the
other, may use one folder: files are whole from the moment they are there.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

from lighthubert_training.distillation.teacher import Teacher, TeacherOutputs
from lighthubert_training.models import frame_mask
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.files import whole_file


KINDS = ("targets", "hidden_states")
"""Outputs that are lists of tensors, (num_frames, hidden_size) of a recording."""


class CachedTeacher(Teacher):
    """A teacher that runs once for each recording.

    Args:
        teacher: whose outputs are kept; it is used up.
        folder: of all teachers and targets; each has a folder in it.
        max_samples: recordings of so many samples are crops, which do not come again: they are not kept.
    """

    def __init__(self, teacher: Teacher, folder: Path, max_samples: int):
        super().__init__(teacher.model, teacher.objective)
        objective = self.objective  # only what its outputs depend on: masks and weights of losses are the student's
        mean, states = objective.target_layers is None, objective.temporal_relation_weight > 0
        of_outputs = [objective.target, self.target_layers, objective.target_norm, mean, states]
        digest = hashlib.sha256(json.dumps(of_outputs).encode())
        digest.update(json.dumps(self.model.config.to_diff_dict(), sort_keys=True, default=str).encode())
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + weight.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self.folder, self.max_samples = folder / digest.hexdigest()[:16], max_samples

    def outputs(self, batch: Mapping[str, Any]) -> TeacherOutputs:
        """As of the teacher, to the precision of float16. The device is waited for only by recordings that are new.

        Args:
            batch: with the `waveforms` of its recordings.
        """
        device = batch["attention_mask"].device
        kept = [self.of_recording(torch.from_numpy(waveform), device) for waveform in batch["waveforms"]]
        names = list(kept[0])
        padded = {name: pad_sequence([each[name] for each in kept], batch_first=True) for name in names}
        padded = {name: tensor.to(device, non_blocking=True).float() for name, tensor in padded.items()}
        counts = torch.tensor([len(each["conv_features"]) for each in kept])
        frames = frame_mask(counts, int(counts.max())).to(device, non_blocking=True)
        of_kind = {kind: tuple(padded[name] for name in names if name.startswith(f"{kind}.")) for kind in KINDS}
        conv_features = padded["conv_features"].transpose(1, 2).to(self.model.dtype)
        return TeacherOutputs(of_kind["targets"], of_kind["hidden_states"], conv_features, frames)

    @torch.no_grad()
    def of_recording(self, waveform: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
        """Outputs for one recording by name, float16 (num_frames, size) on the CPU, kept or computed.

        Args:
            waveform: (num_samples), on the CPU.
            device: of the teacher.

        Raises:
            UserError: they cannot be written.
        """
        content = hashlib.sha256(waveform.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        file = self.folder / content[:2] / f"{content}.safetensors"
        try:
            return load_file(file)
        except (FileNotFoundError, SafetensorError):  # it is not there, or damaged
            mask = torch.ones_like(waveform, dtype=torch.int64)
            outputs = self(waveform[None].to(device), mask[None].to(device))
        parts: dict[str, torch.Tensor] = {"conv_features": outputs.conv_features[0].T}
        lists: Sequence[Sequence[torch.Tensor]] = [getattr(outputs, kind) for kind in KINDS]
        for kind, tensors in zip(KINDS, lists, strict=True):
            parts |= {f"{kind}.{number:03}": tensor[0] for number, tensor in enumerate(tensors)}
        parts = {name: tensor.half().cpu().contiguous() for name, tensor in parts.items()}
        if len(waveform) < self.max_samples:
            try:
                with whole_file(file) as unfinished:
                    save_file(parts, unfinished)
            except (OSError, SafetensorError) as error:
                advice = "make room, or choose another --teacher_cache_dir"
                raise UserError(
                    f"the teacher's outputs cannot be kept in {self.folder} ({error}): {advice}"
                ) from error
        return parts
