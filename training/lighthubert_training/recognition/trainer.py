"""transformers' Trainer for CTC: one loss however a step is dealt out, any subnet of a supernet, error rates, and the
failures that CTC is known for, named while they happen."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import EvalPrediction, PreTrainedModel, ProgressCallback, Trainer, TrainerCallback

from lighthubert_training.distillation.step import sum_gradients
from lighthubert_training.distillation.teacher import answering, has_fixed_feature_encoder, true_frames
from lighthubert_training.error_rates import CharacterErrorRate, WordErrorRate
from lighthubert_training.recognition.data import EpochSampler
from lighthubert_training.runs.checkpoints import seal
from lighthubert_training.sampling import SAMPLING_STRATEGIES, draw_subnets
from modeling_lighthubert import SearchSpace, Subnet


logger = logging.getLogger(__name__)
ONLY_BLANKS = (
    "only blanks were predicted after {step} steps. CTC begins so, and leaves it after some hundred steps; if the loss"
    " stays where it is, try another --learning_rate or a longer --warmup_steps, train the output layer alone at first"
    " (--freeze_encoder_steps), lower --mask_time_prob, or start from weights that were distilled or pre-trained"
)


@dataclass
class CTCArguments:
    """How the model is fine-tuned, besides what Trainer asks for."""

    once_for_all: bool = field(
        default=False,
        metadata={"help": "Fine-tune the supernet itself: every subnet of the result transcribes. Default: cut one."},
    )
    sampling: str = field(
        default="sandwich",
        metadata={
            "help": "Subnets of each step of once_for_all: largest, uniform, uniform_size (sizes as likely as each"
            " other), or sandwich (smallest, random ones, largest).",
            "choices": SAMPLING_STRATEGIES,
        },
    )
    num_random_subnets: int = field(default=4, metadata={"help": "Random subnets of each step of once_for_all."})
    distillation_weight: float = field(
        default=0.0,
        metadata={
            "help": "In-place distillation: weight of the divergence of a subnet's posteriors from the largest's."
        },
    )
    num_eval_subnets: int = field(
        default=0, metadata={"help": "Random subnets to evaluate besides the named ones, always the same."}
    )
    freeze_encoder_steps: int = field(
        default=0, metadata={"help": "First steps in which the output layer alone is trained."}
    )
    per_device_train_batch_seconds: float | None = field(
        default=None, metadata={"help": "No more audio in a batch than this, with its padding, in seconds."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better word error rate."}
    )

    def __post_init__(self) -> None:
        if self.distillation_weight < 0:
            raise ValueError(f"distillation_weight={self.distillation_weight} has to be 0 or more")
        if self.distillation_weight and not self.once_for_all:
            raise ValueError(
                "distillation_weight is for --once_for_all: a model of one size has nothing to learn from"
            )
        if self.sampling != "largest" and self.num_random_subnets < (0 if self.sampling == "sandwich" else 1):
            raise ValueError(f"num_random_subnets={self.num_random_subnets} leaves nothing to train")


class CTCTrainer(Trainer):
    """A Trainer of CTC models: of one size, or, with `eval_subnets`, of a supernet once for all.

    The loss of a step is the mean over all characters of its recordings, over accumulated batches and processes. As in
    `distillation_step`, processes add their gradients up by hand once a step: subnets leave weights out, which
    DistributedDataParallel does not take well.

    Args:
        ctc: how it is fine-tuned.
        eval_subnets: subnets that an evaluation measures, by name; `None` trains the model as one.
        options: of Trainer. The configuration of the model has `ctc_loss_reduction="sum"`.
    """

    def __init__(self, ctc: CTCArguments, eval_subnets: Mapping[str, Subnet] | None = None, **options: Any):
        super().__init__(compute_metrics=self.error_rates, **options)
        self.ctc, self.eval_subnets = ctc, eval_subnets
        self.model_accepts_loss_kwargs = True  # Trainer counts the labels of a step; compute_loss divides by them
        self.args.logging_nan_inf_filter = False  # it hides what training_step stops at
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)  # see above
        self.num_passes, self.posteriors = 1, None
        self.references: Sequence[str] = ()
        self.hypotheses: dict[str, list[str]] = {}
        self.evaluated = "model"
        self.audio_seconds, self.since = 0.0, time.perf_counter()
        self.add_callback(FreezeEncoder(ctc.freeze_encoder_steps))
        self.remove_callback(ProgressCallback)
        if not self.args.disable_tqdm:
            self.add_callback(ProgressWithValues)

    @property
    def search_space(self) -> SearchSpace | None:
        """Of a supernet that is trained once for all."""
        return None if self.eval_subnets is None else self.model.search_space

    def get_train_dataloader(self) -> DataLoader:
        """This process's batches of an epoch: of recordings of similar length, dealt as in distillation."""
        if isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        args = self.args
        first = args.process_index * args.gradient_accumulation_steps
        sampler = EpochSampler(
            self.train_dataset.seconds,
            batch_size=args.train_batch_size,
            max_batch_seconds=self.ctc.per_device_train_batch_seconds,
            crop_seconds=math.inf,
            seed=args.seed if args.data_seed is None else args.data_seed,
            shares=range(first, first + args.gradient_accumulation_steps),
            num_shares=args.world_size * args.gradient_accumulation_steps,
        )
        self.add_callback(SetEpoch(sampler))
        return DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def subnets_of_step(self) -> list[Subnet | None]:
        """What the step trains. It follows from seed and step, so accumulated batches and resumed runs agree."""
        ctc, step = self.ctc, self.state.global_step
        return draw_subnets(self.search_space, ctc.sampling, self.args.seed, step, ctc.num_random_subnets)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Gradients of the mean loss over the subnets of the step, on one batch.

        Raises:
            FloatingPointError: the loss is NaN or infinite.
        """
        inputs = self._prepare_inputs(inputs)
        names, subnets = inputs.pop("names"), self.subnets_of_step()
        self.audio_seconds += int(inputs["attention_mask"].sum()) * self.args.world_size / self.sampling_rate
        self.num_passes, loss = len(subnets), torch.zeros((), device=self.args.device)
        with self.shared_feature_encoder(inputs["input_values"]):
            self.posteriors = self.posteriors_of_the_largest(inputs) if self.ctc.distillation_weight else None
            for subnet in subnets:
                if subnet is not None:
                    self.model.set_subnet(subnet)
                loss += super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {float(loss)} at step {self.state.global_step}, on {', '.join(names)}. The last"
                " checkpoint is as it was: lower --learning_rate, or use bf16 in place of fp16"
            )
        if self.accelerator.sync_gradients:
            sum_gradients(self.model.parameters(), self.accelerator)
        return loss * self.args.world_size  # Trainer logs the mean over processes

    def shared_feature_encoder(self, input_values: torch.Tensor) -> AbstractContextManager[None]:
        """Inside the block, a frozen feature encoder is not computed again for every pass."""
        encoder = self.model.base_model.feature_extractor
        if self.search_space is None or not has_fixed_feature_encoder(self.model):
            return nullcontext()
        with torch.no_grad(), self.accelerator.autocast():
            return answering(encoder, encoder(input_values))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """CTC for each character, and the divergence from the largest subnet's posteriors, for a step's share."""
        outputs = model(**inputs)
        loss = outputs["loss"]
        if model.training and self.posteriors is not None:
            loss = loss + self.ctc.distillation_weight * self.divergence(outputs["logits"], inputs["attention_mask"])
        if model.training:
            loss = loss / (num_items_in_batch * self.num_passes)
        else:
            loss = loss / inputs["labels"].ne(-100).sum()
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def posteriors_of_the_largest(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Log probabilities, (batch_size, num_frames, vocab_size), of all recordings without masks or dropout."""
        self.model.eval()
        with self.model.using_subnet("largest"), self.compute_loss_context_manager(), self.accelerator.autocast():
            logits = self.model(inputs["input_values"], attention_mask=inputs["attention_mask"]).logits
        self.model.train()
        return F.log_softmax(logits.float(), dim=-1)

    def divergence(self, logits: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Kullback-Leibler divergence of a subnet's posteriors from the largest's, a sum over true frames."""
        each = F.kl_div(F.log_softmax(logits.float(), dim=-1), self.posteriors, reduction="none", log_target=True)
        return each.sum(dim=-1)[true_frames(self.model, logits.shape[1], attention_mask)].sum()

    @property
    def sampling_rate(self) -> int:
        return self.processing_class.feature_extractor.sampling_rate

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Predictions are token ids, (batch_size, num_frames), with padding after the last true frame."""
        inputs = {name: value for name, value in inputs.items() if name != "names"}
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if logits is None:
            return loss, logits, labels
        padding = ~true_frames(self.model, logits.shape[1], inputs["attention_mask"].to(logits.device))
        return loss, logits.argmax(dim=-1).masked_fill(padding, self.model.config.pad_token_id), labels

    def error_rates(self, prediction: EvalPrediction) -> dict[str, float]:
        """Word and character error rate of greedy transcripts, against the transcripts of the data."""
        tokenizer, ids = self.processing_class.tokenizer, prediction.predictions
        hypotheses = tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids))
        if not any(hypotheses):
            logger.warning(ONLY_BLANKS.format(step=self.state.global_step))
        self.hypotheses[self.evaluated] = hypotheses
        texts = {"predictions": hypotheses, "references": self.references}
        return WordErrorRate().compute(**texts) | CharacterErrorRate().compute(**texts)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **options: Any):
        self.references = dataloader.dataset.texts
        return super().evaluation_loop(dataloader, *args, **options)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """As Trainer does; of a supernet every subnet in question, and their mean."""
        if self.eval_subnets is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics: dict[str, float] = {}
        for name, subnet in self.eval_subnets.items():
            self.evaluated = name
            with self.model.using_subnet(subnet):
                loader = self.get_eval_dataloader(eval_dataset)
                output = self.evaluation_loop(loader, f"evaluating {name}", metric_key_prefix=name)
            for measure in ("loss", "wer", "cer"):
                value = output.metrics[f"{name}_{measure}"]
                metrics[f"{metric_key_prefix}_{measure}_{name}"] = value
                total = metrics.get(f"{metric_key_prefix}_{measure}", 0.0)
                metrics[f"{metric_key_prefix}_{measure}"] = total + value / len(self.eval_subnets)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["audio_seconds_per_second"] = self.audio_seconds / (time.perf_counter() - self.since)
            self.audio_seconds, self.since = 0.0, time.perf_counter()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer does; a supernet with its largest subnet selected."""
        if self.search_space is not None:
            self.model.set_subnet("largest")
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: PreTrainedModel, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        self.accelerator.wait_for_everyone()
        if self.args.should_save and folder.exists():
            seal(folder)  # what a kill leaves half-written has no manifest


class FreezeEncoder(TrainerCallback):
    """Trains the output layer alone in the first steps, then what would have been trained without it."""

    def __init__(self, num_steps: int):
        self.num_steps, self.frozen = num_steps, []

    def on_step_begin(self, args, state, control, model: PreTrainedModel, **_: Any) -> None:
        freeze = state.global_step < self.num_steps
        if freeze and not self.frozen:
            self.frozen = [parameter for parameter in model.base_model.parameters() if parameter.requires_grad]
        for parameter in self.frozen:
            parameter.requires_grad_(not freeze)
        if not freeze:
            self.frozen = []


class SetEpoch(TrainerCallback):
    """Tells the sampler which epoch begins."""

    def __init__(self, sampler: EpochSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **_: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


class ProgressWithValues(ProgressCallback):
    """Trainer's progress bar, with the newest values on it."""

    def on_log(self, args, state, control, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        if self.training_bar is not None and logs is not None:
            shown = ("loss", "grad_norm", "audio_seconds_per_second", "eval_loss", "eval_wer")
            self.training_bar.set_postfix({name: f"{logs[name]:.3g}" for name in shown if name in logs})
