"""Exports of a subnet: as a cut model, as a stock HuBERT of transformers (`to_hubert`), as an ONNX file.

    python -m modeling_lighthubert.export supernet --subnet best.json --format hubert --output_dir small

prints what was lost and gained: the difference from the cut model's answers, size, and speed on this machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoTokenizer,
    HubertConfig,
    HubertForCTC,
    HubertForSequenceClassification,
    HubertModel,
)
from transformers.activations import ACT2FN
from transformers.models.hubert.modeling_hubert import HubertPreTrainedModel

from . import (
    LightHubertForCTC,
    LightHubertForPreTraining,
    LightHubertForSequenceClassification,
    LightHubertModel,
    LightHubertPreTrainedModel,
    Subnet,
    modeling_lighthubert,
)
from .onnx_export import to_onnx


HUBERT_CLASSES: dict[type[LightHubertPreTrainedModel], type[HubertPreTrainedModel]] = {
    LightHubertModel: HubertModel,
    LightHubertForCTC: HubertForCTC,
    LightHubertForSequenceClassification: HubertForSequenceClassification,
}


def to_hubert(model: LightHubertPreTrainedModel) -> HubertPreTrainedModel:
    """A stock `HubertModel`, `HubertForCTC` or `HubertForSequenceClassification` with the answers of `model`.

    All layers of a HuBERT have the same number of heads and FFN units. Layers that have fewer are filled up with
    zeros, which changes nothing: a zero value head adds zero, and so does a unit whose activation of zero is zero.
    Logits of CTC on frames of padding are the stock model's own, where ours are blanks.

    Args:
        model: a cut model, or a supernet, whose selected subnet is exported.

    Raises:
        ValueError: transformers has no such HuBERT head, or a stock HuBERT cannot hold the subnet exactly
            (`Subnet.is_hubert_exportable` tells beforehand); the message names the layer.
    """
    hubert_class = HUBERT_CLASSES.get(type(model))
    if hubert_class is None:
        allowed = [ours.__name__ for ours in HUBERT_CLASSES]
        raise ValueError(f"transformers has no HuBERT like {type(model).__name__}: export one of {allowed}")
    subnet = model.subnet
    if subnet.hubert_obstacle:
        raise ValueError(f"a stock HuBERT cannot hold this subnet exactly: {subnet.hubert_obstacle}")
    if model.search_space is not None:
        model = model.extract_subnet()
    config = model.config
    if len(set(subnet.intermediate_size)) > 1 and ACT2FN[config.hidden_act](torch.zeros(1)) != 0:
        narrow = subnet.intermediate_size.index(min(subnet.intermediate_size))
        raise ValueError(
            f"a stock HuBERT cannot hold this subnet exactly: layer {narrow} has fewer FFN units than others, and"
            f" {config.hidden_act}(0) is not 0"
        )
    shared = {field.name: getattr(config, field.name) for field in fields(HubertConfig)}
    shared |= {"num_attention_heads": subnet.hidden_size // subnet.head_dim, "architectures": None}
    with torch.device("meta"):
        hubert = hubert_class(HubertConfig(**shared))
    hubert.set_attn_implementation(config._attn_implementation)
    state = model.state_dict()
    hubert.load_state_dict(
        {name: _zero_padded(state[name], like) for name, like in hubert.state_dict().items()}, assign=True
    )
    return hubert.train(model.training)


def _zero_padded(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`tensor` in the front corner of zeros of the shape of `like`."""
    missing = [amount for have, want in zip(tensor.shape, like.shape, strict=True) for amount in (want - have, 0)]
    return nn.functional.pad(tensor.detach(), missing[::-1]).clone()


Runner = Callable[[torch.Tensor], torch.Tensor]
"""From audio (batch_size, num_samples) to logits or hidden states, in fp32."""


def load(model_name_or_path: str, subnet: str | None = None) -> LightHubertPreTrainedModel:
    """The cut model of a subnet, with the head of its supernet, but for those of distillation.

    Args:
        subnet: a name or a JSON file. Default: the selected one.

    Raises:
        ValueError: a subnet of what is no supernet, or no checkpoint of ours.
    """
    config = AutoConfig.from_pretrained(model_name_or_path)
    name = (config.architectures or ["LightHubertModel"])[0]
    model_class = getattr(modeling_lighthubert, name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, LightHubertPreTrainedModel)):
        raise ValueError(f"{model_name_or_path} is a {name}: export a LightHuBERT")
    if model_class is LightHubertForPreTraining:
        model_class = LightHubertModel
    model = model_class.from_pretrained(model_name_or_path).eval()
    if model.search_space is None and subnet is not None:
        raise ValueError(f"subnet {subnet}: {model_name_or_path} is one model, no supernet to choose from")
    chosen = Subnet.from_json_file(subnet) if subnet is not None and subnet.endswith(".json") else subnet
    return model.extract_subnet(chosen)


def save(
    model: LightHubertPreTrainedModel, folder: Path, form: str, dtype: torch.dtype, quantize: str | None
) -> tuple[Runner, Path]:
    """Writes a cut model in one of `FORMATS`.

    Returns:
        What runs the file that was written, and the file.
    """
    if form == "onnx":
        to_onnx(model, folder, quantize)
        file = folder / ("model_int8.onnx" if quantize else "model.onnx")
        return onnx_runner(file), file
    exported = model if form == "transformers" else to_hubert(model)
    type(exported).to(exported, dtype).save_pretrained(folder)
    return torch_runner(type(exported).from_pretrained(folder, dtype=dtype).eval()), folder / "model.safetensors"


def copy_processor(model_name_or_path: str, folder: Path) -> None:
    """Saves the feature extractor and the tokenizer of the supernet, as far as there are any."""
    for auto_class in (AutoFeatureExtractor, AutoTokenizer):
        try:
            auto_class.from_pretrained(model_name_or_path).save_pretrained(folder)
        except (OSError, ValueError, TypeError, KeyError):
            continue


def torch_runner(model: HubertPreTrainedModel) -> Runner:
    @torch.inference_mode()
    def run(audio: torch.Tensor) -> torch.Tensor:
        outputs = model(audio.to(model.dtype))
        return (outputs.logits if "logits" in outputs else outputs.last_hidden_state).float()

    return run


def onnx_runner(file: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # its threads would go on waiting busily, and take the cores from what has its turn next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(audio: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(audio.shape, dtype=torch.long)
        inputs = {"input_values": audio.numpy(), "attention_mask": mask.numpy()}
        return torch.from_numpy(session.run(None, inputs)[0])

    return run


def speed_up(reference: Runner, exported: Runner, seconds: float, repeats: int) -> tuple[float, float]:
    """How many times faster the export is, the median of ratios, both taking turns; and the seconds that it takes."""
    audio = torch.randn(1, int(16_000 * seconds))
    times: list[list[float]] = []
    for _ in range(repeats + 1):
        times.append([])
        for run in (reference, exported):
            start = time.perf_counter()
            run(audio)
            times[-1].append(time.perf_counter() - start)
    del times[0]  # the first is a warm-up
    return statistics.median(one / other for one, other in times), statistics.median(other for _, other in times)


FORMATS = ("transformers", "hubert", "onnx")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Folder or Hub id of a LightHuBERT checkpoint.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the export.")
    parser.add_argument("--subnet", help="Name or JSON file of a subnet. Default: the one the checkpoint selects.")
    parser.add_argument(
        "--format", choices=FORMATS, default="transformers", help="Default: transformers, a cut model."
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="Of weights.")
    parser.add_argument("--quantize", choices=("int8",), help="8-bit weights, of an ONNX file.")
    parser.add_argument("--repeats", type=int, default=20, help="Timed runs of 5 s of audio (default: 20).")
    options = parser.parse_args(arguments)
    if options.quantize and options.format != "onnx":
        parser.error("--quantize is for --format onnx")
    if options.format == "onnx" and options.dtype != "float32":
        parser.error("--dtype is not for --format onnx: an ONNX file has float32, or --quantize int8")
    model = load(options.model, options.subnet)
    reference = torch_runner(model.extract_subnet())
    exported, file = save(model, options.output_dir, options.format, getattr(torch, options.dtype), options.quantize)
    copy_processor(options.model, options.output_dir)
    audio = torch.randn(1, 80_000, generator=torch.Generator().manual_seed(0))
    expected, found = reference(audio), exported(audio)
    difference = float((found - expected).square().mean().sqrt() / expected.std())
    size, (faster, _) = file.stat().st_size, speed_up(reference, exported, 5.0, options.repeats)
    print(model.subnet)
    print(f"{file}: {size / 2**20:.1f} MiB, {size / (4 * model.num_parameters()):.2f} times the parameters in fp32")
    print(f"difference from the cut model, on noise: {difference:.1e} of the deviation of its answers (RMS)")
    print(f"speed, 5 s of audio, {torch.get_num_threads()} threads: {faster:.2f} times that of the cut model")


if __name__ == "__main__":
    main()
