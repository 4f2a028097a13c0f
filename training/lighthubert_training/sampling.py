"""Which subnets an optimiser step trains, and which an evaluation measures.

A draw depends on seed and step only, so that a resumed run, and every process of a distributed one, draws the same.
"""

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
            them, stage 2 of the paper), `"uniform_size"` (the same, by `SearchSpace.sample_by_size`), or `"sandwich"`
            (smallest, `num_random` by `"uniform"`, and the largest last; from slimmable networks, arXiv 1903.05134,
            not in the paper).
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
        return [search_space.sample_by_size(rng) for _ in range(num_random)]
    drawn: list[Subnet | None] = [search_space.sample(rng) for _ in range(num_random)]
    return drawn if sampling == "uniform" else [search_space.smallest, *drawn, search_space.largest]


def evaluation_subnets(space: SearchSpace | None, num_random: int) -> dict[str, Subnet | None]:
    """The subnets that an evaluation measures, by name: the named ones, and `num_random` others, always the same. A
    student that is one model is called `model`."""
    if space is None:
        return {"model": None}
    rng = random.Random("evaluation")
    return {**space.named, **{f"random_{number}": space.sample(rng) for number in range(num_random)}}
