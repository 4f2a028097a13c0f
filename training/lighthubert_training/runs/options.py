"""Options of a script: dataclasses, filled from the command line and from a recipe, a YAML file of options that comes
with the package or from the user; and the file that says with which options a run was made."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import MISSING, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from modeling_lighthubert.errors import UserError, user_error
from modeling_lighthubert.files import write_text


RECIPES = Path(__file__).parents[1] / "configs"
"""A folder of recipes for each job."""


def option(default: Any = MISSING, help: str = "", choices: Sequence[str] | None = None) -> Any:
    """A field of a dataclass of options, for `HfArgumentParser`. Without a default, the option is required."""
    metadata = {"help": help} | ({"choices": choices} if choices else {})
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def parse_options(
    parser: HfArgumentParser, job: str | None = None, arguments: Sequence[str] | None = None
) -> tuple[Any, ...]:
    """The dataclasses of `parser`, from a recipe (`--config`) and from the command line, which has the last word.

    Values of a recipe go through the parser like those of the command line, which checks their names, types and
    choices. `null` leaves the default.

    Args:
        job: folder of `RECIPES` whose recipes `--config` finds by name.
        arguments: words of the command line. Default: those of the process.

    Raises:
        UserError: there is no such option or recipe, or a value is not allowed.
    """
    names = [file.stem for file in sorted((RECIPES / job).glob("*.yaml"))] if job else []
    listed = f", or one of {', '.join(names)}" if names else ""
    parser.add_argument("--config", metavar="RECIPE", help=f"YAML file with any of these options{listed}.")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    for each in (parser, first):
        each.error = _refuse  # type: ignore[method-assign]  # argparse would end the process
    given, words = first.parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
    if given.config is not None:
        recipe = Path(given.config)
        if not recipe.is_file():  # a file of the user goes before the recipe of that name
            if given.config not in names:
                raise UserError(f"--config {given.config} is no file and no recipe: give a YAML file{listed}")
            recipe = RECIPES / str(job) / f"{given.config}.yaml"
        known = {action.dest for action in parser._actions}
        of_recipe: list[str] = []
        for name, value in read_options(recipe).items():
            if name not in known:
                raise UserError(f"--config {recipe}: there is no option {name!r}")
            if value is not None:
                of_recipe += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        words = [*of_recipe, *words]
    with user_error():  # of a dataclass whose values contradict each other
        *parsed, _ = parser.parse_args_into_dataclasses(words)
    return tuple(parsed)


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message} (--help lists the options)")


def read_options(path: Path) -> dict[str, Any]:
    """The options in a recipe, by name.

    Raises:
        UserError: it is no YAML file of options.
    """
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(options, dict):
        raise UserError(f"--config {path} has to be a mapping of option names to values")
    return options


def save_options(options: dict[str, Any], output_dir: str | Path) -> None:
    """Writes all options, given or default, to `recipe.yaml`: as `--config` it starts the same run once more."""
    write_text(Path(output_dir) / "recipe.yaml", yaml.safe_dump(options, sort_keys=False))
