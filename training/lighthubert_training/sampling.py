"""Which subnets an optimiser step trains, and which an evaluation measures.

A draw depends on seed and step only, so that a resumed run, and every process of a distributed one, draws the same.
Where losses matter, it depends on what `LossEstimate` knows of them, too, which is the same on all processes.
"""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from modeling_lighthubert import SearchSpace, Subnet


SAMPLING_STRATEGIES = ("largest", "uniform", "uniform_size", "sandwich")
DISTILLATION_STRATEGIES = (*SAMPLING_STRATEGIES, "size_ends", "worst_up", "best_up")
CANDIDATES = 3
"""How many subnets of a size `"worst_up"` and `"best_up"` choose one of."""


class LossEstimate:
    """What a subnet's loss would be now: a regression of the losses of the steps on the subnets' sizes.

    Features are width, depth, and the means over layers of heads and FFN units. The weight of a loss falls with the
    number of steps since, as all losses do in training.
    """

    MEMORY, RIDGE = 200, 1e-3

    def __init__(self) -> None:
        self.products, self.targets = np.zeros((5, 5)), np.zeros(5)

    @staticmethod
    def features(space: SearchSpace, subnet: Subnet) -> np.ndarray:
        """Sizes as shares of the largest subnet's, and a constant."""

        def sizes(of: Subnet) -> np.ndarray:
            heads, units = np.mean(of.num_attention_heads), np.mean(of.intermediate_size) / of.hidden_size
            return np.array([1.0, of.hidden_size, of.num_hidden_layers, heads, units])

        return sizes(subnet) / sizes(space.largest)

    def update(self, space: SearchSpace, subnet: Subnet, loss: float) -> None:
        """Adds the loss of a step."""
        features, kept = self.features(space, subnet), 1 - 1 / self.MEMORY
        self.products = kept * self.products + np.outer(features, features)
        self.targets = kept * self.targets + loss * features

    def __call__(self, space: SearchSpace, subnet: Subnet) -> float:
        """The estimate; 0 before the first loss."""
        weights = np.linalg.solve(self.products + self.RIDGE * np.eye(5), self.targets)
        return float(self.features(space, subnet) @ weights)

    def state_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"products": self.products.tolist(), "targets": self.targets.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.products, self.targets = np.array(state["products"]), np.array(state["targets"])


def draw_subnets(
    search_space: SearchSpace | None,
    sampling: str,
    seed: int,
    step: int,
    num_random: int = 1,
    process_index: int | None = None,
    ends_prob: float = 0.0,
    estimate: LossEstimate | None = None,
) -> list[Subnet | None]:
    """The subnets that one optimiser step trains, in order.

    Args:
        search_space: `None` for a student that is one model; then the only entry is `None`.
        sampling: `"largest"` (stage 1), `"uniform"` (`num_random` at random, each choice independent: with one of
            them, stage 2 of the paper), `"uniform_size"` (the same, by `SearchSpace.sample_by_size`), or `"sandwich"`
            (smallest, `num_random` by `"uniform"`, and the largest last; from slimmable networks, arXiv 1903.05134,
            not in the paper). In distillation also `"size_ends"`: `"uniform_size"`, but each of `num_random` is the
            smallest, or the largest, with `ends_prob`; and `"worst_up"` and `"best_up"`: of three by
            `"uniform_size"`, of one size, that with the highest, or lowest, loss (arXiv 2011.09011).
        num_random: number of random subnets in a step.
        process_index: draws for this process alone. By default all processes draw the same.
        ends_prob: of `"size_ends"`.
        estimate: of losses, for `"worst_up"` and `"best_up"`.

    Raises:
        ValueError: no such strategy.
    """
    if sampling not in DISTILLATION_STRATEGIES:
        raise ValueError(f"sampling={sampling!r} is not known: choose from {list(DISTILLATION_STRATEGIES)}")
    if search_space is None:
        return [None]
    if sampling == "largest":
        return [search_space.largest]
    rng = random.Random(f"{seed}-{step}" if process_index is None else f"{seed}-{step}-{process_index}")
    if sampling == "uniform_size":
        return [search_space.sample_by_size(rng) for _ in range(num_random)]
    if sampling == "size_ends":
        ends = [rng.random() for _ in range(num_random)]
        others = [search_space.sample_by_size(rng) for _ in ends]
        return [
            search_space.smallest if end < ends_prob else search_space.largest if end < 2 * ends_prob else other
            for end, other in zip(ends, others, strict=True)
        ]
    if sampling in ("worst_up", "best_up"):
        loss, choose = estimate or LossEstimate(), max if sampling == "worst_up" else min
        sizes = [search_space.sample_size(rng) for _ in range(num_random)]
        drawn_of_size = [[search_space.sample_by_size(rng, size) for _ in range(CANDIDATES)] for size in sizes]
        return [choose(candidates, key=lambda each: loss(search_space, each)) for candidates in drawn_of_size]
    drawn: list[Subnet | None] = [search_space.sample(rng) for _ in range(num_random)]
    return drawn if sampling == "uniform" else [search_space.smallest, *drawn, search_space.largest]


def evaluation_subnets(space: SearchSpace | None, num_random: int) -> dict[str, Subnet | None]:
    """The subnets that an evaluation measures, by name: the named ones, and `num_random` others, always the same. A
    student that is one model is called `model`."""
    if space is None:
        return {"model": None}
    rng = random.Random("evaluation")
    return {**space.named, **{f"random_{number}": space.sample(rng) for number in range(num_random)}}
