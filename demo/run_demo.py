"""The whole way on real input: teacher -> supernet -> subnets -> cut model -> speech recognition -> transcripts.

    make demo
    python demo/run_demo.py --train_file digits-train.parquet --test_file digits-test.parquet

Without arguments it uses the speech and the tiny teacher in this folder. Other data needs the columns `audio` and
`text`; with `digit` and `speaker` it is probed for them, and recordings of single words are joined to strings of one
speaker. Every training run is a command that a user could type; it is printed before it runs.
"""

import json
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from transformers import PreTrainedModel, Wav2Vec2FeatureExtractor, set_seed
from transformers.utils import logging

from lighthubert_training.cards.render import save_card
from lighthubert_training.cards.subnet import COUNTS, FACTS_FILE, render_subnet_card, subnet_facts
from lighthubert_training.data.strings import Speech, prepare_speech
from lighthubert_training.distillation.teacher import ObjectiveArguments, Teacher
from lighthubert_training.probing import ProbeBench
from lighthubert_training.runs.options import OptionParser, option, parse_options
from lighthubert_training.runs.plots import new_figure, save_figure
from lighthubert_training.runs.tables import markdown_table
from modeling_lighthubert import LightHubertModel
from modeling_lighthubert.errors import UserError, run
from modeling_lighthubert.files import write_json, write_text
from modeling_lighthubert.loading import load_model
from modeling_lighthubert.profiling import macs_per_second, measure_latency


ROOT = Path(__file__).resolve().parent.parent
NUM_TARGET_LAYERS = 4
KINDS = ("distilled", "slice of the teacher", "random transformer")
"""Of a subnet: the last has the teacher's feature encoder, and shows what that alone is worth."""


@dataclass
class DemoArguments:
    """What the demonstration runs on, and for how long."""

    train_file: str = option(str(ROOT / "demo/speech/train.parquet"), "Parquet file to train on.")
    test_file: str = option(str(ROOT / "demo/speech/test.parquet"), "Parquet file to test on.")
    teacher: str = option(str(ROOT / "demo/teacher"), "HuBERT to distil.")
    search_space: str = option(str(ROOT / "demo/search_space.json"), "JSON file: the subnets to train.")
    output_dir: str = option(str(ROOT / "demo/output"), "Folder for everything it makes.")
    stage1_steps: int = option(100, "Steps of stage 1, the largest subnet.")
    stage2_steps: int = option(300, "Steps of stage 2, the supernet.")
    ctc_steps: int = option(600, "Fine-tuning steps, of the subnet and of its control.")
    max_probe_recordings: int = option(600, "Training, and held-out, recordings that models are compared on.")
    seed: int = option(0, "Random seed.")

    def __post_init__(self) -> None:
        for name, file in (("train_file", self.train_file), ("test_file", self.test_file)):
            if not Path(file).is_file():
                raise ValueError(f"--{name} {file} is not there: give a Parquet file")


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Prints a heading, and how long the block took."""
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - start:.0f} s", flush=True)


def run_script(script: str, *positional: Path, **options: Any) -> None:
    """Prints and runs a Python script of this project. If it fails, it has said why, and this process ends with its
    exit status."""
    words = [*map(str, positional), *(str(word) for name, value in options.items() for word in (f"--{name}", value))]
    print("   $ python " + shlex.join(word.replace(f"{ROOT}/", "") for word in (script, *words)), flush=True)
    if status := subprocess.run([sys.executable, str(ROOT / script), *words], check=False).returncode:
        sys.exit(status)


def distil(arguments: DemoArguments, train_file: Path, output_dir: Path, **options: Any) -> None:
    """One run of the distillation script."""
    run_script(
        "training/run_distillation.py", config="small_budget", train_file=train_file,
        teacher_name_or_path=arguments.teacher, search_space=arguments.search_space, seed=arguments.seed,
        output_dir=output_dir, **options,
    )  # fmt: skip


def recognise(
    arguments: DemoArguments, start: Path, train: Speech, test: Speech, output_dir: Path, **options: Any
) -> dict[str, Any]:
    """Fine-tunes `start` with CTC, and transcribes the test recordings in a process without our package."""
    run_script(
        "training/run_speech_recognition_ctc.py", config="ctc_small_budget", model_name_or_path=start,
        train_file=train.strings_file, validation_file=test.strings_file, max_eval_samples=10,
        max_steps=arguments.ctc_steps, seed=arguments.seed, output_dir=output_dir, **options,
    )  # fmt: skip
    results = output_dir / "transcripts.json"
    run_script("demo/transcribe.py", output_dir, test.strings_file, output_file=results)
    return json.loads(results.read_text(encoding="utf-8"))


def measure_model(name: str, kind: str, model: PreTrainedModel, macs: float, bench: ProbeBench) -> dict[str, Any]:
    """A row of the table."""
    latency = measure_latency(model.eval(), 5.0)
    row = {"model": name, "kind": kind, "parameters": model.num_parameters(), "macs": macs, "rtf": latency / 5.0}
    return row | bench.measure(model)


def measure_subnets(
    supernet: LightHubertModel, untrained: LightHubertModel, bench: ProbeBench
) -> list[dict[str, Any]]:
    """Rows of the table: the teacher, and each subnet distilled, as a slice of the `untrained` teacher, and with a
    random transformer above the teacher's feature encoder."""
    space, teacher = supernet.search_space, bench.teacher.model
    rows = [measure_model("teacher", "teacher", teacher, macs_per_second(untrained, space.largest), bench)]
    for name in ("largest", "middle", "smallest"):
        random_transformer = LightHubertModel(supernet.config.cut_to(space.named[name]))
        random_transformer.feature_extractor.load_state_dict(untrained.feature_extractor.state_dict())
        models = supernet.extract_subnet(name), untrained.extract_subnet(name), random_transformer
        for kind, model in zip(KINDS, models, strict=True):
            rows.append(measure_model(f"{name}, {kind}", kind, model, macs_per_second(model), bench))
            texts = zip(COLUMNS, cells(rows[-1]), strict=True)
            line = ", ".join(text if column == "model" else f"{column} {text}" for column, text in texts)
            print(f"   {line}", flush=True)
    return rows


COLUMNS = ("model", "parameters", "MMAC/s", "real-time factor", "digit", "speaker", "R2")


def cells(row: Mapping[str, Any]) -> list[str]:
    """The texts of a row of the table."""
    probes = [f"{row[name]:.1%}" if name in row else "n/a" for name in ("digit", "speaker")]
    costs = [f"{row['parameters']:,}", f"{row['macs'] / 1e6:.1f}", f"{row['rtf']:.4f}"]
    return [row["model"], *costs, *probes, f"{row['r2']:.3f}"]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """R2, and accuracy of each probe that the data has labels for, against MACs: one point for each model."""
    labels = {"digit": "digit probe, accuracy", "speaker": "speaker probe, accuracy", "r2": "R2 of the target"}
    measures = [measure for measure in labels if measure in rows[0]]
    figure, panels = new_figure(len(measures), (4.5 * len(measures), 4))
    for axes, measure in zip(panels, measures, strict=True):
        for kind, marker in zip(KINDS, "osx", strict=True):
            points = [(row["macs"] / 1e6, row[measure]) for row in rows if row["kind"] == kind]
            axes.plot(*zip(*points), marker=marker, label=kind)
        axes.plot(rows[0]["macs"] / 1e6, rows[0][measure], "k*", markersize=11, label="teacher")
        axes.set(xlabel="million MACs per second of audio", ylabel=labels[measure])
    panels[0].legend()
    save_figure(figure, path)


def write_card(folder: Path, arguments: DemoArguments, result: Mapping[str, Any]) -> None:
    """The card of the fine-tuned middle subnet, and the facts that it is made of."""
    facts = subnet_facts(load_model(folder), "the supernet of the demonstration")
    facts["teacher"] = arguments.teacher.removeprefix(f"{ROOT}/")
    counts = dict.fromkeys(COUNTS, result["num_recordings"])  # all that there are
    facts["results"] = [{"metric": metric, "value": result[metric]} | counts for metric in ("wer", "cer")]
    write_json(folder / FACTS_FILE, facts)
    train_file, test_file = Path(arguments.train_file).name, Path(arguments.test_file).name
    data = f"`{train_file}`, tested on `{test_file}`."
    limits = "A demonstration: it has learnt the words of its small training set, and no others."
    options = {"dataset": test_file, "language": "en", "limits": limits}
    card = render_subnet_card(facts, "lighthubert-demo-middle", "apache-2.0", data, **options)
    save_card(card, folder / "README.md")


def write_results(output: Path, rows: list[dict[str, Any]], ctc: list[dict[str, Any]]) -> str:
    """Writes both tables, as Markdown and as JSON, and the plot; returns the Markdown."""
    rates = [[row["model"], f"{row['wer']:.1%}", f"{row['cer']:.1%}"] for row in ctc]
    tables = markdown_table(COLUMNS, map(cells, rows)), markdown_table(("fine-tuned with CTC", "WER", "CER"), rates)
    write_text(output / "results.md", "\n\n".join(tables) + "\n")
    write_json(output / "results.json", {"models": rows, "ctc": ctc})
    plot(rows, output / "accuracy-against-macs.png")
    return "\n\n".join(tables)


def compare_models(arguments: DemoArguments, output: Path, train: Speech, test: Speech) -> str:
    """Distils the teacher, measures subnets, and fine-tunes one and its control. Returns the tables."""
    with stage("2. Teacher"):
        teacher = Teacher(load_model(arguments.teacher), ObjectiveArguments(num_target_layers=NUM_TARGET_LAYERS))
        print(f"   {teacher.model.num_parameters():,} parameters")
    with stage("3a. Stage 1: the largest subnet learns from the teacher"):
        distil(arguments, train.file, output / "stage1", sampling="largest", max_steps=arguments.stage1_steps)
    with stage("3b. Stage 2: all subnets learn"):
        start, steps = output / "stage1", arguments.stage2_steps
        distil(arguments, train.file, output / "supernet", student_name_or_path=start, max_steps=steps)
    with stage("4. Subnets against the teacher, its untrained slices, and random transformers"):
        supernet = load_model(output / "supernet")
        print(f"   the supernet holds {supernet.search_space.num_subnets:,} subnets")
        extractor = Wav2Vec2FeatureExtractor.from_pretrained(output / "supernet")
        bench = ProbeBench(train, test, teacher, extractor, arguments.max_probe_recordings)
        untrained = load_model(arguments.teacher, head=LightHubertModel, search_space=supernet.search_space)
        rows = measure_subnets(supernet, untrained, bench)
    with stage("5. Speech recognition: the middle subnet, and the same slice of the teacher, not distilled"):
        ctc = []
        for kind, of, folder in (("distilled", supernet, "asr"), ("slice of the teacher", untrained, "asr-slice")):
            start = output / f"middle-{folder}"
            of.extract_subnet("middle").save_pretrained(start)
            result = recognise(arguments, start, train, test, output / folder)
            measured = {key: result[key] for key in ("wer", "cer", "num_recordings")}
            ctc.append({"model": f"middle, {kind}"} | measured)
    write_card(output / "asr", arguments, ctc[0])
    return write_results(output, rows, ctc)


def main() -> None:
    (arguments,) = parse_options(OptionParser(DemoArguments, description=__doc__))
    folder, output = arguments.output_dir, Path(arguments.output_dir).resolve()
    if (output / "data").exists():
        raise UserError(f"--output_dir {folder} holds a demonstration: choose another folder, or delete it")
    start = time.perf_counter()
    logging.set_verbosity_error()
    disable_progress_bars()
    set_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    with stage("1. Speech"):
        train, test = (
            prepare_speech(file, output / "data", part, num_strings, rng)
            for part, file, num_strings in (("train", arguments.train_file, 1000), ("test", arguments.test_file, 100))
        )
        print(f"   {len(train.words)} words to train on, {len(test.words)} to test on, and strings")
    tables = compare_models(arguments, output, train, test)
    print(f"\n{tables}\n\nAll of it is in {folder}; {time.perf_counter() - start:.0f} s in all.")


if __name__ == "__main__":
    run(main)
