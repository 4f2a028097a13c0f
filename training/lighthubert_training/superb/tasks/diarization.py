"""Diarisation: who speaks when."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import median_filter
from torch import nn

from lighthubert_training.models import frame_mask
from lighthubert_training.superb.heads import RecurrentClassifier
from lighthubert_training.superb.metrics import Turn, diarization_error_rate
from lighthubert_training.superb.tasks.base import Task
from modeling_lighthubert.errors import UserError


class Diarization(Task):
    """Frame by frame, which of as many speakers as a training recording has at most are speaking, in any order."""

    columns = ("segments",)
    higher_is_better = {"der": False}
    THRESHOLD, MEDIAN_FRAMES = 0.5, 11

    def prepare(self) -> None:
        speakers = [{segment["speaker"] for segment in row["segments"]} for row in self.parts["train"].rows]
        self.num_speakers = max(map(len, speakers))
        if self.num_speakers < 2:
            raise UserError(f"{self.settings.task}: no training recording has more than one speaker")

    def build_head(self) -> nn.Module:
        return RecurrentClassifier(
            self.upstream.hidden_size, self.num_speakers, self.settings.lstm_size, num_layers=1, bidirectional=False
        )

    def targets(self, row: Mapping[str, Any], num_frames: int) -> torch.Tensor:
        """Who speaks in each frame, (num_frames, num_speakers); `first_frame` of a row is where the crop begins."""
        target = torch.zeros(num_frames, self.num_speakers)
        names = sorted({segment["speaker"] for segment in row["segments"]})
        for segment in row["segments"]:
            start, end = (
                round(segment[at] / self.upstream.seconds_per_frame) - row.get("first_frame", 0)
                for at in ("start", "end")
            )
            if end > 0:
                target[max(0, start) : end, names.index(segment["speaker"])] = 1.0
        return target

    def loss(self, head, outputs, lengths, rows) -> torch.Tensor:
        targets = torch.stack([self.targets(row, outputs.shape[1]) for row in rows]).to(outputs.device)
        mask = frame_mask(lengths, outputs.shape[1]).unsqueeze(-1)
        losses = []
        for order in itertools.permutations(range(self.num_speakers)):
            loss = F.binary_cross_entropy_with_logits(outputs, targets[..., list(order)], reduction="none")
            losses.append((loss * mask).sum(dim=(1, 2)) / (lengths * self.num_speakers))
        return torch.stack(losses).min(dim=0).values.mean()

    def scores(self, outputs, part) -> dict[str, float]:
        references, hypotheses, seconds = [], [], []
        for row, logits in zip(part.rows, outputs, strict=True):
            references.append([Turn(str(each["speaker"]), each["start"], each["end"]) for each in row["segments"]])
            speaking = (logits.sigmoid() > self.THRESHOLD).numpy().astype(np.uint8)
            smoothed = median_filter(speaking, size=(self.MEDIAN_FRAMES, 1))
            hypotheses.append(turns_of(smoothed, self.upstream.seconds_per_frame))
            length = len(logits) * self.upstream.seconds_per_frame
            seconds.append(max([length, *(turn.end for turn in references[-1])]))
        return {"der": diarization_error_rate(references, hypotheses, seconds)}


def turns_of(speaking: np.ndarray, seconds_per_frame: float) -> list[Turn]:
    """Turns of speakers who speak in a frame (1) or do not (0), (num_frames, num_speakers)."""
    turns = []
    for speaker, frames in enumerate(speaking.T):
        edges = np.flatnonzero(np.diff(frames.astype(int), prepend=0, append=0)) * seconds_per_frame
        turns += [Turn(str(speaker), start, end) for start, end in zip(edges[::2], edges[1::2])]
    return turns
