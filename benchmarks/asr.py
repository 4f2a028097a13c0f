"""What fine-tuning for speech recognition is worth: each subnet alone, or all of them at once.

    python benchmarks/asr.py
    python benchmarks/asr.py --train_file digits-train.parquet --test_file digits-test.parquet --held_out_speaker theo

For each seed a supernet is distilled by the recipe `small_budget` and fine-tuned by `ctc_small_budget`, on strings of
words of one speaker with pauses of random length: once for all, with and without in-place distillation, and each
subnet alone, cut first, in the same number of steps. The control has the shape of the middle subnet and random
weights. With `--held_out_speaker` a second round leaves that speaker out of all training, and transcribes nobody else.
Two runs at a time, with one thread each; a run that is done is not made again, so the benchmark goes on where it
stopped. What scripts print is in `run.log` of each run.
"""

import json
import random
import statistics
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from common import ROOT, SPACE, Results, SpeechArguments, run_all
from transformers import set_seed

from lighthubert_training.data.audio import load_waveform
from lighthubert_training.data.strings import SAMPLING_RATE, prepare_speech, read_parquet
from lighthubert_training.error_rates import character_error_rate, word_error_rate
from lighthubert_training.recognition.recognizer import Recognizer
from lighthubert_training.runs.options import option
from lighthubert_training.runs.plots import new_figure, save_figure
from lighthubert_training.runs.tables import markdown_table
from modeling_lighthubert import LightHubertModel, SearchSpace
from modeling_lighthubert.errors import UserError, run
from modeling_lighthubert.loading import load_model
from modeling_lighthubert.profiling import macs_per_second


ONCE_FOR_ALL = {"once for all": 0.0, "once for all, taught by the largest": 0.1}
"""Weight of in-place distillation of each."""


@dataclass
class RecognitionArguments(SpeechArguments):
    """What is compared, and for how long."""

    output_dir: str = option(str(ROOT / "benchmarks/output/asr"), "Folder for runs and results.")
    held_out_speaker: str | None = option(None, "Speaker to hold out in a second round.")
    distillation_steps: int = option(300, "Steps that make the supernet.")
    steps: int = option(600, "Steps of each fine-tuning.")
    num_random_subnets: int = option(20, "Random subnets to transcribe with, once for all.")
    num_random_alone: int = option(20, "How many of them are fine-tuned alone, too.")
    seeds: list[int] = option([0, 1, 2], "One run of each kind for each.")


class Recognition:
    """Runs of one round, all speakers or all but one, and their error rates."""

    def __init__(self, arguments: RecognitionArguments, held_out_speaker: str | None = None):
        self.arguments, self.held_out_speaker = arguments, held_out_speaker
        self.output, rng = Path(arguments.output_dir).resolve() / (held_out_speaker or "all"), random.Random(0)
        self.train, self.test = (
            prepare_speech(self._speakers(file, part), self.output / "data", part, num_strings, rng)
            for part, file, num_strings in (("train", arguments.train_file, 2000), ("test", arguments.test_file, 200))
        )
        strings = read_parquet(self.test.strings_file)
        self.references = list(strings["text"])
        self.waveforms = [load_waveform(audio, SAMPLING_RATE) for audio in strings["audio"]]
        space, draw = SearchSpace.from_json_file(SPACE), random.Random("evaluation")
        self.subnets = {name: space.named[name] for name in ("smallest", "middle", "largest")}
        self.subnets |= {f"random_{number}": space.sample(draw) for number in range(arguments.num_random_subnets)}
        (self.output / "subnets").mkdir(exist_ok=True)
        for name, subnet in self.subnets.items():
            subnet.to_json_file(self.subnet_file(name))
        self.measuring = threading.Lock()

    def subnet_file(self, name: str) -> Path:
        return self.output / "subnets" / f"{name}.json"

    def _speakers(self, file: str, part: str) -> str:
        """The file, or one of it without (or of nobody but) the speaker that is held out."""
        held_out, rows = self.held_out_speaker, read_parquet(file)
        if held_out is None:
            return file
        if part == "test" and held_out not in (known := rows.unique("speaker")):
            raise UserError(f"--held_out_speaker {held_out}: {file} has {', '.join(known)}")
        chosen = self.output / "data" / f"{part}-speakers.parquet"
        chosen.parent.mkdir(parents=True, exist_ok=True)
        is_test = part == "test"
        rows.filter(lambda speaker: (speaker == held_out) == is_test, input_columns="speaker").to_parquet(chosen)
        return str(chosen)

    @property
    def kinds(self) -> list[str]:
        """Runs by name. With a speaker held out, only those that say what a new voice costs."""
        if self.held_out_speaker is not None:
            return ["once for all", "middle alone"]
        named = [f"{name} alone" for name in ("smallest", "middle", "largest")]
        drawn = [f"random_{number} alone" for number in range(self.arguments.num_random_alone)]
        once_for_all, *others = ONCE_FOR_ALL
        return [once_for_all, *named, "middle from random weights", *others, *drawn]

    def folder(self, kind: str, seed: int) -> Path:
        return self.output / f"{kind.replace(' ', '-').replace(',', '')}-{seed}"

    def run_script(self, name: str, folder: Path, seed: int, **options: Any) -> None:
        """Runs a training script, and goes on with what an earlier run left in `folder`."""
        options |= {"output_dir": folder, "seed": seed, "report_to": "none", "resume_from_checkpoint": "latest"}
        common.run_script(f"training/{name}.py", **options)

    def distil(self, name: str, seed: int) -> None:
        """Makes the supernet that all runs of the seed start from."""
        options = {"train_file": self.train.file, "max_steps": self.arguments.distillation_steps}
        options |= {"config": "small_budget", "dataloader_num_workers": 0}
        self.run_script("run_distillation", self.folder(name, seed), seed, **options)

    def fine_tune(self, kind: str, seed: int) -> dict[str, Any]:
        """Fine-tunes, and transcribes the test recordings with every subnet that the run made."""
        folder, name, once_for_all = self.folder(kind, seed), kind.split()[0], kind in ONCE_FOR_ALL
        options: dict[str, Any] = {"train_file": self.train.strings_file, "validation_file": self.test.strings_file}
        options |= {"config": "ctc_small_budget", "max_steps": self.arguments.steps}
        options["max_eval_samples"] = 10  # the error rates below are of all
        options["model_name_or_path"] = self.folder("supernet", seed)
        if once_for_all:
            options |= {"once_for_all": True, "distillation_weight": ONCE_FOR_ALL[kind]}
        elif kind.endswith("random weights"):
            # nothing is there to be kept
            options |= {"model_name_or_path": self.random_weights(name, seed), "freeze_feature_encoder": False}
        else:
            options["subnet"] = self.subnet_file(name)
        self.run_script("run_speech_recognition_ctc", folder, seed, **options)
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        seconds = next(entry["train_runtime"] for entry in history if "train_runtime" in entry)
        with self.measuring:
            files = {each: self.subnet_file(each) for each in self.subnets} if once_for_all else {name: None}
            return {"seconds": seconds} | {each: self.measure(folder, file) for each, file in files.items()}

    def random_weights(self, name: str, seed: int) -> Path:
        """A model of the shape of a subnet that has learnt nothing."""
        folder = self.output / f"random-weights-{seed}"
        with self.measuring:
            set_seed(seed)
            supernet = load_model(self.folder("supernet", seed))
            LightHubertModel(supernet.config.cut_to(self.subnets[name])).save_pretrained(folder)
        return folder

    def measure(self, folder: Path, subnet: Path | None) -> dict[str, float]:
        """Error rates on the test recordings."""
        recognizer = Recognizer.from_pretrained(folder, subnet=subnet)
        texts = [transcript.text for transcript in recognizer.transcribe(self.waveforms)]
        return {"wer": word_error_rate(self.references, texts), "cer": character_error_rate(self.references, texts)}

    def macs(self, seed: int) -> dict[str, float]:
        """MACs per second of audio of every subnet."""
        model = load_model(self.folder("once for all", seed))
        return {name: macs_per_second(model, subnet) for name, subnet in self.subnets.items()}


def rates(results: Results, kind: str, subnet: str, measure: str = "wer") -> dict[str, float]:
    """Error rates by seed."""
    return {seed: run[subnet][measure] for seed, run in sorted(results.get(kind, {}).items())}


def mean_rates(results: Results, kind: str, subnets: Sequence[str], measure: str) -> list[float]:
    """For each seed, the mean of the subnets that there is a run of; `kind` may have a place for their name."""
    found = [rates(results, kind.format(name), name, measure) for name in subnets]
    seeds = sorted({seed for each in found for seed in each})
    return [statistics.mean(each[seed] for each in found if seed in each) for seed in seeds]


def table(results: Results, subnets: Sequence[str]) -> str:
    """Markdown: error rates of each subnet, fine-tuned alone, once for all, and from random weights."""
    kinds = {"alone": "{} alone"} | {kind: kind for kind in ONCE_FOR_ALL}
    kinds["from random weights"] = "{} from random weights"
    columns = [("WER", kind) for kind in kinds]
    columns += [("CER", kind) for kind in ("alone", "once for all", "from random weights")]
    drawn = [name for name in subnets if name.startswith("random")]
    rows, shown = [], {name: [name] for name in subnets if name not in drawn}
    for title, names in [*shown.items(), ("random, mean", drawn)]:
        found = [mean_rates(results, kinds[kind], names, measure.lower()) for measure, kind in columns]
        rows.append([title, *(common.summary(values, percent=True) for values in found)])
    return markdown_table(["", *(f"{measure} {kind}" for measure, kind in columns)], rows)


def margins(results: Results, subnets: Sequence[str]) -> list[str]:
    """What distillation gains, and what one fine-tuning for all subnets costs, in the mean of the seeds."""
    lines = []
    own, control = rates(results, "middle alone", "middle"), rates(results, "middle from random weights", "middle")
    if own and control:
        ratio = statistics.mean(own.values()) / statistics.mean(control.values())
        worse = sum(own[seed] >= control[seed] for seed in own)
        lines.append(
            f"middle, distilled against random weights: {ratio:.2f} of its word errors in the mean,"
            f" no better in {worse} of {len(own)} seeds"
        )
    alone = {name: rates(results, f"{name} alone", name) for name in subnets if f"{name} alone" in results}
    for kind in [kind for kind in ONCE_FOR_ALL if kind in results and alone]:
        gaps = {}
        for name, own in alone.items():
            together = rates(results, kind, name)
            gaps[name] = statistics.mean(together[seed] - own[seed] for seed in together.keys() & own.keys())
        largest = max(gaps, key=gaps.__getitem__)
        cost = statistics.mean(run["seconds"] for run in results[kind].values())
        each = [statistics.mean(run["seconds"] for run in results[f"{name} alone"].values()) for name in alone]
        lines.append(
            f"{kind}: {100 * statistics.mean(gaps.values()):+.1f} points of WER against {len(alone)} subnets alone in"
            f" the mean, {100 * gaps[largest]:+.1f} at most ({largest}); {cost / sum(each):.2f} of their training time"
            f" together, {cost / statistics.mean(each):.1f} times that of one"
        )
    stuck = [f"{name} ({seed})" for name, own in alone.items() for seed, rate in own.items() if rate > 0.9]
    return [*lines, f"alone, blanks to the end: {', '.join(stuck) or 'none'}"]


def plot(results: Results, macs: Mapping[str, float], path: Path) -> None:
    """Word error rate against MACs: every subnet of the supernets, and those fine-tuned alone."""
    figure, (axes,) = new_figure()
    kinds = {kind: [(name, kind) for name in macs] for kind in ONCE_FOR_ALL if kind in results}
    kinds["each alone"] = [(name, f"{name} alone") for name in macs if f"{name} alone" in results]
    for (label, pairs), marker in zip(kinds.items(), ("o", "s", "x")):
        means = [statistics.mean(rates(results, kind, name).values()) for name, kind in pairs]
        points = [(macs[name] / 1e6, 100 * mean) for (name, _), mean in zip(pairs, means, strict=True)]
        if points:
            axes.scatter(*zip(*points), label=label, marker=marker, s=25)
    axes.set(xlabel="million MACs per second of audio", ylabel="word error rate, %")
    axes.legend()
    save_figure(figure, path)


def main() -> None:
    arguments = common.parse(RecognitionArguments, __doc__)
    for speaker in dict.fromkeys([None, arguments.held_out_speaker]):
        recognition, seeds = Recognition(arguments, speaker), arguments.seeds
        file, subnets = recognition.output / "results.json", list(recognition.subnets)
        run_all(file, [("supernet", seed) for seed in seeds], recognition.distil)
        results = run_all(file, [(kind, seed) for kind in recognition.kinds for seed in seeds], recognition.fine_tune)
        print("all speakers" if speaker is None else f"{speaker}, who is not in the training data", end="\n\n")
        findings = margins(results, subnets) if speaker is None else []
        common.report(recognition.output, table(results, subnets), findings)
        plot(results, recognition.macs(seeds[0]), recognition.output / "wer-against-macs.png")


if __name__ == "__main__":
    run(main)
