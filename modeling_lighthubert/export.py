"""Exports of a cut model to formats that need no code of ours: `to_hubert` gives a stock HuBERT of transformers."""

from dataclasses import fields

import torch
from torch import nn
from transformers import HubertConfig, HubertForCTC, HubertForSequenceClassification, HubertModel
from transformers.activations import ACT2FN
from transformers.models.hubert.modeling_hubert import HubertPreTrainedModel

from . import LightHubertForCTC, LightHubertForSequenceClassification, LightHubertModel, LightHubertPreTrainedModel


HUBERT_CLASSES: dict[type[LightHubertPreTrainedModel], type[HubertPreTrainedModel]] = {
    LightHubertModel: HubertModel,
    LightHubertForCTC: HubertForCTC,
    LightHubertForSequenceClassification: HubertForSequenceClassification,
}


def to_hubert(model: LightHubertPreTrainedModel) -> HubertPreTrainedModel:
    """A stock `HubertModel`, `HubertForCTC` or `HubertForSequenceClassification` with the answers of `model`.

    All layers of a HuBERT have the same number of heads and FFN units. Layers that have fewer are filled up with
    zeros, which changes nothing: a zero value head adds zero, and so does a unit whose activation of zero is zero.

    Args:
        model: a cut model, or a supernet, whose selected subnet is exported.

    Raises:
        ValueError: transformers has no such HuBERT head, or a stock HuBERT cannot hold the subnet exactly
            (`Subnet.is_hubert_exportable` tells beforehand); the message names the layer.
    """
    hubert_class = HUBERT_CLASSES.get(type(model))
    if hubert_class is None:
        allowed = [ours.__name__ for ours in HUBERT_CLASSES]
        raise ValueError(f"transformers has no HuBERT like {type(model).__name__}: export one of {allowed}")
    subnet = model.subnet
    if subnet.hubert_obstacle:
        raise ValueError(f"a stock HuBERT cannot hold this subnet exactly: {subnet.hubert_obstacle}")
    if model.search_space is not None:
        model = model.extract_subnet()
    config = model.config
    if len(set(subnet.intermediate_size)) > 1 and ACT2FN[config.hidden_act](torch.zeros(1)) != 0:
        narrow = subnet.intermediate_size.index(min(subnet.intermediate_size))
        raise ValueError(
            f"a stock HuBERT cannot hold this subnet exactly: layer {narrow} has fewer FFN units than others, and"
            f" {config.hidden_act}(0) is not 0"
        )
    shared = {field.name: getattr(config, field.name) for field in fields(HubertConfig)}
    shared |= {"num_attention_heads": subnet.hidden_size // subnet.head_dim, "architectures": None}
    with torch.device("meta"):
        hubert = hubert_class(HubertConfig(**shared))
    hubert.set_attn_implementation(config._attn_implementation)
    state = model.state_dict()
    hubert.load_state_dict(
        {name: _zero_padded(state[name], like) for name, like in hubert.state_dict().items()}, assign=True
    )
    return hubert.train(model.training)


def _zero_padded(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`tensor` in the front corner of zeros of the shape of `like`."""
    missing = [amount for have, want in zip(tensor.shape, like.shape, strict=True) for amount in (want - have, 0)]
    return nn.functional.pad(tensor.detach(), missing[::-1]).clone()
