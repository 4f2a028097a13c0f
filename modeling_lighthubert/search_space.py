"""What a supernet holds, in plain Python: `Subnet` names one architecture, `SearchSpace` the set a supernet is
trained for.

Both are frozen values. They know nothing of torch, compare by content, and go to JSON and back. Sources: sections 2
and 3 of the LightHuBERT paper (arXiv 2203.15610) and the released code, whose dictionaries are read as well.
"""

import json
import math
import operator
import random
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar


T = TypeVar("T")
LARGEST_SIZE, MOST_LAYERS, MOST_CHOICES, MOST_WAYS = 1_000_000, 1000, 100, 1_000_000
"""What a subnet may have: width, heads or units of a layer, and layers. What a search space may choose from, and ways
to choose all convolutions. More is a mistake in a file, and would take memory and time without end."""


def kept_layers(num_hidden_layers: int, depth: int) -> tuple[int, ...]:
    """Which layers (0-based) of a supernet stay in a subnet of `depth` layers.

    Every fourth layer, counted from the top, is dropped first, highest first; then the layers below those, and so on.
    For 12 layers this drops 11, 7, 3, 10, 6, 2 in that order, which is the table in the released code; the paper gives
    no rule, so for supernets of another depth this one is our choice. The kept sets are nested.
    """
    if not 1 <= depth <= num_hidden_layers:
        raise ValueError(
            f"a subnet of a {num_hidden_layers}-layer supernet has 1 to {num_hidden_layers} layers, not {depth}"
        )
    from_top = sorted(range(num_hidden_layers), key=lambda position: (position % 4, position))
    dropped = {num_hidden_layers - 1 - position for position in from_top[: num_hidden_layers - depth]}
    return tuple(layer for layer in range(num_hidden_layers) if layer not in dropped)


@cache
def nondecreasing_choices(choices: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """All ways to choose a width for each convolution so that none is narrower than the one before it.

    The first convolutions see the most frames, so this is where narrow ones save the most.
    """
    ways: list[tuple[int, ...]] = [()]
    for widths in choices:
        ways = [(*way, width) for way in ways for width in widths if not way or width >= way[-1]]
    return tuple(ways)


def _span(window: int | None) -> float:
    """How far a window reaches: `None` is everything."""
    return math.inf if window is None else window


def count_nondecreasing(choices: Sequence[Sequence[int]]) -> int:
    """Number of `nondecreasing_choices`, without making them."""
    ways = {0: 1}  # by the width of the last convolution
    for widths in choices:
        ways = {width: sum(count for last, count in ways.items() if last <= width) for width in widths}
    return sum(ways.values())


def _short(value: Any) -> str:
    """A value as messages show it."""
    return reprlib.repr(value)


def _list(name: str, value: Any, most: int, what: str = "with one value for each layer") -> list[Any]:
    if not isinstance(value, Iterable) or isinstance(value, str | Mapping):
        raise ValueError(f"{name} is a list {what}, not {_short(value)}")
    if len(items := list(islice(value, most + 1))) > most:
        raise ValueError(f"{name} is a list {what}, of at most {most:,}")
    return items


def _positive_number(name: str, value: Any, most: int = LARGEST_SIZE) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{name} must be positive numbers, not {_short(value)}")
    if value > most:
        raise ValueError(f"{name} must be at most {most:,}, not {_short(value)}")
    return float(value)


def _whole_number(name: str, value: Any, most: int = LARGEST_SIZE) -> int:
    if not _positive_number(name, value, most).is_integer():
        raise ValueError(f"{name} must be whole positive numbers, not {_short(value)}")
    return int(value)


def _rename(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in values.items()}


def _check_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    required = [field.name for field in fields(cls) if field.default is MISSING]  # type: ignore[arg-type]
    unknown, missing = sorted(set(values) - set(known)), [name for name in required if name not in values]
    if unknown:
        raise ValueError(
            f"{cls.__name__} does not know {_short(unknown)}: it has {known}. If the file was written by a newer"
            " version of LightHuBERT, update this one"
        )
    if missing:
        raise ValueError(f"{cls.__name__} needs {missing}")
    return dict(values)


def _quantile(choices: tuple[T, ...], level: float, at: float) -> T:
    """Entry of `choices` at the quantile `at` of a binomial distribution with success probability `level`."""
    trials, cumulated = len(choices) - 1, 0.0
    for successes in range(trials):
        cumulated += math.comb(trials, successes) * level**successes * (1 - level) ** (trials - successes)
        if at < cumulated:
            return choices[successes]
    return choices[-1]


class JsonValue(ABC):
    """JSON for a frozen dataclass of numbers and tuples."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON; without what is `None`."""

        def plain(value: Any) -> Any:
            return [plain(item) for item in value] if isinstance(value, tuple) else value

        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: plain(value) for name, value in values.items() if value is not None}

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict())

    def to_json_file(self, json_file_path: str | Path) -> None:
        Path(json_file_path).write_text(self.to_json_string() + "\n", encoding="utf-8")

    @classmethod
    @abstractmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""

    @classmethod
    def from_json_string(cls, text: str) -> Self:
        try:
            values = json.loads(text)
        except RecursionError:
            raise ValueError(f"a {cls.__name__} is a JSON object, not lists in lists: {text[:80]!r}") from None
        if not isinstance(values, dict):
            raise ValueError(f"a {cls.__name__} is a JSON object, not {text[:80]!r}")
        return cls.from_dict(values)

    @classmethod
    def from_json_file(cls, json_file_path: str | Path) -> Self:
        return cls.from_json_string(Path(json_file_path).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Subnet(JsonValue):
    """One architecture: a width, and for every layer its attention heads and its FFN size.

    Args:
        hidden_size: width of the residual stream, the same in all layers.
        num_attention_heads: heads of each layer; attention in layer i is `head_dim * num_attention_heads[i]` wide,
            whatever `hidden_size` is.
        intermediate_size: FFN units of each layer.
        head_dim: size of one head. It belongs to the supernet and is the same for all its subnets.
        conv_dim: channels of each convolution of the feature encoder, `None` for all that there are. Not in the paper.
        attention_window: for each layer, how many frames of 20 ms on each side a frame attends to, `None` for all.
            `None` if all layers attend to everything, as in the paper.
    """

    hidden_size: int
    num_attention_heads: tuple[int, ...]
    intermediate_size: tuple[int, ...]
    head_dim: int = 64
    conv_dim: tuple[int, ...] | None = None
    attention_window: tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("num_attention_heads", "intermediate_size", "conv_dim"):
            value = getattr(self, name)
            if name == "conv_dim" and value is None:
                continue
            items = _list(f"subnet {name}", value, MOST_LAYERS)
            object.__setattr__(self, name, tuple(_whole_number(name, item) for item in items))
        object.__setattr__(self, "hidden_size", _whole_number("hidden_size", self.hidden_size))
        object.__setattr__(self, "head_dim", _whole_number("head_dim", self.head_dim))
        if not self.num_attention_heads or len(self.num_attention_heads) != len(self.intermediate_size):
            raise ValueError(
                "subnet num_attention_heads and intermediate_size need one value for each layer, but have"
                f" {len(self.num_attention_heads)} and {len(self.intermediate_size)}"
            )
        if self.attention_window is not None:
            self._set_attention_window(_list("subnet attention_window", self.attention_window, MOST_LAYERS))

    def _set_attention_window(self, windows: list[int | None]) -> None:
        if len(windows) != self.num_hidden_layers:
            raise ValueError(
                f"subnet attention_window needs one value for each layer, but has {len(windows)} for"
                f" {self.num_hidden_layers} layers"
            )
        checked = tuple(None if window is None else _whole_number("attention_window", window) for window in windows)
        object.__setattr__(self, "attention_window", None if set(checked) == {None} else checked)

    @classmethod
    def uniform(
        cls,
        hidden_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        intermediate_size: int,
        head_dim: int = 64,
        conv_dim: tuple[int, ...] | None = None,
    ) -> Self:
        """A subnet whose layers are all alike."""
        heads, units = (num_attention_heads,) * num_hidden_layers, (intermediate_size,) * num_hidden_layers
        return cls(hidden_size, heads, units, head_dim, conv_dim)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.num_attention_heads)

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """Attention window of each layer, `None` for everything."""
        return self.attention_window or (None,) * self.num_hidden_layers

    @property
    def num_matrix_weights(self) -> int:
        """Number of weights of the matrices in the layers: nearly all that subnets differ in."""
        attention = 4 * self.head_dim * sum(self.num_attention_heads)
        return self.hidden_size * (attention + 2 * sum(self.intermediate_size))

    @property
    def hubert_obstacle(self) -> str | None:
        """Why a stock `HubertModel` cannot hold this subnet exactly, or `None` if it can.

        HuBERT derives the size of a head from `hidden_size / num_attention_heads` and has no attention wider than
        `hidden_size`.
        """
        for layer, window in enumerate(self.attention_window or ()):
            if window is not None:
                return f"layer {layer} attends to no more than {window} frames on each side"
        if self.hidden_size % self.head_dim:
            return f"hidden_size={self.hidden_size} is not a multiple of the head size {self.head_dim}"
        for layer, heads in enumerate(self.num_attention_heads):
            if heads * self.head_dim > self.hidden_size:
                return (
                    f"layer {layer} has {heads} heads of {self.head_dim}, together wider than"
                    f" hidden_size={self.hidden_size}"
                )
        return None

    @property
    def is_hubert_exportable(self) -> bool:
        """Whether a stock `HubertModel` can hold this subnet exactly."""
        return self.hubert_obstacle is None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads our keys, or those of the released code.

        The latter are `embed_dim`, `heads_num`, `atten_dim`, `ffn_embed`, `layer_num` and `slide_wsz`. Windows other
        than `"global"` are refused: what the released code does in them is not exact.
        """
        values = dict(values)
        if "embed_dim" in values:
            heads = values.pop("heads_num", None)
            attention = values.pop("atten_dim", None)
            if heads is None:
                raise ValueError(f"subnet in the keys of the released code needs heads_num; given: {sorted(values)}")
            windows = _list("subnet slide_wsz", values.pop("slide_wsz", []), MOST_LAYERS)
            if any(window != "global" for window in windows):
                raise ValueError(f"subnet slide_wsz={_short(windows)}: only 'global' attention is supported")
            heads = [_whole_number("heads_num", item) for item in _list("subnet heads_num", heads, MOST_LAYERS)]
            head_dim = 64
            if attention is not None:
                attention = _list("subnet atten_dim", attention, MOST_LAYERS)
                if len(attention) != len(heads) or not heads:
                    raise ValueError(f"subnet atten_dim and heads_num have {len(attention)} and {len(heads)} values")
                head_dim = _whole_number("atten_dim", attention[0]) // heads[0]
                if attention != [head_dim * count for count in heads]:
                    raise ValueError(
                        f"subnet atten_dim={_short(attention)} is not one head size times heads_num={_short(heads)}"
                    )
            values = _rename(
                values,
                {"embed_dim": "hidden_size", "ffn_embed": "intermediate_size", "layer_num": "num_hidden_layers"},
            ) | {"num_attention_heads": heads, "head_dim": head_dim}
        depth = values.pop("num_hidden_layers", None)
        subnet = cls(**_check_fields(cls, values))
        if depth is not None and depth != subnet.num_hidden_layers:
            raise ValueError(
                f"subnet lists have {subnet.num_hidden_layers} layers, but num_hidden_layers={_short(depth)}"
            )
        return subnet

    def __str__(self) -> str:
        def short(values: tuple[int | None, ...]) -> str:
            names = ["all" if value is None else str(value) for value in values]
            return names[0] if len(set(names)) == 1 else "-".join(names)

        return (
            f"hidden_size={self.hidden_size}, num_hidden_layers={self.num_hidden_layers},"
            f" num_attention_heads={short(self.num_attention_heads)},"
            f" intermediate_size={short(self.intermediate_size)}"
            + (f", conv_dim={short(self.conv_dim)}" if self.conv_dim is not None else "")
            + (f", attention_window={short(self.attention_window)}" if self.attention_window is not None else "")
        )


NAMED_SUBNETS = {
    "a_small": Subnet.uniform(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536),
    "a_base": Subnet.uniform(hidden_size=640, num_hidden_layers=12, num_attention_heads=10, intermediate_size=2560),
}
"""The subnets that the paper names (its table 2)."""


@dataclass(frozen=True)
class SearchSpace(JsonValue):
    """The subnets a supernet was trained for: every combination of the choices below.

    Width and depth are chosen once for a subnet; heads, FFN ratio and attention window are chosen for each layer on
    its own, and so are the channels of the convolutions, except that none has fewer than the one before it.

    Args:
        hidden_size: widths to choose from.
        num_attention_heads: numbers of heads to choose from.
        ffn_ratio: FFN sizes to choose from, as multiples of the chosen width.
        num_hidden_layers: depths to choose from. `kept_layers` says which layers stay.
        head_dim: size of one head.
        conv_dim: for each convolution of the feature encoder, channels to choose from. With `None`, as in the paper,
            all subnets have all channels.
        attention_window: windows to choose from, see `Subnet`. With `None`, as in the paper, all layers attend to
            everything.
    """

    hidden_size: tuple[int, ...]
    num_attention_heads: tuple[int, ...]
    ffn_ratio: tuple[float, ...]
    num_hidden_layers: tuple[int, ...]
    head_dim: int = 64
    conv_dim: tuple[tuple[int, ...], ...] | None = None
    attention_window: tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_attention_heads", "ffn_ratio", "num_hidden_layers"):
            choices = _list(f"search space {name}", getattr(self, name), MOST_CHOICES, "of at least one choice")
            if not choices:
                raise ValueError(f"search space {name} is a list of at least one choice, not empty")
            most = MOST_LAYERS if name == "num_hidden_layers" else LARGEST_SIZE
            convert = _positive_number if name == "ffn_ratio" else _whole_number
            checked = [convert(name, item, most) for item in choices]
            object.__setattr__(self, name, tuple(sorted(set(checked))))
        object.__setattr__(self, "head_dim", _whole_number("head_dim", self.head_dim))
        if self.conv_dim is not None:
            self._set_conv_dim(self.conv_dim)
        if self.attention_window is not None:
            choices = _list(
                "search space attention_window", self.attention_window, MOST_CHOICES, "of at least one choice"
            )
            windows = [None if item is None else _whole_number("attention_window", item) for item in choices]
            if not windows:
                raise ValueError("search space attention_window is a list of at least one choice, not empty")
            object.__setattr__(self, "attention_window", tuple(sorted(set(windows), key=_span)))
        for width in self.hidden_size:
            for ratio in self.ffn_ratio:
                if not (width * ratio).is_integer() or width * ratio > LARGEST_SIZE:
                    raise ValueError(
                        f"search space: ffn_ratio={ratio} x hidden_size={width} is no whole number of units, or above"
                        f" {LARGEST_SIZE:,}"
                    )

    def _set_conv_dim(self, choices: Any) -> None:
        name, what = "search space conv_dim", "of choices for each convolution"
        layers = [_list(name, layer, MOST_CHOICES, what) for layer in _list(name, choices, MOST_CHOICES, what)]
        sorted_choices = tuple(tuple(sorted({_whole_number("conv_dim", item) for item in layer})) for layer in layers)
        for choose in (min, max):
            ends = [choose(layer) for layer in sorted_choices if layer]
            if len(ends) < len(sorted_choices) or not ends or ends != sorted(ends):
                raise ValueError(
                    "search space conv_dim needs choices for each convolution, of which the least and the most do not"
                    f" fall from one to the next, not {_short(choices)}"
                )
        if (ways := count_nondecreasing(sorted_choices)) > MOST_WAYS:
            raise ValueError(f"search space conv_dim has {ways:,} ways to choose, more than {MOST_WAYS:,}")
        object.__setattr__(self, "conv_dim", sorted_choices)

    @classmethod
    def small(cls) -> Self:
        """The paper's small space: 951 892 141 473 subnets of 11 to 44 million parameters."""
        return cls(
            hidden_size=(256, 384, 512),
            num_attention_heads=(4, 6, 8),
            ffn_ratio=(3, 3.5, 4),
            num_hidden_layers=(10, 11, 12),
        )

    @classmethod
    def base(cls) -> Self:
        """The paper's base space: 6 530 347 008 subnets of 41 to 94 million parameters."""
        return cls(
            hidden_size=(512, 640, 768), num_attention_heads=(8, 10, 12), ffn_ratio=(3.5, 4), num_hidden_layers=(12,)
        )

    @classmethod
    def tiny_to_base(cls) -> Self:
        """Ours: 3 to 94 million parameters, 0.3 to 6.9 GMAC for a second of audio, because the feature encoder is
        elastic too."""
        return cls(
            hidden_size=(192, 256, 384, 512, 640, 768),
            num_attention_heads=(3, 4, 6, 8, 10, 12),
            ffn_ratio=(2, 3, 4),
            num_hidden_layers=(8, 10, 12),
            conv_dim=((128, 256, 384, 512),) * 7,
        )

    @classmethod
    def preset(cls, name: str) -> Self:
        """`"small"`, `"base"` or `"tiny_to_base"`."""
        presets = {"small": cls.small, "base": cls.base, "tiny_to_base": cls.tiny_to_base}
        if name not in presets:
            raise ValueError(
                f"search space {name!r} is not known: choose from {list(presets)}, or give the choices as a dict"
            )
        return presets[name]()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads our keys, or those of the released code.

        The latter are `embed_dim`, `heads_num`, `ffn_ratio`, `layer_num`, and `atten_dim`, which gives the head size.
        """
        values = dict(values)
        if "embed_dim" in values:
            attention, heads = values.pop("atten_dim", None), values.get("heads_num")
            if attention and heads:
                least = (
                    min(_whole_number(name, item) for item in _list(f"search space {name}", choices, MOST_CHOICES))
                    for name, choices in (("atten_dim", attention), ("heads_num", heads))
                )
                values["head_dim"] = operator.floordiv(*least)
            values = _rename(
                values,
                {
                    "embed_dim": "hidden_size",
                    "heads_num": "num_attention_heads",
                    "layer_num": "num_hidden_layers",
                },
            )
            values.pop("slide_wsz", None)
        return cls(**_check_fields(cls, values))

    @property
    def num_subnets(self) -> int:
        """Exact count: feature encoders x widths x sum over depths d of (ratios x heads x windows) ** d."""
        per_layer = len(self.ffn_ratio) * len(self.num_attention_heads) * len(self.attention_window or (None,))
        encoders = 1 if self.conv_dim is None else count_nondecreasing(self.conv_dim)
        return encoders * len(self.hidden_size) * sum(per_layer**depth for depth in self.num_hidden_layers)

    @property
    def largest(self) -> Subnet:
        """The most of everything."""
        return self._uniform(lambda choices: choices[-1])

    @property
    def smallest(self) -> Subnet:
        """The least of everything."""
        return self._uniform(lambda choices: choices[0])

    @property
    def middle(self) -> Subnet:
        """The middle of every choice, the upper one of two; a convolution that would be narrower than the one before
        it has the least that is not."""
        return self._uniform(lambda choices: choices[len(choices) // 2])

    @property
    def named(self) -> dict[str, Subnet]:
        """Subnets that can be asked for by name: `largest`, `smallest`, `middle`, and those of the paper's that are
        inside."""
        inside = {name: self.resolve(subnet) for name, subnet in NAMED_SUBNETS.items() if subnet in self}
        return {"largest": self.largest, "smallest": self.smallest, "middle": self.middle, **inside}

    def resolve(self, subnet: "str | Subnet | Mapping[str, Any]") -> Subnet:
        """The subnet behind a name, a dict or a `Subnet`. Where convolutions are to be chosen, one that does not name
        them has the widest.

        Raises:
            ValueError: it is not in this space; the message names what is allowed.
        """
        if isinstance(subnet, str):
            if subnet not in self.named:
                raise ValueError(
                    f"subnet {subnet!r} is not known in this search space: choose from {list(self.named)}"
                )
            return self.named[subnet]
        subnet = subnet_from(subnet)
        if subnet.conv_dim is None:
            subnet = replace(subnet, conv_dim=self.largest.conv_dim)
        self._check(subnet)
        return subnet

    def __contains__(self, subnet: object) -> bool:
        if not isinstance(subnet, Subnet):
            return False
        try:
            self.resolve(subnet)
        except ValueError:
            return False
        return True

    def sample(self, rng: random.Random | int | None = None) -> Subnet:
        """Draws a subnet: each choice uniform and on its own, as in stage 2 of the paper.

        Args:
            rng: a `random.Random`, or a seed. The same state draws the same subnet.
        """
        rng = rng if isinstance(rng, random.Random) else random.Random(rng)
        width, depth = rng.choice(self.hidden_size), rng.choice(self.num_hidden_layers)
        heads = [rng.choice(self.num_attention_heads) for _ in range(depth)]
        ratios = [rng.choice(self.ffn_ratio) for _ in range(depth)]
        conv_dim = self.sample_conv_dim(rng)
        return self._assemble(width, heads, ratios, conv_dim, self.sample_attention_window(depth, rng))

    def sample_by_size(self, rng: random.Random) -> Subnet:
        """Draws a subnet whose size is uniform between the smallest and the largest.

        With every choice uniform and independent, sizes pile up around those of each width, and the ends are almost
        never trained. Here a size is drawn first, then one of the widths and depths that can have it. Heads and ratios
        rise together from least to most, each along its own random path (a binomial quantile of the common level), up
        to the level at which the size is met. Channels of convolutions and windows hardly change the size and are
        drawn independently.
        """
        size = rng.uniform(self.smallest.num_matrix_weights, self.largest.num_matrix_weights)

        def subnet(width: int, level: float, at_layers: list[tuple[float, float]]) -> Subnet:
            heads = [_quantile(self.num_attention_heads, level, at) for at, _ in at_layers]
            ratios = [_quantile(self.ffn_ratio, level, at) for _, at in at_layers]
            return self._assemble(width, heads, ratios, None, None)

        def distance(width: int, depth: int) -> float:
            least, most = (subnet(width, level, [(0.5, 0.5)] * depth).num_matrix_weights for level in (0.0, 1.0))
            return max(least - size, size - most, 0.0)

        shapes = {shape: distance(*shape) for shape in product(self.hidden_size, self.num_hidden_layers)}
        nearest = min(shapes.values())
        width, depth = rng.choice([shape for shape, gap in shapes.items() if gap == nearest])
        at_layers = [(rng.random(), rng.random()) for _ in range(depth)]
        low, high = 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            too_small = subnet(width, middle, at_layers).num_matrix_weights < size
            low, high = (middle, high) if too_small else (low, middle)
        candidates = [subnet(width, level, at_layers) for level in (low, high)]
        drawn = min(candidates, key=lambda candidate: abs(candidate.num_matrix_weights - size))
        conv_dim = self.sample_conv_dim(rng)
        return replace(drawn, conv_dim=conv_dim, attention_window=self.sample_attention_window(depth, rng))

    def sample_conv_dim(self, rng: random.Random) -> tuple[int, ...] | None:
        """Draws channels of all convolutions, each way to choose them as likely as the others."""
        return None if self.conv_dim is None else rng.choice(nondecreasing_choices(self.conv_dim))

    def sample_attention_window(self, depth: int, rng: random.Random) -> tuple[int | None, ...] | None:
        """Draws a window for each of `depth` layers."""
        windows = self.attention_window
        return None if windows is None else tuple(rng.choice(windows) for _ in range(depth))

    def mutate(self, subnet: Subnet, rng: random.Random | int | None = None, probability: float = 0.1) -> Subnet:
        """A neighbour of `subnet`: every gene (width, depth, heads, ratio and window of each layer, channels of each
        convolution as far as its neighbours allow) is redrawn with `probability`."""
        rng = rng if isinstance(rng, random.Random) else random.Random(rng)
        subnet = self.resolve(subnet)

        def redraw(value: T, choices: tuple[T, ...]) -> T:
            return rng.choice(choices) if rng.random() < probability else value

        width = redraw(subnet.hidden_size, self.hidden_size)
        depth = redraw(subnet.num_hidden_layers, self.num_hidden_layers)
        added = range(depth - subnet.num_hidden_layers)
        heads = [*subnet.num_attention_heads[:depth], *(rng.choice(self.num_attention_heads) for _ in added)]
        ratios = [*self._ratios(subnet)[:depth], *(rng.choice(self.ffn_ratio) for _ in added)]
        heads = [redraw(head, self.num_attention_heads) for head in heads]
        ratios = [redraw(ratio, self.ffn_ratio) for ratio in ratios]
        channels = list(subnet.conv_dim or ())
        for layer, choices in enumerate(self.conv_dim or ()):
            before = channels[layer - 1] if layer > 0 else choices[0]
            after = channels[layer + 1] if layer + 1 < len(channels) else choices[-1]
            allowed = tuple(width for width in choices if before <= width <= after)
            channels[layer] = redraw(channels[layer], allowed)
        windows = None
        if self.attention_window is not None:
            windows = [*subnet.layer_windows[:depth], *(rng.choice(self.attention_window) for _ in added)]
            windows = [redraw(window, self.attention_window) for window in windows]
        return self._assemble(width, heads, ratios, channels or None, windows)

    def crossover(self, one: Subnet, other: Subnet, rng: random.Random | int | None = None) -> Subnet:
        """A child: each gene from one of the two parents. Layers only the deeper parent has come from that parent;
        convolutions all come from one."""
        rng = rng if isinstance(rng, random.Random) else random.Random(rng)
        one, other = self.resolve(one), self.resolve(other)
        width = rng.choice((one, other)).hidden_size
        depth = rng.choice((one, other)).num_hidden_layers
        layers = []
        for layer in range(depth):
            parents = [parent for parent in (one, other) if layer < parent.num_hidden_layers]
            layers.append(
                (
                    rng.choice(parents).num_attention_heads[layer],
                    self._ratios(rng.choice(parents))[layer],
                    None if self.attention_window is None else rng.choice(parents).layer_windows[layer],
                )
            )
        conv_dim = None if self.conv_dim is None else rng.choice((one, other)).conv_dim
        heads, ratios, windows = map(list, zip(*layers, strict=True))
        return self._assemble(width, heads, ratios, conv_dim, windows)

    def _uniform(self, pick: Callable[[Sequence[Any]], Any]) -> Subnet:
        """The subnet whose layers all have what `pick` takes from the choices, which are in ascending order."""
        depth = pick(self.num_hidden_layers)
        channels: list[int] = []
        for choices in self.conv_dim or ():
            least = max([pick(choices), *channels[-1:]])
            channels.append(min(width for width in choices if width >= least))
        heads, ratios = [pick(self.num_attention_heads)] * depth, [pick(self.ffn_ratio)] * depth
        windows = None if self.attention_window is None else [pick(self.attention_window)] * depth
        return self._assemble(pick(self.hidden_size), heads, ratios, channels or None, windows)

    def _assemble(
        self,
        width: int,
        heads: list[int],
        ratios: list[float],
        conv_dim: Iterable[int] | None,
        windows: Iterable[int | None] | None,
    ) -> Subnet:
        sizes = tuple(int(width * ratio) for ratio in ratios)
        channels = None if conv_dim is None else tuple(conv_dim)
        return Subnet(width, tuple(heads), sizes, self.head_dim, channels, None if windows is None else tuple(windows))

    @staticmethod
    def _ratios(subnet: Subnet) -> list[float]:
        return [size / subnet.hidden_size for size in subnet.intermediate_size]

    def _check(self, subnet: Subnet) -> None:
        def require(name: str, value: int | None, choices: Iterable[float | None]) -> None:
            if value not in (allowed := list(choices)):
                raise ValueError(f"subnet {name}={value} is not in this search space: choose from {allowed}")

        require("head_dim", subnet.head_dim, [self.head_dim])
        require("hidden_size", subnet.hidden_size, self.hidden_size)
        require("num_hidden_layers", subnet.num_hidden_layers, self.num_hidden_layers)
        sizes = [int(subnet.hidden_size * ratio) for ratio in self.ffn_ratio]
        for layer in range(subnet.num_hidden_layers):
            require(f"num_attention_heads[{layer}]", subnet.num_attention_heads[layer], self.num_attention_heads)
            require(f"intermediate_size[{layer}]", subnet.intermediate_size[layer], sizes)
            windows = (None,) if self.attention_window is None else self.attention_window
            require(f"attention_window[{layer}]", subnet.layer_windows[layer], windows)
        if subnet.conv_dim is None:
            return
        if self.conv_dim is None:
            raise ValueError(
                f"subnet conv_dim={list(subnet.conv_dim)}: in this search space all subnets have the full feature"
                " encoder: leave conv_dim out"
            )
        if len(subnet.conv_dim) != len(self.conv_dim):
            raise ValueError(f"subnet conv_dim={list(subnet.conv_dim)} is not for {len(self.conv_dim)} convolutions")
        for layer, (channels, choices) in enumerate(zip(subnet.conv_dim, self.conv_dim, strict=True)):
            require(f"conv_dim[{layer}]", channels, choices)
        if list(subnet.conv_dim) != sorted(subnet.conv_dim):
            raise ValueError(
                f"subnet conv_dim={list(subnet.conv_dim)}: no convolution has fewer channels than the one before it"
            )


def subnet_from(value: Any) -> Subnet:
    """A `Subnet` from a `Subnet` or a dict in our keys or those of the released code."""
    if isinstance(value, Subnet):
        return value
    if type(value).__name__ == "Subnet":  # of another copy of this module: remote code is loaded once for each file
        value = value.to_dict()
    if isinstance(value, Mapping):
        return Subnet.from_dict(value)
    raise ValueError(f"a subnet is a name, a Subnet or a dict, not {type(value).__name__}: {_short(value)}")


def search_space_from(value: Any) -> SearchSpace:
    """A `SearchSpace` from a `SearchSpace`, a preset's name, or a dict in our keys or those of the released code."""
    if isinstance(value, SearchSpace):
        return value
    if type(value).__name__ == "SearchSpace":  # as above
        value = value.to_dict()
    if isinstance(value, str):
        return SearchSpace.preset(value)
    if isinstance(value, Mapping):
        return SearchSpace.from_dict(value)
    raise ValueError(f"a search space is a name, a SearchSpace or a dict, not {type(value).__name__}: {_short(value)}")
