"""Sums up runs of the demonstration with different seeds: mean and range of every figure that a seed moves.

for seed in 0 1 2; do python demo/run_demo.py --seed $seed --output_dir demo/output/seed-$seed; done
python benchmarks/demo_seeds.py demo/output/seed-*
"""

import argparse
import json
import statistics
from pathlib import Path

from run_demo import CTC_COLUMNS, markdown_table


def summary(values: list[float], percent: bool) -> str:
    """Mean and, where values differ, range: `88.1% (87.5-88.6)` or `0.324 (0.318-0.331)`."""
    scale, digits, unit = (100, 1, "%") if percent else (1, 3, "")
    mean, low, high = (f"{scale * value:.{digits}f}" for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean}{unit}" + (f" ({low}-{high})" if low != high else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="Output folders of demo/run_demo.py.")
    runs = [json.loads((folder / "results.json").read_text()) for folder in parser.parse_args().folders]
    measures = [measure for measure in ("digit", "speaker", "r2") if measure in runs[0]["models"][0]]
    models = [
        [rows[0]["model"], f"{rows[0]['parameters']:,}", f"{rows[0]['macs'] / 1e6:.1f}"]
        + [summary([row[measure] for row in rows], percent=measure != "r2") for measure in measures]
        for rows in zip(*(run["models"] for run in runs), strict=True)
    ]
    ctc = [
        [rows[0]["model"], *(summary([row[measure] for row in rows], percent=True) for measure in ("wer", "cer"))]
        for rows in zip(*(run["ctc"] for run in runs), strict=True)
    ]
    print(markdown_table(("model", "parameters", "MMAC/s", *measures), models), end="\n\n")
    print(markdown_table(CTC_COLUMNS, ctc))


if __name__ == "__main__":
    main()
