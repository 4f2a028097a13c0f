"""Scores frozen models on the ten tasks of SUPERB: a weighted sum of their layers, and a light head for each task.

    python training/run_superb.py --model_name_or_path lighthubert-small --subnets largest,a_small,best.json \\
        --data_dir superb-data --cache_dir features --output_dir superb
    python demo/make_superb_stand_ins.py --output_dir stand-ins
    python training/run_superb.py --model_name_or_path supernet --subnets largest,smallest --variant stand_in \\
        --data_dir stand-ins --cache_dir features --output_dir superb

Any model will do that transformers loads and that returns hidden states. Each run leaves a `result.json`, all of them
together `table.md`, `table.csv` and `table.png`. Finished runs are not repeated, and an interrupted one is resumed.
Stand-ins have the structure of SUPERB's data and none of its recordings: scores on them are no SUPERB results.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lighthubert_training.runs.distributed import DEVICE_HELP, build_accelerator
from lighthubert_training.runs.options import OptionParser, option, parse_options
from lighthubert_training.superb.features import FeatureCache, Upstream
from lighthubert_training.superb.recipes import read_settings, task_names
from lighthubert_training.superb.report import write_report
from lighthubert_training.superb.scoring import Scoring
from modeling_lighthubert.errors import run


@dataclass
class SuperbArguments:
    """What is scored, on what, and how."""

    model_name_or_path: list[str] = option(help="Models that transformers loads, folders or Hub ids.")
    output_dir: str = option(help="Folder for results.")
    data_dir: str | None = option(None, "Folder with a folder of data for each task; see configs/superb/README.md.")
    tasks: list[str] = option(["all"], f"Tasks, with commas or spaces between: {', '.join(task_names())}, or all.")
    subnets: list[str] | None = option(
        None, "Subnets of supernets: names or JSON files, with commas or spaces between."
    )
    variant: str | None = option(
        None,
        "Variant of the recipes: lighthubert_base, lighthubert_small or lighthubert_stage1 (the authors'"
        " learning rates), stand_in (small data).",
    )
    cache_dir: str | None = option(None, "Folder that keeps features. Default: they are computed whenever needed.")
    features_dtype: str | None = option(
        None, "Dtype of kept features. Default: float16.", choices=("float32", "float16")
    )
    max_unreadable_share: float = option(
        0.0, "Share of each part that may be unreadable, and is left out. Default: none may."
    )
    seeds: list[int] = option([0], "Random seeds: a head for each.")
    learning_rate: float | None = option(None, "Learning rate in place of the recipe's.")
    sweep: list[float] | None = option(None, "Learning rates to try; the best on the dev part is tested.")
    max_steps: int | None = option(None, "Optimiser steps in place of the recipe's.")
    device: str | None = option(None, DEVICE_HELP)

    def __post_init__(self) -> None:
        if self.cache_dir is None and self.features_dtype is not None:
            raise ValueError(f"--features_dtype {self.features_dtype} is of features that are kept: give --cache_dir")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"--max_steps has to be 1 or more, not {self.max_steps}")


def load_upstreams(arguments: SuperbArguments, device: torch.device) -> Iterator[Upstream]:
    """Each model, or each subnet of it, loaded when its turn comes."""
    subnets = [name for words in arguments.subnets or [] for name in words.split(",") if name]
    for model in arguments.model_name_or_path:
        for subnet in subnets or [None]:
            yield Upstream.from_pretrained(model, subnet, device)


def main() -> None:
    (arguments,) = parse_options(OptionParser(SuperbArguments, description=__doc__))
    accelerator = build_accelerator(arguments.device)
    names = [name for words in arguments.tasks for name in words.split(",") if name]
    tasks = [
        read_settings(name, arguments.variant, learning_rate=arguments.learning_rate, max_steps=arguments.max_steps)
        for name in (task_names() if names == ["all"] else names)
    ]
    output_dir = Path(arguments.output_dir)
    for upstream in load_upstreams(arguments, accelerator.device):
        cache = None
        if arguments.cache_dir is not None:
            dtype = getattr(torch, arguments.features_dtype or "float16")
            cache = FeatureCache(upstream, Path(arguments.cache_dir), dtype)
        scoring = Scoring(
            upstream, accelerator, output_dir, arguments.data_dir, arguments.max_unreadable_share, cache,
            seeds=arguments.seeds, sweep=arguments.sweep, variant=arguments.variant,
        )  # fmt: skip
        for settings in tasks:
            for result in scoring.run(settings):
                scores = ", ".join(f"{name} {100 * value:.2f}" for name, value in result["test"].items())
                print(f"{upstream.name}, {settings.task}, seed {result['seed']}: {scores}", flush=True)
    if accelerator.is_main_process:
        print(write_report(output_dir, arguments.variant, published=arguments.variant != "stand_in"))
    accelerator.end_training()


if __name__ == "__main__":
    run(main)
