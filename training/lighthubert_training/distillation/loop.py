"""The training loop of distillation: steps, evaluations, checkpoints, and an orderly end when it is told to stop."""

import itertools
import random
import signal
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from tqdm.auto import tqdm

from lighthubert_training.distillation.arguments import DistillationArguments, check_same_recipe
from lighthubert_training.distillation.loaders import SpeechLoader
from lighthubert_training.distillation.step import evaluate, training_step
from lighthubert_training.distillation.teacher import Teacher
from lighthubert_training.runs.checkpoints import FailedSaves, find_checkpoint, require_no_run, save_checkpoint
from lighthubert_training.runs.distributed import any_process
from lighthubert_training.runs.log import RunLog
from lighthubert_training.runs.options import save_options
from lighthubert_training.sampling import draw_subnets, evaluation_subnets
from modeling_lighthubert import LightHubertForPreTraining, SearchSpace
from modeling_lighthubert.errors import UserError


@contextmanager
def stop_on_sigterm() -> Iterator[threading.Event]:
    """Inside the block, an event that is set when the process is asked to end; the process itself goes on."""
    stop = threading.Event()
    earlier = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, earlier)


@contextmanager
def advising_on_divergence() -> Iterator[None]:
    """Says what to do after the `FloatingPointError` of a loss that is NaN or infinite."""
    try:
        yield
    except FloatingPointError as error:
        advice = "lower the learning rate, or leave these recordings out"
        raise FloatingPointError(f"{error}. The last checkpoint is as it was: {advice}") from error


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
    elif resumed := find_checkpoint(accelerator, arguments.resume_from_checkpoint, output_dir):
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

    Layers of the same sizes share what is compiled; every combination of sizes is compiled when it first comes.

    Of the teacher, attention and feed-forward layer are compiled, each on its own and without its hooks, by which its
    output is kept: what is compiled for a layer that has no hook is run for one that has (torch does not look).
    """
    for layer in student.hubert.encoder.layers:
        layer.compile(dynamic=True)
    for layer in teacher.model.encoder.layers:
        for part in (layer.attention, layer.feed_forward):
            part.forward = torch.compile(part.forward, dynamic=True)


def compiling(space: SearchSpace | None) -> AbstractContextManager[None]:
    """Inside the block, `compile_layers` may compile each combination of a layer's sizes, 27 in the small space, in
    training and in evaluation. More are an error: torch would go on without compiling, and say nothing."""
    sizes = 1
    if space is not None:
        windows = space.attention_window or (None,)
        sizes = len(space.hidden_size) * len(space.num_attention_heads) * len(space.ffn_ratio) * len(windows)
    limit = 4 * sizes + 16
    limits: dict[str, Any] = {
        "recompile_limit": limit,
        "accumulated_recompile_limit": 4 * limit,
        "fail_on_recompile_limit_hit": True,
    }
    return torch._dynamo.config.patch(**limits)


@dataclass
class Distiller:
    """A student, its teacher, and all that a step needs.

    Attributes:
        loader: batches of training, from the step on that it begins with.
        eval_loader: batches of held-out speech, if there is any.
        recipe: all options of the run, kept in its checkpoints.
        failed_saves: what became of the checkpoints that were to be written.
    """

    arguments: DistillationArguments
    student: LightHubertForPreTraining
    teacher: Teacher
    optimizer: AcceleratedOptimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    accelerator: Accelerator
    loader: SpeechLoader
    eval_loader: SpeechLoader | None
    log: RunLog
    recipe: dict[str, Any]
    failed_saves: FailedSaves = field(default_factory=FailedSaves)

    def train(self, start: int) -> bool:
        """The steps from `start` to `max_steps`, with a progress bar, evaluations and checkpoints.

        Returns:
            Whether all were made. If not, SIGTERM came, and a checkpoint of the last step is there.

        Raises:
            FloatingPointError: a loss is NaN or infinite; the message names the recordings.
        """
        arguments = self.arguments
        self.student.train()
        batches = iter(self.loader)
        steps, is_hidden = range(start, arguments.max_steps), not self.accelerator.is_main_process
        bar = tqdm(steps, desc="distilling", initial=start, total=arguments.max_steps, disable=is_hidden)
        compiled = compiling(self.student.search_space) if arguments.torch_compile else nullcontext()
        with stop_on_sigterm() as stop, bar, compiled, advising_on_divergence():
            if start == 0 and arguments.subnet is not None and self.eval_loader is not None:
                self.evaluate(0)  # what the subnet was worth in its supernet
            for step in bar:
                of_step = itertools.islice(batches, arguments.gradient_accumulation_steps)
                if entry := self.step(step, list(self.loader.readable(of_step))):
                    bar.set_postfix({name: f"{value:.3g}" for name, value in entry.items()}, refresh=False)
                done = step + 1
                eval_loss = self.evaluate(done) if self.is_evaluated(done) else None
                stopping = any_process(stop.is_set())
                if done % arguments.save_steps == 0 or stopping:
                    self.save(done, eval_loss)
                if stopping and done < arguments.max_steps:
                    break
            else:
                self.log.read()
                return True
        self.accelerator.print(f"stopped after step {done}: go on with --resume_from_checkpoint latest")
        return False

    def step(self, step: int, batches: Sequence[dict[str, Any]]) -> dict[str, float]:
        """One optimiser step.

        Returns:
            What the progress bar shows: an entry of the log, if one is due. Raises as `RunLog.step`.
        """
        arguments, accelerator, space = self.arguments, self.accelerator, self.student.search_space
        process = accelerator.process_index if arguments.subnet_per_process else None
        subnets = draw_subnets(space, arguments.sampling, arguments.seed, step, arguments.num_random_subnets, process)
        # dropout, too, follows from the step
        torch.manual_seed(random.Random(f"{arguments.seed}-{step}-{accelerator.process_index}").getrandbits(63))
        share = arguments.share_feature_encoder
        losses = training_step(self.student, self.teacher, batches, subnets, accelerator, share)
        values: dict[str, torch.Tensor] = {}
        if losses is None:  # without gradients a scaler of them would fail, and the optimiser itself does nothing
            self.optimizer.optimizer.step()
        else:
            grad_norm = accelerator.clip_grad_norm_(self.student.parameters(), arguments.max_grad_norm)
            self.optimizer.step()
            values = {"loss": losses.mean(), "grad_norm": torch.as_tensor(grad_norm, device=losses.device)}
            ends = {} if space is None else {space.largest: "largest", space.smallest: "smallest"}
            by_class = defaultdict(list)
            for subnet, loss in zip(subnets, losses, strict=True):
                if subnet is not None:
                    by_class[f"loss_{ends.get(subnet, 'random')}"].append(loss)
            values |= {name: torch.stack(of_class).mean() for name, of_class in by_class.items()}
        self.scheduler.step()
        self.optimizer.zero_grad()
        samples = sum(batch["num_samples"] for batch in batches)
        seconds = accelerator.num_processes * samples / self.loader.sampling_rate
        names = [name for batch in batches for name in batch["names"]]
        return self.log.step(step + 1, values, seconds, float(self.scheduler.get_last_lr()[0]), names)

    def is_evaluated(self, step: int) -> bool:
        """Whether an evaluation is due after so many steps; one is at the end."""
        every, last = self.arguments.eval_steps, step == self.arguments.max_steps
        return self.eval_loader is not None and (last or bool(every and step % every == 0))

    def evaluate(self, step: int) -> float:
        """Measures the loss on held-out speech of every subnet of `evaluation_subnets`, and returns their mean."""
        assert self.eval_loader is not None
        self.log.read()
        batches, share = self.eval_loader.readable(self.eval_loader), self.arguments.share_feature_encoder
        subnets = evaluation_subnets(self.student.search_space, self.arguments.num_eval_subnets)
        losses = evaluate(self.student, self.teacher, batches, subnets, self.accelerator, share)
        return self.log.add_evaluation(step, losses)

    def save(self, step: int, eval_loss: float | None) -> None:
        """Writes a checkpoint after so many steps."""
        state: dict[str, Any] = {"recipe": self.recipe, "eval_loss": eval_loss}
        state |= {"log": self.log.state_dict(), "sampler": self.loader.states(step)}
        state |= {"unreadable": self.loader.unreadable.state_dict()}
        output_dir, limit = Path(self.arguments.output_dir), self.arguments.save_total_limit
        save_checkpoint(self.accelerator, output_dir, step, state, limit, self.failed_saves)
