"""What subnets are worth on SUPERB's ten tasks, on stand-ins that run anywhere; no figure here is a SUPERB result.

    for seed in 0 1 2; do python demo/run_demo.py --seed $seed --output_dir demo/output/seed-$seed; done
    python benchmarks/superb.py --supernets demo/output/seed-?/supernet

For each supernet, a seed of its own: the teacher, the largest, the middle and the smallest subnet, and random weights
in the shape of the largest. Every run is `training/run_superb.py` with the variant stand_in, two at a time with a
thread each; those that are done are not made again.
"""

import shutil
import statistics
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RANDOM as CONTROL
from common import SUBNETS
from comparisons import report
from processes import ROOT, SpeechArguments, parse, run_script
from tqdm.auto import tqdm
from transformers import set_seed

from lighthubert_training.runs.distributed import DEVICE_HELP
from lighthubert_training.runs.options import option
from lighthubert_training.runs.tables import markdown_table
from lighthubert_training.superb import report as superb
from modeling_lighthubert import LightHubertModel
from modeling_lighthubert.errors import run, user_error
from modeling_lighthubert.loading import load_model


@dataclass(kw_only=True)
class SuperbBenchmarkArguments(SpeechArguments):
    """What is scored, and on what: the stand-ins are made of single words."""

    supernets: list[str] = option(help="Supernets, one for each seed.")
    teacher: str = option(str(ROOT / "demo/teacher"), "Teacher that they were distilled from.")
    output_dir: str = option(str(ROOT / "benchmarks/output/superb"), "Folder for data, features and results.")
    features_dtype: str = option("float32", "Dtype of kept features.", choices=("float32", "float16"))
    device: str = option("cpu", DEVICE_HELP.replace("a GPU if there is one", "cpu"))


def models(arguments: SuperbBenchmarkArguments, output: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The seed, and the options that say which model, of every run. The control of each seed is made and saved."""
    for seed, folder in enumerate(arguments.supernets):
        supernet, control = load_model(folder), output / f"models/{seed}" / CONTROL
        set_seed(seed)
        LightHubertModel(supernet.config.cut_to(supernet.search_space.largest)).save_pretrained(control)
        with user_error():
            shutil.copy(Path(folder) / "preprocessor_config.json", control)
        for model in (Path(arguments.teacher).resolve(), control):
            yield seed, {"model_name_or_path": model}
        for subnet in SUBNETS:
            yield seed, {"model_name_or_path": Path(folder).resolve(), "subnets": subnet}


def tasks_won(scores: Mapping[str, superb.Scores], model: str) -> tuple[list[str], list[str]]:
    """Tasks whose first metric is better than that of the control, in every seed and in the mean."""
    first: dict[str, str] = {}
    for (task, _), (title, _) in superb.COLUMNS.items():
        first.setdefault(task, title)
    in_all, in_mean, better = [], [], superb.higher_is_better_score
    for title in first.values():
        own, control = ([better(title, value) for value in scores[each][title]] for each in (model, CONTROL))
        gains = [one - other for one, other in zip(own, control, strict=True)]
        in_all += [title] if min(gains) > 0 else []
        in_mean += [title] if statistics.mean(gains) > 0 else []
    return in_all, in_mean


def main() -> None:
    arguments = parse(SuperbBenchmarkArguments, __doc__)
    output = Path(arguments.output_dir).resolve()
    data = output / "data"
    if not (data / "asr/lm.arpa").exists():
        speech = {name: Path(getattr(arguments, name)).resolve() for name in ("train_file", "test_file")}
        run_script("demo/make_superb_stand_ins.py", output_dir=data, **speech)
    options = {"data_dir": data, "cache_dir": output / "features", "features_dtype": arguments.features_dtype}
    options |= {"variant": "stand_in", "device": arguments.device}

    def score(job: tuple[int, dict[str, Any]]) -> None:
        seed, model = job
        run_script("training/run_superb.py", output_dir=output / f"seed-{seed}", seeds=seed, **model, **options)

    jobs = list(models(arguments, output))
    with ThreadPoolExecutor(2) as workers:
        list(tqdm(workers.map(score, jobs), total=len(jobs), desc="runs"))
    scores: dict[str, dict[str, list[float]]] = {}
    for seed in range(len(arguments.supernets)):
        for model, row in superb.read_scores(output / f"seed-{seed}", "stand_in").items():
            for title, values in row.items():
                scores.setdefault(model, {}).setdefault(title, []).extend(values)
    findings = []
    for model in [model for model in scores if model != CONTROL]:
        in_all, in_mean = tasks_won(scores, model)
        won = f"{len(in_mean)} of 10 tasks in the mean, in {len(in_all)} in every seed ({', '.join(in_all)})"
        findings.append(f"{model}: better than {CONTROL} in {won}")
    report(output / "results.md", markdown_table(*superb.rows_of(scores, published=False)), findings)
    superb.plot_scores(scores, output / "superb.png")


if __name__ == "__main__":
    run(main)
