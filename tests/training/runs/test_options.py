"""Recipes give options, the command line has the last word, and mistakes end with their reason."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
from run_speech_recognition_ctc import ModelArguments
from transformers import HfArgumentParser, TrainingArguments

from lighthubert_training.data.sources import DataArguments
from lighthubert_training.distillation.arguments import DistillationArguments
from lighthubert_training.distillation.teacher import ObjectiveArguments
from lighthubert_training.recognition.data import TextArguments
from lighthubert_training.recognition.trainer import CTCArguments
from lighthubert_training.runs.options import parse_recipe, save_recipe


CONFIGS = sorted((Path(__file__).parent.parent / "training" / "configs").glob("*.yaml"))
PUBLISHED = [path for path in CONFIGS if path.stem.startswith("stage")]
DISTILLATION = (DistillationArguments, ObjectiveArguments, DataArguments)
RECOGNITION = (ModelArguments, CTCArguments, TextArguments, DataArguments, TrainingArguments)


def parse_published(path: Path) -> tuple:
    """What the script of the recipe reads from it."""
    if path.stem.startswith("ctc"):
        return parse_recipe(
            HfArgumentParser(RECOGNITION),
            ["--config", str(path), "--output_dir", "out", "--model_name_or_path", "m", "--fp16", "False"],
        )
    return parse_recipe(HfArgumentParser(DISTILLATION), ["--config", str(path), "--output_dir", "out"])


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
    parse_published(path)
    settings = [
        line for line in path.read_text().splitlines() if line and not line.startswith(("#", " ", "dataset_config"))
    ]
    uncommented = [line for line in settings if "#" not in line and "split" not in line and "column" not in line]
    assert not uncommented


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_recipes_are_those_of_the_paper(path):
    arguments, objective, data = parse_published(path)
    assert arguments.teacher_name_or_path == "facebook/hubert-base-ls960"
    assert (objective.num_target_layers, objective.mask_time_prob, objective.mask_time_length) == (8, 0.65, 10)
    assert data.dataset_name == ["openslr/librispeech_asr"]


def test_the_schedule_of_the_recipe_for_100_hours_ends_with_its_steps():
    path = next(path for path in CONFIGS if path.stem == "ctc_librispeech_100h")
    *_, training = parse_published(path)
    phases = training.lr_scheduler_kwargs
    assert training.warmup_steps + phases["num_stable_steps"] + phases["num_decay_steps"] == training.max_steps


def test_the_recipes_for_small_budgets_name_files_that_are_here():
    recipes = {path.stem: parse_published(path) for path in CONFIGS if "small_budget" in path.stem}
    arguments, _, data = recipes["small_budget"]
    top = CONFIGS[0].parent.parent.parent
    names = [arguments.teacher_name_or_path, arguments.search_space, *data.train_file, *data.validation_file]
    for name in [*names, *recipes["ctc_small_budget"][3].train_file]:
        assert (top / name).exists(), name
