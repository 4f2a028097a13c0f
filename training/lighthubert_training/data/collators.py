"""From recordings to padded batches, for distillation and for CTC."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, PreTrainedTokenizerBase, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

from lighthubert_training.data.recordings import Recording, item_seed
from lighthubert_training.models import draw_time_mask
from modeling_lighthubert import LightHubertConfig
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


def masks_and_counts(
    num_samples: Sequence[int],
    config: LightHubertConfig,
    mask_time_prob: float,
    mask_time_length: int,
    seeds: Sequence[int | str],
) -> dict[str, Any]:
    """What a distillation loss needs besides audio, of recordings of `num_samples`: `mask`, `num_samples`,
    `num_frames` and `num_masked`, as in a batch of `DistillationCollator`. Masks are those of `draw_time_mask`."""
    num_frames = list(map(config.num_frames, num_samples))
    mask = draw_time_mask(num_frames, mask_time_prob, mask_time_length, seeds)
    counts = {"num_samples": sum(num_samples), "num_frames": sum(num_frames), "num_masked": int(mask.sum())}
    return {"mask": mask, **counts}


@dataclass
class DistillationCollator:
    """Pads a batch for student and teacher, each as its own feature extractor says (normalised or raw), and draws
    the frames that are masked for the student. All that is counted is counted here, where no device is waited for.

    Recordings shorter than one frame are repeated until they are long enough. A recording's mask depends on `seed`,
    its epoch and its index (see `draw_time_mask`).

    Args:
        config: of the student.
        keep_waveforms: batches have `waveforms` as well, of each recording as the teacher takes it, float32
            (num_samples): a `CachedTeacher` finds what it has kept by them.
    """

    student_feature_extractor: Wav2Vec2FeatureExtractor
    teacher_feature_extractor: Wav2Vec2FeatureExtractor
    config: LightHubertConfig
    mask_time_prob: float = 0.0
    mask_time_length: int = 10
    seed: int = 0
    keep_waveforms: bool = False

    def __call__(self, recordings: Sequence[Recording]) -> dict[str, Any]:
        """Tensors `input_values`, `teacher_input_values` and `attention_mask`, each (batch_size, num_samples), and
        `mask`, masked frames, bool (batch_size, num_frames); `num_samples`, `num_frames` and `num_masked`, of all
        recordings together; `names`; and `unreadable`, name and problem of each recording that is left out. If none
        can be read, there is nothing but `unreadable`."""
        readable, waveforms, unreadable = _split(recordings)
        if not readable:
            return {"unreadable": unreadable}
        least = self.config.samples_per_first_frame
        waveforms = [np.resize(waveform, max(len(waveform), least)) for waveform in waveforms]
        seeds, lengths = [item_seed(self.seed, *each.item) for each in readable], list(map(len, waveforms))
        student = pad(self.student_feature_extractor, waveforms)
        same = self.teacher_feature_extractor is self.student_feature_extractor
        teacher = student if same else pad(self.teacher_feature_extractor, waveforms)
        kept = [row[:length].numpy() for row, length in zip(teacher["input_values"], lengths, strict=True)]
        return {
            **({"waveforms": kept} if self.keep_waveforms else {}),
            "input_values": student["input_values"],
            "teacher_input_values": teacher["input_values"],
            "attention_mask": student["attention_mask"],
            **masks_and_counts(lengths, self.config, self.mask_time_prob, self.mask_time_length, seeds),
            "names": [each.name for each in readable],
            "unreadable": unreadable,
        }


@dataclass
class CTCCollator:
    """Pads waveforms, and the token ids that are their labels with -100, which the loss leaves out."""

    processor: Wav2Vec2Processor

    def __call__(self, recordings: Sequence[Recording]) -> dict[str, Any]:
        """Tensors `input_values` and `attention_mask`, (batch_size, num_samples), and `labels`, int64 (batch_size,
        num_labels); `num_samples`, `names` and `unreadable` as in `DistillationCollator`."""
        readable, waveforms, unreadable = _split(recordings)
        if not readable:
            return {"unreadable": unreadable}
        labels = [torch.tensor(each.labels, dtype=torch.int64) for each in readable]
        return {
            **pad(self.processor.feature_extractor, waveforms),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "num_samples": sum(map(len, waveforms)),
            "names": [each.name for each in readable],
            "unreadable": unreadable,
        }
