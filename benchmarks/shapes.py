"""Models at full size that benchmarks compare: subnets of the paper's spaces and of ours, stock HuBERT, and what
people would use instead."""

import dataclasses

import torch
from rivals import RIVALS, rival_gigamacs
from transformers import HubertConfig, HubertModel, PreTrainedModel

from modeling_lighthubert import LightHubertConfig, LightHubertModel, SearchSpace, Subnet
from modeling_lighthubert.profiling import macs_per_second


REFERENCE, TWO_LAYERS = "stock HuBERT Base", "DistilHuBERT's shape"
A_SMALL = SearchSpace.small().named["a_small"]
SUBNETS = {
    "largest": SearchSpace.tiny_to_base().largest,
    "a_base": Subnet.uniform(hidden_size=640, num_hidden_layers=12, num_attention_heads=10, intermediate_size=2560),
    "a_small": A_SMALL,
    "smallest of the small space": SearchSpace.small().smallest,
    "a_small, half the channels": dataclasses.replace(A_SMALL, conv_dim=(256,) * 7),
    "384 wide, narrow below": Subnet.uniform(384, 10, 4, 768, conv_dim=(128, 128, 128, 256, 256, 256, 384)),
    "smallest of tiny_to_base": SearchSpace.tiny_to_base().smallest,
}
ROWS = (REFERENCE, TWO_LAYERS, *SUBNETS)


def build(row: str) -> PreTrainedModel:
    """A model with random weights."""
    torch.manual_seed(0)
    if row in RIVALS:
        return RIVALS[row].build().eval()
    if row in SUBNETS:
        return LightHubertModel(cut_config(SUBNETS[row])).eval()
    return HubertModel(HubertConfig(num_hidden_layers=12 if row == REFERENCE else 2)).eval()


def cut_config(subnet: Subnet) -> LightHubertConfig:
    return LightHubertConfig(search_space=SearchSpace.tiny_to_base()).cut_to(subnet)


def gigamacs(row: str, seconds: float) -> float:
    """MACs for a second of audio, in clips of `seconds`. They depend on the shape alone."""
    if row in RIVALS:
        return rival_gigamacs(row, seconds)
    stock = Subnet.uniform(768, 12 if row == REFERENCE else 2, 12, 3072)
    with torch.device("meta"):
        return macs_per_second(LightHubertModel(cut_config(SUBNETS.get(row, stock))), seconds=seconds) / 1e9
