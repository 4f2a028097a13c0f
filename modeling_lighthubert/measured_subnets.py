"""Subnets of a supernet that a search has measured: `subnets.json` beside the weights names them by their size.

`from_pretrained(..., subnet="27M")`, `set_subnet("27M")` and `extract_subnet(max_params=27e6)` choose from them;
`run_subnet_search.py` writes the file.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Self

from transformers.utils import cached_file

from .search_space import SearchSpace, Subnet, search_space_from, subnet_from


SUBNETS_FILE = "subnets.json"
COSTS = {"params": "parameters", "macs": "MACs per second of audio", "latency_ms": "ms for a clip on this machine"}
"""The costs of a subnet by name, in words."""
SUFFIXES = {"G": 1e9, "M": 1e6, "k": 1e3}


@dataclass(frozen=True)
class MeasuredSubnet:
    """A subnet with what it costs and loses.

    Attributes:
        error: on the data of the search; which error it is, `MeasuredSubnets` says.
        costs: of the cut model, by the names in `COSTS`.
    """

    subnet: Subnet
    error: float
    costs: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        return {"error": self.error, **self.costs, "subnet": self.subnet.to_dict()}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """
        Raises:
            ValueError: it has no error, no parameters, no MACs or no subnet, or one that is none.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a measured subnet is a JSON object, not {str(values)[:80]}")
        figures = {name: values[name] for name in ("error", *COSTS) if name in values}
        for name in ("error", "params", "macs"):
            if name not in figures:
                raise ValueError(f"a measured subnet has {name}, which is missing from {str(values)[:80]}")
        for name, figure in figures.items():
            if isinstance(figure, bool) or not isinstance(figure, int | float) or not math.isfinite(figure):
                raise ValueError(f"{name} of a measured subnet is a number, not {figure!r}")
        return cls(subnet_from(values.get("subnet")), figures.pop("error"), figures)


@dataclass(frozen=True)
class MeasuredSubnets:
    """What a search found: the subnets that lose least for what they cost.

    Attributes:
        search_space: of the supernet.
        error: name of the error, such as `character error rate`.
        subnets: by name, the cheapest first.
    """

    search_space: SearchSpace
    error: str
    subnets: Mapping[str, MeasuredSubnet]

    @classmethod
    def of(cls, search_space: SearchSpace, error: str, subnets: Iterable[MeasuredSubnet]) -> Self:
        """Names each of the subnets by its number of parameters."""
        ordered = list(subnets)
        return cls(search_space, error, dict(zip(names_of([each.costs["params"] for each in ordered]), ordered)))

    def to_dict(self) -> dict[str, Any]:
        subnets = {name: each.to_dict() for name, each in self.subnets.items()}
        return {"error": self.error, "search_space": self.search_space.to_dict(), "subnets": subnets}

    @classmethod
    def from_json_file(cls, file: str | Path, search_space: SearchSpace) -> Self:
        """Reads the file of a supernet.

        Args:
            search_space: of the supernet.

        Raises:
            ValueError: it cannot be read, or is of a supernet with another search space; the message names the file.
        """
        try:
            values = json.loads(Path(file).read_text(encoding="utf-8"))
            if not isinstance(values, dict) or not isinstance(values.get("subnets"), dict) or not values["subnets"]:
                raise ValueError("it has no subnets")
            if search_space_from(values.get("search_space")) != search_space:
                raise ValueError("it is of another supernet, with another search space: search this one")
            subnets = {name: MeasuredSubnet.from_dict(each) for name, each in values["subnets"].items()}
            for each in subnets.values():
                search_space.resolve(each.subnet)
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{file} cannot be used: {error}") from error
        return cls(search_space, str(values.get("error")), subnets)

    def within(self, max_params: float | None = None, max_macs: float | None = None) -> str:
        """Name of the subnet with the least error that costs no more.

        Args:
            max_macs: per second of audio.

        Raises:
            ValueError: all cost more; the message names the one that is nearest.
        """
        limits = {"params": max_params, "macs": max_macs}
        asked = {name: limit for name, limit in limits.items() if limit is not None}

        def excess(name: str) -> float:
            return sum(max(0.0, self.subnets[name].costs[cost] / limit - 1) for cost, limit in asked.items())

        if any(not limit > 0 for limit in asked.values()):
            raise ValueError(f"max_params and max_macs have to be above 0, not {list(asked.values())}")
        if fitting := [name for name in self.subnets if not excess(name)]:
            return min(fitting, key=lambda name: self.subnets[name].error)
        nearest = min(self.subnets, key=excess)
        costs = " and ".join(f"{self.subnets[nearest].costs[cost]:,.0f} {COSTS[cost]}" for cost in asked)
        wanted = " and ".join(f"at most {limit:,.0f} {COSTS[cost]}" for cost, limit in asked.items())
        raise ValueError(f"no measured subnet has {wanted}: the nearest is {nearest!r} with {costs}")


def names_of(sizes: Sequence[float]) -> list[str]:
    """A name for each size, such as `27M`, with as many decimals as tell it from the others; equal sizes are
    numbered."""
    names: list[str] = []
    for at, size in enumerate(sizes):
        others = {other for other in sizes if other != size}
        names.append(
            next(
                name
                for decimals in count()
                if (name := short(size, decimals)) not in {short(other, decimals) for other in others}
            )
        )
        if number := list(sizes[:at]).count(size):
            names[-1] += f"-{number + 1}"
    return names


def short(size: float, decimals: int) -> str:
    """`27412345` without decimals: `27M`."""
    suffix, unit = next(((suffix, unit) for suffix, unit in SUFFIXES.items() if size >= unit), ("", 1.0))
    return f"{size / unit:.{decimals}f}{suffix}"


def measured_subnets(name_or_path: str | None, search_space: SearchSpace) -> MeasuredSubnets | None:
    """Of the supernet in a folder or on the Hub; `None` if it has no such file.

    Raises:
        ValueError: it has one that cannot be used.
    """
    if not name_or_path:
        return None
    try:
        file = cached_file(name_or_path, SUBNETS_FILE)
    except OSError:  # no such file, no such folder, or the Hub cannot be reached
        return None
    return None if file is None else MeasuredSubnets.from_json_file(file, search_space)


def resolve(search_space: SearchSpace, subnet: Any, name_or_path: str | None) -> Subnet:
    """As [`SearchSpace.resolve`], where names may also be those of the measured subnets of that supernet."""
    if not isinstance(subnet, str) or subnet in search_space.named:
        return search_space.resolve(subnet)
    measured = measured_subnets(name_or_path, search_space)
    if measured is None or subnet not in measured.subnets:
        names = [*search_space.named, *(measured.subnets if measured else ())]
        raise ValueError(f"subnet {subnet!r} is not known in this search space: choose from {names}")
    return search_space.resolve(measured.subnets[subnet].subnet)
