"""Recipes give options, the command line has the last word, and mistakes end with their reason."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from distillation import ObjectiveArguments
from distillation_arguments import DistillationArguments
from recipes import parse_recipe, save_recipe
from speech_data import DataArguments


CONFIGS = sorted((Path(__file__).parent.parent / "training" / "configs").glob("*.yaml"))
PUBLISHED = [path for path in CONFIGS if path.stem.startswith("stage")]


@dataclass
class Options:
    """A required option, one with choices, a list, a switch."""

    name: str = field()
    kind: str = field(default="one", metadata={"choices": ("one", "two")})
    layers: list[int] | None = None
    rate: float = 1.0
    switch: bool = False


def parse(folder: Path, recipe: str, *arguments: str) -> Options:
    (folder / "recipe.yaml").write_text(recipe)
    (options,) = parse_recipe(HfArgumentParser(Options), ["--config", str(folder / "recipe.yaml"), *arguments])
    return options


def test_the_command_line_overrides_the_recipe(tmp_path):
    recipe = "name: a\nkind: two\nlayers: [1, 2]\nrate: 5e-4\nswitch: true\n"
    assert parse(tmp_path, recipe) == Options("a", "two", [1, 2], 5e-4, True)
    assert parse(tmp_path, recipe, "--rate", "2", "--switch", "false") == Options("a", "two", [1, 2], 2.0, False)


def test_a_saved_recipe_gives_the_same_options(tmp_path):
    options = Options("a", layers=[3], rate=1e-5)
    save_recipe(asdict(options), str(tmp_path / "run"))
    (again,) = parse_recipe(HfArgumentParser(Options), ["--config", str(tmp_path / "run" / "recipe.yaml")])
    assert again == options


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("nome: a", "there is no option 'nome'"),
        ("name: a\nkind: three", "invalid choice: 'three'"),
        ("name: a\nrate: fast", "invalid float value: 'fast'"),
        ("- a", "has to be a mapping"),
        ("name: [", "cannot be read"),
        ("kind: two", "--name"),
    ],
)
def test_mistakes_in_a_recipe_end_with_their_reason(tmp_path, capsys, recipe, message):
    with pytest.raises(SystemExit):
        parse(tmp_path, recipe)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_value_of_a_recipe_says_where_it_comes_from(path):
    parser = HfArgumentParser((DistillationArguments, ObjectiveArguments, DataArguments))
    parse_recipe(parser, ["--config", str(path), "--output_dir", "out"])
    settings = [
        line for line in path.read_text().splitlines() if line and not line.startswith(("#", "dataset_config"))
    ]
    uncommented = [line for line in settings if "#" not in line and "split" not in line and "column" not in line]
    assert not uncommented


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_recipes_are_those_of_the_paper(path):
    parser = HfArgumentParser((DistillationArguments, ObjectiveArguments, DataArguments))
    arguments, objective, data = parse_recipe(parser, ["--config", str(path), "--output_dir", "out"])
    assert arguments.teacher_name_or_path == "facebook/hubert-base-ls960"
    assert (objective.num_target_layers, objective.mask_time_prob, objective.mask_time_length) == (8, 0.65, 10)
    assert data.dataset_name == ["openslr/librispeech_asr"]


def test_the_recipe_for_small_budgets_names_files_that_are_here():
    parser = HfArgumentParser((DistillationArguments, ObjectiveArguments, DataArguments))
    path = next(path for path in CONFIGS if path.stem == "small_budget")
    arguments, _, data = parse_recipe(parser, ["--config", str(path), "--output_dir", "out"])
    top = path.parent.parent.parent
    for name in (arguments.teacher_name_or_path, arguments.search_space, *data.train_file, *data.validation_file):
        assert (top / name).exists(), name
