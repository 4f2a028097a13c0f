"""Sums up runs of the demonstration with different seeds: mean and range of every figure that a seed moves.

for seed in 0 1 2; do python demo/run_demo.py --seed $seed --output_dir demo/output/seed-$seed; done
python benchmarks/demo_seeds.py demo/output/seed-*
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lighthubert_training.runs.tables import markdown_table
from modeling_lighthubert.errors import run, user_error


def summary(values: Sequence[float], percent: bool) -> str:
    """Mean and, where values differ, range: `88.1% (87.5-88.6)` or `0.324 (0.318-0.331)`."""
    scale, digits, unit = (100, 1, "%") if percent else (1, 3, "")
    mean, low, high = (f"{scale * value:.{digits}f}" for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean}{unit}" + (f" ({low}-{high})" if low != high else "")


def tables(runs: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for each model, and one for each that was fine-tuned."""
    measures = [measure for measure in ("digit", "speaker", "r2") if measure in runs[0]["models"][0]]
    models, ctc = [], []
    for rows in zip(*(each["models"] for each in runs), strict=True):
        first = rows[0]
        measured = [summary([row[measure] for row in rows], percent=measure != "r2") for measure in measures]
        models.append([first["model"], f"{first['parameters']:,}", f"{first['macs'] / 1e6:.1f}", *measured])
    for rows in zip(*(each["ctc"] for each in runs), strict=True):
        ctc.append([rows[0]["model"], *(summary([row[rate] for row in rows], True) for rate in ("wer", "cer"))])
    first = markdown_table(("model", "parameters", "MMAC/s", *measures), models)
    return f"{first}\n\n{markdown_table(('fine-tuned with CTC', 'WER', 'CER'), ctc)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="Output folders of demo/run_demo.py.")
    folders = parser.parse_args().folders
    with user_error("no result of a demonstration: "):
        runs = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in folders]
    print(tables(runs))


if __name__ == "__main__":
    run(main)
