"""Configuration of a LightHuBERT checkpoint: a HuBERT configuration plus the search space and the selected subnet."""

import copy
import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import HubertConfig

from .measured_subnets import resolve
from .search_space import Subnet, search_space_from, subnet_from


AUTO_MAP = {
    "AutoConfig": "configuration_lighthubert.LightHubertConfig",
    "AutoModel": "modeling_lighthubert.LightHubertModel",
    "AutoModelForPreTraining": "modeling_lighthubert.LightHubertForPreTraining",
    "AutoModelForCTC": "modeling_lighthubert.LightHubertForCTC",
    "AutoModelForAudioClassification": "modeling_lighthubert.LightHubertForSequenceClassification",
    "AutoModelForAudioFrameClassification": "modeling_lighthubert.LightHubertForAudioFrameClassification",
    "AutoModelForAudioXVector": "modeling_lighthubert.LightHubertForXVector",
}
"""Which class each Auto class loads; saved whole, so that every Auto class works from every saved folder."""


@strict
class LightHubertConfig(HubertConfig):
    r"""
    Configuration of a LightHuBERT **supernet** (`search_space` set) or of a **cut model** (`search_space` is `None`).

    Everything that [`HubertConfig`] has means the same here. `hidden_size`, `num_hidden_layers`, `num_attention_heads`
    and `intermediate_size` are the sizes of the stored weights: of a supernet the full ones, of a cut model the
    largest over its layers.

    Args:
        search_space (`SearchSpace`, `dict` or `str`, *optional*):
            The subnets that the checkpoint holds: a [`SearchSpace`], its dict (our keys or the released code's), or
            `"small"` / `"base"` / `"tiny_to_base"`. Kept as a dict.
        subnet (`Subnet`, `dict` or `str`, *optional*):
            The selected subnet. A supernet takes any of its space, or a name of one, and defaults to the largest. Of a
            cut model it is the architecture, and defaults to equal layers of the sizes above. Kept as a dict.
        head_dim (`int`, *optional*, defaults to `hidden_size // num_attention_heads` when a model is built):
            Size of an attention head. Attention in a layer is `head_dim` times its heads wide, which may differ from
            the width of the subnet.
        feat_extract_norm (`str`, *optional*, defaults to `"layer"`):
            `"layer"` as in the released models: the output for a recording does not depend on what it is padded or
            batched with. `"group"`, as in HuBERT Base and wav2vec 2.0 Base, takes statistics over the padded length
            and cannot promise that.
        layerdrop (`float`, *optional*, defaults to 0.0):
            As in HuBERT. Distil with 0: a dropped layer shortens `hidden_states`.
        num_prediction_heads (`int`, *optional*, defaults to 1):
            Predicted teacher targets of [`LightHubertForPreTraining`].
        teacher_hidden_size (`int`, *optional*, defaults to `hidden_size` when a model is built):
            Width of those targets.
        tdnn_dim, tdnn_kernel, tdnn_dilation, xvector_output_dim:
            Of [`LightHubertForXVector`], as in [`Wav2Vec2Config`].

    Example:

    ```python
    >>> from modeling_lighthubert import LightHubertConfig, LightHubertModel, SearchSpace

    >>> model = LightHubertModel(LightHubertConfig(search_space=SearchSpace.small()))
    >>> model.set_subnet("a_small")
    ```"""

    model_type = "lighthubert"

    search_space: Any = None
    subnet: Any = None
    head_dim: int | None = None
    feat_extract_norm: str = "layer"
    layerdrop: float | int = 0.0
    num_prediction_heads: int = 1
    teacher_hidden_size: int | None = None
    tdnn_dim: list[int] | tuple[int, ...] = (512, 512, 512, 512, 1500)
    tdnn_kernel: list[int] | tuple[int, ...] = (5, 3, 3, 1, 1)
    tdnn_dilation: list[int] | tuple[int, ...] = (1, 2, 3, 1, 1)
    xvector_output_dim: int = 512

    def __post_init__(self, **kwargs):
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # `from_pretrained(..., subnet=...)` assigns after construction, and JSON needs dicts
        if name == "search_space" and value is not None:
            value = search_space_from(value).to_dict()
        elif name == "subnet" and value is not None and not isinstance(value, str):
            value = subnet_from(value).to_dict()
        super().__setattr__(name, value)

    def resolved(self) -> "LightHubertConfig":
        """A copy in which `head_dim` and `teacher_hidden_size` are numbers, as a model has it.

        Raises:
            ValueError: `head_dim` is neither given, nor does `hidden_size` divide into heads.
        """
        config = copy.deepcopy(self)
        config.head_dim = self._head_dim()
        if self.teacher_hidden_size is None:
            config.teacher_hidden_size = self.hidden_size
        return config

    def _head_dim(self) -> int:
        if self.head_dim is not None:
            return self.head_dim
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads="
                f"{self.num_attention_heads}: give head_dim as well"
            )
        return self.hidden_size // self.num_attention_heads

    def selected_subnet(self) -> Subnet:
        """What `subnet` stands for.

        Raises:
            ValueError: it is not in the search space, or not the architecture of this cut model.
        """
        if self.search_space is not None:
            return self.resolve_subnet(self.subnet or "largest")
        if isinstance(self.subnet, str):
            raise ValueError(
                f"subnet={self.subnet!r}: this checkpoint has no search space to choose from. It is one model already;"
                " load the supernet to choose another subnet"
            )
        full = self.full_subnet()
        subnet = subnet_from(self.subnet) if self.subnet else full
        if _sizes(subnet) != _sizes(full) or list(subnet.conv_dim or self.conv_dim) != list(self.conv_dim):
            raise ValueError(
                f"subnet ({subnet}) is not the architecture of this checkpoint, which is at most {full}. Only a"
                " supernet can select another one"
            )
        return subnet

    def resolve_subnet(self, subnet: Any) -> Subnet:
        """The subnet of this supernet behind a name, which `subnets.json` may give, a dict or a `Subnet`.

        Raises:
            ValueError: it is not in the search space; the message names what is allowed.
        """
        return resolve(search_space_from(self.search_space), subnet, self.name_or_path)

    def full_subnet(self) -> Subnet:
        """Every weight that is stored: equal layers of the full sizes. Not always in the search space."""
        has_elastic_convolutions = self.search_space is not None and self.search_space.get("conv_dim") is not None
        return Subnet.uniform(
            self.hidden_size,
            self.num_hidden_layers,
            self.num_attention_heads,
            self.intermediate_size,
            self._head_dim(),
            tuple(self.conv_dim) if has_elastic_convolutions else None,
        )

    def cut_to(self, subnet: Subnet) -> "LightHubertConfig":
        """Configuration of the cut model of `subnet`."""
        config = self.resolved()
        config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size, _ = _sizes(
            subnet
        )
        config.conv_dim = subnet.conv_dim or config.conv_dim
        config.search_space, config.subnet = None, subnet
        return config

    def trimmed(self) -> "LightHubertConfig":
        """Configuration of a supernet of the same search space that stores no more width than its largest subnet."""
        largest = search_space_from(self.search_space).largest
        config = self.resolved()
        config.hidden_size, config.num_attention_heads = largest.hidden_size, max(largest.num_attention_heads)
        # whole blocks of the new width, so that every subnet still finds its units at the front of each block
        config.intermediate_size = largest.hidden_size * math.ceil(
            max(largest.intermediate_size) / largest.hidden_size
        )
        config.conv_dim = largest.conv_dim or config.conv_dim
        return config

    def validate_architecture(self):
        """Part of `@strict` validation: what concerns several fields."""
        super().validate_architecture()
        if getattr(self, "adapter_attn_dim", None) is not None or getattr(self, "add_adapter", False):
            raise ValueError("LightHuBERT has no adapters: adapter_attn_dim and add_adapter are not supported")
        if self.hidden_size % self.num_conv_pos_embedding_groups:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of"
                f" num_conv_pos_embedding_groups={self.num_conv_pos_embedding_groups}"
            )
        if self.search_space is not None:
            self._validate_search_space()
        if self.subnet is not None or self.search_space is not None:
            self.selected_subnet()

    def _validate_search_space(self):
        space, full_ratio = search_space_from(self.search_space), self.intermediate_size / self.hidden_size
        for name, largest, full in (
            ("hidden_size", max(space.hidden_size), self.hidden_size),
            ("num_attention_heads", max(space.num_attention_heads), self.num_attention_heads),
            ("ffn_ratio", max(space.ffn_ratio), full_ratio),
            ("num_hidden_layers", max(space.num_hidden_layers), self.num_hidden_layers),
        ):
            if largest > full:
                raise ValueError(f"search space {name} goes up to {largest}, but the supernet has only {full:g}")
        if space.conv_dim is not None:
            most = [max(choices) for choices in space.conv_dim]
            if len(most) != len(self.conv_dim) or any(wide > full for wide, full in zip(most, self.conv_dim)):
                raise ValueError(
                    f"search space conv_dim goes up to {most}, but the supernet has {list(self.conv_dim)}"
                )
        if not full_ratio.is_integer():
            raise ValueError(
                f"a supernet needs whole blocks of FFN units: intermediate_size={self.intermediate_size} is not a"
                f" multiple of hidden_size={self.hidden_size}"
            )
        if space.head_dim != self._head_dim():
            raise ValueError(
                f"search space head_dim={space.head_dim}, but heads of the supernet are {self._head_dim()} wide"
            )
        for width in space.hidden_size:
            if width % self.num_conv_pos_embedding_groups:
                raise ValueError(
                    f"search space hidden_size={width} is not a multiple of"
                    f" num_conv_pos_embedding_groups={self.num_conv_pos_embedding_groups}"
                )
        if self.use_weighted_layer_sum and len(space.num_hidden_layers) > 1:
            raise ValueError(
                "use_weighted_layer_sum has one weight for each layer, but the depth of subnets in this search space"
                f" varies ({list(space.num_hidden_layers)}): extract a subnet and use it there"
            )

    @property
    def samples_per_first_frame(self) -> int:
        """Samples that the first frame is computed from: 400 (25 ms at 16 kHz) for the usual convolutions."""
        return receptive_field(self)[0]

    def num_frames(self, num_samples: int) -> int:
        """Frames of a recording of so many samples."""
        for kernel, stride in zip(self.conv_kernel, self.conv_stride, strict=True):
            num_samples = (num_samples - kernel) // stride + 1
        return num_samples


def _sizes(subnet: Subnet) -> tuple[int, int, int, int, int]:
    """Width, depth, most heads, most FFN units, head size: what the weights of a cut model are stored for."""
    return (
        subnet.hidden_size,
        subnet.num_hidden_layers,
        max(subnet.num_attention_heads),
        max(subnet.intermediate_size),
        subnet.head_dim,
    )


def receptive_field(config: Any) -> tuple[int, int]:
    """Samples that one frame is computed from, and samples between two frames: n samples make (n - field) // hop + 1
    frames. For the usual convolutions 400 and 320."""
    field, hop = 1, 1
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        field, hop = field + (kernel - 1) * hop, hop * stride
    return field, hop
