"""From recordings to padded batches, for distillation and for CTC."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, PreTrainedTokenizerBase, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

from lighthubert_training.data.recordings import Recording
from modeling_lighthubert.errors import UserError


Batch = Mapping[str, torch.Tensor]
"""`input_values` and `attention_mask`, as `pad` gives them."""


def pad(extractor: Wav2Vec2FeatureExtractor, waveforms: Sequence[np.ndarray]) -> BatchFeature:
    """Tensors `input_values`, float32, and `attention_mask`, int32, each (batch_size, num_samples), as the feature
    extractor makes them (normalised or raw). Padding, zeros, is on the right.

    Raises:
        UserError: the feature extractor pads on the left. Models take the first frames for the true ones.
    """
    options: dict[str, Any] = {"padding": True, "return_attention_mask": True, "return_tensors": "pt"}
    batch = extractor(list(waveforms), sampling_rate=extractor.sampling_rate, **options)
    mask = batch["attention_mask"]
    if bool((mask[:, 1:] > mask[:, :-1]).any()):
        remedy = 'set "padding_side": "right" in its preprocessor_config.json'
        raise UserError(f"the feature extractor pads recordings on the {extractor.padding_side}: {remedy}")
    return batch


def padded_batches(
    extractor: Wav2Vec2FeatureExtractor, waveforms: Sequence[np.ndarray], batch_size: int = 16
) -> list[Batch]:
    """Padded batches, in the order of `waveforms`."""
    return [pad(extractor, waveforms[at : at + batch_size]) for at in range(0, len(waveforms), batch_size)]


def label_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the characters of each text. `<pad>` in a text is five characters, not a blank."""
    return tokenizer(list(texts), split_special_tokens=True).input_ids if texts else []


def _split(recordings: Sequence[Recording]) -> tuple[list[Recording], list[np.ndarray], list[tuple[str, str]]]:
    """Recordings that can be read, their waveforms, and name and problem of each of the others."""
    readable = [each for each in recordings if each.waveform is not None]
    waveforms = [each.waveform for each in recordings if each.waveform is not None]
    return readable, waveforms, [(each.name, each.problem) for each in recordings if each.waveform is None]


@dataclass
class DistillationCollator:
    """Pads a batch for student and teacher, each as its own feature extractor says (normalised or raw).

    Recordings shorter than `min_samples`, less than one frame, are repeated until they are long enough.
    """

    student_feature_extractor: Wav2Vec2FeatureExtractor
    teacher_feature_extractor: Wav2Vec2FeatureExtractor
    min_samples: int

    def __call__(self, recordings: Sequence[Recording]) -> dict[str, Any]:
        """Tensors `input_values`, `teacher_input_values` and `attention_mask`, each (batch_size, num_samples), and
        `items`, epoch and index, int64 (batch_size, 2); `names`; and `unreadable`, name and problem of each recording
        that is left out. If none can be read, there is nothing but `unreadable`."""
        readable, waveforms, unreadable = _split(recordings)
        if not readable:
            return {"unreadable": unreadable}
        waveforms = [np.resize(waveform, max(len(waveform), self.min_samples)) for waveform in waveforms]
        student = pad(self.student_feature_extractor, waveforms)
        same = self.teacher_feature_extractor is self.student_feature_extractor
        teacher = student if same else pad(self.teacher_feature_extractor, waveforms)
        return {
            "input_values": student["input_values"],
            "teacher_input_values": teacher["input_values"],
            "attention_mask": student["attention_mask"],
            "items": torch.tensor([each.item for each in readable]),
            "names": [each.name for each in readable],
            "unreadable": unreadable,
        }


@dataclass
class CTCCollator:
    """Pads waveforms, and the token ids that are their labels with -100, which the loss leaves out."""

    processor: Wav2Vec2Processor

    def __call__(self, recordings: Sequence[Recording]) -> dict[str, Any]:
        """Tensors `input_values` and `attention_mask`, (batch_size, num_samples), and `labels`, int64 (batch_size,
        num_labels); `names` and `unreadable` as in `DistillationCollator`."""
        readable, waveforms, unreadable = _split(recordings)
        if not readable:
            return {"unreadable": unreadable}
        labels = [torch.tensor(each.labels, dtype=torch.int64) for each in readable]
        return {
            **pad(self.processor.feature_extractor, waveforms),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "names": [each.name for each in readable],
            "unreadable": unreadable,
        }
