"""How good a subnet is, without training it: its distillation loss on held-out speech, its character error rate, or
the error of a linear probe. All subnets are measured on the same recordings, which are made ready once."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from transformers import Wav2Vec2Processor

from lighthubert_training.distillation.step import prepare_lesson
from lighthubert_training.distillation.teacher import Teacher, answering, has_fixed_feature_encoder
from lighthubert_training.error_rates import CharacterErrorRate
from lighthubert_training.probing import Batch, pooled_features, probe_accuracy
from modeling_lighthubert import LightHubertForCTC, LightHubertForPreTraining, LightHubertPreTrainedModel, Subnet


class Fitness(Protocol):
    """An error of subnets.

    Attributes:
        name: of the error.
        num_shares: shares of the data after which it is known, the last of which is all.
    """

    name: str
    num_shares: int

    def errors(self, subnet: Subnet) -> Iterator[float]:
        """The error on each share of the data, one after another. The selection of the model changes."""
        ...


def ends_of_shares(num_batches: int) -> list[int]:
    """A quarter of the batches, a half, and all."""
    return sorted({-(-num_batches * quarters // 4) for quarters in (1, 2, 4)})


@torch.no_grad()
def conv_features(model: LightHubertPreTrainedModel, batches: Sequence[Batch]) -> list[torch.Tensor | None]:
    """What the feature encoder makes of each batch, where it is the same for all subnets."""
    model.base_model.feature_extractor._freeze_parameters()  # nothing learns in a search
    if not has_fixed_feature_encoder(model):
        return [None] * len(batches)
    return [model.base_model.feature_extractor(batch["input_values"]) for batch in batches]


def heard(model: LightHubertPreTrainedModel, features: torch.Tensor | None) -> AbstractContextManager[Any]:
    """Inside the block, the feature encoder need not compute `features` once more."""
    return nullcontext() if features is None else answering(model.base_model.feature_extractor, features)


class DistillationLoss:
    """The loss of `run_distillation.py` on held-out speech; no labels are needed.

    Args:
        student: a supernet with its prediction heads.
        batches: with `visits`, as `DistillationCollator` makes them.
    """

    name = "distillation loss"

    def __init__(
        self,
        student: LightHubertForPreTraining,
        teacher: Teacher,
        batches: Sequence[dict[str, torch.Tensor]],
        accelerator: Accelerator,
    ):
        self.student, self.teacher = student.eval(), teacher
        student.freeze_feature_encoder()
        with torch.no_grad():
            self.lessons = [prepare_lesson(student, teacher, batch, 0, accelerator) for batch in batches]
        self.ends = ends_of_shares(len(batches))
        self.num_shares = len(self.ends)

    @torch.no_grad()
    def errors(self, subnet: Subnet) -> Iterator[float]:
        self.student.set_subnet(subnet)
        total, num_frames, start = 0.0, 0, 0
        for end in self.ends:
            for lesson in self.lessons[start:end]:
                total += float(lesson.loss(self.student, self.teacher)) * lesson.num_frames
                num_frames += lesson.num_frames
            start = end
            yield total / num_frames


class CTCError:
    """Character error rate, greedily decoded, of a supernet that was fine-tuned once for all.

    Args:
        batches: `input_values` and `attention_mask` of recordings.
        references: their transcripts.
    """

    name = "character error rate"

    def __init__(
        self,
        model: LightHubertForCTC,
        processor: Wav2Vec2Processor,
        batches: Sequence[Batch],
        references: Sequence[str],
    ):
        self.model, self.processor = model.eval(), processor
        self.batches, self.references = batches, list(references)
        self.features = conv_features(model, batches)
        self.ends = ends_of_shares(len(batches))
        self.num_shares = len(self.ends)

    @torch.no_grad()
    def errors(self, subnet: Subnet) -> Iterator[float]:
        self.model.set_subnet(subnet)
        hypotheses: list[str] = []
        start = 0
        for end in self.ends:
            for batch, features in zip(self.batches[start:end], self.features[start:end], strict=True):
                with heard(self.model, features):
                    logits = self.model(batch["input_values"], attention_mask=batch["attention_mask"]).logits
                tokens = logits.argmax(dim=-1)
                lengths = self.model._get_feat_extract_output_lengths(batch["attention_mask"].sum(-1))
                tokens[torch.arange(tokens.shape[1]) >= lengths[:, None]] = self.processor.tokenizer.pad_token_id
                hypotheses += self.processor.batch_decode(tokens)
            start = end
            yield CharacterErrorRate.rate(self.references[: len(hypotheses)], hypotheses)


class ProbeError:
    """Error of a linear probe that is fitted to the mean features of training recordings; without shares.

    Args:
        train, test: batches and labels of recordings.
    """

    name, num_shares = "probe error", 1

    def __init__(
        self,
        model: LightHubertPreTrainedModel,
        train: tuple[Sequence[Batch], Sequence[Any]],
        test: tuple[Sequence[Batch], Sequence[Any]],
    ):
        self.model, self.train, self.test = model.base_model.eval(), train, test
        self.selecting = model

    def errors(self, subnet: Subnet) -> Iterator[float]:
        self.selecting.set_subnet(subnet)
        (train, train_labels), (test, test_labels) = self.train, self.test
        features = (pooled_features(self.model, batches) for batches in (train, test))
        train_features, test_features = features
        yield 1.0 - probe_accuracy(train_features, train_labels, test_features, test_labels)
