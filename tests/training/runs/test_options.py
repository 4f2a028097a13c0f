"""Recipes give options, the command line has the last word, and mistakes end with their reason."""

import re
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pytest
from run_speech_recognition_ctc import KINDS
from transformers import TrainingArguments

from lighthubert_training.data.sources import DataArguments
from lighthubert_training.distillation.arguments import DistillationArguments, ObjectiveArguments
from lighthubert_training.recognition.arguments import CTCArguments, ModelArguments
from lighthubert_training.recognition.text import TextArguments
from lighthubert_training.runs.options import RECIPES, OptionParser, option, parse_options, read_options, save_options
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
    parsed = parse_options(OptionParser(kinds), path.parent.name, ["--config", path.stem, *required])
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


def parse(folder: Path, recipe: str, *arguments: str, kind: type = Options) -> Any:
    (folder / "recipe.yaml").write_bytes(recipe.encode(errors="surrogateescape"))
    (options,) = parse_options(OptionParser(kind), arguments=["--config", str(folder / "recipe.yaml"), *arguments])
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
    assert parse_options(OptionParser(Options)) == (Options("a"),)


def test_saved_options_give_the_same_options(tmp_path):
    options = Options("a", layers=[3], rate=1e-5)
    save_options(asdict(options), str(tmp_path / "run"))
    recipe = tmp_path / "run" / "recipe.yaml"
    assert parse_options(OptionParser(Options), arguments=["--config", str(recipe)]) == (options,)
    assert read_options(recipe)["rate"] == "1.0e-05"


# Recipes are words, whose type is that of the option


@dataclass
class Typed:
    """An option of each type."""

    language: str | None = None
    strategy: Literal["no", "steps"] = "steps"
    switch: bool = False
    count: int = 0
    rate: float = 0.0
    names: list[str] | None = None
    kwargs: dict | str | None = None


@pytest.mark.parametrize("recipe", ["language: no", "language: 'no'", 'language: "no"  # Norwegian'])
def test_no_is_a_language(tmp_path, recipe):
    assert parse(tmp_path, recipe, kind=Typed).language == "no"


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("strategy: no", Typed(strategy="no")),
        *((f"switch: {word}", Typed(switch=True)) for word in ("yes", "on", "true", "True", "1")),
        *((f"switch: {word}", Typed(switch=False)) for word in ("no", "off", "false", "False", "0")),
        ("count: 007", Typed(count=7)),
        ("language: 007", Typed(language="007")),
        ("language: 1e-4", Typed(language="1e-4")),
        ("language: 2020-01-01", Typed(language="2020-01-01")),
        ("language: -x", Typed(language="-x")),
        ("language: null", Typed()),
        ("language: none", Typed()),
        ("language: 'null'", Typed(language="null")),
        ("language: ''", Typed(language="")),
        ("rate: 1e-4", Typed(rate=1e-4)),
        ("rate: -1", Typed(rate=-1.0)),
        ("names: [no, 1, on]", Typed(names=["no", "1", "on"])),
        ("kwargs: {steps: 3}", Typed(kwargs='{"steps": "3"}')),
    ],
)
def test_a_word_of_a_recipe_means_what_the_type_of_its_option_says(tmp_path, recipe, expected):
    assert parse(tmp_path, recipe, kind=Typed) == expected


def test_options_of_any_type_survive_being_saved(tmp_path):
    options = Typed("no", "no", True, 7, 1e-4, ["null", "007"])
    save_options(asdict(options), tmp_path)
    assert parse_options(OptionParser(Typed), arguments=["--config", str(tmp_path / "recipe.yaml")]) == (options,)


# Unset


@dataclass
class Optionals:
    """Options without a value, and two that have one."""

    file: list[str] | None = option(None, "Files")
    steps: int | None = None
    form: str | None = option(None, "Format", choices=("txt", "srt"))
    switch: bool | None = None
    name: str = "a"
    report_to: None | str | list[str] = field(default="none")


@pytest.mark.parametrize("words", [("{} none",), ("{}=none",)], ids=["space", "equals"])
def test_what_a_recipe_sets_is_unset_on_the_command_line(tmp_path, words):
    recipe = "file: [a, b]\nsteps: 3\nform: srt\nswitch: yes\nname: b\n"
    assert parse(tmp_path, recipe, kind=Optionals) == Optionals(["a", "b"], 3, "srt", True, "b")
    unset = " ".join(words[0].format(f"--{name}") for name in ("file", "steps", "form", "switch")).split()
    assert parse(tmp_path, recipe, *unset, kind=Optionals) == Optionals(name="b")
    assert parse(tmp_path, recipe, *unset, "--file", "c", kind=Optionals) == Optionals(["c"], name="b")


def test_none_is_a_word_where_another_is_the_default(tmp_path):
    assert parse(tmp_path, "name: none\nreport_to: none\n", kind=Optionals) == Optionals(name="none")
    with pytest.raises(UserError, match="invalid int value: 'nine'"):
        parse(tmp_path, "steps: nine", kind=Optionals)


def test_every_optional_option_of_fine_tuning_can_be_unset():
    parser = OptionParser(KINDS)
    optional = [word for name in sorted(parser.optional - {"output_dir"}) for word in (f"--{name}", "none")]
    required = ["--model_name_or_path", "m", "--output_dir", "out", "--use_cpu"]
    parsed = parse_options(parser, arguments=[*required, "--validation_file", "a.parquet", *optional])
    assert parsed[3].validation_file is None
    assert parsed[0].device is None


# Mistakes


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
        (["--name", "a", "--nome", "b"], "unrecognized arguments: --nome b"),
        (["--name"], "--name: expected one argument .--help lists the options"),
        (["--config"], "--config: expected one argument"),
        (["--config", "nowhere.yaml"], "nowhere.yaml is no file and no recipe: give a YAML file$"),
    ],
)
def test_mistakes_on_the_command_line_end_with_their_reason(arguments, message):
    with pytest.raises(UserError, match=message):
        parse_options(OptionParser(Options), arguments=arguments)


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
    return parse_options(OptionParser(Options), job, arguments)[0]


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


# Help


def help_of(capsys, kinds: object, *words: str, description: str | None = None) -> str:
    with pytest.raises(SystemExit) as ended:
        parse_options(OptionParser(kinds, description), arguments=words)
    assert ended.value.code == 0
    return capsys.readouterr().out


@dataclass
class Output:
    """Where the result goes."""

    output_dir: str = option("out", "A folder")
    form: str | None = option(None, "Format", choices=("txt", "srt"))


def test_the_help_has_a_section_for_each_dataclass_and_every_option_once(capsys):
    listed = help_of(capsys, (Options, Output), "--help")
    parts = ("A required option, one with", "--kind {one,two}", "Where the result goes", "--form {txt,srt}")
    assert sorted(parts, key=listed.index) == list(parts)
    for name in ("--layers", "--switch", "--output_dir", "--form"):
        assert len(re.findall(rf"^  {name} ", listed, re.MULTILINE)) == 1
    assert "A folder (default: out)" in listed
    assert "(default: None)" not in listed
    assert "--output-dir" not in listed
    assert parse_options(OptionParser(Output), arguments=["--output-dir", "b"])[0].output_dir == "b"


def test_the_help_keeps_the_lines_of_examples(capsys):
    assert "\n    python x.py \\\n        --a b\n" in help_of(
        capsys, Optionals, "--help", description="Does.\n\n    python x.py \\\n        --a b\n"
    )


def test_the_options_of_transformers_are_listed_when_they_are_asked_for(capsys):
    ours, every = (help_of(capsys, KINDS, word) for word in ("--help", "--help-all"))
    assert len(ours.splitlines()) < 200 < len(every.splitlines())
    assert every.startswith(ours.rstrip())
    assert "--help-all" in ours
    assert "--learning_rate " not in ours.replace("such as --output_dir and\n", "")
    for name in (each.name for each in fields(TrainingArguments) if each.init):
        assert len(re.findall(rf"^  --{name}\b", every, re.MULTILINE)) == 1, name


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


def test_recovery_has_the_objective_of_stage_2_so_that_the_prediction_head_fits():
    recipes = [parse_published(path) for path in CONFIGS if path.stem in ("recovery", "stage2_small")]
    recovery, stage2 = (options["ObjectiveArguments"] for options in recipes)
    assert recovery == stage2


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
