"""Recipes: the options of a training script in a YAML file, and the file that says with which a run was made."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse_recipe(parser: HfArgumentParser, arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
    """The dataclasses of `parser` from the command line; `--config recipe.yaml` gives options before all others.

    Values of a recipe go through the parser like any option, so an unknown name, a wrong type or a value that is not
    among the choices ends with its message. `null` leaves the default.
    """
    parser.add_argument("--config", metavar="RECIPE.yaml", help="YAML file with any of these options.")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    config, rest = first.parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
    options = read_recipe(config.config, parser) if config.config is not None else []
    *parsed, _ = parser.parse_args_into_dataclasses([*options, *rest])
    return tuple(parsed)


def read_recipe(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """The options in a recipe, as words of a command line."""
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"--config {path} cannot be read: {error}")
    if not isinstance(recipe, dict):
        parser.error(f"--config {path} has to be a mapping of option names to values")
    known = {action.dest for action in parser._actions}
    words: list[str] = []
    for name, value in recipe.items():
        if name not in known:
            parser.error(f"--config {path}: there is no option {name!r}")
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def save_recipe(recipe: dict[str, Any], output_dir: str) -> None:
    """Writes all options, given or default, to `recipe.yaml`: `--config` of the same run once more."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
