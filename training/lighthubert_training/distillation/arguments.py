"""Options of `run_distillation.py`, besides what is learnt (`ObjectiveArguments`) and from which speech
(`DataArguments`)."""

from dataclasses import dataclass, field

from lighthubert_training.sampling import SAMPLING_STRATEGIES


@dataclass
class DistillationArguments:
    """Teacher, student and recipe. Defaults are the paper's where it gives them."""

    output_dir: str = field(metadata={"help": "Folder for the trained student."})
    teacher_name_or_path: str = field(metadata={"help": "HuBERT-like model to learn from."})
    teacher_dtype: str = field(
        default="auto",
        metadata={
            "help": "Precision the teacher runs in. Default: that of its weights.",
            "choices": ("auto", "float32", "bfloat16", "float16"),
        },
    )
    student_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Where the student starts: a checkpoint (a teacher, or the result of stage 1), or 'random'."
            " Default: the teacher's weights."
        },
    )
    search_space: str | None = field(
        default=None,
        metadata={
            "help": "small, base, or a JSON file with the choices. Default: that of the student, or none: a student"
            " that is one model."
        },
    )
    sampling: str = field(
        default="uniform",
        metadata={
            "help": "Subnets of each step: largest (stage 1), uniform (stage 2), uniform_size (sizes as likely as each"
            " other), or sandwich (smallest, random ones, largest).",
            "choices": SAMPLING_STRATEGIES,
        },
    )
    num_random_subnets: int = field(default=1, metadata={"help": "Random subnets of each step."})
    subnet_per_process: bool = field(
        default=False, metadata={"help": "Each process draws subnets of its own. Default: all train the same."}
    )
    feat_extract_norm: str | None = field(
        default=None,
        metadata={
            "help": "Norm of the student's convolutions: layer (as published: answers do not depend on padding) or"
            " group. Default: as where it starts. What does not carry over starts anew, and is reported.",
            "choices": ("layer", "group"),
        },
    )
    freeze_feature_encoder: bool = field(default=False, metadata={"help": "Keep the convolutions as they start."})
    share_feature_encoder: bool = field(
        default=False,
        metadata={
            "help": "Keep the convolutions, which have to be the teacher's, and compute them once for both. Then the"
            " student takes audio as the teacher does, raw or normalised."
        },
    )
    progressive_shrinking_ratio: float = field(
        default=0.0,
        metadata={
            "help": "Share of the steps, from the first, in which all subnets have the widest feature encoder: width"
            " and depth shrink first, then the ear (progressive shrinking, arXiv 1908.09791)."
        },
    )
    max_steps: int = field(default=1000, metadata={"help": "Optimiser steps."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Recordings in a batch, on each process."})
    per_device_train_batch_seconds: float | None = field(
        default=None, metadata={"help": "No more audio in a batch than this, with its padding, in seconds."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches of each step, on each process."})
    max_unreadable_share: float = field(
        default=0.01,
        metadata={"help": "Recordings that cannot be read are left out; more than this share stop the run."},
    )
    crop_seconds: float = field(
        default=20.0, metadata={"help": "Longer recordings are cropped at random, in seconds."}
    )
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak of the schedule."})
    feature_encoder_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak for the convolutions. Default: learning_rate."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Of AdamW."})
    warmup_ratio: float = field(
        default=0.08, metadata={"help": "Share of the steps that the rate rises; then it falls."}
    )
    lr_scheduler_type: str = field(
        default="linear", metadata={"help": "How the rate falls.", "choices": ("linear", "cosine")}
    )
    max_grad_norm: float = field(default=10.0, metadata={"help": "Gradients are clipped to this norm."})
    dataloader_num_workers: int = field(default=1, metadata={"help": "Processes that decode audio."})
    mixed_precision: str = field(
        default="no", metadata={"help": "Precision of the student's passes.", "choices": ("no", "bf16", "fp16")}
    )
    torch_compile: bool = field(
        default=False, metadata={"help": "Compile the layers of student and teacher. Pays in long runs on a GPU."}
    )
    eval_steps: int | None = field(
        default=None, metadata={"help": "Steps between evaluations on held-out speech. Default: only at the end."}
    )
    num_eval_subnets: int = field(
        default=2, metadata={"help": "Random subnets to evaluate besides the named ones, always the same."}
    )
    logging_steps: int = field(default=10, metadata={"help": "Steps that an entry of the log is an average over."})
    report_to: str = field(
        default="tensorboard", metadata={"help": "Where the log goes too.", "choices": ("tensorboard", "none")}
    )
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int = field(
        default=2, metadata={"help": "Checkpoints that stay: the newest, besides the best that was evaluated."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "'latest', the newest whole checkpoint in output_dir, if any; or a folder."}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the trained student to the Hub."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository to upload to. Default: the name of output_dir."}
    )
    seed: int = field(default=0, metadata={"help": "Of everything random."})
    cpu: bool = field(default=False, metadata={"help": "Train on the CPU even if there is a GPU."})

    def __post_init__(self) -> None:
        at_least_one = ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "save_steps")
        for name in (*at_least_one, "logging_steps", "save_total_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} has to be at least 1")
        if self.eval_steps is not None and self.eval_steps < 1:
            raise ValueError(f"eval_steps={self.eval_steps} has to be at least 1, or left out")
        if not 0.0 <= self.progressive_shrinking_ratio <= 1.0:
            raise ValueError(
                f"progressive_shrinking_ratio={self.progressive_shrinking_ratio} has to be between 0 and 1"
            )
        fixed = self.freeze_feature_encoder or self.share_feature_encoder
        if fixed and self.feature_encoder_learning_rate is not None:
            raise ValueError("feature_encoder_learning_rate: the feature encoder is frozen, nothing there learns")
        if self.crop_seconds <= 0:
            raise ValueError(f"crop_seconds={self.crop_seconds} has to be above 0")


FREE_TO_CHANGE = {
    *("output_dir", "resume_from_checkpoint", "save_steps", "save_total_limit", "dataloader_num_workers", "cpu"),
    *("validation_file", "eval_split_name", "max_eval_samples", "eval_steps", "num_eval_subnets", "logging_steps"),
    *("report_to", "push_to_hub", "hub_model_id", "max_unreadable_share", "preprocessing_num_workers"),
}
"""Options that do not change what a run computes."""
