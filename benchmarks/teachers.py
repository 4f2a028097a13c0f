"""What the teacher of the benchmarks knows of people's speech, beside other things that one may start from.

    python benchmarks/teachers.py --speech_dir speech

The teacher is compared with that of the demonstration, which was trained on a synthesiser, with random weights, and
with MFCCs: as frozen features, and below a transformer of the teacher's shape that is fine-tuned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comparisons
import numpy as np
import torch
from common import ENCODER, RANDOM, BenchArguments, Table
from measures import Features, Measures
from processes import ROOT, parse
from recordings import Speech
from runner import Runner
from torch.nn.utils.rnn import pad_sequence

from lighthubert_training.data.mfcc import mfcc
from lighthubert_training.distillation.arguments import ObjectiveArguments
from lighthubert_training.distillation.teacher import build_teacher
from lighthubert_training.runs.options import option
from lighthubert_training.runs.tables import markdown_table
from modeling_lighthubert import LightHubertModel
from modeling_lighthubert.errors import run
from modeling_lighthubert.loading import load_model


TEACHER, DEMONSTRATION, MFCC = "teacher", "the demonstration's teacher", "MFCC"


@dataclass(kw_only=True)
class TeachersArguments(BenchArguments):
    """What is compared, and by what."""

    measures: list[str] = option(["probes", "phones", "recognition"], "Groups of measures.")


class MfccFeatures(Features):
    """MFCCs, which are computed once."""

    def __init__(self, speech: Speech):
        super().__init__(speech)
        self.kept: dict[int, torch.Tensor] = {}

    def __call__(self, batch: Sequence[int], mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        for number in batch:
            if number not in self.kept:
                waveform = self.speech.recordings[number].waveform.astype(np.float32)
                self.kept[number] = torch.from_numpy(mfcc(waveform, normalized=False)).to(self.speech.device)
        frames = [self.kept[number] for number in batch]
        return pad_sequence(frames, batch_first=True), torch.tensor(list(map(len, frames)))


class Teachers(Table):
    """The teacher, and what it is compared with."""

    name = "teachers"

    @classmethod
    def names(cls, arguments: BenchArguments) -> list[str]:
        return [TEACHER, DEMONSTRATION, MFCC, RANDOM]

    @classmethod
    def cost(cls, name: str, arguments: BenchArguments) -> tuple[int, int]:
        return 0, 1

    def run(self, name: str, seed: int) -> dict[str, dict[str, Any]]:
        measures, full = self.measures, self.space.largest
        if name == RANDOM:
            return {name: measures(self.control(RANDOM, full, seed), seed)}
        if name == TEACHER:
            return {name: measures(self.untrained.extract_subnet(full), seed)}
        if name == DEMONSTRATION:
            teacher, extractor = build_teacher(
                str(ROOT / "demo/teacher"), "float32", ObjectiveArguments(num_target_layers=1)
            )
            measures = Measures(self.arguments, teacher, extractor, measures.speech.recordings)
            model = load_model(ROOT / "demo/teacher", head=LightHubertModel, dtype=torch.float32)
            return {name: measures(model, seed)}
        measures = Measures(self.arguments, self.teacher, measures.speech.extractor, measures.speech.recordings)
        features, speech = MfccFeatures(measures.speech), measures.speech
        row = measures.of_features(features, seed)
        if "recognition" in self.arguments.measures:
            # in place of the output of the feature encoder, whose other channels are silent
            channels = self.teacher.model.config.conv_dim[-1]
            for number in measures.transcribed("train") + measures.transcribed("test"):
                frames = features([number])[0][0]
                speech.conv_features[number] = torch.nn.functional.pad(frames, (0, channels - frames.shape[1])).half()
            row |= measures.recognition(self.control(ENCODER, full, seed), seed)
        return {name: row}


def main() -> None:
    runner = Runner(Teachers, parse(TeachersArguments, __doc__))
    results = runner()
    measures = comparisons.measures_of(results)
    rows = []
    for name in results:
        values = (list(comparisons.over_seeds(results, name, name, measure).values()) for measure in measures)
        rows.append(
            [name, *(comparisons.mean_and_each(each, measure) for each, measure in zip(values, measures, strict=True))]
        )
    comparisons.report(runner.file.with_suffix(".md"), markdown_table(["", *measures], rows))


if __name__ == "__main__":
    run(main)
