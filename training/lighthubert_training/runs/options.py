"""Options of a script: dataclasses, filled from the command line and from a recipe, a YAML file of options that comes
with the package or from the user; and the file that says with which options a run was made."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from modeling_lighthubert.errors import UserError, user_error
from modeling_lighthubert.files import write_text


RECIPES = Path(__file__).parents[1] / "configs"
"""A folder of recipes for each job."""


def option(default: Any = MISSING, help: str = "", choices: Sequence[str] | None = None) -> Any:
    """A field of a dataclass of options, for `OptionParser`. Without a default, the option is required; with the
    default `None`, the word `none` unsets it."""
    metadata = {"help": help} | ({"choices": choices} if choices else {})
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def parse_size(text: str) -> float:
    """`27M` as 27 million, `2.5G` as 2.5 thousand million.

    Raises:
        UserError: it is no number.
    """
    scale = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:], 1.0)
    try:
        return float(text if scale == 1.0 else text[:-1]) * scale
    except ValueError:
        raise UserError(f"{text!r} is no number: give one such as 500k, 27M or 2.5G") from None


class OptionParser(HfArgumentParser):
    """Options in dataclasses, as transformers reads them, with a `--help` that fits a screen and a half.

    The listing is grouped by dataclass, has each option once (`--a-b` is taken as well as `--a_b`), and leaves the
    options of classes of transformers to `--help-all`. An option whose default is `None` is unset by the word `none`;
    switches are `on` and `off`, too.

    Args:
        dataclass_types: a dataclass of options, or several.
        description: the docstring of the script, whose lines stay as they are.
    """

    def __init__(self, dataclass_types: Any, description: str | None = None):
        super().__init__(dataclass_types, description=description, formatter_class=_Lines)
        self.all_kinds = list(self.dataclass_types)
        self.kinds = [kind for kind in self.all_kinds if not kind.__module__.startswith("transformers.")]
        if self.kinds != self.all_kinds:
            text = "List the options of transformers as well, such as --output_dir and --learning_rate."
            self.add_argument("--help-all", action=_HelpAll, nargs=0, default=argparse.SUPPRESS, help=text)
        self.optional = {each.name for kind in self.all_kinds for each in fields(kind) if each.default is None}
        for action in self._actions:
            if action.type is string_to_bool:
                action.type = _switch
                action.metavar = "BOOL"
            if action.dest in self.optional and action.type is not None:
                action.type = _none_or(action.type)
                action.choices = action.choices and [*action.choices, None]

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        found, others = super().parse_known_args(args, namespace)
        for name in self.optional:
            if getattr(found, name, None) == [None]:  # a list of none
                setattr(found, name, None)
        if others:
            self.error(f"unrecognized arguments: {' '.join(others)}")
        return found, others

    def format_help(self) -> str:
        return self.format_options(self.kinds)

    def format_options(self, kinds: Sequence[Any]) -> str:
        """What `--help` prints, of the options in `kinds` and of those that are in no dataclass."""
        names = {each.name for kind in self.all_kinds for each in fields(kind)}
        general = [action for action in self._actions if action.dest not in names]
        required = [action for action in self._actions if action.required]
        formatter = self._get_formatter()
        formatter.add_usage(None, _once([*general[1:], *required]), [])
        formatter.add_text(self.description)
        sections = {(kind.__doc__ or kind.__name__).splitlines()[0].rstrip("."): kind for kind in kinds}
        for title, actions in (
            ("Options", general),
            *((title, self._of(kind)) for title, kind in sections.items()),
        ):
            formatter.start_section(title)
            formatter.add_arguments(_once(actions))
            formatter.end_section()
        return formatter.format_help()

    def _of(self, kind: Any) -> list[argparse.Action]:
        names = [each.name for each in fields(kind)]
        return [action for action in self._actions if action.dest in names]


class _Lines(argparse.RawDescriptionHelpFormatter):
    """Defaults stand behind the help, but for those that it names and those that are `None` or empty."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        has_default = action.option_strings and action.default not in (None, argparse.SUPPRESS, "", [])
        return f"{text} (default: %(default)s)" if has_default and "efault" not in text else text


class _HelpAll(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(parser.format_options(parser.all_kinds), end="")
        parser.exit()


def _once(actions: Iterable[argparse.Action]) -> list[argparse.Action]:
    """The first action of each name, with the first of its spellings."""
    firsts: dict[str, argparse.Action] = {}
    for action in actions:
        if action.dest not in firsts:
            firsts[action.dest] = copy(action)
            firsts[action.dest].option_strings = action.option_strings[: 2 if action.dest == "help" else 1]
            if action.choices is not None:
                choices = [str(choice) for choice in action.choices if choice is not None]
                firsts[action.dest].metavar = "{" + ",".join(choices) + "}"
    return list(firsts.values())


def _switch(word: str) -> bool:
    return string_to_bool({"on": "yes", "off": "no"}.get(word.lower(), word))


def _none_or(convert: Any) -> Any:
    """`convert`, but for the word `none`, which is `None`."""

    def convert_or_none(word: str) -> Any:
        return None if word.lower() == "none" else convert(word)

    convert_or_none.__name__ = getattr(convert, "__name__", str(convert))  # in messages
    return convert_or_none


def parse_options(
    parser: OptionParser, job: str | None = None, arguments: Sequence[str] | None = None
) -> tuple[Any, ...]:
    """The dataclasses of `parser`, from a recipe (`--config`) and from the command line, which has the last word.

    Values of a recipe are words, which go through the parser like those of the command line: it checks their names,
    types and choices. `null` leaves the default, `none` unsets.

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
    first.error = parser.error  # type: ignore[method-assign]  # argparse would end the process
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
            if isinstance(value, list):
                of_recipe += [f"--{name}", *map(str, value)]
            elif value is not None:
                of_recipe.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
        words = [*of_recipe, *words]
    with user_error():  # of a dataclass whose values contradict each other
        *parsed, _ = parser.parse_args_into_dataclasses(words)
    return tuple(parsed)


class _Words(yaml.SafeLoader):
    """Reads scalars as they are written, but for `null`: `no` is no `False` where the option is a language."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        start: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
        ]
        for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_options(path: Path) -> dict[str, Any]:
    """The options in a recipe, by name: words, lists and mappings of them, or `None`.

    Raises:
        UserError: it is no YAML file of options.
    """
    try:
        options = yaml.load(path.read_text(encoding="utf-8"), Loader=_Words)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(options, dict):
        raise UserError(f"--config {path} has to be a mapping of option names to values")
    return options


def save_options(options: dict[str, Any], output_dir: str | Path) -> None:
    """Writes all options, given or default, to `recipe.yaml`: as `--config` it starts the same run once more."""
    write_text(Path(output_dir) / "recipe.yaml", yaml.safe_dump(options, sort_keys=False))
