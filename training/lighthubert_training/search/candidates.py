"""Subnets that a budget allows: what each costs, how they are drawn at random, and how they are bred from parents."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from lighthubert_training.search.latency import LatencyTable
from modeling_lighthubert import LightHubertPreTrainedModel, SearchSpace, Subnet
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.measured_subnets import COSTS
from modeling_lighthubert.profiling import Cost, Profile, profile_subnet


class SubnetCosts:
    """Parameters, and MACs per second of audio in clips of one second, of any subnet of a supernet.

    It adds up the costs of parts, each computed once, because `profile_subnet` takes milliseconds, and a search asks
    for thousands of subnets.

    Args:
        latency: makes the milliseconds of a clip a cost, too.
    """

    def __init__(self, model: LightHubertPreTrainedModel, latency: LatencyTable | None = None):
        assert model.search_space is not None
        self.model, self.space, self.latency = model, model.search_space, latency
        self.layer, self.all_but_layers = cache(self._layer), cache(self._all_but_layers)

    def __call__(self, subnet: Subnet) -> dict[str, float]:
        """Costs by their names in `COSTS`."""
        subnet = self.space.resolve(subnet)
        windows = subnet.attention_window or (None,) * subnet.num_hidden_layers
        layers = zip(subnet.num_attention_heads, subnet.intermediate_size, windows, strict=True)
        total = self.all_but_layers(subnet.hidden_size, subnet.conv_dim)
        total = sum((self.layer(subnet.hidden_size, *layer) for layer in layers), total)
        costs: dict[str, float] = {"params": total.num_parameters, "macs": total.macs}
        return costs if self.latency is None else costs | {"latency_ms": self.latency(subnet)}

    def _layer(self, width: int, heads: int, units: int, window: int | None) -> Cost:
        """Cost of one transformer layer."""
        return self._profile(width, self.space.largest.conv_dim, heads, units, window).layers[0]

    def _all_but_layers(self, width: int, conv_dim: tuple[int, ...] | None) -> Cost:
        heads, units = self.space.num_attention_heads[0], int(width * self.space.ffn_ratio[0])
        window = None if self.space.attention_window is None else self.space.attention_window[0]
        profile = self._profile(width, conv_dim, heads, units, window)
        parts = [profile.feature_encoder, profile.projection, profile.position, profile.norm, profile.head or Cost()]
        return sum(parts, Cost())

    def _profile(
        self, width: int, conv_dim: tuple[int, ...] | None, heads: int, units: int, window: int | None
    ) -> Profile:
        """Profile of the shallowest subnet with such layers."""
        depth = self.space.num_hidden_layers[0]
        windows = None if window is None else (window,) * depth
        subnet = Subnet(width, (heads,) * depth, (units,) * depth, self.space.head_dim, conv_dim, windows)
        return profile_subnet(self.model, subnet)


@dataclass(frozen=True)
class Budget:
    """Limits on the subnets of a search.

    Attributes:
        limits: least and most of each cost that is limited, by the names in `COSTS`.
        hubert_exportable: whether a stock HuBERT has to be able to hold the subnet.
    """

    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    hubert_exportable: bool = False

    def excess(self, subnet: Subnet, costs: Mapping[str, float]) -> float:
        """How far `subnet` is from what is allowed, as a sum of fractions of the limits; 0 if it is allowed."""
        excesses = [
            max(least / costs[name] - 1, costs[name] / most - 1, 0.0) for name, (least, most) in self.limits.items()
        ]
        if self.hubert_exportable:
            most_heads = subnet.hidden_size / subnet.head_dim
            excesses += [max(heads / most_heads - 1, 0.0) for heads in subnet.num_attention_heads]
            excesses.append(float(not subnet.is_hubert_exportable))
        return sum(excesses)


def format_limit(cost: str, least: float, most: float) -> str:
    """A limit in words, such as `at most 27,000,000 parameters`."""
    ends = [f"at least {least:,.0f}"] if least > 0 else []
    ends += [f"at most {most:,.0f}"] if most < float("inf") else []
    return f"{' and '.join(ends)} {COSTS[cost]}"


class Candidates:
    """Subnets within a budget: drawn at random, or bred from two parents.

    Raises:
        UserError: the budget allows none. The message says what the smallest and the largest subnet cost.
    """

    def __init__(self, space: SearchSpace, costs: SubnetCosts, budget: Budget):
        self.space, self.costs, self.budget = space, costs, budget
        smallest, largest = costs(space.smallest), costs(space.largest)
        for name, (least, most) in budget.limits.items():
            if smallest[name] > most or largest[name] < least:
                raise UserError(
                    f"no subnet has {format_limit(name, least, most)}: the smallest has {smallest[name]:,.0f}, the"
                    f" largest {largest[name]:,.0f}"
                )
        self.draw(random.Random(0))

    def excess(self, subnet: Subnet) -> float:
        return self.budget.excess(subnet, self.costs(subnet))

    def draw(self, rng: random.Random) -> Subnet:
        """A random subnet of the space, moved into the budget by random steps that do not lead away from it."""
        for _ in range(10):
            if found := self.move_within(self.space.sample(rng), rng):
                return found
        asked = [format_limit(name, *ends) for name, ends in self.budget.limits.items()]
        asked += ["a stock HuBERT that can hold it"] if self.budget.hubert_exportable else []
        raise UserError(f"no subnet was found with {', '.join(asked)}: allow a wider range")

    def move_within(self, subnet: Subnet, rng: random.Random, num_steps: int = 300) -> Subnet | None:
        """The subnet, or where mutations that do not lead away from the budget bring it; `None` if not inside."""
        excess = self.excess(subnet)
        for _ in range(num_steps):
            if not excess:
                return subnet
            neighbour = self.space.mutate(subnet, rng)
            if (other := self.excess(neighbour)) <= excess:
                subnet, excess = neighbour, other
        return None

    def child(self, parents: Sequence[Subnet], rng: random.Random) -> Subnet:
        """Each gene from one of two of the parents, some of them redrawn (the paper's genome), within the budget."""
        one, other = rng.choice(parents), rng.choice(parents)
        mutant = self.space.mutate(self.space.crossover(one, other, rng), rng)
        return self.move_within(mutant, rng) or self.draw(rng)
