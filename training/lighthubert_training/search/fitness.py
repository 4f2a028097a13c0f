"""Errors of subnets that are measured without training them: the mean of a loss on held-out speech, the character
error rate, or the error of a linear probe. All subnets are measured on the same batches, which are prepared once."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from transformers import Wav2Vec2Processor

from lighthubert_training.data.collators import Batch
from lighthubert_training.error_rates import character_error_rate
from lighthubert_training.models import computed_once, has_fixed_feature_encoder, true_frames
from lighthubert_training.probing import pooled_features, probe_accuracy
from modeling_lighthubert import LightHubertForCTC, LightHubertPreTrainedModel, Subnet


T = TypeVar("T")


class Fitness(Protocol):
    """An error of subnets, which may be measured in stages, each on more of the data.

    Attributes:
        name: of the error.
        num_stages: number of stages; the last is on all of the data.
    """

    name: str
    num_stages: int

    def errors(self, subnet: Subnet) -> Iterator[float]:
        """The error after each stage. The selection of the model changes."""
        ...


def split_stages(batches: Sequence[T]) -> list[Sequence[T]]:
    """The batches that each stage adds: stages end at a quarter, at half, and at the end of the data."""
    ends = sorted({-(-len(batches) * quarters // 4) for quarters in (1, 2, 4)})
    return [batches[start:end] for start, end in zip([0, *ends], ends)]


class MeanLoss:
    """The mean of a loss over prepared batches, each weighted by its number of frames.

    Args:
        model: a supernet.
        batches: with an attribute `num_frames`, the number of frames that the loss is a mean over.
        loss: mean loss of the selected subnet on a batch.
    """

    def __init__(
        self,
        name: str,
        model: LightHubertPreTrainedModel,
        batches: Sequence[Any],
        loss: Callable[[Any], torch.Tensor],
    ):
        self.name, self.model, self.loss = name, model.eval(), loss
        self.batches, self.stages = batches, split_stages(batches)
        self.num_stages = len(self.stages)

    @property
    def num_recordings(self) -> int:
        """Of prepared batches of a distillation."""
        return sum(len(each.batch["input_values"]) for each in self.batches)

    @torch.no_grad()
    def errors(self, subnet: Subnet) -> Iterator[float]:
        self.model.set_subnet(subnet)
        total, num_frames = 0.0, 0
        for stage in self.stages:
            losses = torch.stack([self.loss(batch) for batch in stage]).tolist()  # waits for the device once
            for loss, batch in zip(losses, stage, strict=True):
                total += loss * batch.num_frames
                num_frames += batch.num_frames
            yield total / num_frames


class CTCError:
    """Character error rate, with greedy decoding, of a supernet that was fine-tuned once for all.

    Args:
        batches: `input_values` and `attention_mask` of recordings, on the device of the model.
        references: transcripts of all recordings.
    """

    name = "character error rate"

    def __init__(
        self,
        model: LightHubertForCTC,
        processor: Wav2Vec2Processor,
        batches: Sequence[Batch],
        references: Sequence[str],
    ):
        self.model, self.processor, self.references = model.eval(), processor, references
        self.num_recordings = len(references)
        self.stages = split_stages(list(zip(batches, conv_features(model, batches), strict=True)))
        self.num_stages = len(self.stages)

    @torch.no_grad()
    def errors(self, subnet: Subnet) -> Iterator[float]:
        self.model.set_subnet(subnet)
        encoder, blank = self.model.base_model.feature_extractor, self.processor.tokenizer.pad_token_id
        hypotheses: list[str] = []
        for stage in self.stages:
            predicted = []
            for batch, features in stage:
                audio, mask = batch["input_values"], batch["attention_mask"]
                with computed_once(encoder, features):
                    tokens = self.model(audio, attention_mask=mask).logits.argmax(-1)
                predicted.append(tokens.masked_fill(~true_frames(self.model, tokens.shape[1], mask), blank))
            for tokens in predicted:  # all of a stage are under way before the first is waited for
                hypotheses += self.processor.batch_decode(tokens.cpu())
            yield character_error_rate(self.references[: len(hypotheses)], hypotheses)

    def loss(self, batch: Batch) -> torch.Tensor:
        """CTC loss of the selected subnet on a batch with `labels`."""
        return self.model(batch["input_values"], batch["attention_mask"], labels=batch["labels"]).loss


@torch.no_grad()
def conv_features(model: LightHubertPreTrainedModel, batches: Sequence[Batch]) -> list[torch.Tensor | None]:
    """Output of the feature encoder for each batch, where it is the same for all subnets. The feature encoder is
    frozen for good."""
    encoder: Any = model.base_model.feature_extractor
    encoder._freeze_parameters()
    is_fixed = has_fixed_feature_encoder(model)
    return [encoder(batch["input_values"]) if is_fixed else None for batch in batches]


class ProbeError:
    """Error of a linear probe that is fitted to the mean features of training recordings, in one stage.

    Args:
        train, test: batches of recordings, on the device of the model, and the label of each recording.
    """

    name, num_stages = "probe error", 1

    def __init__(
        self,
        model: LightHubertPreTrainedModel,
        train: tuple[Sequence[Batch], Sequence[Any]],
        test: tuple[Sequence[Batch], Sequence[Any]],
    ):
        self.model, self.train, self.test = model.eval(), train, test
        self.num_recordings = len(test[1])

    def errors(self, subnet: Subnet) -> Iterator[float]:
        self.model.set_subnet(subnet)
        (train, train_labels), (test, test_labels) = self.train, self.test
        train_features, test_features = (pooled_features(self.model.base_model, part) for part in (train, test))
        yield 1.0 - probe_accuracy(train_features, train_labels, test_features, test_labels)
