"""Which subnets an optimiser step trains, and which an evaluation measures.

A draw depends on seed and step only, so that a resumed run, and every process of a distributed one, draws the same.
"""

import dataclasses
import math
import random

from modeling_lighthubert import SearchSpace, Subnet


SAMPLING_STRATEGIES = ("largest", "uniform", "uniform_size", "sandwich")


def draw_subnets(
    search_space: SearchSpace | None,
    sampling: str,
    seed: int,
    step: int,
    num_random: int = 1,
    process_index: int | None = None,
) -> list[Subnet | None]:
    """The subnets that one optimiser step trains, in order.

    Args:
        search_space: `None` for a student that is one model; then the only entry is `None`.
        sampling: `"largest"` (stage 1), `"uniform"` (`num_random` at random, each choice independent: with one of
            them, stage 2 of the paper), `"uniform_size"` (the same, by `sample_by_size`), or `"sandwich"` (smallest,
            `num_random` by `"uniform"`, and the largest last; from slimmable networks, arXiv 1903.05134, not in the
            paper).
        num_random: number of random subnets in a step.
        process_index: draws for this process alone. By default all processes draw the same.

    Raises:
        ValueError: no such strategy.
    """
    if sampling not in SAMPLING_STRATEGIES:
        raise ValueError(f"sampling={sampling!r} is not known: choose from {list(SAMPLING_STRATEGIES)}")
    if search_space is None:
        return [None]
    if sampling == "largest":
        return [search_space.largest]
    rng = random.Random(f"{seed}-{step}" if process_index is None else f"{seed}-{step}-{process_index}")
    if sampling == "uniform_size":
        return [sample_by_size(search_space, rng) for _ in range(num_random)]
    drawn: list[Subnet | None] = [search_space.sample(rng) for _ in range(num_random)]
    return drawn if sampling == "uniform" else [search_space.smallest, *drawn, search_space.largest]


def evaluation_subnets(space: SearchSpace | None, num_random: int) -> dict[str, Subnet | None]:
    """The subnets that an evaluation measures, by name: the named ones, and `num_random` others, always the same. A
    student that is one model is called `model`."""
    if space is None:
        return {"model": None}
    rng = random.Random("evaluation")
    return {**space.named, **{f"random_{number}": space.sample(rng) for number in range(num_random)}}


def num_matrix_weights(subnet: Subnet) -> int:
    """Number of weights of the matrices in the layers of `subnet`: nearly all that subnets differ in."""
    attention = 4 * subnet.head_dim * sum(subnet.num_attention_heads)
    return subnet.hidden_size * (attention + 2 * sum(subnet.intermediate_size))


def sample_by_size(search_space: SearchSpace, rng: random.Random) -> Subnet:
    """Draws a subnet whose size is uniform between the smallest and the largest.

    With every choice uniform and independent, sizes pile up around those of each width, and the ends are almost never
    trained. Here a size is drawn first, then one of the widths and depths that can have it. Heads and ratios rise
    together from least to most, each along its own random path (a binomial quantile of the common level), up to the
    level at which the size is met. Channels of convolutions and windows hardly change the size and are drawn
    independently.
    """
    size = rng.uniform(num_matrix_weights(search_space.smallest), num_matrix_weights(search_space.largest))

    def subnet(width: int, level: float, at_layers: list[tuple[float, float]]) -> Subnet:
        heads = tuple(_quantile(search_space.num_attention_heads, level, at) for at, _ in at_layers)
        ratios = [_quantile(search_space.ffn_ratio, level, at) for _, at in at_layers]
        return Subnet(width, heads, tuple(int(width * ratio) for ratio in ratios), search_space.head_dim)

    def distance(width: int, depth: int) -> float:
        least, most = (num_matrix_weights(subnet(width, level, [(0.5, 0.5)] * depth)) for level in (0.0, 1.0))
        return max(least - size, size - most, 0.0)

    shapes = {
        (width, depth): distance(width, depth)
        for width in search_space.hidden_size
        for depth in search_space.num_hidden_layers
    }
    nearest = min(shapes.values())
    width, depth = rng.choice([shape for shape, gap in shapes.items() if gap == nearest])
    at_layers = [(rng.random(), rng.random()) for _ in range(depth)]
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        too_small = num_matrix_weights(subnet(width, middle, at_layers)) < size
        low, high = (middle, high) if too_small else (low, middle)
    candidates = [subnet(width, level, at_layers) for level in (low, high)]
    nearest_one = min(candidates, key=lambda candidate: abs(num_matrix_weights(candidate) - size))
    return dataclasses.replace(
        nearest_one,
        conv_dim=search_space.sample_conv_dim(rng),
        attention_window=search_space.sample_attention_window(depth, rng),
    )


def _quantile(choices: tuple, level: float, at: float):
    """Entry of `choices` at the quantile `at` of a binomial distribution with success probability `level`."""
    trials, cumulated = len(choices) - 1, 0.0
    for successes in range(trials):
        cumulated += math.comb(trials, successes) * level**successes * (1 - level) ** (trials - successes)
        if at < cumulated:
            return choices[successes]
    return choices[-1]
