"""What jobs do with a model besides running it: a feature encoder that is frozen is computed once for all subnets.

Models are loaded by `modeling_lighthubert.loading`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from modeling_lighthubert import LightHubertPreTrainedModel


def has_fixed_feature_encoder(model: LightHubertPreTrainedModel) -> bool:
    """Whether the feature encoder gives the same features in all steps and for all subnets: it is frozen, and subnets
    do not choose its channels."""
    encoder = model.base_model.get_submodule("feature_extractor")
    is_frozen = not any(parameter.requires_grad for parameter in encoder.parameters())
    return is_frozen and (model.search_space is None or model.search_space.conv_dim is None)


@contextmanager
def computed_once(module: nn.Module, output: torch.Tensor | None) -> Iterator[None]:
    """Temporarily replaces `module.forward` by a constant, so that a frozen module is not recomputed for every subnet.

    Args:
        output: what the module returns inside the block, whatever its inputs. `None` changes nothing.
    """
    if output is None:
        yield
        return
    module.forward = lambda *inputs: output
    try:
        yield
    finally:
        del module.forward
