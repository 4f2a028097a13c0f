"""A moving average of the student's weights, which is evaluated and saved in their place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class AveragedWeights:
    """The moving average of a model's weights that learn. Buffers, and frozen weights, are the model's own.

    Args:
        decay: share of the average that stays in a step; less in the first steps, in which weights that were drawn at
            random would linger: step n counts at least 9 / (10 + n).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.averages = {name: weight.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Adds the weights after `step`, which are counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, weight in self.weights.items():
            self.averages[name].lerp_(weight, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block, the model has the averages for weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """Exchanges the model's weights and their averages."""
        for name, weight in self.weights.items():
            weight.data, self.averages[name] = self.averages[name], weight.data

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self.averages)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, average in self.averages.items():
            average.copy_(state[name])
