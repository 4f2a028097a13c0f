"""The one way to load a model for a command or a job: any checkpoint, a subnet of it, a head, a device, a dtype."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    Wav2Vec2Processor,
)
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from . import LightHubertForPreTraining, LightHubertModel, LightHubertPreTrainedModel, modeling_lighthubert
from .errors import UserError, user_error
from .search_space import SearchSpace, Subnet, search_space_from


SubnetLike = str | Path | Subnet | Mapping[str, Any]
"""A name, a JSON file, a `Subnet`, or a dict in our keys or those of the released code."""
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
LAYER = re.compile(r"encoder\.layers\.(\d+)\.")
TOKENIZER_FILES = (("tokenizer_config.json",), ("vocab.json", "tokenizer.json"))
EXTRACTOR_FILES = (("preprocessor_config.json", "processor_config.json"),)
PROCESSORS = {
    Wav2Vec2Processor: ("tokenizer and feature extractor", (*TOKENIZER_FILES, *EXTRACTOR_FILES)),
    AutoFeatureExtractor: ("feature extractor", EXTRACTOR_FILES),
    AutoTokenizer: ("tokenizer", TOKENIZER_FILES),
}
"""What a processor and its parts are called, and the files that they are in, each with others that take its place."""
NUMBERS_OF_PARTS = {"num_hidden_layers", "num_prediction_heads"}
SIZES = {
    *("hidden_size", "intermediate_size", "num_attention_heads", "head_dim", "vocab_size", "num_labels"),
    *("conv_dim", "conv_kernel", "conv_stride", "num_conv_pos_embeddings", "num_conv_pos_embedding_groups"),
    *("classifier_proj_size", "teacher_hidden_size", "xvector_output_dim", "tdnn_dim", "tdnn_kernel", "tdnn_dilation"),
}
"""What a configuration names that takes memory, or divides."""


def parse_subnet(subnet: SubnetLike) -> str | Subnet | Mapping[str, Any]:
    """What `set_subnet` takes: a JSON file is read, a name stays one.

    Raises:
        UserError: there is no such file, or it holds no subnet.
    """
    if isinstance(subnet, Path) or (isinstance(subnet, str) and subnet.endswith(".json")):
        with user_error(f"subnet {subnet}: "):
            return Subnet.from_json_file(subnet)
    return subnet


def parse_search_space(space: str | Path | SearchSpace | None) -> SearchSpace | None:
    """A search space from a preset's name or a JSON file.

    Raises:
        UserError: no such preset or file, or a file that holds no search space.
    """
    if space is None or isinstance(space, SearchSpace):
        return space
    with user_error(f"search space {space}: "):
        return SearchSpace.from_json_file(space) if str(space).endswith(".json") else search_space_from(space)


def check_name(model_name_or_path: str | Path) -> None:
    """Refuses what is neither a folder nor a name that the Hub could have, which would be asked for it for minutes.

    Raises:
        UserError: it is a file, or looks like a path and is none.
    """
    name, path = str(model_name_or_path), Path(model_name_or_path)
    if path.is_file():
        what = "an ONNX file, which only transcription runs" if path.suffix == ".onnx" else "a file"
        raise UserError(f"{path} is {what}: give the folder of a checkpoint, such as {path.parent}")
    # a name on the Hub is organisation/name; below a folder that is here, it would be a file or folder of it
    if not path.exists() and not (HUB_NAME.fullmatch(name) and not Path(name.partition("/")[0]).exists()):
        raise UserError(f"{path} does not exist: give the folder of a checkpoint, or its name on the Hub")


def load_config(model_name_or_path: str | Path, config_class: Any = AutoConfig, **options: Any) -> PreTrainedConfig:
    """The configuration of a checkpoint. Its sizes are checked before anything is made of them.

    Args:
        config_class: class with `from_pretrained`.
        options: of `from_pretrained`.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    check_name(model_name_or_path)
    with user_error(f"{model_name_or_path} cannot be loaded: ", (Exception,)):
        if (file := cached_file(model_name_or_path, "config.json")) is None:
            raise ValueError("it has no config.json")
        with user_error(f"{file} is no JSON: "):
            values = json.loads(Path(file).read_text(encoding="utf-8"))
        _check_values(values)
        if config_class is AutoConfig:
            options["trust_remote_code"] = False  # else transformers asks on the terminal
        config = config_class.from_pretrained(model_name_or_path, **options)
        config.name_or_path = str(model_name_or_path)  # only `AutoConfig` says so; measured subnets are there
        return config


def _check_values(config: Any) -> None:
    """Raises a `ValueError` for a configuration with a size that no model has, or classes that are no names."""
    if not isinstance(config, dict):
        raise ValueError(f"config.json has to be a JSON object, not {str(config)[:80]}")
    classes = config.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"architectures in config.json has to be a list of names, not {str(classes)[:80]}")
    for name in config.keys() & (SIZES | NUMBERS_OF_PARTS):
        least, most = (0, 1000) if name in NUMBERS_OF_PARTS else (1, 1_000_000)
        value = config[name]
        for size in value if isinstance(value, list) else [] if value is None else [value]:
            if isinstance(size, bool) or not isinstance(size, int) or not least <= size <= most:
                raise ValueError(f"{name} in config.json has to be whole, from {least} to {most:,}, not {size!r}")


def _check_weights(model_name_or_path: str | Path, config: PreTrainedConfig) -> None:
    """Raises a `ValueError` where the weights cannot be those of the configuration: missing layers would be made anew,
    in as much memory as they take."""
    folder, missing_is_none = Path(model_name_or_path), {"_raise_exceptions_for_missing_entries": False}
    if (onnx := sorted(folder.glob("*.onnx"))) and not [*folder.glob("*.safetensors*"), *folder.glob("*.bin*")]:
        raise ValueError(f"it has no weights but those of {onnx[0]}: transcription runs that file, if it is given")
    file = cached_file(model_name_or_path, SAFE_WEIGHTS_NAME, **missing_is_none)
    if file is None:  # weights in several files, or of an older form
        return
    with safe_open(file, framework="pt") as weights:
        found = [int(match[1]) for name in weights.keys() if (match := LAYER.search(name))]  # noqa: SIM118
    asked = getattr(config, "num_hidden_layers", 0)
    if found and asked > max(found) + 1:
        raise ValueError(f"config.json names {asked} layers, but {SAFE_WEIGHTS_NAME} has {max(found) + 1}")


def has_processor(model_name_or_path: str | Path, kind: Any) -> bool:
    """Whether a checkpoint has all the files of `kind`, as in `load_processor`."""
    lookup = {"_raise_exceptions_for_missing_entries": False}
    _, files = PROCESSORS[kind]
    return all(any(cached_file(model_name_or_path, each, **lookup) for each in file) for file in files)


def load_processor(model_name_or_path: str | Path, kind: Any = Wav2Vec2Processor) -> Any:
    """The processor of a CTC model, or a part of one: what makes input of audio, and text of output.

    Args:
        kind: `Wav2Vec2Processor`, `AutoFeatureExtractor` or `AutoTokenizer`.

    Raises:
        UserError: it is not there, or cannot be read.
    """
    check_name(model_name_or_path)
    (name, files), folder = PROCESSORS[kind], Path(model_name_or_path)
    missing = [file for file in files if folder.is_dir() and not any((folder / each).exists() for each in file)]
    with user_error(f"{model_name_or_path} has no {name} that can be read: ", (Exception,)):
        try:
            return kind.from_pretrained(model_name_or_path)
        except Exception as error:
            if not missing:
                raise
            raise ValueError(f"there is no {missing[0][0]} in it") from error


def load_model(
    model_name_or_path: str | Path,
    subnet: SubnetLike | None = None,
    head: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    **options: Any,
) -> Any:
    """A checkpoint, in evaluation mode, with `subnet` selected if it is a supernet.

    Args:
        model_name_or_path: folder or Hub id of a LightHuBERT, or of any model that transformers loads.
        subnet: to select; default: what the checkpoint selects.
        head: class with `from_pretrained`, such as `AutoModelForCTC`. Default: the class that the checkpoint names if
            it is one of ours, without the heads of distillation; otherwise `AutoModel`.
        device: default: where transformers puts it, the CPU.
        dtype: default: that of the checkpoint.
        options: of `from_pretrained`. With `output_loading_info=True` the report is returned as well.

    Raises:
        UserError: no checkpoint that transformers can load, a subnet of what is no supernet, no such subnet, or no
            such device.
    """
    config = load_config(model_name_or_path)
    device = None if device is None else parse_device(device)
    with user_error(f"{model_name_or_path} cannot be loaded: ", (Exception,)):
        _check_weights(model_name_or_path, config)
        loaded = (head or _default_class(config)).from_pretrained(model_name_or_path, dtype=dtype, **options)
    model: Any = loaded[0] if isinstance(loaded, tuple) else loaded
    if subnet is not None:
        if not is_supernet(model):
            raise UserError(f"subnet {subnet}: {model_name_or_path} is one model, no supernet to choose one from")
        with user_error():
            model.set_subnet(parse_subnet(subnet))
    model = model.eval() if device is None else model.eval().to(device)
    return (model, *loaded[1:]) if isinstance(loaded, tuple) else model


def load_cut_model(model_name_or_path: str | Path, subnet: SubnetLike | None = None, **options: Any) -> Any:
    """As `load_model`, but of a supernet the selected subnet is cut out; any other model is as it is."""
    loaded = load_model(model_name_or_path, subnet, **options)
    model, *report = loaded if isinstance(loaded, tuple) else (loaded,)
    model = model.extract_subnet() if is_supernet(model) else model
    return (model, *report) if report else model


def load_cut_lighthubert(
    model_name_or_path: str | Path, subnet: SubnetLike | None = None, **options: Any
) -> LightHubertPreTrainedModel:
    """As `load_cut_model`, of a checkpoint of ours.

    Raises:
        UserError: it is another model's.
    """
    config = load_config(model_name_or_path)
    if config.model_type != "lighthubert":
        name = (named_classes(config) or [f"{config.model_type} checkpoint"])[0]
        raise UserError(f"{model_name_or_path} is a {name}: give a LightHuBERT")
    return load_cut_model(model_name_or_path, subnet, **options)


def parse_device(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        UserError: torch knows no such device, or this machine has none.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from error


def is_supernet(model: Any) -> bool:
    """Whether a model, or a configuration, holds subnets to choose from."""
    return getattr(getattr(model, "config", model), "search_space", None) is not None


def named_classes(config: PreTrainedConfig) -> list[str]:
    """The classes of a model that its checkpoint names, such as `HubertForCTC`; older ones name none."""
    return config.architectures or []


def _default_class(config: PreTrainedConfig) -> Any:
    """The class of a checkpoint of ours, the base model for one with the heads of distillation; else `AutoModel`."""
    name = (named_classes(config) or [""])[0]
    if name == LightHubertForPreTraining.__name__:
        return LightHubertModel
    return getattr(modeling_lighthubert, name) if name in modeling_lighthubert.__all__ else AutoModel
