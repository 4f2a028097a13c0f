"""Converts a checkpoint of the authors (`lighthubert_{base,small,stage1}.pt`) to a folder that the Auto classes load.

    python -m modeling_lighthubert.convert_lighthubert_original_checkpoint_to_pytorch \\
        --checkpoint_path lighthubert_small.pt --pytorch_dump_folder_path lighthubert-small --trim

The file is unpickled with `weights_only=True`, every tensor is accounted for by name and shape, and the folder appears
whole or not at all.
"""

import argparse
import ast
import logging
import operator
import pickle
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.utils import validate_repo_id
from transformers import Wav2Vec2FeatureExtractor

from . import LightHubertConfig, LightHubertForPreTraining, SearchSpace
from .errors import UserError, run, user_error
from .files import require_unused, whole_folder
from .loading import parse_search_space
from .search_space import MOST_LAYERS


logger = logging.getLogger("modeling_lighthubert.convert")

# Ours on the left of a layer's number or name, fairseq's on the right
NAMES = {
    "hubert.masked_spec_embed": "mask_emb",
    "hubert.feature_projection.layer_norm": "layer_norm",
    "hubert.feature_projection.projection": "post_extract_proj",
    "hubert.encoder.pos_conv_embed.conv.bias": "encoder.pos_conv.0.bias",
    "hubert.encoder.pos_conv_embed.conv.parametrizations.weight.original0": "encoder.pos_conv.0.weight_g",
    "hubert.encoder.pos_conv_embed.conv.parametrizations.weight.original1": "encoder.pos_conv.0.weight_v",
    "hubert.encoder.layer_norm": "encoder.layer_norm",
}
LAYER_NAMES = {
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.out_proj": "self_attn.out_proj",
    "layer_norm": "self_attn_layer_norm",
    "feed_forward.intermediate_dense": "fc1",
    "feed_forward.output_dense": "fc2",
    "final_layer_norm": "final_layer_norm",
}
SETTINGS = (
    "encoder_layers",
    "encoder_embed_dim",
    "encoder_attention_heads",
    "encoder_ffn_embed_dim",
    "conv_feature_layers",
    "extractor_mode",
    "layer_norm_first",
    "conv_bias",
    "conv_pos",
    "conv_pos_groups",
)
"""Settings without which there is no model."""
UNUSED = ("label_embs_concat", "final_proj.")
"""HuBERT's pre-training head, which LightHuBERT's training left as it was."""


def load_original_checkpoint(checkpoint_path: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Model settings and weights of a `.pt` file, given by path or as `organisation/repository/file` on the Hub.

    Raises:
        UserError: the file is missing, damaged, holds anything but tensors and plain values, or is another model's.
    """
    path = Path(checkpoint_path)
    if not path.is_file():
        parts = checkpoint_path.split("/")
        if path.is_absolute() or len(parts) < 3:
            raise UserError(
                f"{checkpoint_path} is no file. Give a path, or organisation/repository/file on the Hub, such as"
                " mechanicalsea/lighthubert/lighthubert_small.pt"
            )
        with user_error(f"{checkpoint_path} cannot be downloaded: "):
            path = Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint: it is damaged, or holds code beside weights, which is never run"
            f" ({type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no details'})"
        ) from error
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    settings = checkpoint["cfg"].get("model") if isinstance(checkpoint.get("cfg"), dict) else None
    weights = checkpoint.get("model")
    if not isinstance(settings, dict) or settings.get("_name") not in ("hubert_pruner", "student_hubert"):
        raise UserError(f"{path} is not a LightHuBERT checkpoint: cfg.model names no hubert_pruner or student_hubert")
    if missing := [name for name in SETTINGS if name not in settings]:
        raise UserError(f"{path} is not a LightHuBERT checkpoint: its settings lack {missing}")
    if settings["encoder_layers"] not in range(1, MOST_LAYERS + 1):
        raise UserError(f"{path} is not a LightHuBERT checkpoint: encoder_layers={settings['encoder_layers']!r:.80}")
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"{path} is not a LightHuBERT checkpoint: 'model' is not a dictionary of tensors")
    return settings, weights


def parse_conv_layers(text: str) -> list[tuple[int, int, int]]:
    """`"[(512,10,5)] + [(512,3,2)] * 4"` to a list of (channels, kernel, stride), without evaluating it as code."""

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.List(elts=items):
                return [value(item) for item in items]
            case ast.Tuple(elts=items):
                return tuple(value(item) for item in items)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return operator.add(value(left), value(right))
            case ast.BinOp(left=ast.List() as left, op=ast.Mult(), right=ast.Constant(value=int(times))) if (
                times < 100
            ):
                return value(left) * times
        raise UserError(f"conv_feature_layers={text!r} is not a list of (channels, kernel, stride)")

    try:
        layers = value(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise UserError(f"conv_feature_layers={text!r} is not a list of (channels, kernel, stride)") from error
    if not isinstance(layers, list) or not all(isinstance(layer, tuple) and len(layer) == 3 for layer in layers):
        raise UserError(f"conv_feature_layers={text!r} is not a list of (channels, kernel, stride)")
    return layers


def find_search_space(settings: dict[str, Any]) -> SearchSpace | None:
    """The search space that the settings name: `None` for stage 1, which is one model.

    Raises:
        UserError: a supernet whose settings do not say which space it was trained for.
    """
    if settings["_name"] == "student_hubert":
        return None
    name = Path(str(settings.get("pruner_supernet", ""))).stem
    if name not in ("small", "base"):
        raise UserError("the checkpoint does not say which search space it was trained for: give --search_space")
    return SearchSpace.preset(name)


def make_config(
    settings: dict[str, Any], search_space: SearchSpace | None, teacher_hidden_size: int | None
) -> LightHubertConfig:
    """Configuration in our terms of the settings in fairseq's."""
    conv_dim, conv_kernel, conv_stride = zip(*parse_conv_layers(settings["conv_feature_layers"]), strict=True)
    return LightHubertConfig(
        search_space=search_space,
        hidden_size=settings["encoder_embed_dim"],
        num_hidden_layers=settings["encoder_layers"],
        num_attention_heads=settings["encoder_attention_heads"],
        intermediate_size=settings["encoder_ffn_embed_dim"],
        hidden_act=settings.get("activation_fn", "gelu"),
        hidden_dropout=settings.get("dropout", 0.1),
        attention_dropout=settings.get("attention_dropout", 0.1),
        activation_dropout=settings.get("activation_dropout", 0.0),
        feat_proj_dropout=settings.get("dropout_input", 0.0),
        layerdrop=settings.get("encoder_layerdrop", 0.0),
        feat_extract_norm="layer" if settings["extractor_mode"] == "layer_norm" else "group",
        do_stable_layer_norm=settings["layer_norm_first"],
        conv_dim=conv_dim,
        conv_kernel=conv_kernel,
        conv_stride=conv_stride,
        conv_bias=settings["conv_bias"],
        num_conv_pos_embeddings=settings["conv_pos"],
        num_conv_pos_embedding_groups=settings["conv_pos_groups"],
        num_prediction_heads=0 if teacher_hidden_size is None else 1,
        teacher_hidden_size=teacher_hidden_size,
    )


def original_name(name: str, config: LightHubertConfig) -> str:
    """fairseq's name of our parameter `name`."""
    if name in NAMES:
        return NAMES[name]
    module, _, kind = name.rpartition(".")
    if module in NAMES:
        return f"{NAMES[module]}.{kind}"
    parts = module.split(".")
    if module.startswith("hubert.encoder.layers."):
        return f"encoder.layers.{parts[3]}.{LAYER_NAMES['.'.join(parts[4:])]}.{kind}"
    if module.startswith("prediction_heads."):
        return f"layer_pred_heads.{config.num_hidden_layers - 1}.{kind}"
    # feature_extractor: fairseq has a Sequential of convolution, dropout, norm (layer norm sits between transposes),
    # GELU
    norm = "2.1" if config.feat_extract_norm == "layer" else "2"
    return f"feature_extractor.conv_layers.{parts[3]}.{'0' if parts[4] == 'conv' else norm}.{kind}"


def convert(checkpoint_path: str, search_space: SearchSpace | None = None) -> LightHubertForPreTraining:
    """The model in a checkpoint of the authors, in fp32, with its prediction head.

    Args:
        checkpoint_path: see `load_original_checkpoint`.
        search_space: overrides what the checkpoint says, or says what it does not.

    Raises:
        UserError: not a LightHuBERT checkpoint, or one whose tensors do not fit its settings.
    """
    settings, weights = load_original_checkpoint(checkpoint_path)
    space = search_space or find_search_space(settings)
    head = weights.get(f"layer_pred_heads.{settings['encoder_layers'] - 1}.weight")
    said = (
        "" if search_space or not space else ", with the search space that its settings name (--search_space: another)"
    )
    with user_error(f"{checkpoint_path}{said}: ", (Exception,)):  # settings can be of any type
        config = make_config(settings, space, None if head is None else head.shape[0])
    with torch.device("meta"):
        model = LightHubertForPreTraining(config)
    state, used = {}, set()
    for name, parameter in model.state_dict().items():
        theirs = original_name(name, config)
        if theirs not in weights:
            raise UserError(f"{checkpoint_path} lacks {theirs} (our {name})")
        if weights[theirs].shape != parameter.shape:
            raise UserError(
                f"{theirs} has shape {tuple(weights[theirs].shape)}, but its settings say {tuple(parameter.shape)}"
            )
        state[name] = weights[theirs].float()
        used.add(theirs)
    unused = sorted(set(weights) - used)
    if unknown := [name for name in unused if not name.startswith(UNUSED)]:
        raise UserError(f"{checkpoint_path} has weights that LightHuBERT does not know: {unknown}")
    if unused:
        logger.warning(f"Dropped, because nothing uses them: {', '.join(unused)}")
    model.load_state_dict(state, assign=True)
    return model.eval()


MODEL_CARD = """---
library_name: transformers
license: mit
tags: [speech, hubert, lighthubert, once-for-all]
---

# {name}

Converted from `{checkpoint}` of the authors of LightHuBERT ([paper](https://arxiv.org/abs/2203.15610)).
It holds {content}.

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
```
"""


def save_whole(model: LightHubertForPreTraining, folder: Path, checkpoint_path: str, name: str) -> None:
    """Writes model, code, feature extractor and card: all of it, or nothing on an error."""
    with whole_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(unfinished)
        space = model.search_space
        content = f"{space.num_subnets:,} subnets, {space}" if space else f"one model, {model.subnet}"
        card = MODEL_CARD.format(name=name, checkpoint=Path(checkpoint_path).name, content=content)
        (unfinished / "README.md").write_text(card, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint_path", required=True, help="The .pt file: a path, or organisation/repository/file on the Hub."
    )
    parser.add_argument(
        "--pytorch_dump_folder_path", required=True, type=Path, help="Folder to write. Must not exist."
    )
    parser.add_argument(
        "--search_space",
        help="small, base, or a JSON file with the choices. Default: what the checkpoint says (stage 1 is one model).",
    )
    parser.add_argument(
        "--trim", action="store_true", help="Store no more width than the largest subnet has. Outputs stay the same."
    )
    parser.add_argument("--push_to_hub", metavar="ID", help="Hub repository to push the folder to.")
    options = parser.parse_args(arguments)
    folder = require_unused(options.pytorch_dump_folder_path, "--pytorch_dump_folder_path")
    if options.push_to_hub:
        with user_error("--push_to_hub: "):
            validate_repo_id(options.push_to_hub)
    model = convert(options.checkpoint_path, parse_search_space(options.search_space))
    if options.trim:
        with user_error():
            model = model.trim()
    save_whole(model, folder, options.checkpoint_path, options.push_to_hub or folder.name)
    print(f"{folder}: {model.num_parameters():,} parameters, subnet {model.subnet}")
    if options.push_to_hub:
        try:
            repo = HfApi().create_repo(options.push_to_hub, exist_ok=True)
            HfApi().upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message="Convert LightHuBERT")
        except Exception as error:  # which, depends on the client's HTTP library
            raise ConnectionError(f"{folder} is whole, but is not pushed to {options.push_to_hub}: {error}") from error
        print(f"pushed to {repo}")


if __name__ == "__main__":
    run(main)
