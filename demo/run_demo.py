"""The whole way on real input: teacher -> supernet -> subnets -> cut model -> speech recognition -> transcripts.

    make demo
    python demo/run_demo.py --train_file digits-train.parquet --test_file digits-test.parquet

Without arguments it uses the speech and the tiny teacher in this folder. Other data needs the columns `audio` and
`text`; with `digit` and `speaker` it is probed for them, and recordings of single words are joined to strings of one
speaker. Every training run is a command that a user could type; it is printed before it runs.
"""

import io
import json
import random
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
import matplotlib
import numpy as np
import soundfile
from datasets import Audio, Dataset, disable_progress_bars, load_dataset
from transformers import (
    AutoModel,
    AutoModelForCTC,
    HfArgumentParser,
    PreTrainedModel,
    Wav2Vec2FeatureExtractor,
    set_seed,
)
from transformers.utils import logging

from lighthubert_training.cards.subnet import FACTS_FILE, render_card, subnet_facts
from lighthubert_training.data.sources import load_waveform
from lighthubert_training.distillation.teacher import ObjectiveArguments, Teacher
from lighthubert_training.probing import (
    Batch,
    cross_validated_accuracy,
    draw_masks,
    make_batches,
    masked_features,
    masked_targets,
    pooled_features,
    probe_accuracy,
    ridge_r2,
)
from modeling_lighthubert import LightHubertModel, SearchSpace, Subnet
from modeling_lighthubert.profiling import macs_per_second, measure_latency


matplotlib.use("Agg")
from matplotlib import pyplot


SAMPLING_RATE = 16_000
NUM_TARGET_LAYERS = 4
MASK_TIME_PROB, MASK_TIME_LENGTH = 0.3, 5  # spoken words are short: a span of 10 frames is half of one


@dataclass
class DemoArguments:
    """What the demonstration runs on, and for how long."""

    train_file: str = field(
        default=str(ROOT / "demo/speech/train.parquet"), metadata={"help": "Parquet file to train on."}
    )
    test_file: str = field(
        default=str(ROOT / "demo/speech/test.parquet"), metadata={"help": "Parquet file to test on."}
    )
    teacher: str = field(default=str(ROOT / "demo/teacher"), metadata={"help": "HuBERT to distil."})
    search_space: str = field(
        default=str(ROOT / "demo/search_space.json"), metadata={"help": "JSON file: the subnets to train."}
    )
    output_dir: str = field(default=str(ROOT / "demo/output"), metadata={"help": "Folder for everything it makes."})
    stage1_steps: int = field(default=100, metadata={"help": "Steps of stage 1, the largest subnet."})
    stage2_steps: int = field(default=300, metadata={"help": "Steps of stage 2, the supernet."})
    ctc_steps: int = field(default=600, metadata={"help": "Fine-tuning steps, of the subnet and of its control."})
    max_probe_recordings: int = field(
        default=600, metadata={"help": "Training, and held-out, recordings that models are compared on."}
    )
    seed: int = field(default=0, metadata={"help": "Of everything random."})


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Prints a heading, and how long the block took."""
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - start:.0f} s", flush=True)


def run(*command: str | Path) -> None:
    """Prints and runs a Python script of this project."""
    words = [str(word) for word in command]
    print("   $ python " + shlex.join(word.replace(f"{ROOT}/", "") for word in words), flush=True)
    subprocess.run([sys.executable, *words], check=True, cwd=ROOT)


@dataclass
class Speech:
    """One part, training or held-out, of the recordings.

    Attributes:
        words: recordings of single words; of anything, where there are none.
        file: Parquet file with all recordings.
        strings_file: Parquet file with those of several words, real ones or joined.
    """

    words: Dataset
    file: Path
    strings_file: Path


def prepare_speech(file: str, folder: Path, name: str, num_strings: int, rng: random.Random) -> Speech:
    """Reads recordings, joins words to strings if there are none, and writes both files to `folder`."""
    dataset = load_dataset("parquet", data_files=file, split="train").cast_column("audio", Audio(decode=False))
    words = dataset.filter(lambda text: len(text.split()) == 1, input_columns="text")
    strings = dataset.filter(lambda text: len(text.split()) > 1, input_columns="text")
    if not len(strings):
        strings = join_words(words, num_strings, rng)
    everything = Dataset.from_list(
        [*words.select_columns(["audio", "text"]), *strings.select_columns(["audio", "text"])]
    )
    speech = Speech(words if len(words) else strings, folder / f"{name}.parquet", folder / f"{name}-strings.parquet")
    everything.cast_column("audio", Audio(decode=False)).to_parquet(speech.file)
    strings.to_parquet(speech.strings_file)
    return speech


def join_words(
    words: Dataset,
    num_strings: int,
    rng: random.Random,
    num_words: tuple[int, int] = (3, 6),
    pause: tuple[float, float] = (0.05, 0.25),
) -> Dataset:
    """Strings of single-word recordings of one speaker, each with a pause behind it.

    Args:
        num_words: of a string, at least and at most.
        pause: seconds, at least and at most.
    """
    by_speaker = defaultdict(list)
    for index, speaker in enumerate(words["speaker"] if "speaker" in words.column_names else [""] * len(words)):
        by_speaker[speaker].append(index)
    rows = []
    for _ in range(num_strings):
        speaker = rng.choice(sorted(by_speaker))
        chosen = words.select(rng.choices(by_speaker[speaker], k=rng.randint(*num_words)))
        parts = []
        for audio in chosen["audio"]:
            silence = np.zeros(int(rng.uniform(*pause) * SAMPLING_RATE), dtype=np.float32)
            parts += [load_waveform(audio, SAMPLING_RATE), silence]
        file = io.BytesIO()
        soundfile.write(file, np.concatenate(parts), SAMPLING_RATE, format="FLAC")
        audio = {"bytes": file.getvalue(), "path": None}
        rows.append({"audio": audio, "text": " ".join(chosen["text"]), "speaker": speaker})
    return Dataset.from_list(rows).cast_column("audio", Audio(decode=False))


def middle_subnet(space: SearchSpace) -> Subnet:
    """The subnet of the middle choices."""

    def middle(choices: tuple) -> float:
        return choices[len(choices) // 2]

    width = middle(space.hidden_size)
    return Subnet.uniform(
        width,
        middle(space.num_hidden_layers),
        middle(space.num_attention_heads),
        int(middle(space.ffn_ratio) * width),
        space.head_dim,
    )


class Bench:
    """What models are measured on: words with labels for the probes, and any speech for the frames.

    Args:
        train, test: what the probes are fitted to, and what they are asked.
        max_recordings: of each kind, drawn at random.
    """

    def __init__(
        self, train: Speech, test: Speech, teacher: Teacher, extractor: Wav2Vec2FeatureExtractor, max_recordings: int
    ):
        self.teacher = teacher

        def some(recordings: Dataset) -> Dataset:
            return recordings.shuffle(seed=0).select(range(min(max_recordings, len(recordings))))

        def waveforms(recordings: Dataset) -> list[np.ndarray]:
            return [load_waveform(audio, SAMPLING_RATE) for audio in recordings["audio"]]

        def frames(file: Path) -> list[Batch]:
            recordings = load_dataset("parquet", data_files=str(file), split="train")
            by_length = sorted(waveforms(some(recordings.cast_column("audio", Audio(decode=False)))), key=len)
            return make_batches(by_length, extractor)

        self.train_words, self.test_words = some(train.words), some(test.words)
        self.train_batches = make_batches(waveforms(self.train_words), extractor)
        self.test_batches = make_batches(waveforms(self.test_words), extractor)
        self.train_frames, self.test_frames = frames(train.file), frames(test.file)
        self.masks = [
            draw_masks(teacher.model, frames, MASK_TIME_PROB, MASK_TIME_LENGTH)
            for frames in (self.train_frames, self.test_frames)
        ]
        self.train_targets = masked_targets(teacher, self.train_frames, self.masks[0])
        self.test_targets = masked_targets(teacher, self.test_frames, self.masks[1])

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """R2 and the probes' accuracies of the frozen `model`, for the labels that the data has."""
        model = model.eval()
        row = {
            "r2": ridge_r2(
                masked_features(model, self.train_frames, self.masks[0]),
                self.train_targets,
                masked_features(model, self.test_frames, self.masks[1]),
                self.test_targets,
            )
        }
        test = pooled_features(model, self.test_batches)
        if "digit" in self.test_words.column_names:
            train = pooled_features(model, self.train_batches)
            row["digit"] = probe_accuracy(train, self.train_words["digit"], test, self.test_words["digit"])
        if "speaker" in self.test_words.column_names:
            row["speaker"] = cross_validated_accuracy(test, self.test_words["speaker"])
        return row


def measure_subnets(
    arguments: DemoArguments, supernet: LightHubertModel, subnets: dict[str, Subnet], bench: Bench
) -> list[dict]:
    """Rows of the table: the teacher, and each subnet distilled, as an untrained slice of the teacher, and random."""
    space = supernet.search_space
    untrained = LightHubertModel.from_pretrained(arguments.teacher, search_space=space)
    rows = [
        {"model": "teacher", "kind": "teacher", "parameters": bench.teacher.model.num_parameters(),
         "macs": macs_per_second(untrained, space.largest), "rtf": measure_latency(bench.teacher.model, 5.0) / 5.0,
         **bench.measure(bench.teacher.model)}
    ]  # fmt: skip
    for name, subnet in subnets.items():
        models = {
            "distilled": supernet.extract_subnet(subnet),
            "slice of the teacher": untrained.extract_subnet(subnet),
            "random weights": LightHubertModel(supernet.config.cut_to(subnet)),
        }
        for kind, model in models.items():
            rows.append(
                {"model": f"{name}, {kind}", "kind": kind, "parameters": model.num_parameters(),
                 "macs": macs_per_second(model), "rtf": measure_latency(model.eval(), 5.0) / 5.0,
                 **bench.measure(model)}
            )  # fmt: skip
            print("   " + format_row(rows[-1]), flush=True)
    return rows


COLUMNS = ("model", "parameters", "MMAC/s", "real-time factor", "digit", "speaker", "R2")
CTC_COLUMNS = ("fine-tuned with CTC", "WER", "CER")


def cells(row: dict) -> list[str]:
    """The texts of a row of the table."""

    def share(name: str) -> str:
        return f"{row[name]:.1%}" if name in row else "n/a"

    return [
        row["model"],
        f"{row['parameters']:,}",
        f"{row['macs'] / 1e6:.1f}",
        f"{row['rtf']:.4f}",
        share("digit"),
        share("speaker"),
        f"{row['r2']:.3f}",
    ]


def format_row(row: dict) -> str:
    return ", ".join(
        f"{name} {text}" if name != "model" else text for name, text in zip(COLUMNS, cells(row), strict=True)
    )


def markdown_table(header: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(rows: list[dict], path: Path) -> None:
    """R2, and accuracy of each probe that the data has labels for, against MACs: one point for each model."""
    labels = {"digit": "digit probe, accuracy", "speaker": "speaker probe, accuracy", "r2": "R2 of the target"}
    measures = [measure for measure in labels if measure in rows[0]]
    figure, panels = pyplot.subplots(1, len(measures), figsize=(4.5 * len(measures), 4), squeeze=False)
    for axes, measure in zip(panels[0], measures, strict=True):
        for kind, marker in (("random weights", "x"), ("slice of the teacher", "s"), ("distilled", "o")):
            points = [row for row in rows if row["kind"] == kind]
            axes.plot(
                [row["macs"] / 1e6 for row in points], [row[measure] for row in points], marker=marker, label=kind
            )
        axes.plot(rows[0]["macs"] / 1e6, rows[0][measure], "k*", markersize=11, label="teacher")
        axes.set(xlabel="million MACs per second of audio", ylabel=labels[measure])
        axes.grid(alpha=0.3)
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def write_card(folder: Path, arguments: DemoArguments, name: str, result: dict) -> None:
    """The card of the fine-tuned subnet, and the facts that it is made of."""
    facts = subnet_facts(AutoModelForCTC.from_pretrained(folder), "the supernet of the demonstration")
    facts["teacher"] = arguments.teacher.removeprefix(f"{ROOT}/")
    facts["results"] = [{"metric": metric, "value": result[metric]} for metric in ("wer", "cer")]
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n")
    card = render_card(
        facts,
        f"lighthubert-demo-{name}",
        "apache-2.0",
        f"`{Path(arguments.train_file).name}`, tested on `{Path(arguments.test_file).name}`.",
        dataset=Path(arguments.test_file).name,
        language="en",
        limits="A demonstration: it has learnt the words of its small training set, and no others.",
    )
    card.save(folder / "README.md")


def distil(arguments: DemoArguments, train_file: Path, output_dir: Path, *options: str | Path) -> None:
    """One run of the distillation script."""
    run(
        ROOT / "training/run_distillation.py", "--config", ROOT / "training/lighthubert_training/configs/distillation/small_budget.yaml",
        "--train_file", train_file, "--teacher_name_or_path", arguments.teacher,
        "--search_space", arguments.search_space, "--seed", str(arguments.seed), "--output_dir", output_dir, *options,
    )  # fmt: skip


def recognise(
    arguments: DemoArguments, start: Path, train: Speech, test: Speech, output_dir: Path, *options: str
) -> dict:
    """Fine-tunes `start` with CTC, and transcribes the test recordings in a process without our package."""
    run(
        ROOT / "training/run_speech_recognition_ctc.py", "--config", ROOT / "training/lighthubert_training/configs/recognition/ctc_small_budget.yaml",
        "--model_name_or_path", start, "--train_file", train.strings_file, "--validation_file", test.strings_file,
        "--max_eval_samples", "10", "--max_steps", str(arguments.ctc_steps), "--seed", str(arguments.seed),
        "--output_dir", output_dir, *options,
    )  # fmt: skip
    results = output_dir / "transcripts.json"
    run(ROOT / "demo/transcribe.py", output_dir, test.strings_file, "--output_file", results)
    return json.loads(results.read_text())


def main() -> None:
    parser = HfArgumentParser(DemoArguments, description=__doc__.splitlines()[0])
    (arguments,) = parser.parse_args_into_dataclasses()
    start = time.perf_counter()
    logging.set_verbosity_error()
    disable_progress_bars()
    set_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    output = Path(arguments.output_dir).resolve()
    (output / "data").mkdir(parents=True, exist_ok=True)

    with stage("1. Speech"):
        train_speech = prepare_speech(arguments.train_file, output / "data", "train", 1000, rng)
        test_speech = prepare_speech(arguments.test_file, output / "data", "test", 100, rng)
        print(f"   {len(train_speech.words)} words to train on, {len(test_speech.words)} to test on, and strings")
    with stage("2. Teacher"):
        teacher = Teacher(
            AutoModel.from_pretrained(arguments.teacher), ObjectiveArguments(num_target_layers=NUM_TARGET_LAYERS)
        )
        print(f"   {teacher.model.num_parameters():,} parameters")
    with stage("3a. Stage 1: the largest subnet learns from the teacher"):
        distil(
            arguments, train_speech.file, output / "stage1",
            "--sampling", "largest", "--max_steps", str(arguments.stage1_steps),
        )  # fmt: skip
    with stage("3b. Stage 2: all subnets learn"):
        distil(
            arguments, train_speech.file, output / "supernet",
            "--student_name_or_path", output / "stage1", "--max_steps", str(arguments.stage2_steps),
        )  # fmt: skip
    with stage("4. Subnets against the teacher, its untrained slices, and random weights"):
        supernet = LightHubertModel.from_pretrained(output / "supernet")
        space = supernet.search_space
        print(f"   the supernet holds {space.num_subnets:,} subnets")
        subnets = {"largest": space.largest, "middle": middle_subnet(space), "smallest": space.smallest}
        extractor = Wav2Vec2FeatureExtractor.from_pretrained(output / "supernet")
        bench = Bench(train_speech, test_speech, teacher, extractor, arguments.max_probe_recordings)
        rows = measure_subnets(arguments, supernet, subnets, bench)
    with stage("5. Speech recognition: the middle subnet, and the same shape from random weights"):
        supernet.extract_subnet(subnets["middle"]).save_pretrained(output / "middle")
        LightHubertModel(supernet.config.cut_to(subnets["middle"])).save_pretrained(output / "middle-random")
        distilled = recognise(arguments, output / "middle", train_speech, test_speech, output / "asr")
        control = recognise(
            arguments, output / "middle-random", train_speech, test_speech, output / "asr-random",
            "--freeze_feature_encoder", "False",
        )  # fmt: skip
    ctc = [
        {"model": name, "wer": result["wer"], "cer": result["cer"]}
        for name, result in (("middle, distilled", distilled), ("middle, random weights", control))
    ]
    table = markdown_table(COLUMNS, [cells(row) for row in rows])
    ctc_table = markdown_table(CTC_COLUMNS, [[row["model"], f"{row['wer']:.1%}", f"{row['cer']:.1%}"] for row in ctc])
    (output / "results.md").write_text(f"{table}\n\n{ctc_table}\n", encoding="utf-8")
    (output / "results.json").write_text(json.dumps({"models": rows, "ctc": ctc}, indent=2) + "\n")
    plot(rows, output / "accuracy-against-macs.png")
    write_card(output / "asr", arguments, "middle", distilled)
    print(f"\n{table}\n\n{ctc_table}\n")
    print(f"All of it is in {arguments.output_dir}; {time.perf_counter() - start:.0f} s in all.")


if __name__ == "__main__":
    main()
