"""The one way to load a model for a command or a job: any checkpoint, a subnet of it, a head, a device, a dtype."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from . import LightHubertForPreTraining, LightHubertModel, LightHubertPreTrainedModel, modeling_lighthubert
from .errors import UserError, user_error
from .search_space import SearchSpace, Subnet, search_space_from


SubnetLike = str | Path | Subnet | Mapping[str, Any]
"""A name, a JSON file, a `Subnet`, or a dict in our keys or those of the released code."""


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


def load_config(model_name_or_path: str | Path) -> PreTrainedConfig:
    """The configuration of a checkpoint.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = Path(model_name_or_path)
    if not path.exists() and (path.is_absolute() or path.parts[:1] == ("..",) or len(path.parts) > 2):
        raise UserError(f"{path} does not exist: give the folder of a checkpoint, or its name on the Hub")
    with user_error(f"{model_name_or_path} cannot be loaded: "):
        return AutoConfig.from_pretrained(model_name_or_path)


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
    with user_error(f"{model_name_or_path} cannot be loaded: "):
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
        name = (config.architectures or [f"{config.model_type} checkpoint"])[0]
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


def _default_class(config: PreTrainedConfig) -> Any:
    """The class of a checkpoint of ours, the base model for one with the heads of distillation; else `AutoModel`."""
    name = (config.architectures or [""])[0]
    if name == LightHubertForPreTraining.__name__:
        return LightHubertModel
    return getattr(modeling_lighthubert, name) if name in modeling_lighthubert.__all__ else AutoModel
