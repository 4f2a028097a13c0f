"""No model waits for its device more often than stock HuBERT, whose lines that do are named here."""

from collections import Counter

import pytest
import torch
from conftest import FLAVOURS, TWO_DEEP, WINDOWED, tiny_config, tiny_model
from transformers import (
    HubertConfig,
    HubertForCTC,
    HubertForSequenceClassification,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2ForAudioFrameClassification,
    Wav2Vec2ForXVector,
)
from waits import Waits

from modeling_lighthubert import (
    LightHubertForAudioFrameClassification,
    LightHubertForCTC,
    LightHubertForPreTraining,
    LightHubertForSequenceClassification,
    LightHubertForXVector,
    LightHubertModel,
)


MASK = "and (padding_mask is None or padding_mask.all())"
CTC = [
    "if labels is not None and labels.max() >= self.config.vocab_size:",
    "flattened_targets = labels.masked_select(labels_mask)",
    "nn.functional.ctc_loss(",
    "loss.backward()",  # of ctc_loss
]
HEADS = {
    LightHubertModel: (HubertModel, None),
    LightHubertForPreTraining: (HubertModel, None),
    LightHubertForCTC: (HubertForCTC, [[1, 2], [3, -100]]),
    LightHubertForSequenceClassification: (HubertForSequenceClassification, [0, 1]),
    LightHubertForAudioFrameClassification: (Wav2Vec2ForAudioFrameClassification, None),
    LightHubertForXVector: (Wav2Vec2ForXVector, [0, 1]),
}
NAMED = {MASK, *CTC}
"""Lines of transformers that wait. An x-vector waits twice for each recording besides."""


def waits_of(model: torch.nn.Module, labels: list | None) -> Counter[str]:
    """Of a padded batch of two recordings, forward and backward, in training and in evaluation mode."""
    model = model.to("meta")
    inputs = {"attention_mask": torch.ones(2, 16000, dtype=torch.long, device="meta")}
    if labels is not None:
        inputs["labels"] = torch.tensor(labels).to("meta")
    with Waits() as waits:
        for training in (True, False):
            outputs = model.train(training)(torch.zeros(2, 16000, device="meta"), **inputs)
            if (loss := outputs.get("loss")) is None:
                loss = sum(each.sum() for each in outputs.get("predictions") or [outputs[0]])
            loss.backward()
    return waits.lines


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("search_space", [TWO_DEEP, WINDOWED, None], ids=["supernet", "windows", "cut"])
@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_a_model_waits_no_more_often_than_stock_hubert(head, search_space, flavour):
    stock, labels = HEADS[head]
    config = tiny_config(search_space, ctc_zero_infinity=True, **flavour)
    kind = Wav2Vec2Config if "Wav2Vec2" in stock.__name__ else HubertConfig
    names = kind().to_dict().keys() - {"architectures", "model_type"}
    settings = {name: value for name, value in config.to_dict().items() if name in names}
    # SpecAugment of wav2vec 2.0 reads the lengths, that of HuBERT does not
    stock_config = kind(**settings | {"apply_spec_augment": kind is HubertConfig})
    ours, theirs = waits_of(head(config), labels), waits_of(stock(stock_config), labels)
    assert ours <= theirs
    assert ours.keys() <= NAMED or head is LightHubertForXVector


def test_masked_frames_are_replaced_without_a_wait():
    model = tiny_model(mask_time_prob=0.5).to("meta").train()
    audio = torch.zeros(2, 16000, device="meta")
    with Waits() as waits:
        model(audio, mask_time_indices=torch.ones(2, 49, dtype=torch.bool, device="meta"))
    assert not waits.lines


def test_what_waits_is_counted():
    values, mask = torch.zeros(3, device="meta"), torch.ones(3, dtype=torch.bool, device="meta")
    with Waits() as waits:
        bool(mask.any())
        values[mask] = torch.ones(2, device="meta")
        values[mask] = 0.0  # a fill
        read = values.tolist()
    assert read == [0.0] * 3
    written = 'values[mask] = torch.ones(2, device="meta")'
    assert waits.lines == dict.fromkeys(("bool(mask.any())", written, "read = values.tolist()"), 1)
