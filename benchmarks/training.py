"""What a step of distillation costs, at the size of HuBERT Base and LightHuBERT's small space.

    python benchmarks/training.py
    python benchmarks/training.py --device cuda --mixed_precision bf16 --batch_size 16 --seconds 15

Weights and audio are random: neither changes the cost. What is compared takes turns within each repeat, so whatever
else the machine does hits all of it; ratios are medians of the ratios within a repeat. Memory is the most that the
step holds above what is held before it (weights, gradients, optimiser), counted by torch's allocators.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Audio, Dataset
from processes import peak_memory, synchronizer
from recordings import noise, to_distil
from torch.utils.data import DataLoader
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from lighthubert_training.data.batches import RandomAccessSampler
from lighthubert_training.data.collators import DistillationCollator
from lighthubert_training.data.recordings import CroppedRecordings, SpeechDataset, durations
from lighthubert_training.data.strings import SAMPLING_RATE, encode_flac
from lighthubert_training.distillation.step import prepare_batch, training_step
from lighthubert_training.distillation.teacher import Teacher
from lighthubert_training.runs.distributed import DEVICE_HELP, build_accelerator
from modeling_lighthubert import LightHubertConfig, LightHubertForPreTraining, SearchSpace, Subnet
from modeling_lighthubert.errors import run
from modeling_lighthubert.profiling import median_ratio, time_in_turns


Step = Callable[[], object]


class Bench:
    """A batch, by default of nearly as much audio as in the published recipes, a teacher of the size of HuBERT Base,
    and students to train."""

    def __init__(self, options: argparse.Namespace):
        torch.manual_seed(0)
        self.accelerator = build_accelerator(options.device, mixed_precision=options.mixed_precision)
        self.options, device = options, self.accelerator.device
        self.teacher = Teacher(HubertModel(HubertConfig(feat_extract_norm="layer", layerdrop=0.0))).to(device)
        audio = torch.from_numpy(noise(options.batch_size, options.seconds))
        batch = {"input_values": audio, "attention_mask": torch.ones(audio.shape, dtype=torch.long)}
        (batch,) = to_distil([batch], LightHubertConfig(), self.teacher.objective)
        self.batch = send_to_device(batch, device)
        self.synchronize = synchronizer(device)

    def supernet(self) -> LightHubertForPreTraining:
        """A student as stage 2 of the small space has it, with the convolutions of the teacher."""
        config = LightHubertConfig(search_space=SearchSpace.small(), feat_extract_norm="layer", layerdrop=0.0)
        student = LightHubertForPreTraining(config.trimmed())
        student.hubert.feature_extractor.load_state_dict(self.teacher.model.feature_extractor.state_dict())
        return student

    def prepare(self, student: LightHubertForPreTraining, freeze: bool = False) -> tuple:
        """A student that trains, and its optimiser."""
        if freeze:
            student.freeze_feature_encoder()
        student = self.accelerator.prepare_model(student.train(), evaluation_mode=True)
        weights = [weight for weight in student.parameters() if weight.requires_grad]
        return student, torch.optim.AdamW(weights, lr=1e-5, fused=True)

    def student_step(self, student, optimizer: torch.optim.Optimizer, share: bool = False) -> Step:
        """Forward, backward and optimiser of what is selected; the teacher's outputs are there."""
        prepared = prepare_batch(student, self.teacher, self.batch, self.accelerator, share)
        frozen = prepared.conv_features is not None and not share

        def step() -> None:
            if frozen:
                with torch.no_grad(), self.accelerator.autocast():
                    prepared.conv_features = student.hubert.feature_extractor(self.batch["input_values"])
            prepared.loss(student, self.teacher).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def whole_step(self, student, optimizer: torch.optim.Optimizer, subnets: list[Subnet], share: bool) -> Step:
        """A step of the training script, with the teacher."""

        def step() -> None:
            training_step(student, self.teacher, [self.batch], subnets, self.accelerator, share)
            self.accelerator.clip_grad_norm_(student.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def time(self, steps: dict[str, Step]) -> dict[str, list[float]]:
        return time_in_turns(steps, self.options.repeats, synchronize=self.synchronize)


def selected_against_cut(bench: Bench) -> None:
    """A selected subnet costs what its cut model costs, and a small one less than a large one."""
    supernet, optimizer = bench.prepare(bench.supernet())
    print("| a step of the student | time | memory, GiB |\n|---|---|---|")
    for name in bench.options.subnets:
        supernet.set_subnet(name)
        cut, cut_optimizer = bench.prepare(supernet.extract_subnet())
        steps = [bench.student_step(supernet, optimizer), bench.student_step(cut, cut_optimizer)]
        times = bench.time(dict(zip(("selected", "cut"), steps, strict=True)))
        selected, of_cut = (peak_memory(step, bench.accelerator.device) / 2**30 for step in steps)
        ratios = [f"{median_ratio(times['selected'], times['cut']):.3f}", f"{selected / of_cut:.3f}"]
        print(f"| {name}, selected / cut | {ratios[0]} | {selected:.2f} / {of_cut:.2f} = {ratios[1]} |", flush=True)

    step = bench.student_step(supernet, optimizer)

    def select_and_step(name: str) -> None:
        supernet.set_subnet(name)
        step()

    times = bench.time({name: partial(select_and_step, name) for name in ("smallest", "largest")})
    print(f"| smallest / largest of the small space | {median_ratio(times['smallest'], times['largest']):.3f} | |")


def feature_encoders(bench: Bench) -> float:
    """What a feature encoder costs that learns, is frozen, or is shared with the teacher.

    Returns:
        Seconds of audio in a second, of a step of a_small with the teacher and a shared encoder.
    """
    space = SearchSpace.small()
    a_small, rate = space.named["a_small"], 0.0
    print("\n| a step | encoder frozen / learns | shared / learns | shared / frozen |\n|---|---|---|---|")
    for name, subnets in {
        "a_small, of the student alone": [],
        "a_small, with the teacher": [a_small],
        "sandwich (smallest, a_small, largest), with the teacher": [space.smallest, a_small, space.largest],
    }.items():
        steps = {}
        for kind in ("learns", "frozen", "shared"):
            student, optimizer = bench.prepare(bench.supernet(), freeze=kind != "learns")
            student.set_subnet(a_small)
            if subnets:
                steps[kind] = bench.whole_step(student, optimizer, subnets, kind == "shared")
            else:
                steps[kind] = bench.student_step(student, optimizer, kind == "shared")
        times = bench.time(steps)
        pairs = (("frozen", "learns"), ("shared", "learns"), ("shared", "frozen"))
        ratios = [f"{median_ratio(times[one], times[other]):.3f}" for one, other in pairs]
        print(f"| {name} | {' | '.join(ratios)} |", flush=True)
        if len(subnets) == 1:
            rate = bench.options.batch_size * bench.options.seconds / statistics.median(times["shared"])
    return rate


def recordings_of_many_lengths(num_recordings: int) -> SpeechDataset:
    """Noise in FLAC, of lengths drawn between 1 and 35 s."""
    rng = np.random.default_rng(0)
    lengths = rng.uniform(1, 35, num_recordings) * SAMPLING_RATE
    rows = [{"audio": encode_flac(0.1 * rng.standard_normal(int(length)).astype(np.float32))} for length in lengths]
    return SpeechDataset(Dataset.from_list(rows).cast_column("audio", Audio(decode=False)), "audio", SAMPLING_RATE)


def data_pipeline(rate: float, num_batches: int = 100) -> None:
    """Decoding, normalising and padding alone, in one worker, against the `rate` of a step; and how much of a batch is
    padding."""
    speech = recordings_of_many_lengths(400)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    sampler = RandomAccessSampler(durations(speech), batch_size=32, max_batch_seconds=160.0, crop_seconds=35.0, seed=0)
    crops = CroppedRecordings(speech, SAMPLING_RATE, 35.0, seed=0)
    collator = DistillationCollator(extractor, extractor, LightHubertConfig())
    batches = iter(DataLoader(crops, batch_sampler=sampler, collate_fn=collator, num_workers=1))
    next(batches)
    start, true, padded = time.perf_counter(), 0, 0
    for batch in itertools.islice(batches, num_batches):
        true, padded = true + int(batch["attention_mask"].sum()), padded + batch["attention_mask"].numel()
    seconds = true / SAMPLING_RATE / (time.perf_counter() - start)
    of_step = f"{seconds / rate:.0f} times the {rate:.1f} of a step of a_small with the teacher, shared"
    print(f"\ndata pipeline, one worker: {seconds:.0f} s of audio a second, {of_step}")
    print(f"padding, lengths of 1 to 35 s: {1 - true / padded:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help=DEVICE_HELP.replace("a GPU if there is one", "cpu"))
    parser.add_argument("--mixed_precision", default="no", choices=("no", "bf16"), help="Precision of the student.")
    parser.add_argument("--batch_size", type=int, default=16, help="Clips in a batch (default: 16).")
    parser.add_argument("--seconds", type=float, default=5.0, help="Length of a clip (default: 5).")
    parser.add_argument("--repeats", type=int, default=3, help="Timed rounds (default: 3).")
    named = ["a_small", "largest", "smallest"]
    parser.add_argument("--subnets", nargs="*", default=named, help="Subnets to compare with their cut models.")
    options = parser.parse_args()
    bench = Bench(options)
    threads = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    audio = f"batch {options.batch_size} x {options.seconds:g} s"
    print(f"{audio}, {options.device}, {options.mixed_precision}, {threads}\n")
    if options.subnets:
        selected_against_cut(bench)
    data_pipeline(feature_encoders(bench))


if __name__ == "__main__":
    run(main)
