"""The training loop of distillation: steps, evaluations, checkpoints, and an orderly end when the machine is taken
away.
"""

import itertools
import random
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lighthubert_training.data.batches import BatchSampler
from lighthubert_training.data.recordings import Unreadable
from lighthubert_training.distillation.arguments import DistillationArguments, check_same_recipe
from lighthubert_training.distillation.step import evaluate, training_step
from lighthubert_training.distillation.teacher import Teacher
from lighthubert_training.runs.checkpoints import find_checkpoint, require_no_run, save_checkpoint
from lighthubert_training.runs.distributed import any_process
from lighthubert_training.runs.log import RunLog
from lighthubert_training.runs.options import save_options
from lighthubert_training.sampling import draw_subnets, evaluation_subnets
from modeling_lighthubert import LightHubertForPreTraining, SearchSpace, Subnet
from modeling_lighthubert.errors import UserError


def subnet_class(space: SearchSpace | None, subnet: Subnet | None) -> str:
    """Whether a subnet is one of the two ends: `largest`, `smallest` or `random`."""
    ends: dict[Subnet | None, str] = {}
    if space is not None:
        ends = {space.largest: "largest", space.smallest: "smallest"}
    return ends.get(subnet, "random")


def mean_by_class(
    space: SearchSpace | None, subnets: Sequence[Subnet | None], losses: Sequence[float]
) -> dict[str, float]:
    """Mean loss of each class of subnet that is among `subnets`; of a student that is one model, none."""
    classes: dict[str, list[float]] = {}
    for subnet, loss in zip(subnets if space is not None else (), losses):
        classes.setdefault(subnet_class(space, subnet), []).append(loss)
    return {name: sum(of_class) / len(of_class) for name, of_class in classes.items()}


@contextmanager
def stop_on_sigterm() -> Iterator[threading.Event]:
    """Inside the block, an event that is set when the process is asked to end, as by a scheduler that takes the
    machine away; the process itself goes on."""
    stop = threading.Event()
    earlier = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, earlier)


def prepare_output(
    arguments: DistillationArguments, recipe: dict[str, Any], accelerator: Accelerator
) -> tuple[Path | None, dict[str, Any]]:
    """Writes the recipe to the output folder, before anything takes long.

    Returns:
        The checkpoint to go on from, if any; and its state, or that of a run that begins.

    Raises:
        UserError: the folder cannot be written, or holds another run, or there is nothing whole to go on from.
    """
    output_dir, resumed = Path(arguments.output_dir), None
    if arguments.resume_from_checkpoint is None:
        require_no_run(output_dir)
    else:
        resumed = find_checkpoint(accelerator, arguments.resume_from_checkpoint, output_dir)
        if resumed is not None:
            check_same_recipe(recipe, resumed[1]["recipe"])
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        try:
            save_options(recipe, arguments.output_dir)
        except OSError as error:
            raise UserError(f"--output_dir {output_dir} cannot be written: {error}") from error
    return resumed or (None, {"step": 0, "log": None, "sampler": None})


def compile_layers(student: LightHubertForPreTraining, teacher: Teacher) -> None:
    """Compiles the encoder layers, each on its own: subnets differ in which they run, and in their sizes.

    Every combination of sizes is compiled when it first comes: 27 of a layer in the small space.
    """
    torch._dynamo.config.recompile_limit = 64
    for layer in [*student.hubert.encoder.layers, *teacher.model.encoder.layers]:
        layer.compile(dynamic=True)


@dataclass
class Distiller:
    """A student, its teacher, and all that a step needs.

    Attributes:
        loader: this process's batches, without end, from the step on that training begins with.
        eval_loader: this process's batches of held-out speech, if there is any.
        sampling_rate: of the audio in batches, in Hz.
        unreadable, eval_unreadable: recordings of either loader that are left out.
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
    eval_unreadable: Unreadable
    log: RunLog
    recipe: dict[str, Any]

    def train(self, start: int) -> bool:
        """The steps from `start` to `max_steps`, with a progress bar, evaluations and checkpoints.

        Returns:
            Whether all were made. If not, SIGTERM came, and a checkpoint of the last step is there.
        """
        arguments = self.arguments
        self.student.train()
        batches = iter(self.loader)
        bar = tqdm(
            range(start, arguments.max_steps),
            desc="distilling",
            initial=start,
            total=arguments.max_steps,
            disable=not self.accelerator.is_main_process,
        )
        with stop_on_sigterm() as stop, bar:
            for step in bar:
                of_step = itertools.islice(batches, arguments.gradient_accumulation_steps)
                averages = self.step(step, list(self.readable(of_step, self.unreadable)))
                bar.set_postfix({name: f"{value:.3g}" for name, value in averages.items()}, refresh=False)
                done = step + 1
                eval_loss = self.evaluate(done) if self.is_evaluated(done) else None
                stopping = any_process(self.accelerator, stop.is_set())
                if done % arguments.save_steps == 0 or stopping:
                    self.save(done, eval_loss)
                if stopping and done < arguments.max_steps:
                    break
            else:
                return True
        self.accelerator.print(f"stopped after step {done}: go on with --resume_from_checkpoint latest")
        return False

    def readable(self, batches: Iterable[dict[str, Any]], unreadable: Unreadable) -> Iterator[dict[str, Any]]:
        """Batches on the device. What cannot be read is added to `unreadable`; a batch of nothing else is left out."""
        for batch in batches:
            for name, reason in batch["unreadable"]:
                unreadable.add(name, reason)
            if "items" in batch:
                yield send_to_device(batch, self.accelerator.device)

    def step(self, step: int, batches: Sequence[dict[str, Any]]) -> dict[str, float]:
        """One optimiser step.

        Returns:
            What the progress bar shows: averages since the last entry of the log.

        Raises:
            FloatingPointError: the loss is NaN or infinite; the message names the recordings.
        """
        arguments, accelerator, space = self.arguments, self.accelerator, self.student.search_space
        process = accelerator.process_index if arguments.subnet_per_process else None
        subnets = draw_subnets(space, arguments.sampling, arguments.seed, step, arguments.num_random_subnets, process)
        # dropout, too, follows from the step
        torch.manual_seed(random.Random(f"{arguments.seed}-{step}-{accelerator.process_index}").getrandbits(63))
        share = arguments.share_feature_encoder
        try:
            losses = training_step(self.student, self.teacher, batches, subnets, accelerator, arguments.seed, share)
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
            values |= {f"loss_{name}": loss for name, loss in mean_by_class(space, subnets, losses).items()}
        samples = sum(int(batch["attention_mask"].sum()) for batch in batches)
        seconds = accelerator.num_processes * samples / self.sampling_rate
        return self.log.step(step + 1, values, seconds, float(self.scheduler.get_last_lr()[0]))

    def is_evaluated(self, step: int) -> bool:
        """Whether an evaluation is due after so many steps; one is at the end."""
        every, last = self.arguments.eval_steps, step == self.arguments.max_steps
        return self.eval_loader is not None and (last or bool(every and step % every == 0))

    def evaluate(self, step: int) -> float:
        """Measures the loss on held-out speech of every subnet of `evaluation_subnets`, and returns their mean."""
        assert self.eval_loader is not None
        losses = evaluate(
            self.student,
            self.teacher,
            self.readable(self.eval_loader, self.eval_unreadable),
            evaluation_subnets(self.student.search_space, self.arguments.num_eval_subnets),
            self.accelerator,
            self.arguments.share_feature_encoder,
        )
        return self.log.add_evaluation(step, losses)

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
