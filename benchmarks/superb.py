"""What subnets are worth on SUPERB's ten tasks, on stand-ins that run anywhere; no figure here is a SUPERB result.

    for seed in 0 1 2; do python demo/run_demo.py --seed $seed --output_dir demo/output/seed-$seed; done
    python benchmarks/superb.py --supernets demo/output/seed-?/supernet

For each supernet, a seed of its own: the teacher, the largest, the middle and the smallest subnet, and random weights
in the shape of the largest. Every run is `training/run_superb.py` with the variant stand_in, two at a time with a
thread each; those that are done are not made again.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm
from transformers import HfArgumentParser, set_seed
from transformers.utils import logging


ROOT = Path(__file__).resolve().parent.parent
from run_demo import markdown_table, middle_subnet

from lighthubert_training.superb.report import COLUMNS, goodness, plot, read_scores, rows_of
from modeling_lighthubert import LightHubertModel


CONTROL = "random weights"


@dataclass
class SuperbBenchmarkArguments:
    """What is scored, and on what."""

    supernets: list[str] = field(metadata={"help": "Supernets, one for each seed."})
    teacher: str = field(default=str(ROOT / "demo/teacher"), metadata={"help": "What they were distilled from."})
    train_file: str = field(
        default=str(ROOT / "demo/speech/train.parquet"), metadata={"help": "Of the stand-ins: single words."}
    )
    test_file: str = field(default=str(ROOT / "demo/speech/test.parquet"), metadata={"help": "Likewise."})
    output_dir: str = field(
        default=str(ROOT / "benchmarks/output/superb"), metadata={"help": "Folder for data, features and results."}
    )
    features_dtype: str = field(
        default="float32", metadata={"help": "Of kept features.", "choices": ("float32", "float16")}
    )


def commands(arguments: SuperbBenchmarkArguments, output: Path) -> list[tuple[int, list[str]]]:
    """The seed and the words of every run. The model of the control is made, and the middle subnet written."""
    runs = []
    for seed, folder in enumerate(arguments.supernets):
        supernet = LightHubertModel.from_pretrained(folder)
        space, models = supernet.search_space, output / f"models/{seed}"
        models.mkdir(parents=True, exist_ok=True)
        (models / "middle.json").write_text(json.dumps(middle_subnet(space).to_dict()))
        set_seed(seed)
        LightHubertModel(supernet.config.cut_to(space.largest)).save_pretrained(models / CONTROL)
        shutil.copy(Path(folder) / "preprocessor_config.json", models / CONTROL)
        chosen = [[arguments.teacher], [str(models / CONTROL)]]
        chosen += [[folder, "--subnets", subnet] for subnet in ("largest", str(models / "middle.json"), "smallest")]
        runs += [(seed, words) for words in chosen]
    return runs


def run(seed: int, model: list[str], arguments: SuperbBenchmarkArguments, output: Path) -> None:
    command = [
        sys.executable, ROOT / "training/run_superb.py", "--model_name_or_path", *model, "--variant", "stand_in",
        "--data_dir", output / "data", "--cache_dir", output / "features", "--seeds", seed, "--cpu", "True",
        "--features_dtype", arguments.features_dtype, "--output_dir", output / f"seed-{seed}",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{finished.stderr[-3000:]}")


def tasks_won(scores: dict[str, dict[str, list[float]]], model: str) -> tuple[list[str], list[str]]:
    """Tasks whose first metric is better than that of the control, in every seed and in the mean."""
    first = {}
    for (task, _), (title, _) in COLUMNS.items():
        first.setdefault(task, title)
    in_all, in_mean = [], []
    for title in first.values():
        pairs = [
            (goodness(title, one), goodness(title, other))
            for one, other in zip(scores[model][title], scores[CONTROL][title], strict=True)
        ]
        in_all += [title] if all(one > other for one, other in pairs) else []
        in_mean += [title] if statistics.mean(one - other for one, other in pairs) > 0 else []
    return in_all, in_mean


def main() -> None:
    (arguments,) = HfArgumentParser(SuperbBenchmarkArguments, description=__doc__).parse_args_into_dataclasses()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    output, begin = Path(arguments.output_dir).resolve(), time.perf_counter()
    make = [sys.executable, ROOT / "demo/make_superb_stand_ins.py", "--output_dir", output / "data"]
    make += ["--train_file", arguments.train_file, "--test_file", arguments.test_file]
    if not (output / "data/asr/lm.arpa").exists():
        subprocess.run(list(map(str, make)), check=True)
    runs = commands(arguments, output)
    with ThreadPoolExecutor(2) as workers, tqdm(total=len(runs), desc="runs") as bar:
        for _ in workers.map(lambda each: run(*each, arguments, output), runs):
            bar.update()
    scores: dict[str, dict[str, list[float]]] = {}
    for seed in range(len(arguments.supernets)):
        for model, row in read_scores(output / f"seed-{seed}", "stand_in").items():
            for title, values in row.items():
                scores.setdefault(model, {}).setdefault(title, []).extend(values)
    header, rows = rows_of(scores, published=False)
    lines = [markdown_table(tuple(header), rows), ""]
    for model in scores:
        if model != CONTROL:
            in_all, in_mean = tasks_won(scores, model)
            lines.append(
                f"- {model}: better than {CONTROL} in {len(in_mean)} of 10 tasks in the mean, in {len(in_all)} in"
                f" every seed ({', '.join(in_all)})"
            )
    lines.append(f"- {(time.perf_counter() - begin) / 60:.1f} minutes")
    (output / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot(scores, output / "superb.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
