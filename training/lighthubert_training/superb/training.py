"""Training of a task's head on frozen features. It is reproducible: the same seed gives the same head, whether the run
was killed and resumed or not."""

import json
import logging
import random
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from lighthubert_training.runs.checkpoints import FailedSaves, is_write_error
from lighthubert_training.runs.distributed import on_main_process, sum_gradients
from lighthubert_training.superb.features import Features, Stored, read_ahead
from lighthubert_training.superb.heads import Downstream, spans_masked
from lighthubert_training.superb.tasks import Task
from modeling_lighthubert.files import whole_file


logger = logging.getLogger(__name__)
STATE_FILE = "state.pt"
LOGGING_STEPS = 20
"""Between the losses that the progress bar shows."""


@lru_cache(maxsize=1)
def epoch_order(seed: int, epoch: int, num_recordings: int) -> list[int]:
    """Training recordings in the order of an epoch."""
    return random.Random(f"{seed}-{epoch}").sample(range(num_recordings), num_recordings)


class HeadTraining:
    """Trains a head, evaluates it on the dev part every `eval_steps`, and tests the one that was best there.

    A step's recordings, crops, masks and dropout follow from the seed and the number of the step, so a resumed run
    ends like one that was not interrupted. Processes split the recordings of a step; only dropout depends on how many
    processes there are.

    Args:
        features: of each part.
        folder: for the state, which is written at every evaluation.
        setting: everything that the result depends on, `seed` among it. A state with another setting is ignored.
    """

    def __init__(
        self, task: Task, features: Features, folder: Path, accelerator: Accelerator, setting: dict[str, Any]
    ):
        self.task, self.settings, self.upstream, self.features = task, task.settings, task.upstream, features
        self.folder, self.accelerator, self.seed = folder, accelerator, setting["seed"]
        set_seed(self.seed)
        self.downstream = Downstream(self.upstream.num_layers, task.build_head()).to(accelerator.device)
        self.optimizer = torch.optim.Adam(self.downstream.parameters(), lr=self.settings.learning_rate)
        self.step, self.best, self.history = 0, dict[str, Any](), list[dict[str, float]]()
        self.setting, self.failed_saves = json.dumps(setting, sort_keys=True), FailedSaves("the same command")

    def run(self) -> dict[str, Any]:
        """Trains to the end, from the state in the folder if there is one.

        Returns:
            `test` and `dev` scores of the best head, its `step`, and the `history` of losses and dev scores; an empty
            dict on all processes but the main one.
        """
        self.load_state()
        max_steps, is_main = self.settings.max_steps, self.accelerator.is_main_process
        bar = tqdm(total=max_steps, initial=self.step, desc=self.settings.task, leave=False, disable=not is_main)
        start, seconds = time.perf_counter(), 0.0
        own = (self.own_indices(step) for step in range(self.step, max_steps))
        stored = read_ahead(self.features["train"], own)
        while self.step < max_steps:
            loss, of_step = self.train_step(self.step, next(stored))
            self.step, seconds = self.step + 1, seconds + of_step
            bar.update()
            if self.step % LOGGING_STEPS == 0:  # reading the loss waits for the device
                rate = seconds / (time.perf_counter() - start)
                bar.set_postfix({"loss": f"{float(loss):.3g}", "audio s/s": f"{rate:.0f}"}, refresh=False)
                start, seconds = time.perf_counter(), 0.0
            if self.step % self.settings.eval_steps == 0 or self.step == max_steps:
                self.evaluate(loss)
                error = self.save_state() if is_main else None
                self.failed_saves.note(self.folder / STATE_FILE, error, self.accelerator)
        bar.close()
        self.downstream.load_state_dict(on_main_process(lambda: self.best["head"]))
        outputs = self.outputs("test")
        if not is_main:
            return {}
        test = self.task.scores(outputs, self.task.parts["test"])
        return {"test": test, "dev": self.best["scores"], "step": self.best["step"], "history": self.history}

    def train_step(self, step: int, stored: Sequence[Stored]) -> tuple[torch.Tensor, float]:
        """One optimiser step of all processes.

        Args:
            stored: what is read of the recordings of this process.

        Returns:
            The loss, on the device, and the seconds of audio, of this process.
        """
        ours = self.own_indices(step)
        set_seed(random.Random(f"{self.seed}-{step}-{self.accelerator.process_index}").getrandbits(32))
        self.downstream.train()
        self.optimizer.zero_grad()
        loss_value, num_frames = torch.zeros(()), 0
        if ours:
            rngs = [random.Random(f"{self.seed}-{step}-{index}") for index in ours]
            states = self.features["train"].states(ours, stored)
            crops = [self.crop(*each) for each in zip(ours, states, rngs, strict=True)]
            hidden_states, lengths = self.pad([states for states, _ in crops])
            features = self.downstream.weighted_sum(hidden_states)
            if self.settings.spec_augment:
                features = spans_masked(features, [states.shape[1] for states, _ in crops], rngs)
            outputs = self.downstream.head(features, lengths)
            loss = self.task.loss(self.downstream.head, outputs, lengths, [row for _, row in crops])
            (loss * (len(ours) / len(self.indices(step)))).backward()
            loss_value, num_frames = loss.detach(), sum(states.shape[1] for states, _ in crops)
        sum_gradients(self.downstream.parameters(), self.accelerator)
        clip_grad_norm_(self.downstream.parameters(), 1.0)
        self.optimizer.step()
        return loss_value, num_frames * self.upstream.seconds_per_frame

    def indices(self, step: int) -> list[int]:
        """Training recordings of a step. Every epoch has an order of its own; its last incomplete batch is dropped."""
        count = len(self.features["train"])
        size = min(self.settings.batch_size, count)
        epoch, at = divmod(step, count // size)
        return epoch_order(self.seed, epoch, count)[at * size : (at + 1) * size]

    def own_indices(self, step: int) -> list[int]:
        """Those of this process."""
        return self.indices(step)[self.accelerator.process_index :: self.accelerator.num_processes]

    def crop(self, index: int, states: torch.Tensor, rng: random.Random) -> tuple[torch.Tensor, dict[str, Any]]:
        """Hidden states and labels of a training recording, cropped at random if it is longer than `max_seconds`."""
        row = self.task.parts["train"].rows[index]
        if self.settings.max_seconds is None:
            return states, row
        most = int(self.settings.max_seconds * self.upstream.sampling_rate / self.upstream.samples_per_frame)
        first = rng.randrange(max(1, states.shape[1] - most + 1))
        return states[:, first : first + most], row | {"first_frame": first}

    def pad(self, states: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch (batch_size, num_layers, num_frames, hidden_size), and true lengths (batch_size)."""
        lengths = torch.tensor([each.shape[1] for each in states])
        batch = pad_sequence([each.transpose(0, 1) for each in states], batch_first=True).transpose(1, 2)
        return batch.to(self.accelerator.device), lengths.to(self.accelerator.device)

    @torch.no_grad()
    def outputs(self, part: str) -> list[torch.Tensor]:
        """Outputs of the head for each recording of a part, without padding, on the CPU. Processes split them, and all
        get all."""
        self.downstream.eval()
        features, batch_size, own = self.features[part], self.settings.batch_size, dict[int, torch.Tensor]()
        ours = range(self.accelerator.process_index, len(features), self.accelerator.num_processes)
        batches = [ours[start : start + batch_size] for start in range(0, len(ours), batch_size)]
        for indices, stored in zip(batches, read_ahead(features, batches)):
            states = features.states(indices, stored)
            outputs = self.downstream(*self.pad(states)).cpu()
            for index, state, output in zip(indices, states, outputs, strict=True):
                own[index] = output[: state.shape[1]].clone() if outputs.ndim == 3 else output
        found = {index: output for of_process in gather_object([own]) for index, output in of_process.items()}
        return [found[index] for index in range(len(features))]

    def evaluate(self, loss: torch.Tensor) -> None:
        """Scores the head on the dev part, and keeps it, on the main process, if it is better than all before. `loss`
        is that of the last step."""
        outputs = self.outputs("dev")
        if not self.accelerator.is_main_process:
            return
        scores = self.task.scores(outputs, self.task.parts["dev"])
        self.history.append({"step": self.step, "loss": float(loss), **scores})
        if not self.best or self.task.selection_score(scores) > self.task.selection_score(self.best["scores"]):
            head = {name: tensor.detach().cpu().clone() for name, tensor in self.downstream.state_dict().items()}
            self.best = {"scores": scores, "step": self.step, "head": head}

    def save_state(self) -> Exception | None:
        """Writes the state to the folder. Returns the error if the disk does not take it."""
        state = {
            "step": self.step, "downstream": self.downstream.state_dict(), "optimizer": self.optimizer.state_dict(),
            "best": self.best, "history": self.history, "setting": self.setting,
        }  # fmt: skip
        try:
            with whole_file(self.folder / STATE_FILE) as unfinished:
                torch.save(state, unfinished)
        except Exception as error:
            if not is_write_error(error):
                raise
            return error
        return None

    def load_state(self) -> None:
        """Resumes from the state in the folder, if there is one with this setting, without damage."""
        file = self.folder / STATE_FILE
        if not file.exists():
            return
        try:
            state = torch.load(file, map_location=self.accelerator.device, weights_only=True)
            fits = state["setting"] == self.setting
        except (RuntimeError, EOFError, KeyError, TypeError, ValueError, UnpicklingError) as error:
            logger.warning(f"{file} is damaged ({error}): the head is trained from the beginning")
            return
        if fits:
            self.downstream.load_state_dict(state["downstream"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.best, self.history = state["step"], state["best"], state["history"]
