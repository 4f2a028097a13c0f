"""From recordings to padded batches, for distillation and for CTC."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor, Wav2Vec2Processor

from lighthubert_training.data.recordings import Recording


Batch = dict[str, torch.Tensor]


def pad(extractor: SequenceFeatureExtractor, waveforms: Sequence[np.ndarray]) -> BatchFeature:
    """Tensors `input_values`, float32, and `attention_mask`, int64, each (batch_size, num_samples), as the feature
    extractor makes them (normalised or raw); padding is on the right."""
    return extractor(
        list(waveforms),
        sampling_rate=extractor.sampling_rate,
        padding=True,
        return_attention_mask=True,
        return_tensors="pt",
    )


def padded_batches(
    extractor: SequenceFeatureExtractor, waveforms: Sequence[np.ndarray], batch_size: int = 16
) -> list[Batch]:
    """Padded batches, in the order of `waveforms`."""
    return [pad(extractor, waveforms[at : at + batch_size]) for at in range(0, len(waveforms), batch_size)]


@dataclass
class DistillationCollator:
    """Pads a batch for student and teacher, each as its own feature extractor says (normalised or raw).

    Recordings shorter than `min_samples`, less than one frame, are repeated until they are long enough.
    """

    student_feature_extractor: SequenceFeatureExtractor
    teacher_feature_extractor: SequenceFeatureExtractor
    min_samples: int

    def __call__(self, recordings: Sequence[Recording]) -> dict[str, Any]:
        """Tensors `input_values`, `teacher_input_values` and `attention_mask`, each (batch_size, num_samples), and
        `items`, epochs and indices, (batch_size, 2); the `names` of the recordings; and `unreadable`, name and reason of each that is
        left out. If none can be read, there is nothing but `unreadable`."""
        unreadable = [(each.name, each.problem) for each in recordings if each.waveform is None]
        readable = [each for each in recordings if each.waveform is not None]
        if not readable:
            return {"unreadable": unreadable}
        waveforms = [np.resize(each.waveform, max(len(each.waveform), self.min_samples)) for each in readable]
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
    """Pads waveforms and token ids, and keeps the names; padded labels are -100, which the loss leaves out."""

    processor: Wav2Vec2Processor

    def __call__(self, recordings: Sequence[Recording]) -> dict[str, Any]:
        """`input_values`, `attention_mask`, (batch_size, num_samples), `labels` (batch_size, num_labels), `names`; and
        `unreadable`, name and reason of each recording that is left out. If none can be read, there is nothing but
        `unreadable`."""
        unreadable = [(each.name, each.problem) for each in recordings if each.waveform is None]
        readable = [each for each in recordings if each.waveform is not None]
        if not readable:
            return {"unreadable": unreadable}
        batch = pad(self.processor.feature_extractor, [each.waveform for each in readable])
        labels = [torch.tensor(each.labels) for each in readable]
        labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        return {**batch, "labels": labels, "names": [each.name for each in readable], "unreadable": unreadable}
