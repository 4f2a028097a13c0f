"""ONNX files of cut models and stock HuBERTs: for any number of recordings of any length, compared with torch as they
are written."""

import copy
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.hubert.modeling_hubert import HubertPreTrainedModel

from .errors import UserError, optional_module
from .files import whole_file
from .inference_graph import as_inference_graph
from .modeling_lighthubert import frame_mask


CHECKS = ((1, 8000), (1, 16_123), (3, 31_999))
"""Numbers of recordings and samples that an export is compared on."""
WAVEFORM_WEIGHT = "products.0.weight"
"""How the name of the first convolution's weight ends: it stays in 32 bits."""
PRODUCTS = dict.fromkeys(("MatMul", "Gemm", "Conv"), 32) | dict.fromkeys(("MatMulInteger", "ConvInteger"), 8)
"""Operations that multiply matrices, and in how many bits."""


def to_onnx(
    model: HubertPreTrainedModel, folder: str | Path, quantize: str | None = None, max_difference: float = 1e-4
) -> float:
    """Writes `model.onnx`, `model_int8.onnx` or `model_fp16.onnx`, and the configuration into `folder`.

    The graph takes `input_values` (batch_size, num_samples), float32, and `attention_mask` of that shape, int64, and
    gives `logits`, or `last_hidden_state` of a base model. The kernel of the position convolution is stored as it is
    used, without its norm; the other convolutions are matrix products (`inference_graph`).

    Args:
        model: a cut model, a supernet, whose selected subnet is exported, or a stock HuBERT.
        quantize: `"int8"` stores the weights of matrix products in 8 bits, with a scale for each output, and computes
            with them (ONNX Runtime's dynamic quantisation). The first convolution and that of positions stay in fp32.
            `"float16"` computes in half precision, for GPUs and WebGPU; inputs and outputs stay float32.
        max_difference: from torch's outputs; nothing is written above it. Not asked of a quantised file.

    Returns:
        The largest difference from torch's outputs, as a multiple of their standard deviation.

    Raises:
        MissingExtraError: the extra `onnx` is not installed.
        UserError: `quantize` is something else, a layer attends within a window, or the outputs differ by more than
            `max_difference`.
    """
    exported = ExportedModel(model)
    name = {"int8": "model_int8.onnx", "float16": "model_fp16.onnx"}.get(quantize or "", "model.onnx")
    difference = write_graph(exported, Path(folder) / name, quantize, max_difference)
    exported.model.config.save_pretrained(folder)
    return difference


def write_graph(
    exported: "ExportedModel", path: Path, quantize: str | None = None, max_difference: float = 1e-4
) -> float:
    """Writes the ONNX file of what is exported. Arguments, result and errors are those of `to_onnx`."""
    if quantize not in (None, *CONVERSIONS):
        raise UserError(f"quantize={quantize!r} is not known: choose {' or '.join(map(repr, CONVERSIONS))} or None")
    for module in ("onnx", "onnxruntime", "onnxscript"):
        optional_module(module, "onnx", "writing an ONNX file")
    exported.eval()
    if exported.windows:
        raise UserError(
            f"layer {exported.windows[0]} attends within a window, which an ONNX file cannot have for audio of any"
            " length: export a subnet without attention_window"
        )
    expected = [exported.answer(*check) for check in CHECKS]
    as_inference_graph(exported.model)
    with whole_file(path) as file:
        _write(exported, file)
        if quantize is not None:
            CONVERSIONS[quantize](file, file)
        difference = _difference(expected, exported, file)
        if quantize is None and difference > max_difference:
            raise UserError(
                f"the ONNX file differs from torch by {difference:.1e}, more than max_difference={max_difference:g}:"
                " nothing is written"
            )
    return difference


def onnx_session(file: str | Path, num_threads: int | None = None) -> Any:
    """An `onnxruntime.InferenceSession` of `file` on the CPU.

    Args:
        num_threads: default: as many as torch has.

    Raises:
        MissingExtraError: the extra `onnx` is not installed.
        UserError: there is no such file, or ONNX Runtime cannot run it.
    """
    onnxruntime: Any = optional_module("onnxruntime", "onnx", "running an ONNX file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or torch.get_num_threads()
    # its threads would go on waiting busily, and take the cores from what has its turn next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a dozen, which have nothing in common
        raise UserError(f"{file} cannot be run: {error}") from error


class ExportedModel(nn.Module):
    """What is exported: a copy of the model, cut and folded, from audio and its mask to one tensor.

    Attributes:
        windows: layers that attend within a window.
    """

    input_names = ["input_values", "attention_mask"]

    def __init__(self, model: Any):
        super().__init__()
        if hasattr(model, "extract_subnet"):  # of ours, be it loaded with the code of its folder
            self.model = model.extract_subnet()
        else:  # a copy would share the class of its weight-normed convolution, and folding changes that class
            with torch.device("meta"):
                self.model = type(model)(copy.deepcopy(model.config))
            self.model.load_state_dict(model.state_dict(), assign=True)
        self.model = self.model.float()  # whatever the checkpoint is kept in
        position_convolution = self.model.base_model.encoder.pos_conv_embed.conv
        if nn.utils.parametrize.is_parametrized(position_convolution):
            nn.utils.parametrize.remove_parametrizations(position_convolution, "weight")
        layers = enumerate(self.model.base_model.encoder.layers)
        self.windows = [index for index, layer in layers if getattr(layer.attention, "window", None) is not None]

    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        outputs = self.model(input_values, attention_mask=attention_mask)
        return outputs.logits if "logits" in outputs else outputs.last_hidden_state

    @property
    def output_name(self) -> str:
        return "last_hidden_state" if self.model is self.model.base_model else "logits"

    def inputs(self, batch_size: int, num_samples: int) -> tuple[torch.Tensor, ...]:
        """Noise as `forward` takes it; of several recordings, the last is half padding."""
        audio = torch.randn(batch_size, num_samples, generator=torch.Generator().manual_seed(num_samples))
        mask = torch.ones(batch_size, num_samples, dtype=torch.long)
        if batch_size > 1:
            mask[-1, num_samples // 2 :] = 0
        return audio * mask, mask

    @torch.no_grad()
    def answer(self, batch_size: int, num_samples: int) -> torch.Tensor:
        """Of the noise of `inputs`."""
        return self(*self.inputs(batch_size, num_samples))


class WaveformModel(ExportedModel):
    """As `ExportedModel`, from audio alone: recordings without padding."""

    input_names = ["input_values"]

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(input_values, torch.ones_like(input_values, dtype=torch.long))

    def inputs(self, batch_size: int, num_samples: int) -> tuple[torch.Tensor, ...]:
        return (torch.randn(batch_size, num_samples, generator=torch.Generator().manual_seed(num_samples)),)


@torch.no_grad()
def _write(exported: ExportedModel, file: Path) -> None:
    batch, samples = torch.export.Dim("batch_size"), torch.export.Dim("num_samples")
    inputs = exported.inputs(2, 8000)
    shapes: dict[int, Any] = {0: batch, 1: samples}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, of itself
        torch.onnx.export(
            exported,
            inputs,
            str(file),
            input_names=exported.input_names,
            output_names=[exported.output_name],
            dynamic_shapes=(shapes,) * len(inputs),
            external_data=False,
            dynamo=True,
            verbose=False,
        )
    _drop_metadata(file)


def _drop_metadata(file: Path) -> None:
    """Takes out what the exporter notes of each node: the lines of Python that made it, with the paths of this
    machine, which are most of a small file."""
    onnx: Any = optional_module("onnx", "onnx", "writing an ONNX file")
    model = onnx.load(file)
    graphs = [model.graph, *model.functions]
    for graph in graphs:
        noted = [graph, *graph.node, *graph.value_info, *getattr(graph, "initializer", ())]
        noted += [*graph.input, *graph.output] if graph is model.graph else []
        for each in noted:
            del each.metadata_props[:]
            each.doc_string = ""
    onnx.save(model, file)


def quantize_file(file: Path, target: Path) -> None:
    """Dynamic quantisation of all matrix products with constant weights but the first, which reads the waveform:
    weights have a scale for each output, activations one for each tensor, taken as it is computed.

    Raises:
        MissingExtraError: the extra `onnx` is not installed.
    """
    onnx: Any = optional_module("onnx", "onnx", "writing an ONNX file in 8 bits")
    quantization: Any = optional_module("onnxruntime.quantization", "onnx", "writing an ONNX file in 8 bits")
    graph = onnx.load(file).graph
    first = [node.name for node in graph.node if any(name.endswith(WAVEFORM_WEIGHT) for name in node.input)]
    quantization.quantize_dynamic(
        file,
        target,
        weight_type=quantization.QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        nodes_to_exclude=first,
    )


def halve_file(file: Path, target: Path) -> None:
    """Weights and activations in half precision; inputs and outputs stay float32.

    Raises:
        MissingExtraError: the extra `onnx` is not installed.
    """
    onnx: Any = optional_module("onnx", "onnx", "writing an ONNX file in half precision")
    float16: Any = optional_module(
        "onnxruntime.transformers.float16", "onnx", "writing an ONNX file in half precision"
    )
    onnx.save(float16.convert_float_to_float16(onnx.load(file), keep_io_types=True), target)


CONVERSIONS = {"int8": quantize_file, "float16": halve_file}
"""From a file in fp32 to one of another precision."""


def macs_by_bits(file: str | Path, seconds: float = 1.0) -> dict[int, int]:
    """Multiply-accumulates of an ONNX file for one clip, by the bits in which they are computed: 8, or 32 for all that
    is no product of integers. The graph is run, and its products are counted.

    Raises:
        MissingExtraError: the extra `onnx` is not installed.
    """
    onnx: Any = optional_module("onnx", "onnx", "counting the products of an ONNX file")
    onnxruntime: Any = optional_module("onnxruntime", "onnx", "counting the products of an ONNX file")
    model = onnx.load(file)
    products = [node for node in model.graph.node if node.op_type in PRODUCTS]
    shapes = {each.name: tuple(each.dims) for each in model.graph.initializer}
    wanted = {name for node in products for name in (*node.input[:2], node.output[0]) if name not in shapes}
    known = {each.name for each in (*model.graph.input, *model.graph.output)}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(wanted - known))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    audio = torch.randn(1, int(seconds * 16_000), generator=torch.Generator().manual_seed(0))
    inputs = {"input_values": audio.numpy(), "attention_mask": torch.ones(audio.shape, dtype=torch.long).numpy()}
    inputs = {each.name: inputs[each.name] for each in session.get_inputs()}
    names = [output.name for output in session.get_outputs()]
    shapes |= {name: each.shape for name, each in zip(names, session.run(names, inputs), strict=True)}
    shapes |= {name: each.shape for name, each in inputs.items()}
    macs = dict.fromkeys((8, 32), 0)
    for node in products:
        rows, weights, outputs = (shapes[name] for name in (*node.input[:2], node.output[0]))
        summed = math.prod(weights[1:]) if "Conv" in node.op_type else rows[-1]
        macs[PRODUCTS[node.op_type]] += math.prod(outputs) * summed
    return macs


def _difference(expected: Sequence[torch.Tensor], exported: ExportedModel, file: Path) -> float:
    """The largest that is found over `CHECKS`, on frames that are not padding."""
    session = onnx_session(file)
    largest = 0.0
    for check, outputs in zip(CHECKS, expected, strict=True):
        inputs = exported.inputs(*check)
        arrays = [each.numpy() for each in inputs]
        found = session.run([exported.output_name], dict(zip(exported.input_names, arrays, strict=True)))[0]
        deviation = (torch.from_numpy(found) - outputs) / outputs.std()
        if deviation.ndim == 3 and len(inputs) > 1:
            lengths = exported.model._get_feat_extract_output_lengths(inputs[1].sum(-1))
            deviation = deviation[frame_mask(lengths, deviation.shape[1])]
        largest = max(largest, float(deviation.abs().max()))
    return largest
