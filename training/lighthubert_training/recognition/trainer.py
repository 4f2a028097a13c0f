"""transformers' Trainer for CTC. Its loss does not depend on how recordings are split into batches, accumulation steps
and processes; it trains one model or a supernet, and reports error rates and the failures that CTC is known for."""

import itertools
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, EvalPrediction, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from lighthubert_training.data.batches import EpochSampler
from lighthubert_training.data.recordings import Unreadable
from lighthubert_training.error_rates import character_error_rate, word_error_rate
from lighthubert_training.models import computed_once, has_fixed_feature_encoder, true_frames
from lighthubert_training.recognition.arguments import CTCArguments
from lighthubert_training.recognition.data import StreamedSpeech, TranscribedSpeech
from lighthubert_training.runs.checkpoints import PREFIX, FailedSaves, write_checkpoint
from lighthubert_training.runs.distributed import require_whole_weights, sum_gradients, sum_over_processes
from lighthubert_training.runs.log import UnreadValues
from lighthubert_training.sampling import draw_subnets
from modeling_lighthubert import Subnet
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.files import whole_files


logger = logging.getLogger(__name__)
BLANK_PROBABILITY = 0.9
"""Of a new output layer at the beginning: a frame is 20 ms, and in most of them no letter is written."""
ONLY_BLANKS = (
    "only blanks were predicted after {step} steps. CTC begins so, and leaves it after some hundred steps; if the loss"
    " stays where it is, try another --learning_rate or a longer --warmup_steps, train the output layer alone at first"
    " (--freeze_encoder_steps), lower --mask_time_prob, or start from weights that were distilled or pre-trained"
)


@torch.no_grad()
def begin_with_blanks(output_layer: torch.nn.Linear, blank: int) -> None:
    """Gives the blank `BLANK_PROBABILITY` in a new output layer, which else spreads it over all tokens.

    CTC learns this first in any case. Until then the gradients of all frames favour the blank and nothing else, which
    spoils what the encoder has learnt; small models do not always recover (benchmarks/README.md).
    """
    num_others = output_layer.out_features - 1
    output_layer.bias.zero_()
    output_layer.bias[blank] = math.log(num_others * BLANK_PROBABILITY / (1 - BLANK_PROBABILITY))


def shorten_mask_spans(model: Any, speech: TranscribedSpeech | StreamedSpeech) -> None:
    """Makes masked spans no longer than the shortest recording: transformers' SpecAugment fails in a batch that is
    shorter than a span. LightHuBERT shortens them itself."""
    if isinstance(speech, TranscribedSpeech) and not hasattr(model, "subnet"):
        num_frames = int(model._get_feat_extract_output_lengths(int(min(speech.seconds) * speech.sampling_rate)))
        model.config.mask_time_length = min(model.config.mask_time_length, num_frames)


class CTCTrainer(Trainer):
    """A Trainer of CTC models: of one size, or, with `eval_subnets`, of a supernet once for all.

    The loss of a step is the mean over all characters of its recordings, over accumulated batches and processes.
    Processes sum their gradients by hand (see `sum_gradients`). Recordings that cannot be read are left out of a
    batch, named and counted; a step in which none can be read changes no weight.

    Args:
        eval_subnets: subnets that an evaluation measures, by name; `None` trains the model as one.
        options: of Trainer. The configuration of the model has `ctc_loss_reduction="sum"`, data sets are
            `TranscribedSpeech` or, to train on, `StreamedSpeech`, and the collator is a `CTCCollator`.

    Attributes:
        hypotheses: of the last evaluation, the transcript of each recording, by the name of the subnet.

    Raises:
        UserError: processes keep parts of the weights.
    """

    model: Any
    processing_class: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(self, ctc: CTCArguments, eval_subnets: Mapping[str, Subnet | None] | None = None, **options: Any):
        super().__init__(compute_metrics=self.error_rates, **options)
        require_whole_weights(self.accelerator)
        self.ctc, self.eval_subnets, self.failed_saves = ctc, eval_subnets, FailedSaves()
        self.search_space = None if eval_subnets is None else self.model.search_space
        self.model_accepts_loss_kwargs = True  # Trainer passes the labels of a step on; compute_loss divides by them
        self.args.logging_nan_inf_filter = False  # it hides what training_step stops at
        # gradients are summed by hand, so the model is not wrapped
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.num_passes, self.is_step_empty, self.unread = 1, False, UnreadValues()
        self.posteriors: torch.Tensor | None = None
        self.references: Sequence[str] = ()
        self.hypotheses: dict[str, list[str]] = {}
        self.evaluated = "model"
        self.audio_seconds, self.since = 0.0, time.perf_counter()
        self.add_callback(FreezeEncoder(ctc.freeze_encoder_steps))
        self.remove_callback(ProgressCallback)
        if not self.args.disable_tqdm:
            self.add_callback(ProgressWithValues)
        if ctc.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(ctc.early_stopping_patience))

    def get_train_dataloader(self) -> DataLoader:
        """This process's batches of an epoch, of recordings of similar length, dealt as in distillation."""
        if isinstance(self.train_dataset, StreamedSpeech):
            return super().get_train_dataloader()
        args = self.args
        first = args.process_index * args.gradient_accumulation_steps
        sampler = EpochSampler(
            self.train_dataset.seconds,
            batch_size=args.train_batch_size,
            max_batch_seconds=self.ctc.per_device_train_batch_seconds,
            crop_seconds=math.inf,
            seed=args.seed if args.data_seed is None else args.data_seed,
            slices=range(first, first + args.gradient_accumulation_steps),
            num_slices=args.world_size * args.gradient_accumulation_steps,
        )
        loader: Any = DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        )
        loader.set_epoch = sampler.set_epoch  # Trainer calls it where an epoch begins
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: Any) -> tuple[list, torch.Tensor]:
        """This process's batches of a step, and the number of characters in those of all processes. Recordings that
        cannot be read are named and counted, by every process alike."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        readable = [batch for batch in batches if "labels" in batch]
        unreadable = [each for batch in batches for each in batch["unreadable"]]
        num_labels = sum(int(batch["labels"].ne(-100).sum()) for batch in readable)
        num_recordings = len(unreadable) + sum(len(batch["names"]) for batch in readable)
        counts = sum_over_processes([num_labels, num_recordings, len(unreadable)])
        num_labels, num_recordings, num_unreadable = counts
        policy = self.train_dataset.unreadable
        if isinstance(self.train_dataset, StreamedSpeech):
            policy.num_recordings += num_recordings
        for name, reason in gather_object(unreadable) if num_unreadable else ():
            policy.add(name, reason)
        self.is_step_empty = num_labels == 0
        return batches, torch.full((), float(num_labels), device=device)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Gradients of the mean loss over the subnets of the step, on one batch; none of a batch of which no recording
        can be read."""
        loss = torch.zeros((), device=self.args.device)
        if "labels" in inputs:
            loss += self.loss_of_batch(model, self._prepare_inputs(inputs), num_items_in_batch)
        if self.is_step_empty:  # the optimiser, and a scaler of gradients, have nothing to do
            self.accelerator.gradient_state._set_sync_gradients(False)
        elif self.accelerator.sync_gradients:
            sum_gradients(self.model.parameters(), self.accelerator)
        return loss * self.args.world_size  # Trainer logs the mean over processes

    def loss_of_batch(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        """Sum of the losses of the step's subnets on a batch, each of which leaves its gradients in the model."""
        names, num_samples = inputs.pop("names"), inputs.pop("num_samples")
        ctc, step = self.ctc, self.state.global_step
        del inputs["unreadable"]
        # what a step trains follows from seed and step, so accumulated batches and resumed runs agree
        subnets = draw_subnets(self.search_space, ctc.sampling, self.args.seed, step, ctc.num_random_subnets)
        sampling_rate = self.processing_class.feature_extractor.sampling_rate
        self.audio_seconds += num_samples * self.args.world_size / sampling_rate
        self.num_passes, loss = len(subnets), torch.zeros((), device=self.args.device)
        with self.shared_feature_encoder(inputs["input_values"]):
            self.posteriors = self.posteriors_of_the_largest(inputs) if ctc.distillation_weight else None
            for subnet in subnets:
                if subnet is not None:
                    self.model.set_subnet(subnet)
                loss += super().training_step(model, inputs, num_items_in_batch)
        self.unread.add(step + 1, {"loss": loss}, names)
        return loss

    def require_finite_losses(self) -> None:
        """Raises a `FloatingPointError` if a loss since the last call is NaN or infinite: where values are logged, and
        before anything is measured or saved."""
        try:
            self.unread.read()
        except FloatingPointError as error:
            advice = "lower --learning_rate, or use bf16 in place of fp16"
            raise FloatingPointError(f"{error}. The last checkpoint is as it was: {advice}") from error

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        return torch.zeros(()) if self.is_step_empty else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        return grad_norm if self.is_step_empty else super()._get_grad_norm(model, grad_norm)

    def shared_feature_encoder(self, input_values: torch.Tensor) -> AbstractContextManager[None]:
        """Inside the block, a frozen feature encoder is not computed again for every pass."""
        encoder = self.model.base_model.feature_extractor
        if self.search_space is None or not has_fixed_feature_encoder(self.model):
            return nullcontext()
        with torch.no_grad(), self.accelerator.autocast():
            return computed_once(encoder, encoder(input_values))

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """CTC loss, and the divergence from the largest subnet's posteriors: in training a sum over the batch, divided
        by the characters and passes of the step, in evaluations a mean over the characters of the batch."""
        outputs = model(**inputs)
        loss = outputs["loss"]
        if model.training and self.posteriors is not None:
            # Kullback-Leibler divergence from the largest's posteriors, a sum over true frames
            log_probs = F.log_softmax(outputs["logits"].float(), dim=-1)
            each = F.kl_div(log_probs, self.posteriors, reduction="none", log_target=True).sum(dim=-1)
            frames = true_frames(self.model, each.shape[1], inputs["attention_mask"])
            divergence = torch.where(frames, each, 0.0).sum()
            loss = loss + self.ctc.distillation_weight * divergence
        in_step = num_items_in_batch * self.num_passes if model.training else inputs["labels"].ne(-100).sum()
        loss = loss / in_step
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def posteriors_of_the_largest(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Log probabilities, (batch_size, num_frames, vocab_size), of all recordings without masks or dropout."""
        self.model.eval()
        try:
            with self.model.using_subnet("largest"), self.compute_loss_context_manager(), self.accelerator.autocast():
                logits = self.model(inputs["input_values"], attention_mask=inputs["attention_mask"]).logits
        finally:
            self.model.train()
        return F.log_softmax(logits.float(), dim=-1)

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> tuple:
        """Predictions are token ids, (batch_size, num_frames), with padding after the last true frame.

        Raises:
            UserError: a recording cannot be read any more. Error rates without it would be of other recordings.
        """
        for name, reason in inputs["unreadable"]:
            raise UserError(f"{name} could be read when the run began, and cannot be any more: {reason}")
        inputs = {name: value for name, value in inputs.items() if name not in ("names", "num_samples", "unreadable")}
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if logits is None:
            return loss, logits, labels
        padding = ~true_frames(self.model, logits.shape[1], inputs["attention_mask"].to(logits.device))
        return loss, logits.argmax(dim=-1).masked_fill(padding, self.model.config.pad_token_id), labels

    def error_rates(self, prediction: EvalPrediction) -> dict[str, float]:
        """Word and character error rate of greedy transcripts, against the transcripts of the data."""
        tokenizer, ids = self.processing_class.tokenizer, np.asarray(prediction.predictions)
        hypotheses = tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids))
        if not any(hypotheses):
            logger.warning(ONLY_BLANKS.format(step=self.state.global_step))
        self.hypotheses[self.evaluated] = hypotheses
        rates = {"wer": word_error_rate, "cer": character_error_rate}
        return {name: rate(self.references, hypotheses) for name, rate in rates.items()}

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """As Trainer does; of a supernet all of `eval_subnets`, and their mean."""
        self.require_finite_losses()
        self.references = (eval_dataset or self.eval_dataset).texts
        if self.eval_subnets is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics: dict[str, float] = {}
        for name, subnet in self.eval_subnets.items():
            self.evaluated = name
            with self.model.using_subnet(subnet):
                loader = self.get_eval_dataloader(eval_dataset)
                measured: Any = self.evaluation_loop(loader, f"evaluating {name}", metric_key_prefix=name).metrics
            for measure in ("loss", "wer", "cer"):
                key, value = f"{metric_key_prefix}_{measure}", measured[f"{name}_{measure}"]
                metrics[f"{key}_{name}"] = value
                metrics[key] = metrics.get(key, 0.0) + value / len(self.eval_subnets)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.require_finite_losses()
            logs["audio_seconds_per_second"] = self.audio_seconds / (time.perf_counter() - self.since)
            self.audio_seconds, self.since = 0.0, time.perf_counter()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer does, but each file is whole or not there; a supernet with its largest subnet selected."""
        self.require_finite_losses()
        if self.search_space is not None:
            self.model.set_subnet("largest")
        folder = output_dir or self._get_output_dir(None)
        with whole_files(folder) if self.args.should_save else nullcontext(folder) as unfinished:
            super().save_model(str(unfinished), _internal_call)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As Trainer does, but a checkpoint is there from the moment that it is whole, and older ones are deleted
        after that. A disk without room for it is outlived: see `FailedSaves`."""
        self.require_finite_losses()
        output_dir = self._get_output_dir(trial)
        folder = Path(output_dir) / f"{PREFIX}{self.state.global_step}"
        best = self.state.best_model_checkpoint
        write = partial(self._write_checkpoint, model, trial, folder)
        if not write_checkpoint(self.accelerator, folder, write, self.failed_saves):
            self.state.best_model_checkpoint = best
        elif self.args.should_save:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(output_dir, limit, best, use_mtime=True)

    def _write_checkpoint(self, model: torch.nn.Module, trial: Any, folder: Path, unfinished: Path) -> None:
        """Writes the checkpoint `folder` to a folder of the same name in another output folder."""
        args, state = self.args, self.state
        output_dir, limit = args.output_dir, args.save_total_limit
        args.output_dir, args.save_total_limit = str(unfinished.parent), None
        states: Any = state.stateful_callbacks
        states[Unreadable.__name__] = self.train_dataset.unreadable.state_dict()
        try:
            super()._save_checkpoint(model, trial)
        finally:
            args.output_dir, args.save_total_limit = output_dir, limit
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(folder)
            if args.should_save:
                state.save_to_json(str(unfinished / TRAINER_STATE_NAME))

    def _load_callback_state(self) -> None:
        """As Trainer does, and early stopping goes on with the evaluations that it has counted, the policy for what
        cannot be read with those recordings."""
        super()._load_callback_state()
        states: Any = self.state.stateful_callbacks
        if unreadable := states.get(Unreadable.__name__):
            self.train_dataset.unreadable.load_state_dict(unreadable)
        if (saved := states.get(EarlyStoppingCallback.__name__)) and (callback := self.early_stopping) is not None:
            vars(callback).update(saved["attributes"])

    @property
    def early_stopping(self) -> EarlyStoppingCallback | None:
        """The callback that ends training early, if it was asked for."""
        found = [each for each in self.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback)]
        return found[0] if found else None

    def _run_epoch(self, *given: Any, **options: Any) -> None:
        """As Trainer does, which makes one step more where all were made before the run was resumed."""
        stopping = self.early_stopping
        stopped = stopping and 0 < stopping.early_stopping_patience <= stopping.early_stopping_patience_counter
        if stopped or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*given, **options)


class FreezeEncoder(TrainerCallback):
    """Trains the output layer alone in the first steps, then what would have been trained without it."""

    def __init__(self, num_steps: int):
        self.num_steps = num_steps
        self.frozen: list[torch.nn.Parameter] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        freeze = state.global_step < self.num_steps
        if freeze and not self.frozen:
            self.frozen = [each for each in given["model"].base_model.parameters() if each.requires_grad]
        for parameter in self.frozen:
            parameter.requires_grad_(not freeze)
        if not freeze:
            self.frozen = []


class ProgressWithValues(ProgressCallback):
    """Trainer's progress bar, with the newest values on it."""

    def on_log(self, args, state, control, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        if self.training_bar is not None and logs is not None:
            shown = ("loss", "grad_norm", "audio_seconds_per_second", "eval_loss", "eval_wer")
            self.training_bar.set_postfix({name: f"{logs[name]:.3g}" for name in shown if name in logs})
