"""Exports of a subnet: as a cut model, as a stock HuBERT (`to_hubert`) or wav2vec 2.0 of transformers, as an ONNX
file, or as a folder that sherpa-onnx or transformers.js reads.

    python -m modeling_lighthubert.export --model_name_or_path supernet --subnet best.json --format hubert \\
        --output_dir small

prints what was lost and gained: the difference from the cut model's outputs, size, and speed on this machine.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoFeatureExtractor,
    AutoTokenizer,
    HubertConfig,
    HubertForCTC,
    HubertForSequenceClassification,
    HubertModel,
    Wav2Vec2Processor,
)
from transformers.activations import ACT2FN
from transformers.models.hubert.modeling_hubert import HubertPreTrainedModel

from . import (
    LightHubertForCTC,
    LightHubertForSequenceClassification,
    LightHubertModel,
    LightHubertPreTrainedModel,
)
from .errors import UserError, run
from .files import require_unused, whole_folder
from .loading import has_processor, load_cut_lighthubert, load_processor
from .onnx_export import macs_by_bits, onnx_session, to_onnx
from .profiling import SAMPLING_RATE, median_ratio, time_in_turns
from .runtimes import hubert_to_wav2vec2, write_sherpa_onnx, write_transformers_js


HUBERT_CLASSES: dict[str, type[HubertPreTrainedModel]] = {
    LightHubertModel.__name__: HubertModel,
    LightHubertForCTC.__name__: HubertForCTC,
    LightHubertForSequenceClassification.__name__: HubertForSequenceClassification,
}
"""By name: classes that were loaded with a checkpoint's own code are others than those of this package."""


def to_hubert(model: LightHubertPreTrainedModel) -> HubertPreTrainedModel:
    """A stock `HubertModel`, `HubertForCTC` or `HubertForSequenceClassification` with the outputs of `model`.

    All layers of a HuBERT have the same number of heads and FFN units. Layers that have fewer are filled up with
    zeros, which changes nothing: a zero value head adds zero, and so does a unit whose activation of zero is zero.
    Logits of CTC on frames of padding are the stock model's own, where ours are blanks.

    Args:
        model: a cut model, or a supernet, whose selected subnet is exported.

    Raises:
        UserError: transformers has no such HuBERT head, or a stock HuBERT cannot hold the subnet exactly
            (`Subnet.is_hubert_exportable` tells beforehand); the message names the layer.
    """
    hubert_class = HUBERT_CLASSES.get(type(model).__name__)
    if hubert_class is None:
        raise UserError(
            f"transformers has no HuBERT like {type(model).__name__}: export one of {', '.join(HUBERT_CLASSES)}"
        )
    subnet = model.subnet
    if subnet.hubert_obstacle:
        raise UserError(f"a stock HuBERT cannot hold this subnet exactly: {subnet.hubert_obstacle}")
    if model.search_space is not None:
        model = model.extract_subnet()
    config = model.config
    if len(set(subnet.intermediate_size)) > 1 and ACT2FN[config.hidden_act](torch.zeros(1)) != 0:
        narrow = subnet.intermediate_size.index(min(subnet.intermediate_size))
        raise UserError(
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
        {name: _pad_with_zeros(state[name], like) for name, like in hubert.state_dict().items()}, assign=True
    )
    return hubert.train(model.training)


def _pad_with_zeros(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`tensor` in the front corner of zeros of the shape of `like`."""
    missing = [amount for have, want in zip(tensor.shape, like.shape, strict=True) for amount in (want - have, 0)]
    return nn.functional.pad(tensor.detach(), missing[::-1]).clone()


Runner = Callable[[torch.Tensor], torch.Tensor]
"""From audio (batch_size, num_samples) to logits or hidden states: fp32 on the CPU, wherever they are computed."""


def write_export(
    model: LightHubertPreTrainedModel,
    folder: Path,
    form: str,
    dtype: torch.dtype,
    quantize: str | None = None,
    processor: Wav2Vec2Processor | None = None,
) -> tuple[Runner, Path]:
    """Writes a cut model in one of `FORMATS`. Its own weights are rounded to `dtype`, too, but for an ONNX file.

    Args:
        processor: of the model, for `RUNTIMES`, which keep it in a form of their own.

    Returns:
        What runs the file that was written, on the device of `model`, and the file.
    """
    if processor is not None:
        if form == "sherpa-onnx":
            file = write_sherpa_onnx(model, processor, folder, quantize)
        else:
            file = write_transformers_js(model, processor, folder)
        return onnx_runner(file), file
    if form == "onnx":
        to_onnx(model, folder, "float16" if dtype is torch.float16 else quantize)
        (file,) = folder.glob("*.onnx")
        return onnx_runner(file), file
    exported: Any = model if form == "transformers" else to_hubert(model)
    exported = hubert_to_wav2vec2(exported) if form == "wav2vec2" else exported
    type(exported).to(exported, dtype).save_pretrained(folder)
    written = type(exported).from_pretrained(folder, dtype=dtype).eval().to(model.device)
    return torch_runner(written), folder / "model.safetensors"


def copy_processor(model_name_or_path: str, folder: Path) -> None:
    """Saves the feature extractor and the tokenizer of the supernet, as far as there are any.

    What cannot be read is named on standard error, and so is a checkpoint that has neither.
    """
    kinds = [kind for kind in (AutoFeatureExtractor, AutoTokenizer) if has_processor(model_name_or_path, kind)]
    for kind in kinds:
        try:
            load_processor(model_name_or_path, kind).save_pretrained(folder)
        except UserError as error:
            _warn(f"{error}: it is left out")
    if not kinds:
        _warn(f"{model_name_or_path} has no feature extractor and no tokenizer to copy")


def _warn(message: str) -> None:
    print(f"warning: {' '.join(message.split())}", file=sys.stderr)


def torch_runner(model: HubertPreTrainedModel) -> Runner:
    @torch.inference_mode()
    def run(audio: torch.Tensor) -> torch.Tensor:
        outputs = model(audio.to(model.device, model.dtype))
        return (outputs.logits if "logits" in outputs else outputs.last_hidden_state).float().cpu()

    return run


def onnx_runner(file: Path) -> Runner:
    session = onnx_session(file)
    names = [each.name for each in session.get_inputs()]

    def run(audio: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(audio.shape, dtype=torch.long)
        inputs = {"input_values": audio.numpy(), "attention_mask": mask.numpy()}
        return torch.from_numpy(session.run(None, {name: inputs[name] for name in names})[0])

    return run


def speed_up(reference: Runner, exported: Runner, seconds: float, repeats: int) -> tuple[float, float]:
    """How many times faster the export is, the median of ratios, both taking turns; and the seconds that it takes."""
    audio = torch.randn(1, int(SAMPLING_RATE * seconds))
    runs = {"reference": lambda: reference(audio), "exported": lambda: exported(audio)}
    times = time_in_turns(runs, repeats)
    return median_ratio(times["reference"], times["exported"]), statistics.median(times["exported"])


RUNTIMES = ("sherpa-onnx", "transformers.js")
FORMATS = ("transformers", "hubert", "wav2vec2", "onnx", *RUNTIMES)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="Folder or Hub id of a LightHuBERT checkpoint.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the export. Must not be in use.")
    parser.add_argument("--subnet", help="Name or JSON file of a subnet. Default: the one the checkpoint selects.")
    parser.add_argument(
        "--format", choices=FORMATS, default="transformers", help="Default: transformers, a cut model."
    )
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="Dtype of the weights (default: float32).")
    parser.add_argument("--quantize", choices=("int8",), help="8-bit weights for an ONNX file.")
    parser.add_argument("--repeats", type=int, default=20, help="Number of timed runs of 5 s of audio (default: 20).")
    parser.add_argument(
        "--device",
        default="cpu",
        help="Device of the comparison, such as cuda (default: cpu).",
    )
    options = parser.parse_args(arguments)
    is_onnx, form = options.format in ("onnx", *RUNTIMES), options.format
    if options.quantize and form not in ("onnx", "sherpa-onnx"):
        has_all = ", which has all precisions" if form == "transformers.js" else ""
        parser.error(f"--quantize is for --format onnx and sherpa-onnx, not for {form}{has_all}")
    if form == "onnx" and (options.dtype == "bfloat16" or options.dtype == "float16" and options.quantize):
        parser.error("--format onnx has one of --dtype float32, --dtype float16 and --quantize int8")
    if form in RUNTIMES and options.dtype != "float32":
        parser.error(f"--dtype is not for --format {form}")
    if is_onnx and options.device != "cpu":
        parser.error(f"--device is not for --format {form}: an ONNX file is compared on the CPU")
    if options.repeats < 1:
        parser.error("--repeats has to be at least 1")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    require_unused(options.output_dir)
    source, dtype = options.model_name_or_path, getattr(torch, options.dtype)
    model = load_cut_lighthubert(source, options.subnet, device=options.device, dtype=torch.float32)
    reference = torch_runner(model.extract_subnet())
    processor = load_processor(source) if options.format in RUNTIMES else None
    with whole_folder(options.output_dir) as folder:
        exported, file = write_export(model, folder, options.format, dtype, options.quantize, processor)
        if processor is None:
            copy_processor(source, folder)
    file = options.output_dir / file.relative_to(folder)
    audio = torch.randn(1, 5 * SAMPLING_RATE, generator=torch.Generator().manual_seed(0))
    expected, found = reference(audio), exported(audio)
    difference = float((found - expected).square().mean().sqrt() / expected.std())
    size, (faster, _) = file.stat().st_size, speed_up(reference, exported, 5.0, options.repeats)
    print(model.subnet)
    print(f"{file}: {size / 2**20:.1f} MiB, {size / (4 * model.num_parameters()):.2f} times the parameters in fp32")
    if options.quantize:
        macs = macs_by_bits(file)
        print(f"in 8 bits: {macs[8] / sum(macs.values()):.1%} of the multiply-accumulates of a clip of one second")
    print(f"difference from the cut model, on noise: {difference:.1e} of the deviation of its outputs (RMS)")
    where = f"{torch.get_num_threads()} threads" if options.device == "cpu" else options.device
    print(f"speed, 5 s of audio, {where}: {faster:.2f} times that of the cut model")


if __name__ == "__main__":
    run(main)
