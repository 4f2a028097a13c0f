"""Speed of a cut subnet against a stock HuBERT of the same size, and against the same subnet selected in the supernet.

    python benchmarks/selection.py --seconds 1 5 15

The supernet stores the full width of the released checkpoints, the trimmed one that of its largest subnet. Models take
turns within each repeat, so that whatever else the machine does hits all of them; ratios are medians of the ratios
within a repeat.
"""

import argparse
import random
import statistics
import time
from functools import partial

import torch

from lighthubert_training.data.strings import SAMPLING_RATE
from modeling_lighthubert import LightHubertConfig, LightHubertModel, SearchSpace
from modeling_lighthubert.errors import run, user_error
from modeling_lighthubert.export import to_hubert
from modeling_lighthubert.profiling import median_ratio, time_in_turns


def switching_time(supernet: LightHubertModel, repeats: int = 200) -> float:
    """Median seconds of `set_subnet` over random subnets."""
    rng, times = random.Random(0), []
    for subnet in [supernet.search_space.sample(rng) for _ in range(repeats)]:
        start = time.perf_counter()
        supernet.set_subnet(subnet)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subnet", default="a_small", help="Name of the subnet (default: a_small).")
    parser.add_argument("--seconds", type=float, nargs="+", default=[1.0, 5.0, 15.0], help="Lengths of the clips.")
    parser.add_argument("--batch_size", type=int, default=1, help="Clips in a batch (default: 1).")
    parser.add_argument("--repeats", type=int, default=40, help="Timed rounds (default: 40).")
    options = parser.parse_args()
    torch.manual_seed(0)
    supernet = LightHubertModel(LightHubertConfig(search_space=SearchSpace.small())).eval()
    print(f"switching subnets: {switching_time(supernet) * 1e3:.2f} ms")
    trimmed = LightHubertModel(supernet.config.trimmed()).eval()
    with user_error("--subnet: "):
        for model in (supernet, trimmed):
            model.set_subnet(options.subnet)
    cut = supernet.extract_subnet()
    models = {"cut": cut, "stock": to_hubert(cut), "selected": supernet, "trimmed": trimmed}
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{options.subnet}, batch {options.batch_size}, {threads}")
    print("| seconds of audio | cut, ms | cut / stock HubertModel | selected / cut | selected in trimmed / cut |")
    print("|---|---|---|---|---|")
    for seconds in options.seconds:
        audio = torch.randn(options.batch_size, int(seconds * SAMPLING_RATE))
        runs = {name: partial(model, audio) for name, model in models.items()}
        times = time_in_turns(runs, options.repeats, warm_up=2)
        pairs = (("cut", "stock"), ("selected", "cut"), ("trimmed", "cut"))
        ratios = " | ".join(f"{median_ratio(times[one], times[other]):.3f}" for one, other in pairs)
        print(f"| {seconds:g} | {statistics.median(times['cut']) * 1e3:.0f} | {ratios} |", flush=True)


if __name__ == "__main__":
    run(main)
