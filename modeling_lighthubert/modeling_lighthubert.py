"""LightHuBERT: transformers' HuBERT whose leaf layers can use part of their weights.

Every `forward` above the leaf layers is HuBERT's own, inherited. This module says how the layers are sized (each may
have its own heads and FFN), how a subnet is selected in a supernet, and how it is cut out. A cut model is built from
plain layers; no elastic code runs in it. The convolutions of both live in `feature_encoder`.
"""

import copy
import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.hubert.modeling_hubert import (
    HubertAttention,
    HubertEncoder,
    HubertEncoderLayer,
    HubertEncoderLayerStableLayerNorm,
    HubertEncoderStableLayerNorm,
    HubertFeatureProjection,
    HubertFeedForward,
    HubertForCTC,
    HubertForSequenceClassification,
    HubertModel,
    HubertPositionalConvEmbedding,
    HubertPreTrainedModel,
    _compute_mask_indices,
)
from transformers.models.wav2vec2.modeling_wav2vec2 import (
    AMSoftmaxLoss,
    TDNNLayer,
    Wav2Vec2ForAudioFrameClassification,
    Wav2Vec2ForXVector,
)
from transformers.utils import ModelOutput

from .configuration_lighthubert import LightHubertConfig
from .elastic import (
    ElasticBatchNorm1d,
    ElasticLayerList,
    ElasticLayerNorm,
    ElasticLinear,
    ElasticLinearFromBlocks,
    ElasticLinearToBlocks,
    ElasticPositionalConv1d,
    PositionalConv1d,
    cut_state,
    num_selected_parameters,
    share_weights,
)
from .feature_encoder import LightHubertFeatureEncoder
from .measured_subnets import SUBNETS_FILE, MeasuredSubnets, measured_subnets, resolve
from .search_space import SearchSpace, Subnet, kept_layers, search_space_from, subnet_from
from .windowed_attention import recover_frame_mask, windowed_attention


def linear(
    config: LightHubertConfig,
    in_features: int,
    out_features: int,
    bias: bool = True,
    elastic: type[ElasticLinear] = ElasticLinear,
) -> nn.Linear:
    """A linear layer: elastic in a supernet, plain in a cut model."""
    kind = nn.Linear if config.search_space is None else elastic
    return kind(in_features, out_features, bias=bias)


def layer_norm(config: LightHubertConfig) -> nn.LayerNorm:
    """A layer norm over the width: elastic in a supernet, plain in a cut model."""
    kind = nn.LayerNorm if config.search_space is None else ElasticLayerNorm
    return kind(config.hidden_size, eps=config.layer_norm_eps)


def frame_mask(lengths: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Frames that are not padding, bool (batch_size, num_frames), of recordings of `lengths` frames, (batch_size)."""
    return torch.arange(num_frames, device=lengths.device) < lengths[:, None]


class LightHubertPositionalConvEmbedding(HubertPositionalConvEmbedding):
    def __init__(self, config: LightHubertConfig):
        super().__init__(config)
        self.config = config
        conv, norm = (
            (PositionalConv1d, nn.BatchNorm1d)
            if config.search_space is None
            else (ElasticPositionalConv1d, ElasticBatchNorm1d)
        )
        self.conv = conv(config.hidden_size, config.num_conv_pos_embeddings, config.num_conv_pos_embedding_groups)
        if config.conv_pos_batch_norm:
            self.batch_norm = norm(config.hidden_size)
        else:
            self.conv = nn.utils.parametrizations.weight_norm(self.conv, name="weight", dim=2)

    def select(self, hidden_size: int) -> None:
        self.conv.select(hidden_size)
        if self.batch_norm is not None:
            self.batch_norm.select(hidden_size)

    def __getstate__(self) -> dict[str, Any]:
        # weight norm makes a class on the fly, which pickle cannot name: it gets the parameters alone
        if not hasattr(self.conv, "parametrizations"):
            return self.__dict__
        pickled = (dict(self.conv.named_parameters()), getattr(self.conv, "num_selected", None))
        return {**self.__dict__, "_modules": {**self._modules, "conv": None}, "_conv": pickled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        pickled = state.pop("_conv", None)
        super().__setstate__(state)
        if pickled is None:
            return
        parameters, selected = pickled
        with torch.device("meta"):
            self.conv = type(self)(self.config).conv.train(self.training)
        for name, parameter in parameters.items():
            module, _, kind = name.rpartition(".")
            setattr(self.conv.get_submodule(module), kind, parameter)
        if selected is not None:
            self.conv.select(selected)


class LightHubertFeatureProjection(HubertFeatureProjection):
    def __init__(self, config: LightHubertConfig):
        super().__init__(config)
        if config.search_space is not None and self.feat_proj_layer_norm:
            self.layer_norm = ElasticLayerNorm(config.conv_dim[-1], eps=config.layer_norm_eps)
        self.projection = linear(config, config.conv_dim[-1], config.hidden_size)

    def select(self, num_channels: int, hidden_size: int) -> None:
        if self.feat_proj_layer_norm:
            self.layer_norm.select(num_channels)
        self.projection.select(num_channels, hidden_size)


class LightHubertAttention(HubertAttention):
    """HuBERT's attention with heads of a fixed size: it may be narrower or wider than the hidden states."""

    def __init__(self, config: LightHubertConfig, num_attention_heads: int):
        attention_size = num_attention_heads * config.head_dim
        super().__init__(attention_size, num_attention_heads, dropout=config.attention_dropout, config=config)
        self.q_proj = linear(config, config.hidden_size, attention_size)
        self.k_proj = linear(config, config.hidden_size, attention_size)
        self.v_proj = linear(config, config.hidden_size, attention_size)
        self.out_proj = linear(config, attention_size, config.hidden_size)
        self.window: int | None = None

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As in HuBERT; with a `window`, each frame attends to so many on each side, and no weights are returned.

        Raises:
            ValueError: there is a window, and the attention back end has masks that do not say which frames are
                padding.
        """
        if self.window is None:
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        mask = recover_frame_mask(attention_mask)
        outputs = windowed_attention(query, key, value, self.window, mask, self.scaling, dropout)
        return self.out_proj(outputs.transpose(1, 2).flatten(2)), None

    def select(self, hidden_size: int, num_attention_heads: int, window: int | None) -> None:
        self.window = window
        attention_size = num_attention_heads * self.head_dim
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            projection.select(hidden_size, attention_size)
        self.out_proj.select(attention_size, hidden_size)


class LightHubertFeedForward(HubertFeedForward):
    def __init__(self, config: LightHubertConfig, intermediate_size: int):
        super().__init__(config)
        width = config.hidden_size
        self.intermediate_dense = linear(config, width, intermediate_size, elastic=ElasticLinearToBlocks)
        self.output_dense = linear(config, intermediate_size, width, elastic=ElasticLinearFromBlocks)

    def select(self, hidden_size: int, intermediate_size: int) -> None:
        self.intermediate_dense.select(hidden_size, intermediate_size)
        self.output_dense.select(intermediate_size, hidden_size)


class SizedEncoderLayer(nn.Module):
    """What both kinds of layers share: heads and FFN units of their own, instead of those of the configuration."""

    def __init__(self, config: LightHubertConfig, num_attention_heads: int, intermediate_size: int):
        nn.Module.__init__(self)  # HuBERT's own, which is next in line, would make all layers alike
        self.attention = LightHubertAttention(config, num_attention_heads)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layer_norm = layer_norm(config)
        self.feed_forward = LightHubertFeedForward(config, intermediate_size)
        self.final_layer_norm = layer_norm(config)

    def select(
        self, hidden_size: int, num_attention_heads: int, intermediate_size: int, window: int | None = None
    ) -> None:
        self.attention.select(hidden_size, num_attention_heads, window)
        self.layer_norm.select(hidden_size)
        self.feed_forward.select(hidden_size, intermediate_size)
        self.final_layer_norm.select(hidden_size)


class LightHubertEncoderLayer(SizedEncoderLayer, HubertEncoderLayer):
    """HuBERT's layer with norms after attention and FFN."""


class LightHubertEncoderLayerStableLayerNorm(SizedEncoderLayer, HubertEncoderLayerStableLayerNorm):
    """HuBERT's layer with norms before attention and FFN."""

    adapter_layer = None


class SizedEncoder(nn.Module):
    """What both encoders share: layers of different sizes, of which a subnet may keep some."""

    layer_class: type[SizedEncoderLayer]

    def __init__(self, config: LightHubertConfig):
        nn.Module.__init__(self)  # as above
        self.config = config
        self.pos_conv_embed = LightHubertPositionalConvEmbedding(config)
        self.layer_norm = layer_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        if config.search_space is None:
            subnet = config.selected_subnet()
            sizes = zip(subnet.num_attention_heads, subnet.intermediate_size, strict=True)
            self.layers = nn.ModuleList(self.layer_class(config, heads, size) for heads, size in sizes)
            for layer, window in zip(self.layers, subnet.layer_windows, strict=True):
                layer.attention.window = window
        else:
            full = (config.num_attention_heads, config.intermediate_size)
            self.layers = ElasticLayerList(self.layer_class(config, *full) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def select(self, subnet: Subnet) -> None:
        self.pos_conv_embed.select(subnet.hidden_size)
        self.layer_norm.select(subnet.hidden_size)
        self.layers.select(kept_layers(len(self.layers), subnet.num_hidden_layers))
        sizes = (subnet.num_attention_heads, subnet.intermediate_size, subnet.layer_windows)
        for layer, heads, intermediate_size, window in zip(self.layers, *sizes, strict=True):
            layer.select(subnet.hidden_size, heads, intermediate_size, window)


class LightHubertEncoder(SizedEncoder, HubertEncoder):
    layer_class = LightHubertEncoderLayer


class LightHubertEncoderStableLayerNorm(SizedEncoder, HubertEncoderStableLayerNorm):
    layer_class = LightHubertEncoderLayerStableLayerNorm


class SelectionLock:
    """A re-entrant lock, of which a copied or pickled model gets one of its own."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *error: object) -> None:
        self.lock.release()

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), ()


class LightHubertPreTrainedModel(HubertPreTrainedModel):
    """What all LightHuBERT models share: choosing a subnet, and cutting it out.

    A model owns its configuration (a copy of the one it is given), so that two models never share a selection.

    A supernet is for choosing and training. What replaces layers (adapters, quantisation) belongs on the cut model:
    `torch.ao.quantization.quantize_dynamic`, say, does not know elastic layers, and leaves them as they are.
    """

    config: LightHubertConfig
    config_class = LightHubertConfig
    base_model_prefix = "hubert"
    _search_space: tuple[dict[str, Any] | None, SearchSpace | None] = (None, None)
    # none of the losses is normalised by `num_items_in_batch`: Trainer has to average them itself
    accepts_loss_kwargs = False
    _no_split_modules = [
        "LightHubertEncoderLayer",
        "LightHubertEncoderLayerStableLayerNorm",
        "ParametrizedPositionalConv1d",
        "ParametrizedElasticPositionalConv1d",
    ]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Like [`PreTrainedModel.from_pretrained`], of LightHuBERT, HuBERT and wav2vec 2.0 checkpoints.

        A HuBERT or wav2vec 2.0 checkpoint starts a supernet when `search_space` is given: every weight of its
        encoder is kept, and what is new (a head, say) is named in the loading report. `subnet` selects one at load.

        Raises:
            ValueError: a `quantization_config` for a supernet: quantisers do not know elastic layers.
        """
        kwargs.setdefault("key_mapping", {r"^wav2vec2\.": "hubert."})
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.search_space is not None and getattr(model, "hf_quantizer", None) is not None:
            raise ValueError(
                f"{pretrained_model_name_or_path} is a supernet, which quantisers leave as it is: cut a subnet out"
                " with extract_subnet(), save it, and load that with quantization_config"
            )
        model._weight_conversions = None  # transformers would undo the renaming when the model is saved
        return loaded

    @property
    def search_space(self) -> SearchSpace | None:
        """The subnets this model holds, or `None` of a cut model."""
        values = self.config.search_space
        if values is not self._search_space[0]:  # validated once for each value that the configuration gets
            self._search_space = (values, None if values is None else search_space_from(values))
        return self._search_space[1]

    @property
    def subnet(self) -> Subnet:
        """What is selected: the subnet that `forward` runs, or the architecture of a cut model."""
        return self.base_model.selected_subnet

    def set_subnet(self, subnet: str | Subnet | Mapping[str, Any]) -> Subnet:
        """Selects the subnet that runs from now on, and returns it. On a model with a head, call it there.

        A model has one selection, for all threads: requests that want different subnets run inside `using_subnet`,
        where they take turns. A selection waits for a block that another thread is in.

        Args:
            subnet: a name (`"largest"`, `"smallest"`, `"a_small"` ..., or one of `measured_subnets()`), a [`Subnet`],
                or a dict in our keys or the released code's.

        Raises:
            ValueError: the subnet is not in the search space, this is a cut model, or an adapter has replaced an
                elastic layer. The selection stays.
        """
        subnet = self._resolve(subnet)
        self.select_unchecked(subnet)
        return subnet

    def select_unchecked(self, subnet: Subnet) -> None:
        """`set_subnet` for any part of the stored weights, whether or not the search space has it."""
        with self.base_model.selection_lock:
            earlier = self.subnet
            try:
                self._select(subnet)
            except AttributeError as error:  # of a layer that is not elastic: those below it go back
                with suppress(AttributeError):
                    self._select(earlier)
                raise ValueError(
                    f"this supernet cannot select a subnet ({error}): an adapter sits on it. Adapt a cut model instead"
                    " (extract_subnet), or merge and unload the adapter first"
                ) from error

    def _select(self, subnet: Subnet) -> None:
        self.base_model.select(subnet)
        for head in self.elastic_heads():
            head.select(subnet.hidden_size, head.out_features)

    def with_subnet(self, subnet: str | Subnet | Mapping[str, Any] | None = None) -> Self:
        """This supernet with a selection of its own, `subnet` (default: the selected one). The weights are shared.

        It takes a millisecond and no memory: threads that want different subnets at once may each have one.

        Raises:
            ValueError: as in `set_subnet`.
        """
        self._require_search_space()
        return self._selecting(self.subnet if subnet is None else self._resolve(subnet))

    def _selecting(self, subnet: Subnet) -> Self:
        twin, config = share_weights(self), copy.copy(self.config)
        for module in twin.modules():
            if "config" in module.__dict__:
                module.__dict__["config"] = config
        twin.base_model.selection_lock = SelectionLock()
        twin.select_unchecked(subnet)
        return twin

    def sample_subnet(self, rng: random.Random | int | None = None) -> Subnet:
        """Draws a subnet (see [`SearchSpace.sample`]), selects it and returns it."""
        return self.set_subnet(self._require_search_space().sample(rng))

    @contextmanager
    def using_subnet(self, subnet: str | Subnet | Mapping[str, Any]) -> Iterator[Self]:
        """Selects `subnet` inside the block; the earlier selection is restored after it, also on error.

        Threads take turns: a block waits until that of another thread is over. Blocks of one thread may be nested.
        """
        with self.base_model.selection_lock:
            earlier = self.subnet
            self.set_subnet(subnet)
            try:
                yield self
            finally:
                self.set_subnet(earlier)

    def num_subnet_parameters(self, subnet: str | Subnet | Mapping[str, Any] | None = None) -> int:
        """`num_parameters()` of the cut model of `subnet` (default: the selected one), without building it.

        The selection of this model is neither changed nor waited for.
        """
        model = self if self.search_space is None and subnet is None else self.with_subnet(subnet)
        has_mask_embedding = hasattr(self.base_model, "masked_spec_embed")
        missing_width = self.config.hidden_size - model.subnet.hidden_size
        return num_selected_parameters(model) - (missing_width if has_mask_embedding else 0)

    def extract_subnet(
        self,
        subnet: str | Subnet | Mapping[str, Any] | None = None,
        max_params: float | None = None,
        max_macs: float | None = None,
    ) -> Self:
        """Cuts out `subnet` (default: the selected one): an ordinary small model with the same outputs, and its own
        weights.

        It has this model's class, head, dtype, device and training mode, and trains in full. The selection of this
        model is neither changed nor waited for.

        Args:
            max_params: instead of `subnet`: that of `measured_subnets()` with the least error and no more parameters.
            max_macs: as well, or alone: and no more multiply-accumulates per second of audio.

        Raises:
            ValueError: the subnet is not in the search space, no measured subnet costs as little, this is a cut model,
                or weights are offloaded.
        """
        if max_params is not None or max_macs is not None:
            subnet = self._within(subnet, max_params, max_macs)
        is_offloaded = any(hasattr(module, "_hf_hook") for module in self.modules())  # by Accelerate
        if is_offloaded and any(parameter.is_meta for parameter in self.parameters()):
            raise ValueError(
                f"weights of this {type(self).__name__} are offloaded, not in memory: load it without device_map to"
                " cut a subnet out"
            )
        if subnet is None and self.search_space is None:
            return copy.deepcopy(self)
        selected = self.with_subnet(subnet)
        with torch.device("meta"):
            cut = type(self)(self.config.cut_to(selected.subnet))
        cut.load_state_dict(selected.cut_state(), assign=True)
        return cut.train(self.training)

    def trim(self) -> Self:
        """The same supernet, storing no more width, heads and FFN than its largest subnet. Every subnet has the same
        outputs as before. The selection of this model is left as it was.

        Raises:
            ValueError: a cut model, which has nothing to trim.
        """
        if self.search_space is None:
            raise ValueError(
                "only a supernet can be trimmed: this checkpoint is one model (give --search_space to make it one)"
            )
        config = self.config.trimmed()
        with torch.device("meta"):
            trimmed = type(self)(config)
        # all layers, and whole FFN blocks, even where no subnet fills them: others find their part by block and index
        trimmed.load_state_dict(self._selecting(config.full_subnet()).cut_state(), assign=True)
        return trimmed.eval()

    @torch.no_grad()
    def cut_state(self) -> dict[str, torch.Tensor]:
        """State dict of the cut model of the selected subnet; the tensors are copies."""
        state = cut_state(self)
        name = "masked_spec_embed" if self is self.base_model else f"{self.base_model_prefix}.masked_spec_embed"
        if name in state:
            state[name] = state[name][: self.subnet.hidden_size]
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}

    def elastic_heads(self) -> list[nn.Linear]:
        """Layers of the head that read hidden states. Elastic on their input side; none in a base model."""
        return []

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs
    ):
        """As in transformers; and a layer is recomputed in the subnet that it ran in, whatever is selected by then."""

        def checkpoint_in_subnet(function, *args, **options):
            subnet = self.subnet

            def recompute(*inputs, **named_inputs):
                earlier = self.subnet
                if earlier == subnet:
                    return function(*inputs, **named_inputs)
                # without the lock: this may be a thread of the backward pass, which a block of its caller waits for
                self._select(subnet)
                try:
                    return function(*inputs, **named_inputs)
                finally:
                    self._select(earlier)

            return gradient_checkpointing_func(recompute, *args, **options)

        super()._set_gradient_checkpointing(enable, checkpoint_in_subnet, **kwargs)

    def extra_repr(self) -> str:
        return f"subnet: {self.subnet}" if self is self.base_model else ""

    def measured_subnets(self) -> MeasuredSubnets | None:
        """What a search has found in this supernet, by name: `subnets.json` of the folder or repository that it was
        loaded from; `None` if there is none.

        Raises:
            ValueError: the file cannot be used, or this is a cut model.
        """
        return measured_subnets(self.config.name_or_path, self._require_search_space())

    def _within(self, subnet: Any, max_params: float | None, max_macs: float | None) -> Subnet:
        if subnet is not None:
            raise ValueError("give a subnet, or what it may cost (max_params, max_macs), not both")
        if (measured := self.measured_subnets()) is None:
            raise ValueError(
                f"{self.config.name_or_path or 'this supernet'} has no {SUBNETS_FILE}, which names measured subnets:"
                " search it with run_subnet_search.py, or give a subnet"
            )
        return measured.subnets[measured.within(max_params, max_macs)].subnet

    def _resolve(self, subnet: str | Subnet | Mapping[str, Any]) -> Subnet:
        return resolve(self._require_search_space(), subnet, self.config.name_or_path)

    def _require_search_space(self) -> SearchSpace:
        if self.search_space is None:
            raise ValueError(
                f"this {type(self).__name__} is a cut model ({self.subnet}) without a search space: load the supernet"
                " to choose another subnet"
            )
        return self.search_space


class LightHubertModel(LightHubertPreTrainedModel, HubertModel):
    """The bare LightHuBERT: raw waveform in, hidden states out.

    With `feat_extract_norm="layer"` the output for a recording does not depend on what it is padded or batched with,
    as long as `attention_mask` is given. With `"group"` (HuBERT Base, wav2vec 2.0 Base) the first convolution's norm
    takes its statistics over the padded length, and it does.
    """

    # a base model of what distillation left is meant to lack its heads
    _keys_to_ignore_on_load_unexpected = [r"^prediction_heads\."]

    def __init__(self, config: LightHubertConfig):
        config = config.resolved()
        config.validate()
        HubertPreTrainedModel.__init__(self, config)
        self.feature_extractor = LightHubertFeatureEncoder(config)
        self.feature_projection = LightHubertFeatureProjection(config)
        if config.mask_time_prob > 0.0 or config.mask_feature_prob > 0.0:
            self.masked_spec_embed = nn.Parameter(torch.empty(config.hidden_size).uniform_())
        encoder = LightHubertEncoderStableLayerNorm if config.do_stable_layer_norm else LightHubertEncoder
        self.encoder = encoder(config)
        self.selected_subnet = subnet_from(config.selected_subnet())
        self.selection_lock = SelectionLock()
        self.post_init()
        if config.search_space is not None:
            self.select(self.selected_subnet)

    def select(self, subnet: Subnet) -> None:
        """Sets what every elastic layer uses. Users call `set_subnet`, which checks the subnet and knows the head."""
        conv_dim = subnet.conv_dim or tuple(self.config.conv_dim)
        self.feature_extractor.select(conv_dim)
        self.feature_projection.select(conv_dim[-1], subnet.hidden_size)
        self.encoder.select(subnet)
        self.selected_subnet = subnet
        self.config.subnet = subnet

    def forward(
        self,
        input_values: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        mask_time_indices: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ):
        r"""
        Args:
            input_values (`torch.FloatTensor` of shape `(batch_size, num_samples)`):
                Waveforms at 16 kHz, which are cast to the dtype of the model; the released models want zero mean and
                unit variance per recording, taken before padding (`Wav2Vec2FeatureExtractor(do_normalize=True)`).
            attention_mask (`torch.LongTensor` of shape `(batch_size, num_samples)`, *optional*):
                1 for samples of the recording, 0 for padding on its right.
            mask_time_indices (`torch.BoolTensor` of shape `(batch_size, num_frames)`, *optional*):
                Frames to replace by the mask embedding.
            output_attentions, output_hidden_states, return_dict: as in HuBERT.

        Raises:
            ValueError: integer or empty audio, or less than one frame of it; on a CPU also NaN, infinite samples, and
                padding on the left, which other devices would be waited for to find.
        """
        self._check_audio(input_values, attention_mask)
        choices = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        kwargs |= {name: choice for name, choice in choices.items() if choice is not None}
        return super().forward(input_values.to(self.dtype), attention_mask, mask_time_indices, **kwargs)

    def _check_audio(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        if input_values.ndim != 2 or input_values.shape[0] == 0:
            raise ValueError(
                "input_values has to be (batch_size, num_samples) with at least one recording, not"
                f" {tuple(input_values.shape)}"
            )
        if not input_values.is_floating_point():
            raise ValueError(
                f"input_values is {input_values.dtype}: audio has to be floating point. The feature extractor converts"
                " integer samples"
            )
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        if input_values.shape[1] < self.config.samples_per_first_frame:
            raise ValueError(
                f"input_values has {input_values.shape[1]} samples, but one frame needs"
                f" {self.config.samples_per_first_frame}: pad the recording, or leave it out"
            )
        if input_values.device.type != "cpu":
            return
        if not torch.isfinite(input_values).all():
            broken = (~torch.isfinite(input_values)).any(dim=1).nonzero().flatten().tolist()
            raise ValueError(
                f"recording {broken[0]} of the batch has NaN or infinite samples: the audio, or what was done to it,"
                " is broken"
            )
        if attention_mask is not None and (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
            raise ValueError(
                "attention_mask has zeros before ones: pad recordings on the right (padding_side='right')"
            )

    def _mask_hidden_states(
        self,
        hidden_states: torch.Tensor,
        mask_time_indices: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """HuBERT's SpecAugment, with the mask embedding cut to the selected width and spans no longer than the
        clip."""
        config = self.config
        if not config.apply_spec_augment:
            return hidden_states
        batch_size, num_frames, hidden_size = hidden_states.shape
        if mask_time_indices is None and config.mask_time_prob > 0 and self.training:
            mask_time_indices = _compute_mask_indices(
                (batch_size, num_frames),
                config.mask_time_prob,
                min(config.mask_time_length, num_frames),
                attention_mask=attention_mask,
                min_masks=config.mask_time_min_masks,
            )
        if mask_time_indices is not None:
            mask_time_indices = torch.as_tensor(mask_time_indices, dtype=torch.bool, device=hidden_states.device)
            embedding = self.masked_spec_embed[:hidden_size].to(hidden_states.dtype)
            # an assignment to masked frames would count them first, for which a GPU is waited for
            hidden_states = torch.where(mask_time_indices[..., None], embedding, hidden_states)
        if config.mask_feature_prob > 0 and self.training:
            mask_feature_indices = _compute_mask_indices(
                (batch_size, hidden_size),
                config.mask_feature_prob,
                min(config.mask_feature_length, hidden_size),
                min_masks=config.mask_feature_min_masks,
            )
            masked = torch.as_tensor(mask_feature_indices, device=hidden_states.device)
            hidden_states = hidden_states.masked_fill(masked[:, None], 0)
        return hidden_states


class LightHubertWithHead(LightHubertPreTrainedModel):
    """A LightHuBERT with a head on top. Base model and head share the configuration that the base model owns."""

    def __init__(self, config: LightHubertConfig):
        hubert = LightHubertModel(config)
        HubertPreTrainedModel.__init__(self, hubert.config)
        self.hubert = hubert
        self.build_head(hubert.config)
        self.post_init()
        if config.search_space is not None:
            self.set_subnet(self.subnet)

    def build_head(self, config: LightHubertConfig) -> None:
        """Adds the layers of the head, named as transformers names them."""
        raise TypeError(f"{type(self).__name__} has no head")

    def freeze_feature_encoder(self) -> None:
        """Stops gradients of the convolutional feature encoder, and keeps none of its activations."""
        self.hubert.feature_extractor._freeze_parameters()

    def freeze_base_model(self) -> None:
        """Stops gradients of everything but the head."""
        self.hubert.requires_grad_(False)
        self.freeze_feature_encoder()


@dataclass
class LightHubertForPreTrainingOutput(ModelOutput):
    """Output of [`LightHubertForPreTraining`].

    Args:
        predictions (tuple of `torch.FloatTensor`, each of shape `(batch_size, num_frames, teacher_hidden_size)`):
            One prediction for each head.
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, num_frames, width of the subnet)`)
        hidden_states, attentions: as in HuBERT.
    """

    predictions: tuple[torch.FloatTensor, ...] | None = None
    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class LightHubertForPreTraining(LightHubertWithHead):
    """LightHuBERT with distillation heads: from its last hidden state, a linear layer without bias predicts each
    target.

    The loss depends on the teacher and lives with the training code. Source: section 2 of the paper;
    `layer_pred_heads` of the released checkpoints.
    """

    def build_head(self, config: LightHubertConfig) -> None:
        self.prediction_heads = nn.ModuleList(
            linear(config, config.hidden_size, config.teacher_hidden_size, bias=False)
            for _ in range(config.num_prediction_heads)
        )

    def elastic_heads(self) -> list[nn.Linear]:
        return list(self.prediction_heads)

    def forward(
        self,
        input_values: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        mask_time_indices: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> tuple | LightHubertForPreTrainingOutput:
        """Arguments as in [`LightHubertModel`]."""
        outputs = self.hubert(input_values, attention_mask, mask_time_indices, return_dict=True, **kwargs)
        output = LightHubertForPreTrainingOutput(
            predictions=tuple(head(outputs.last_hidden_state) for head in self.prediction_heads),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


class LightHubertForCTC(LightHubertWithHead, HubertForCTC):
    """LightHuBERT with a linear layer on top for speech recognition with connectionist temporal classification.

    Frames of padding are blanks: transformers' pipeline decodes them as well, and their logits would be arbitrary.
    """

    target_lang = None
    BLANK_LOGIT = 1e4

    def build_head(self, config: LightHubertConfig) -> None:
        self.dropout = nn.Dropout(config.final_dropout)
        self.lm_head = linear(config, config.hidden_size, config.vocab_size)

    def elastic_heads(self) -> list[nn.Linear]:
        return [self.lm_head]

    def forward(
        self,
        input_values: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> tuple | CausalLMOutput:
        """Arguments as in [`LightHubertModel`], and `labels` (batch_size, num_labels), -100 where there are none."""
        outputs = super().forward(input_values, attention_mask, labels, return_dict=True, **kwargs)
        if attention_mask is not None:
            lengths = self._get_feat_extract_output_lengths(attention_mask.sum(-1))
            blank = torch.zeros_like(outputs.logits[0, 0])
            blank[self.config.pad_token_id] = self.BLANK_LOGIT
            frames = frame_mask(lengths, outputs.logits.shape[1])
            outputs.logits = torch.where(frames[..., None], outputs.logits, blank)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if return_dict else outputs.to_tuple()


class LightHubertForSequenceClassification(LightHubertWithHead, HubertForSequenceClassification):
    """LightHuBERT with a classifier over mean-pooled frames, for keyword spotting, emotion, language and the like."""

    def build_head(self, config: LightHubertConfig) -> None:
        _add_layer_weights(self, config)
        self.projector = linear(config, config.hidden_size, config.classifier_proj_size)
        self.classifier = nn.Linear(config.classifier_proj_size, config.num_labels)

    def elastic_heads(self) -> list[nn.Linear]:
        return [self.projector]


class Wav2Vec2Alias:
    """Heads that transformers has for wav2vec 2.0 only: their `forward` calls the base model by that name."""

    @property
    def wav2vec2(self) -> LightHubertModel:
        return self.hubert


class LightHubertForAudioFrameClassification(Wav2Vec2Alias, LightHubertWithHead, Wav2Vec2ForAudioFrameClassification):
    """LightHuBERT with a classifier for every frame, for speaker diarisation and the like."""

    def build_head(self, config: LightHubertConfig) -> None:
        _add_layer_weights(self, config)
        self.num_labels = config.num_labels
        self.classifier = linear(config, config.hidden_size, config.num_labels)

    def elastic_heads(self) -> list[nn.Linear]:
        return [self.classifier]


class LightHubertForXVector(Wav2Vec2Alias, LightHubertWithHead, Wav2Vec2ForXVector):
    """LightHuBERT with x-vectors (time-delay layers and statistics pooling) on top, for speaker verification."""

    def build_head(self, config: LightHubertConfig) -> None:
        _add_layer_weights(self, config)
        self.projector = linear(config, config.hidden_size, config.tdnn_dim[0])
        self.tdnn = nn.ModuleList(TDNNLayer(config, layer) for layer in range(len(config.tdnn_dim)))
        self.feature_extractor = nn.Linear(config.tdnn_dim[-1] * 2, config.xvector_output_dim)
        self.classifier = nn.Linear(config.xvector_output_dim, config.xvector_output_dim)
        self.objective = AMSoftmaxLoss(config.xvector_output_dim, config.num_labels)

    def elastic_heads(self) -> list[nn.Linear]:
        return [self.projector]


def _add_layer_weights(model: LightHubertWithHead, config: LightHubertConfig) -> None:
    if config.use_weighted_layer_sum:
        num_layers = config.selected_subnet().num_hidden_layers + 1
        model.layer_weights = nn.Parameter(torch.full((num_layers,), 1 / num_layers))


__all__ = [
    "LightHubertForAudioFrameClassification",
    "LightHubertForCTC",
    "LightHubertForPreTraining",
    "LightHubertForSequenceClassification",
    "LightHubertForXVector",
    "LightHubertModel",
    "LightHubertPreTrainedModel",
]
