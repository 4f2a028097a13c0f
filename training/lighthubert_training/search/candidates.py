"""Which subnets a budget allows: what each costs, and how they are drawn and bred."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from lighthubert_training.search.latency import LatencyTable
from modeling_lighthubert import LightHubertPreTrainedModel, SearchSpace, Subnet
from modeling_lighthubert.profiling import profile_subnet


COSTS = {"params": "parameters", "macs": "MACs per second of audio", "latency_ms": "ms for a clip on this machine"}
"""What a subnet costs, by name."""


class SubnetCosts:
    """Parameters, and MACs per second of audio in clips of a second, of any subnet of a supernet.

    What `profile_subnet` says in milliseconds is added up here from few different layers: a search asks for thousands.

    Args:
        latency: with it, milliseconds for a clip are a cost, too.
    """

    def __init__(self, model: LightHubertPreTrainedModel, latency: LatencyTable | None = None):
        self.model, self.space, self.latency = model, model.search_space, latency
        self.profile = cache(self._profile)

    def __call__(self, subnet: Subnet) -> dict[str, float]:
        subnet = self.space.resolve(subnet)
        width, widest = subnet.hidden_size, self.space.largest.conv_dim
        windows = subnet.attention_window or (None,) * subnet.num_hidden_layers
        layers = list(zip(subnet.num_attention_heads, subnet.intermediate_size, windows, strict=True))
        least = (self.space.num_attention_heads[0], int(width * self.space.ffn_ratio[0]), None)
        parts = [self.profile(width, subnet.conv_dim, least)[0]]
        parts += [self.profile(width, widest, layer)[1] for layer in layers]
        costs = {name: sum(part[name] for part in parts) for name in ("params", "macs")}
        return costs if self.latency is None else costs | {"latency_ms": self.latency(subnet)}

    def _profile(
        self, width: int, conv_dim: tuple[int, ...] | None, layer: tuple[int, int, int | None]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Of all that is no layer, and of one layer with these heads, FFN units and window."""
        depth, (heads, units, window) = self.space.num_hidden_layers[0], layer
        windows = None if window is None else (window,) * depth
        subnet = Subnet(width, (heads,) * depth, (units,) * depth, self.space.head_dim, conv_dim, windows)
        earlier = self.model.subnet
        self.model.select_unchecked(subnet)
        costs = profile_subnet(self.model)
        self.model.set_subnet(earlier)
        of_layers = [cost for cost in costs if cost.part.startswith("layer ") and "heads" in cost.part]
        rest = [cost for cost in costs if cost not in of_layers]
        return tuple(
            {"params": sum(cost.num_parameters for cost in part), "macs": sum(cost.macs for cost in part)}
            for part in (rest, of_layers[:1])
        )


@dataclass(frozen=True)
class Budget:
    """What a subnet may be.

    Attributes:
        limits: least and most of each cost that is limited, by the names in `COSTS`.
        hubert_exportable: whether a stock HuBERT has to be able to hold it.
    """

    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    hubert_exportable: bool = False

    def excess(self, subnet: Subnet, costs: Mapping[str, float]) -> float:
        """How far `subnet` is from what is allowed; 0 if it is allowed."""
        shares = [
            max(least / costs[name] - 1, costs[name] / most - 1, 0.0) for name, (least, most) in self.limits.items()
        ]
        if self.hubert_exportable:
            width = subnet.hidden_size / subnet.head_dim
            shares += [max(heads / width - 1, 0.0) for heads in subnet.num_attention_heads]
            shares.append(float(not subnet.is_hubert_exportable))
        return sum(shares)


def described(cost: str, low: float, high: float) -> str:
    """A limit in words."""
    ends = [f"at least {low:,.0f}"] if low > 0 else []
    ends += [f"at most {high:,.0f}"] if high < float("inf") else []
    return f"{' and '.join(ends)} {COSTS[cost]}"


class Candidates:
    """Subnets within a budget: drawn at random, or bred from two.

    Raises:
        ValueError: the budget allows none; the message says what the least, or the most, is.
    """

    def __init__(self, space: SearchSpace, costs: SubnetCosts, budget: Budget):
        self.space, self.costs, self.budget = space, costs, budget
        least, most = costs(space.smallest), costs(space.largest)
        for name, (low, high) in budget.limits.items():
            if least[name] > high or most[name] < low:
                raise ValueError(
                    f"no subnet has {described(name, low, high)}: the smallest has {least[name]:,.0f}, the largest"
                    f" {most[name]:,.0f}"
                )
        self.draw(random.Random(0))

    def excess(self, subnet: Subnet) -> float:
        return self.budget.excess(subnet, self.costs(subnet))

    def draw(self, rng: random.Random) -> Subnet:
        """A random subnet of the space, or where it walks into the budget, by random steps that do not lead away."""
        for _ in range(10):
            if found := self.within(self.space.sample(rng), rng):
                return found
        asked = [described(name, *ends) for name, ends in self.budget.limits.items()]
        asked += ["a stock HuBERT that can hold it"] if self.budget.hubert_exportable else []
        raise ValueError(f"no subnet was found with {', '.join(asked)}: allow a wider range")

    def within(self, subnet: Subnet, rng: random.Random, steps: int = 300) -> Subnet | None:
        excess = self.excess(subnet)
        for _ in range(steps):
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
        return self.within(mutant, rng) or self.draw(rng)
