"""Trains the head of a task on frozen features: the same head from the same seed, killed and resumed or not."""

import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from lighthubert_training.runs.distributed import sum_gradients
from lighthubert_training.superb.features import Recordings, Upstream
from lighthubert_training.superb.heads import Downstream, spans_masked
from lighthubert_training.superb.tasks import Task


STATE_FILE = "state.pt"


class HeadTraining:
    """Steps, measurements of the dev part, and the test part with the head that was best there.

    A step's recordings, cuts, masks and dropout follow from the seed and its number, so a run that goes on from its
    state ends as one that was not stopped. Processes share the recordings of a step; dropout alone depends on how many
    there are.

    Args:
        recordings: features of each part.
        folder: for the state, written at every measurement.
        setting: what the run depends on, `seed` among it; a state of another is not gone on from.
    """

    def __init__(
        self,
        task: Task,
        recordings: dict[str, Recordings],
        upstream: Upstream,
        folder: Path,
        accelerator: Accelerator,
        setting: Mapping[str, Any],
    ):
        self.task, self.recipe, self.recordings, self.upstream = task, task.recipe, recordings, upstream
        self.folder, self.accelerator, self.seed = folder, accelerator, setting["seed"]
        set_seed(self.seed)
        self.downstream = Downstream(upstream.num_layers, task.build_head(upstream)).to(accelerator.device)
        self.optimizer = torch.optim.Adam(self.downstream.parameters(), lr=self.recipe.learning_rate)
        self.metric, self.higher_is_better = next(iter(task.higher_is_better.items()))
        self.step, self.best, self.history = 0, None, []
        self.setting = json.dumps(setting, sort_keys=True)

    def run(self) -> dict[str, Any]:
        """Trains to the end, or on to it.

        Returns:
            `test` and `dev` scores of the best head, its `step`, and the `history` of losses and dev scores.
        """
        self.load_state()
        bar = tqdm(
            total=self.recipe.max_steps, initial=self.step, desc=self.task.recipe.task, leave=False,
            disable=not self.accelerator.is_main_process,
        )  # fmt: skip
        while self.step < self.recipe.max_steps:
            start = time.perf_counter()
            loss, seconds = self.train_step(self.step)
            self.step += 1
            bar.update()
            rate = seconds / (time.perf_counter() - start)
            bar.set_postfix({"loss": f"{loss:.3g}", "audio s/s": f"{rate:.0f}"}, refresh=False)
            if self.step % self.recipe.eval_steps == 0 or self.step == self.recipe.max_steps:
                if self.accelerator.is_main_process:
                    self.measure(loss)
                    self.save_state()
                self.accelerator.wait_for_everyone()
        bar.close()
        if not self.accelerator.is_main_process:
            return {}
        self.downstream.load_state_dict(self.best["head"])
        test = self.task.scores(self.outputs("test"), self.task.parts["test"])
        return {"test": test, "dev": self.best["scores"], "step": self.best["step"], "history": self.history}

    def train_step(self, step: int) -> tuple[float, float]:
        """One optimiser step of all processes. Returns the loss, and the seconds of audio of this process."""
        indices = self.indices(step)
        share = indices[self.accelerator.process_index :: self.accelerator.num_processes]
        set_seed(random.Random(f"{self.seed}-{step}-{self.accelerator.process_index}").getrandbits(32))
        self.downstream.train()
        self.optimizer.zero_grad()
        loss_value, num_frames = 0.0, 0
        if share:
            rngs = [random.Random(f"{self.seed}-{step}-{index}") for index in share]
            clips = [self.clip(index, rng) for index, rng in zip(share, rngs, strict=True)]
            hidden_states, lengths = self.padded([states for states, _ in clips])
            features = self.downstream.weighted_sum(hidden_states)
            if self.recipe.spec_augment:
                features = spans_masked(features, lengths.tolist(), rngs)
            outputs = self.downstream.head(features, lengths)
            loss = self.task.loss(self.downstream.head, outputs, lengths, [row for _, row in clips])
            (loss * (len(share) / len(indices))).backward()
            loss_value, num_frames = float(loss.detach()), int(lengths.sum())
        sum_gradients(self.downstream.parameters(), self.accelerator)
        clip_grad_norm_(self.downstream.parameters(), 1.0)
        self.optimizer.step()
        return loss_value, num_frames * self.upstream.samples_per_frame / self.upstream.sampling_rate

    def indices(self, step: int) -> list[int]:
        """Training recordings of a step: whole batches of a new order in every epoch."""
        count = len(self.recordings["train"])
        size = min(self.recipe.batch_size, count)
        epoch, at = divmod(step, count // size)
        order = random.Random(f"{self.seed}-{epoch}").sample(range(count), count)
        return order[at * size : (at + 1) * size]

    def clip(self, index: int, rng: random.Random) -> tuple[torch.Tensor, dict[str, Any]]:
        """Hidden states and labels of a training recording, cut at random where it is too long."""
        states, row = self.recordings["train"][index], self.task.parts["train"].rows[index]
        if self.recipe.max_seconds is None:
            return states, row
        most = int(self.recipe.max_seconds * self.upstream.sampling_rate / self.upstream.samples_per_frame)
        first = rng.randrange(max(1, states.shape[1] - most + 1))
        return states[:, first : first + most], row | {"first_frame": first}

    def padded(self, states: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch_size, num_layers, num_frames, hidden_size), and true lengths (batch_size)."""
        lengths = torch.tensor([each.shape[1] for each in states])
        batch = pad_sequence([each.transpose(0, 1) for each in states], batch_first=True).transpose(1, 2)
        return batch.to(self.accelerator.device), lengths.to(self.accelerator.device)

    @torch.no_grad()
    def outputs(self, part: str) -> list[torch.Tensor]:
        """Of each recording of a part, without padding, on the CPU."""
        self.downstream.eval()
        found = []
        recordings = self.recordings[part]
        for start in range(0, len(recordings), self.recipe.batch_size):
            indices = range(start, min(start + self.recipe.batch_size, len(recordings)))
            hidden_states, lengths = self.padded([recordings[index] for index in indices])
            outputs = self.downstream(hidden_states, lengths).cpu()
            framewise = outputs.ndim == 3
            found += [each[:length] if framewise else each for each, length in zip(outputs, lengths.tolist())]
        return found

    def measure(self, loss: float) -> None:
        """Scores of the dev part; the head is kept if it is the best so far, the first of equals. `loss` is that of
        the last step."""
        scores = self.task.scores(self.outputs("dev"), self.task.parts["dev"])
        self.history.append({"step": self.step, "loss": loss, **scores})
        sign = 1 if self.higher_is_better else -1
        if self.best is None or sign * scores[self.metric] > sign * self.best["scores"][self.metric]:
            head = {name: tensor.detach().cpu().clone() for name, tensor in self.downstream.state_dict().items()}
            self.best = {"scores": scores, "step": self.step, "head": head}

    def save_state(self) -> None:
        """Written beside the old one and moved into its place, so that there is always one that is whole."""
        state = {
            "step": self.step, "downstream": self.downstream.state_dict(), "optimizer": self.optimizer.state_dict(),
            "best": self.best, "history": self.history, "setting": self.setting,
        }  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / f"{STATE_FILE}.unfinished"
        torch.save(state, scratch)
        os.replace(scratch, self.folder / STATE_FILE)

    def load_state(self) -> None:
        """Goes on from the state in the folder, if there is one of this recipe, model and seed."""
        file = self.folder / STATE_FILE
        if not file.exists():
            return
        state = torch.load(file, map_location=self.accelerator.device, weights_only=True)
        if state["setting"] == self.setting:
            self.downstream.load_state_dict(state["downstream"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.best, self.history = state["step"], state["best"], state["history"]
