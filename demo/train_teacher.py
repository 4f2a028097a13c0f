"""Trains a small HuBERT as HuBERT is trained: the teacher of the demonstration, and that of the benchmarks.

    python demo/train_teacher.py --output_dir teacher
    python demo/train_teacher.py --config benchmarks/teacher/recipe.yaml --output_dir teacher

In the first iteration, frames are labelled with k-means clusters of their MFCCs, and the model learns to predict the
clusters of masked frames; in each further one, the labels are clusters of a layer of the model that came out of the
one before (HuBERT, arXiv 2106.07447, section 2). Unlike HuBERT's, a further iteration starts from these weights, which
saves most of its steps. The result is a stock `HubertModel`. A run that was killed goes on when the same command is
given again.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from accelerate import Accelerator
from sklearn.cluster import MiniBatchKMeans
from torch import nn
from tqdm import tqdm
from transformers import Wav2Vec2FeatureExtractor, get_scheduler, set_seed

from lighthubert_training.data.audio import load_waveform
from lighthubert_training.data.batches import RandomAccessSampler
from lighthubert_training.data.collators import pad
from lighthubert_training.data.mfcc import HOP, WINDOW, mfcc
from lighthubert_training.data.recordings import Item, item_seed
from lighthubert_training.data.strings import SAMPLING_RATE, read_parquet
from lighthubert_training.models import draw_time_mask
from lighthubert_training.runs.checkpoints import FailedSaves, find_checkpoint, save_checkpoint
from lighthubert_training.runs.distributed import DEVICE_HELP, build_accelerator, locked_by_main_process
from lighthubert_training.runs.log import RunLog
from lighthubert_training.runs.options import OptionParser, option, parse_options
from lighthubert_training.runs.plots import plot_losses
from modeling_lighthubert import LightHubertConfig, LightHubertModel
from modeling_lighthubert.errors import UserError, run
from modeling_lighthubert.export import to_hubert
from modeling_lighthubert.files import require_unused, whole_file, whole_folder, write_json
from modeling_lighthubert.loading import load_model


ROOT = Path(__file__).resolve().parent.parent
MOST_FRAMES = 300_000  # that clusters are fitted to, drawn at random


@dataclass
class TeacherArguments:
    """Model, data and schedule. Defaults are those of the demonstration's teacher."""

    output_dir: str = option(help="Folder of the teacher. Its folder iteration-N has the checkpoints of iteration N.")
    train_files: list[str] = option([str(ROOT / "demo/speech/train.parquet")], "Parquet files to train on.")
    hidden_size: int = option(128, "Width of the transformer.")
    num_hidden_layers: int = option(6, "Layers of the transformer.")
    num_attention_heads: int = option(4, "Heads of each layer.")
    intermediate_size: int = option(512, "FFN units of each layer.")
    conv_channels: int = option(64, "Channels of each convolution of the feature encoder.")
    feat_extract_norm: str = option("layer", "Norm of the convolutions: layer or group.", choices=("layer", "group"))
    feature_encoder_name_or_path: str | None = option(
        None, "HuBERT with whose convolutions those of the teacher begin; it may have fewer channels. Default: random."
    )
    num_units: list[int] = option([100], "Clusters, for each iteration.")
    max_steps: list[int] = option([2500], "Optimiser steps, for each iteration.")
    unit_layer: int = option(4, "Layer, from 1, whose features are clustered after an iteration. HuBERT: 6 of 12.")
    mask_time_prob: float = option(0.5, "Share of frames that are masked.")
    mask_time_length: int = option(6, "Length of a masked span in frames. HuBERT has 10; a digit is about 25 long.")
    unmasked_weight: float = option(0.0, "Weight of the loss on frames that are not masked, beside that on others.")
    join_seconds: float = option(0.0, "Shorter recordings of a speaker are joined until they are so long.")
    batch_seconds: float = option(32.0, "Most seconds of audio in a padded batch.")
    crop_seconds: float = option(15.0, "Length to which longer recordings are cropped at random, in seconds.")
    learning_rate: float = option(2e-3, "Peak learning rate of the first iteration.")
    further_learning_rate: float = option(1e-3, "Peak learning rate of further iterations.")
    speeds: list[float] = option([1.0], "Speeds of which each recording has one at random.")
    noise_prob: float = option(0.0, "Share of recordings with noise, 5 to 30 dB below the speech.")
    gain_db: float = option(0.0, "Most that the level rises or falls in the course of a recording, in dB.")
    save_steps: int = option(250, "Steps between checkpoints.")
    seed: int = option(0, "Random seed.")
    device: str | None = option(None, DEVICE_HELP)

    def __post_init__(self) -> None:
        if len(self.num_units) != len(self.max_steps):
            raise ValueError(f"num_units={self.num_units} and max_steps={self.max_steps}: give one for each iteration")
        if not 1 <= self.unit_layer <= self.num_hidden_layers:
            raise ValueError(f"unit_layer={self.unit_layer} is not one of the {self.num_hidden_layers} layers")

    def config(self) -> LightHubertConfig:
        """Of the teacher, without dropout: it sees each recording a few times only."""
        return LightHubertConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            conv_dim=(self.conv_channels,) * 7,
            feat_extract_norm=self.feat_extract_norm,
            num_conv_pos_embeddings=32,
            hidden_dropout=0.0,
            activation_dropout=0.0,
            attention_dropout=0.0,
            layerdrop=0.0,
        )


def build_model(arguments: TeacherArguments) -> LightHubertModel:
    """A HuBERT with random weights, whose layers add nothing at first (as in Fixup, arXiv 1901.09321): ten layers with
    their norms behind them learn nothing in hundreds of steps otherwise. Convolutions begin with those of another
    model, as far as it has any; filters of raw samples are what takes longest to learn."""
    model = LightHubertModel(arguments.config())
    if arguments.feature_encoder_name_or_path is not None:
        other = load_model(arguments.feature_encoder_name_or_path).feature_extractor.state_dict()
        weights = model.feature_extractor.state_dict()
        if any(name not in weights or weights[name].ndim != weight.ndim for name, weight in other.items()):
            raise UserError(f"{arguments.feature_encoder_name_or_path} has another kind of feature encoder")
        for name, weight in other.items():
            weights[name][: len(weight)] = 0.0  # its channels do not read further ones
            weights[name][tuple(map(slice, weight.shape))] = weight
        model.feature_extractor.load_state_dict(weights)
    for layer in model.encoder.layers:
        nn.init.zeros_(layer.attention.out_proj.weight)
        nn.init.zeros_(layer.feed_forward.output_dense.weight)
    return model


def read(files: Sequence[str], join_seconds: float) -> list[np.ndarray]:
    """Waveforms, float16 to save memory, (num_samples) each. Those that are shorter than `join_seconds` are joined by
    speaker, in the order of the file, until they have them; what is left with less than two frames is left out."""
    waveforms, least = [], join_seconds * SAMPLING_RATE
    for file in files:
        rows, open_pieces = read_parquet(file, ["audio"]), defaultdict(list)
        speakers = rows["speaker"] if "speaker" in rows.column_names else range(len(rows))
        for audio, speaker in zip(tqdm(rows["audio"], desc=Path(file).stem), speakers, strict=True):
            waveform = load_waveform(audio, SAMPLING_RATE).astype(np.float16)
            if len(waveform) >= least:
                waveforms.append(waveform)
                continue
            open_pieces[speaker].append(waveform)
            if sum(map(len, open_pieces[speaker])) >= least:
                waveforms.append(np.concatenate(open_pieces.pop(speaker)))
        waveforms += [np.concatenate(pieces) for pieces in open_pieces.values()]
    return [waveform for waveform in waveforms if len(waveform) >= WINDOW + HOP]


@torch.no_grad()
def layer_features(
    model: LightHubertModel, layer: int, waveforms: Sequence[np.ndarray], extractor: Wav2Vec2FeatureExtractor
) -> Iterator[np.ndarray]:
    """Hidden states of a layer, from 1, (num_frames, hidden_size) of each of `waveforms`."""
    model.eval()
    for waveform in waveforms:
        batch = pad(extractor, [waveform.astype(np.float32)]).to(model.device)
        states = model(batch["input_values"], batch["attention_mask"], output_hidden_states=True).hidden_states
        yield states[layer][0].float().cpu().numpy()


def cluster_frames(features: Iterator[np.ndarray], num_units: int, seed: int) -> list[np.ndarray]:
    """The cluster of every frame of every recording, int64 (num_frames) each."""
    kept = [frames.astype(np.float16) for frames in features]
    every = np.concatenate(kept)
    drawn = np.random.default_rng(seed).permutation(len(every))[:MOST_FRAMES]
    clusters = MiniBatchKMeans(num_units, random_state=seed, batch_size=10_000, n_init=5)
    clusters.fit(every[drawn].astype(np.float32))
    return [clusters.predict(frames.astype(np.float32)).astype(np.int64) for frames in kept]


def perturb(
    waveform: np.ndarray, units: np.ndarray, arguments: TeacherArguments, seed: str
) -> tuple[np.ndarray, np.ndarray]:
    """A crop of a recording as it is used in training, and the units of the frames of the clean one.

    Speed is changed by resampling, the level along a straight line in dB (a constant gain would be taken back by the
    normalisation), and noise is added whose spectrum falls by 0 to 6 dB an octave.

    Args:
        waveform: (num_samples).
        units: int64 (num_frames).
        seed: of what is random.
    """
    rng = random.Random(seed)
    speed = rng.choice(arguments.speeds)
    longest = int(arguments.crop_seconds * speed * SAMPLING_RATE) // HOP * HOP
    if len(waveform) > longest:
        first = rng.randrange((len(waveform) - longest) // HOP + 1)
        waveform, units = waveform[first * HOP : first * HOP + longest], units[first : first + longest // HOP]
    waveform = waveform.astype(np.float32)
    if speed != 1.0:
        waveform = soxr.resample(waveform, SAMPLING_RATE * speed, SAMPLING_RATE, quality="MQ")
        num_frames = (len(waveform) - WINDOW) // HOP + 1
        centres = (np.arange(num_frames) * HOP + WINDOW / 2) * speed  # in the clean recording
        units = units[np.rint((centres - WINDOW / 2) / HOP).astype(int).clip(0, len(units) - 1)]
    if arguments.gain_db:
        ends = [rng.uniform(-arguments.gain_db, arguments.gain_db) for _ in range(2)]
        waveform = waveform * 10 ** (np.linspace(*ends, len(waveform), dtype=np.float32) / 20)
    if rng.random() < arguments.noise_prob:
        spectrum = np.fft.rfft(np.random.default_rng(rng.getrandbits(64)).standard_normal(len(waveform)))
        noise = np.fft.irfft(spectrum / np.arange(1, len(spectrum) + 1) ** rng.uniform(0.0, 1.0), len(waveform))
        level = waveform.std() / noise.std() * 10 ** (-rng.uniform(5.0, 30.0) / 20)
        waveform = (waveform + level * noise).astype(np.float32)
    return waveform, units[: (len(waveform) - WINDOW) // HOP + 1]


class MaskedPrediction(nn.Module):
    """A HuBERT and a linear layer that names the units of frames.

    Args:
        unmasked_weight: of the loss on frames that are not masked.
    """

    def __init__(self, model: LightHubertModel, num_units: int, unmasked_weight: float):
        super().__init__()
        self.model, self.head = model, nn.Linear(model.config.hidden_size, num_units)
        self.unmasked_weight = unmasked_weight

    def forward(
        self, input_values: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor, units: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy, and accuracy, the mean over masked frames.

        Args:
            input_values, attention_mask: (batch_size, num_samples).
            mask: bool (batch_size, num_frames).
            units: int64 (batch_size, num_frames), -1 on padding.
        """
        logits = self.head(self.model(input_values, attention_mask, mask.clone()).last_hidden_state)
        loss = nn.functional.cross_entropy(logits[mask], units[mask])
        if self.unmasked_weight and bool((seen := (units >= 0) & ~mask).any()):
            loss = loss + self.unmasked_weight * nn.functional.cross_entropy(logits[seen], units[seen])
        return loss, (logits[mask].argmax(-1) == units[mask]).float().mean()


class Iteration:
    """One iteration: it learns the units of masked frames.

    Args:
        number: from 0.
        output_dir: folder of its checkpoints, its units and its model.
        start: model to start from.
    """

    def __init__(
        self,
        arguments: TeacherArguments,
        number: int,
        output_dir: Path,
        start: LightHubertModel,
        waveforms: list[np.ndarray],
        accelerator: Accelerator,
    ):
        self.arguments, self.number, self.output_dir = arguments, number, output_dir
        self.waveforms, self.accelerator = waveforms, accelerator
        self.num_steps, self.num_units = arguments.max_steps[number], arguments.num_units[number]
        self.extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
        self.units = self.read_units(start)
        set_seed(arguments.seed + number)
        self.learner = MaskedPrediction(start, self.num_units, arguments.unmasked_weight)

    def read_units(self, start: LightHubertModel) -> list[np.ndarray]:
        """The units of every recording, which are computed once and kept."""
        file, lengths = self.output_dir / "units.npy", [(len(each) - WINDOW) // HOP + 1 for each in self.waveforms]
        if not file.exists():
            bar = tqdm(self.waveforms, desc="clustering")
            layer = self.arguments.unit_layer
            features = layer_features(start, layer, bar, self.extractor) if self.number else map(mfcc, bar)
            units = cluster_frames(features, self.num_units, self.arguments.seed)
            with whole_file(file) as unfinished, unfinished.open("wb") as opened:
                np.save(opened, np.concatenate(units).astype(np.int16))
        every = np.load(file).astype(np.int64)
        if len(every) != sum(lengths):
            raise UserError(f"{file} is of other recordings: delete it, or choose another --output_dir")
        return np.split(every, np.cumsum(lengths)[:-1])

    def batch(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """Arguments of `MaskedPrediction`."""
        arguments, seeds = self.arguments, [item_seed(self.arguments.seed, each.epoch, each.index) for each in items]
        pairs = [
            perturb(self.waveforms[item.index], self.units[item.index], arguments, seed)
            for item, seed in zip(items, seeds, strict=True)
        ]
        batch = pad(self.extractor, [waveform for waveform, _ in pairs])
        num_frames = [self.learner.model.config.num_frames(len(waveform)) for waveform, _ in pairs]
        mask = draw_time_mask(num_frames, arguments.mask_time_prob, arguments.mask_time_length, seeds)
        units = torch.full(mask.shape, -1, dtype=torch.int64)
        for row, (count, (_, targets)) in enumerate(zip(num_frames, pairs, strict=True)):
            units[row, :count] = torch.from_numpy(targets)
        parts = {"input_values": batch["input_values"], "attention_mask": batch["attention_mask"]}
        return {**parts, "mask": mask, "units": units}

    def train(self) -> RunLog:
        """All steps, from the newest checkpoint on."""
        arguments, accelerator = self.arguments, self.accelerator
        parameters = list(self.learner.parameters())
        rate = arguments.further_learning_rate if self.number else arguments.learning_rate
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
        scheduler = get_scheduler("cosine", optimizer, self.num_steps // 20, self.num_steps)
        accelerator.free_memory()
        learner, optimizer = accelerator.prepare(self.learner, optimizer)
        accelerator.register_for_checkpointing(scheduler)
        state: dict[str, Any] = {"step": 0, "log": None}
        if found := find_checkpoint(accelerator, "latest", self.output_dir):
            folder, state = found
            accelerator.load_state(str(folder))
        seconds = [len(waveform) / SAMPLING_RATE for waveform in self.waveforms]
        bounds = {"batch_size": 256, "max_batch_seconds": arguments.batch_seconds}
        sampler = RandomAccessSampler(
            seconds, **bounds, crop_seconds=arguments.crop_seconds, seed=arguments.seed, start=state["step"]
        )
        log, failed = RunLog(accelerator, min(25, self.num_steps), state["log"]), FailedSaves("the same command")
        bar = tqdm(range(state["step"], self.num_steps), initial=state["step"], total=self.num_steps)
        bar.set_description(f"iteration {self.number + 1}")
        learner.train()
        for step, items in zip(bar, sampler):
            batch = self.batch(items)
            loss, accuracy = learner(**{name: tensor.to(accelerator.device) for name, tensor in batch.items()})
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            values = {"loss": loss, "accuracy": accuracy, "grad_norm": norm}
            seconds_of_audio = int(batch["attention_mask"].sum()) / SAMPLING_RATE
            names = [f"piece {item.index}" for item in items]
            if entry := log.step(step + 1, values, seconds_of_audio, float(scheduler.get_last_lr()[0]), names):
                bar.set_postfix({name: f"{value:.3g}" for name, value in entry.items()}, refresh=False)
            if (step + 1) % arguments.save_steps == 0 or step + 1 == self.num_steps:
                save_checkpoint(accelerator, self.output_dir, step + 1, {"log": log.state_dict()}, 1, failed)
        return log


def check_same_recipe(recipe: dict[str, Any], file: Path) -> None:
    """Raises a `UserError` that names the options that are not those in `file`, with which the run has begun."""
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else recipe
    if changed := [name for name, value in recipe.items() if earlier.get(name) != value]:
        raise UserError(
            f"{file.parent} was made with other options ({', '.join(changed)}): give the same ones, or choose another"
            " --output_dir"
        )


def train(arguments: TeacherArguments, work: Path, accelerator: Accelerator) -> None:
    """All iterations, and the teacher that comes out of the last."""
    recipe, recipe_file = asdict(arguments), work / "recipe.json"
    del recipe["output_dir"], recipe["save_steps"], recipe["device"]
    check_same_recipe(recipe, recipe_file)
    waveforms = read(arguments.train_files, arguments.join_seconds)
    write_json(recipe_file, recipe)  # before the units, which depend on it
    print(f"{len(waveforms)} pieces, {sum(map(len, waveforms)) / SAMPLING_RATE / 3600:.2f} hours")
    set_seed(arguments.seed)
    model = build_model(arguments).to(accelerator.device)
    history: dict[str, list[dict[str, float]]] = {}
    for number in range(len(arguments.max_steps)):
        iteration = Iteration(arguments, number, work / f"iteration-{number + 1}", model, waveforms, accelerator)
        log = iteration.train()
        history[f"iteration {number + 1}"] = log.history
        plot_losses(log.history, iteration.output_dir / "loss.png")
        model = iteration.learner.model
    folder = Path(arguments.output_dir)
    with whole_folder(folder / "teacher") as unfinished:
        to_hubert(model).half().save_pretrained(unfinished)
        iteration.extractor.save_pretrained(unfinished)
        write_json(unfinished / "history.json", history)
    accuracies = [f"{entries[-1]['accuracy']:.1%}" for entries in history.values()]
    print(f"{folder}: {model.num_parameters():,} parameters; masked frames right: {', '.join(accuracies)}")


def main() -> None:
    (arguments,) = parse_options(OptionParser(TeacherArguments, description=__doc__))
    folder = Path(arguments.output_dir)
    require_unused(folder / "teacher")
    accelerator = build_accelerator(arguments.device)  # before anything else asks which process this is
    with locked_by_main_process(folder):
        train(arguments, folder, accelerator)


if __name__ == "__main__":
    run(main)
