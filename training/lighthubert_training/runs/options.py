"""Options of a script: dataclasses from the command line and from a recipe, a YAML file of options, which comes with
the package or from the user; and the file that says with which options a run was made."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from modeling_lighthubert.errors import UserError
from modeling_lighthubert.files import write_text


RECIPES = Path(__file__).parents[1] / "configs"
"""A folder of recipes for each job."""


def parse_options(
    parser: HfArgumentParser, job: str | None = None, arguments: Sequence[str] | None = None
) -> tuple[Any, ...]:
    """The dataclasses of `parser` from the command line; `--config` gives options before all others.

    Values of a recipe go through the parser like any option, so an unknown name, a wrong type or a value that is not
    among the choices ends with its message. `null` leaves the default.

    Args:
        job: folder of `configs/` whose recipes `--config` finds by name.
        arguments: default: those of the process.

    Raises:
        UserError: an option that is not there, or a value that it does not allow.
    """
    names = [file.stem for file in sorted((RECIPES / job).glob("*.yaml"))] if job else []
    listed = f", or one of {', '.join(names)}" if names else ""
    parser.add_argument("--config", metavar="RECIPE", help=f"YAML file with any of these options{listed}.")
    parser.error = _refuse  # type: ignore[method-assign]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    config, rest = first.parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
    options = [] if config.config is None else _words_of(_find_recipe(config.config, job, names), parser)
    try:
        *parsed, _ = parser.parse_args_into_dataclasses([*options, *rest])
    except ValueError as error:  # of a dataclass whose values contradict each other
        raise UserError(str(error)) from error
    return tuple(parsed)


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message} (--help lists the options)")


def _find_recipe(name: str, job: str | None, names: Sequence[str]) -> Path:
    path = RECIPES / str(job) / f"{name}.yaml" if name in names and not Path(name).exists() else Path(name)
    if not path.is_file():
        raise UserError(
            f"--config {name} is no file" + (f" and no recipe: choose from {', '.join(names)}" if names else "")
        )
    return path


def read_options(path: Path) -> dict[str, Any]:
    """The options in a recipe.

    Raises:
        UserError: no YAML file of options.
    """
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(options, dict):
        raise UserError(f"--config {path} has to be a mapping of option names to values")
    return options


def _words_of(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    """The options in a recipe, as words of a command line."""
    known = {action.dest for action in parser._actions}
    words: list[str] = []
    for name, value in read_options(path).items():
        if name not in known:
            raise UserError(f"--config {path}: there is no option {name!r}")
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def save_options(options: dict[str, Any], output_dir: str) -> None:
    """Writes all options, given or default, to `recipe.yaml`: `--config` of the same run once more."""
    write_text(Path(output_dir) / "recipe.yaml", yaml.safe_dump(options, sort_keys=False))
