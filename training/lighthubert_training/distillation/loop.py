"""The training loop of distillation: steps, evaluations, checkpoints, and an orderly end when the machine is taken
away."""

import itertools
import random
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lighthubert_training.data.batches import BatchSampler, Unreadable
from lighthubert_training.distillation.arguments import DistillationArguments
from lighthubert_training.distillation.step import evaluate, training_step
from lighthubert_training.distillation.teacher import Teacher
from lighthubert_training.runs.checkpoints import any_process, save_checkpoint
from lighthubert_training.runs.log import RunLog
from lighthubert_training.sampling import draw_subnets, evaluation_subnets, with_widest_feature_encoder
from modeling_lighthubert import LightHubertForPreTraining, SearchSpace, Subnet


def subnet_class(space: SearchSpace | None, subnet: Subnet | None) -> str:
    """Whether a subnet is one of the two ends: `largest`, `smallest` or `random`."""
    ends = {} if space is None else {space.largest: "largest", space.smallest: "smallest"}
    return ends.get(subnet, "random")


def stop_on_sigterm() -> threading.Event:
    """An event that is set when the process is asked to end, as by a scheduler that takes the machine away."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    return stop


@dataclass
class Distiller:
    """A student, its teacher, and all that a step needs.

    Attributes:
        loader: this process's batches, without end, from the step on that training begins with.
        eval_loader: this process's share of the held-out batches, if there are any.
        recipe: all options of the run, kept in its checkpoints.
    """

    arguments: DistillationArguments
    student: LightHubertForPreTraining
    teacher: Teacher
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    accelerator: Accelerator
    loader: DataLoader
    eval_loader: DataLoader | None
    sampling_rate: int
    unreadable: Unreadable
    log: RunLog
    recipe: dict[str, Any]

    def train(self, start: int) -> bool:
        """The steps from `start` to `max_steps`, with a progress bar, evaluations and checkpoints.

        Returns:
            Whether all were made. If not, SIGTERM came, and a checkpoint of the last step is there.
        """
        arguments, stop = self.arguments, stop_on_sigterm()
        self.student.train()
        batches = iter(self.loader)
        bar = tqdm(
            range(start, arguments.max_steps),
            desc="distilling",
            initial=start,
            total=arguments.max_steps,
            disable=not self.accelerator.is_main_process,
            file=sys.stdout,
        )
        for step in bar:
            averages = self.step(step, self.next_batches(batches))
            bar.set_postfix({name: f"{value:.3g}" for name, value in averages.items()}, refresh=False)
            done = step + 1
            evaluated = self.evaluate(done) if self.is_evaluated(done) else None
            stopping = any_process(self.accelerator, stop.is_set())
            if done % arguments.save_steps == 0 or stopping:
                self.save(done, evaluated)
            if stopping and done < arguments.max_steps:
                bar.close()
                self.accelerator.print(f"stopped after step {done}: go on with --resume_from_checkpoint latest")
                return False
        return True

    def next_batches(self, batches) -> list[dict[str, Any]]:
        """The batches that this process accumulates in a step, without those that cannot be read."""
        of_step = [
            send_to_device(batch, self.accelerator.device)
            for batch in itertools.islice(batches, self.arguments.gradient_accumulation_steps)
        ]
        for name, reason in (broken for batch in of_step for broken in batch["unreadable"]):
            self.unreadable.add(name, reason)
        return [batch for batch in of_step if "visits" in batch]

    def step(self, step: int, batches: list[dict[str, Any]]) -> dict[str, float]:
        """One optimiser step.

        Returns:
            What to show: averages since the last entry of the log.

        Raises:
            FloatingPointError: the loss is NaN or infinite; the message names the recordings.
        """
        arguments, accelerator, space = self.arguments, self.accelerator, self.student.search_space
        process = accelerator.process_index if arguments.subnet_per_process else None
        subnets = draw_subnets(space, arguments.sampling, arguments.seed, step, arguments.num_random_subnets, process)
        if step < arguments.progressive_shrinking_ratio * arguments.max_steps:
            subnets = with_widest_feature_encoder(space, subnets)
        # dropout, too, follows from the step
        torch.manual_seed(random.Random(f"{arguments.seed}-{step}-{accelerator.process_index}").getrandbits(63))
        try:
            losses = training_step(
                self.student,
                self.teacher,
                batches,
                subnets,
                accelerator,
                arguments.seed,
                arguments.share_feature_encoder,
            )
        except FloatingPointError as error:
            names = [name for batch in batches for name in batch["names"]]
            raise FloatingPointError(
                f"{error} at step {step}, on {', '.join(names)}. The last checkpoint is as it was: lower the learning"
                " rate, or leave these recordings out"
            ) from error
        grad_norm = accelerator.clip_grad_norm_(self.student.parameters(), arguments.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        values: dict[str, float] = {}
        if losses:
            values = {"loss": sum(losses) / len(losses), "grad_norm": float(grad_norm)}
            classes = [subnet_class(space, subnet) for subnet in subnets]
            for name in dict.fromkeys(classes if space is not None else ()):
                of_class = [loss for loss, other in zip(losses, classes, strict=True) if other == name]
                values[f"loss_{name}"] = sum(of_class) / len(of_class)
        samples = sum(int(batch["attention_mask"].sum()) for batch in batches)
        seconds = accelerator.num_processes * samples / self.sampling_rate
        return self.log.step(step + 1, values, seconds, self.scheduler.get_last_lr()[0])

    def is_evaluated(self, step: int) -> bool:
        """Whether an evaluation is due after so many steps; one is at the end."""
        every, last = self.arguments.eval_steps, step == self.arguments.max_steps
        return self.eval_loader is not None and (last or bool(every and step % every == 0))

    def evaluate(self, step: int) -> float:
        """Measures the loss on held-out speech of every subnet in question, and returns their mean."""
        subnets = evaluation_subnets(self.student.search_space, self.arguments.num_eval_subnets)
        batches = (send_to_device(batch, self.accelerator.device) for batch in self.eval_loader)
        losses = evaluate(
            self.student,
            self.teacher,
            (batch for batch in batches if "visits" in batch),
            subnets,
            self.accelerator,
            self.arguments.share_feature_encoder,
        )
        mean = sum(losses.values()) / len(losses)
        self.log.add(step, {"eval_loss": mean} | {f"eval_loss_{name}": loss for name, loss in losses.items()})
        return mean

    @property
    def eval_losses(self) -> dict[str, float]:
        """Of the last evaluation, by subnet."""
        evaluations = [entry for entry in self.log.history if "eval_loss" in entry]
        names = [name for name in (evaluations[-1] if evaluations else {}) if name.startswith("eval_loss_")]
        return {name.removeprefix("eval_loss_"): evaluations[-1][name] for name in names}

    def save(self, step: int, eval_loss: float | None) -> None:
        """Writes a checkpoint after so many steps."""
        sampler = self.loader.batch_sampler
        assert isinstance(sampler, BatchSampler)
        state = {
            "recipe": self.recipe,
            "eval_loss": eval_loss,
            "log": self.log.state_dict(),
            "sampler": sampler.state_dict(step),
        }
        save_checkpoint(
            self.accelerator, Path(self.arguments.output_dir), step, state, self.arguments.save_total_limit
        )
