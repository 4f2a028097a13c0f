"""Recipes give options, the command line has the last word, and mistakes end with their reason."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from transformers import HfArgumentParser, TrainingArguments

from lighthubert_training.data.sources import DataArguments
from lighthubert_training.distillation.arguments import DistillationArguments, ObjectiveArguments
from lighthubert_training.recognition.arguments import CTCArguments, ModelArguments
from lighthubert_training.recognition.text import TextArguments
from lighthubert_training.runs.options import RECIPES, option, parse_options, read_options, save_options
from modeling_lighthubert.errors import UserError


ROOT = Path(__file__).parents[3]
CONFIGS = [file for job in ("distillation", "recognition") for file in sorted((RECIPES / job).glob("*.yaml"))]
PUBLISHED = [path for path in CONFIGS if path.stem.startswith("stage")]


def parse_published(path: Path) -> dict:
    """What the script of the recipe reads from it, by the name of each dataclass."""
    if path.parent.name == "recognition":
        kinds = (ModelArguments, CTCArguments, TextArguments, DataArguments, TrainingArguments)
        required = ["--output_dir", "out", "--model_name_or_path", "m", "--fp16", "False"]
    else:
        kinds, required = (DistillationArguments, ObjectiveArguments, DataArguments), ["--output_dir", "out"]
    parsed = parse_options(HfArgumentParser(kinds), path.parent.name, ["--config", path.stem, *required])
    return {type(each).__name__: each for each in parsed}


@dataclass
class Options:
    """A required option, one with choices, a list, a switch."""

    name: str = option(help="A name")
    kind: str = option("one", choices=("one", "two"))
    layers: list[int] | None = option(None, "Some layers")
    rate: float = 1.0
    switch: bool = False

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"--rate has to be positive, not {self.rate}")


def parse(folder: Path, recipe: str, *arguments: str) -> Options:
    (folder / "recipe.yaml").write_bytes(recipe.encode(errors="surrogateescape"))
    (options,) = parse_options(
        HfArgumentParser(Options), arguments=["--config", str(folder / "recipe.yaml"), *arguments]
    )
    return options


def test_the_command_line_overrides_the_recipe(tmp_path):
    recipe = "name: a\nkind: two\nlayers: [1, 2]\nrate: 5e-4\nswitch: true\n"
    assert parse(tmp_path, recipe) == Options("a", "two", [1, 2], 5e-4, True)
    assert parse(tmp_path, recipe, "--rate", "2", "--switch", "false") == Options("a", "two", [1, 2], 2.0, False)


def test_a_default_list_is_each_objects_own():
    @dataclass
    class Lists:
        names: list[str] = option(["a"], "Names")

    one, other = Lists(), Lists()
    one.names.append("b")
    assert other.names == Lists().names == ["a"]


def test_null_in_a_recipe_leaves_the_default(tmp_path):
    assert parse(tmp_path, "name: a\nrate: null\nlayers: null\n") == Options("a")


def test_the_command_line_of_the_process_is_read(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--name", "a"])
    assert parse_options(HfArgumentParser(Options)) == (Options("a"),)


def test_saved_options_give_the_same_options(tmp_path):
    options = Options("a", layers=[3], rate=1e-5)
    save_options(asdict(options), str(tmp_path / "run"))
    recipe = tmp_path / "run" / "recipe.yaml"
    assert parse_options(HfArgumentParser(Options), arguments=["--config", str(recipe)]) == (options,)
    assert read_options(recipe) == asdict(options)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("nome: a", "there is no option 'nome'"),
        ("name: a\nkind: three", "invalid choice: 'three'"),
        ("name: a\nrate: fast", "invalid float value: 'fast'"),
        ("name: a\nrate: -1.0", "--rate has to be positive, not -1.0"),
        ("- a", "has to be a mapping"),
        ("name: [", "cannot be read"),
        ("name: \udcff", "cannot be read"),
        ("kind: two", "required: --name"),
    ],
)
def test_mistakes_in_a_recipe_end_with_their_reason(tmp_path, recipe, message):
    with pytest.raises(UserError, match=message):
        parse(tmp_path, recipe)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "a", "--rate", "-1"], "--rate has to be positive"),
        (["--name", "a", "--nome", "b"], "'--nome', 'b'"),
        (["--name"], "--name: expected one argument .--help lists the options"),
        (["--config"], "--config: expected one argument"),
        (["--config", "nowhere.yaml"], "nowhere.yaml is no file and no recipe: give a YAML file$"),
    ],
)
def test_mistakes_on_the_command_line_end_with_their_reason(arguments, message):
    with pytest.raises(UserError, match=message):
        parse_options(HfArgumentParser(Options), arguments=arguments)


# Recipes of the package


@pytest.fixture
def recipes(tmp_path, monkeypatch) -> Path:
    """Two recipes of the job `baking`, in a package of the test's own; and the working directory beside it."""
    (tmp_path / "package" / "baking").mkdir(parents=True)
    for name in ("bread", "cake"):
        (tmp_path / "package" / "baking" / f"{name}.yaml").write_text(f"name: {name}\nrate: 2.0\n")
    monkeypatch.setattr("lighthubert_training.runs.options.RECIPES", tmp_path / "package")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bake(*arguments: str, job: str | None = "baking") -> Options:
    return parse_options(HfArgumentParser(Options), job, arguments)[0]


def test_a_recipe_of_the_package_is_found_by_its_name(recipes):
    assert bake("--config", "cake") == Options("cake", rate=2.0)
    assert bake("--config", "cake", "--rate", "3") == Options("cake", rate=3.0)


def test_a_file_is_found_by_its_path_and_goes_before_a_recipe_of_its_name(recipes):
    (recipes / "mine.yaml").write_text("name: mine")
    assert bake("--config", "mine.yaml") == Options("mine")
    (recipes / "cake").write_text("name: mine")
    assert bake("--config", "cake") == Options("mine")


def test_a_folder_does_not_hide_the_recipe_of_its_name(recipes):
    """Such as the output of the run before."""
    (recipes / "cake").mkdir()
    assert bake("--config", "cake") == Options("cake", rate=2.0)


def test_an_unknown_recipe_is_told_which_ones_there_are(recipes):
    with pytest.raises(UserError, match="pie is no file and no recipe: give a YAML file, or one of bread, cake$"):
        bake("--config", "pie")
    with pytest.raises(UserError, match="--config cake is no file and no recipe: give a YAML file$"):
        bake("--config", "cake", job=None)


def test_the_help_lists_the_recipes(recipes, capsys):
    with pytest.raises(SystemExit) as ended:
        bake("--help")
    assert ended.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "YAML file with any of these options, or one of bread, cake." in words
    assert "--layers LAYERS [LAYERS ...] Some layers" in words


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_value_of_a_recipe_says_where_it_comes_from(path):
    parse_published(path)
    settings = [
        line for line in path.read_text().splitlines() if line and not line.startswith(("#", " ", "dataset_config"))
    ]
    uncommented = [line for line in settings if "#" not in line and "split" not in line and "column" not in line]
    assert not uncommented


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_recipes_are_those_of_the_paper(path):
    options = parse_published(path)
    assert options["DistillationArguments"].teacher_name_or_path == "facebook/hubert-base-ls960"
    objective = options["ObjectiveArguments"]
    assert (objective.num_target_layers, objective.mask_time_prob, objective.mask_time_length) == (8, 0.65, 10)
    assert options["DataArguments"].dataset_name == ["openslr/librispeech_asr"]


def test_the_schedule_of_the_recipe_for_100_hours_ends_with_its_steps():
    path = next(path for path in CONFIGS if path.stem == "ctc_librispeech_100h")
    training = parse_published(path)["TrainingArguments"]
    phases = training.lr_scheduler_kwargs
    assert training.warmup_steps + phases["num_stable_steps"] + phases["num_decay_steps"] == training.max_steps


def test_the_recipes_for_small_budgets_name_files_that_are_here():
    recipes = {path.stem: parse_published(path) for path in CONFIGS if "small_budget" in path.stem}
    arguments, data = (recipes["small_budget"][name] for name in ("DistillationArguments", "DataArguments"))
    names = [arguments.teacher_name_or_path, arguments.search_space, *data.train_file, *data.validation_file]
    for name in [*names, *recipes["ctc_small_budget"]["DataArguments"].train_file]:
        assert (ROOT / name).exists(), name
