"""Fine-tunes for speech recognition with CTC, with transformers' Trainer: a subnet cut out of a supernet, a cut model
or stock HuBERT as it is, or a supernet once for all.

    python training/run_speech_recognition_ctc.py --model_name_or_path supernet --subnet a_small \\
        --train_file train.parquet --validation_file test.parquet --output_dir asr --max_steps 1000
    python training/run_speech_recognition_ctc.py --model_name_or_path supernet --once_for_all \\
        --config training/lighthubert_training/configs/recognition/ctc_small_budget.yaml --output_dir asr-supernet

A recipe holds any of the options below; those on the command line have the last word. The result is an ordinary folder
for `pipeline("automatic-speech-recognition")` and `training/transcribe.py`: model, code, tokenizer, feature extractor.
"""

import dataclasses
import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jiwer
import torch
from datasets import IterableDataset
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForCTC,
    AutoTokenizer,
    EarlyStoppingCallback,
    HfArgumentParser,
    PreTrainedModel,
    TrainingArguments,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    set_seed,
)

import lighthubert_training
from lighthubert_training.data.sources import DataArguments, load_speech
from lighthubert_training.recognition.data import (
    CTCCollator,
    StreamedSpeech,
    TextArguments,
    TranscribedSpeech,
    build_tokenizer,
    leave_out_useless,
    report_unknown_characters,
)
from lighthubert_training.recognition.trainer import CTCArguments, CTCTrainer
from lighthubert_training.runs.checkpoints import newest_whole, whole
from lighthubert_training.runs.hub import push_folder
from lighthubert_training.runs.log import plot_losses
from lighthubert_training.runs.options import parse_recipe
from lighthubert_training.sampling import evaluation_subnets
from modeling_lighthubert import Subnet
from modeling_lighthubert.profiling import macs_per_second


logger = logging.getLogger("run_speech_recognition_ctc")
BLANK_SHARE = 0.9
"""What the blank begins with: a frame is 20 ms, and most of them write nothing."""


@dataclass
class ModelArguments:
    """What is fine-tuned."""

    model_name_or_path: str = field(metadata={"help": "Supernet, cut model, stock HuBERT or wav2vec 2.0."})
    subnet: str | None = field(
        default=None,
        metadata={"help": "Subnet to cut out of a supernet: a name or a JSON file. Default: the selected."},
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Begin with a new output layer where that of the model has other tokens."}
    )
    freeze_feature_encoder: bool = field(default=True, metadata={"help": "Keep the convolutions as they are."})
    mask_time_prob: float = field(default=0.05, metadata={"help": "Share of frames SpecAugment masks in training."})
    mask_time_length: int = field(default=10, metadata={"help": "Length of a masked span in frames."})
    mask_feature_prob: float = field(default=0.0, metadata={"help": "Share of features SpecAugment masks."})
    mask_feature_length: int = field(default=10, metadata={"help": "Length of a masked span of features."})
    attention_dropout: float = field(default=0.0, metadata={"help": "Dropout of attention weights."})
    activation_dropout: float = field(default=0.0, metadata={"help": "Dropout inside the feed-forward layers."})
    hidden_dropout: float = field(default=0.0, metadata={"help": "Dropout in the encoder."})
    final_dropout: float = field(default=0.0, metadata={"help": "Dropout before the output layer."})
    layerdrop: float = field(default=0.0, metadata={"help": "Share of layers left out in a training step."})


@dataclass
class TestArguments:
    """What `--do_predict` transcribes after training, beside the evaluation data."""

    test_file: list[str] | None = field(default=None, metadata={"help": "Test data, as --validation_file."})
    test_split_name: list[str] | None = field(default=None, metadata={"help": "Split of each dataset to test on."})


def load_part(
    data_arguments: DataArguments, test_arguments: TestArguments, part: str, text_column_name: str
) -> Any | None:
    """The training, evaluation or test part of the data, encoded; `None` if there is none."""
    if part == "test":
        files, splits = test_arguments.test_file, test_arguments.test_split_name
        if files is None and splits is None:
            return None
        names = {"train_file": None} if files is None else {}
        data_arguments = dataclasses.replace(
            data_arguments, validation_file=files, eval_split_name=splits, max_eval_samples=None, **names
        )
    return load_speech(data_arguments, part == "train", (text_column_name,))


def is_ctc(config: Any) -> bool:
    """Whether a checkpoint has been fine-tuned with CTC."""
    return any(name.endswith("ForCTC") for name in config.architectures or ())


def build_processor(
    arguments: ModelArguments, text: TextArguments, transcripts: list[str] | None, folder: Path
) -> Wav2Vec2Processor:
    """The processor that the result is saved with.

    Args:
        transcripts: normalised, of the training data; `None` of a stream, which has to bring a tokenizer.
    """
    config, tokenizer_source = AutoConfig.from_pretrained(arguments.model_name_or_path), text.tokenizer_name_or_path
    if tokenizer_source is None and is_ctc(config) and not arguments.ignore_mismatched_sizes:
        tokenizer_source = arguments.model_name_or_path
    if tokenizer_source is not None:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_source)
    elif transcripts is None:
        raise ValueError(
            "--streaming: the vocabulary cannot be made of what is not at hand: give --tokenizer_name_or_path"
        )
    else:
        tokenizer = build_tokenizer(transcripts, folder)
    try:
        extractor = AutoFeatureExtractor.from_pretrained(arguments.model_name_or_path)
    except OSError:  # a cut model that was saved without one
        extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    processor = Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer)
    processor.save_pretrained(folder)
    return processor


def build_model(arguments: ModelArguments, ctc: CTCArguments, processor: Wav2Vec2Processor) -> PreTrainedModel:
    """The model to fine-tune: a supernet, cut out of one, or as it is; with a new output layer, if it has none yet,
    which begins with blanks.

    Raises:
        ValueError: there is no such subnet, or the output layer is for other tokens.
    """
    source, num_tokens = arguments.model_name_or_path, len(processor.tokenizer)
    config = AutoConfig.from_pretrained(source)
    is_supernet = getattr(config, "search_space", None) is not None
    if is_ctc(config) and config.vocab_size != num_tokens and not arguments.ignore_mismatched_sizes:
        raise ValueError(
            f"{source} writes {config.vocab_size} tokens, but the tokenizer has {num_tokens}: leave out"
            " --tokenizer_name_or_path to use its own, or give --ignore_mismatched_sizes for a new output layer"
        )
    if not is_supernet and (arguments.subnet is not None or ctc.once_for_all):
        option = "--once_for_all" if ctc.once_for_all else f"--subnet {arguments.subnet}"
        raise ValueError(f"{option}: {source} is no supernet")
    if ctc.once_for_all and arguments.subnet is not None:
        raise ValueError(f"--once_for_all trains every subnet: leave out --subnet {arguments.subnet}")
    named = ("mask_time_prob", "mask_time_length", "mask_feature_prob", "mask_feature_length", "attention_dropout")
    named += ("activation_dropout", "hidden_dropout", "final_dropout", "layerdrop")
    model, loaded = AutoModelForCTC.from_pretrained(
        source,
        output_loading_info=True,
        vocab_size=num_tokens,
        pad_token_id=processor.tokenizer.pad_token_id,
        ctc_loss_reduction="sum",  # CTCTrainer divides
        ctc_zero_infinity=True,
        ignore_mismatched_sizes=arguments.ignore_mismatched_sizes,
        **{name: getattr(arguments, name) for name in named},
    )
    if any("lm_head.bias" in str(key) for key in (*loaded["missing_keys"], *loaded["mismatched_keys"])):
        begin_with_blanks(model.lm_head, model.config.pad_token_id)
    if ctc.once_for_all:
        model = model.trim()
    elif is_supernet:
        subnet = arguments.subnet
        model = model.extract_subnet(Subnet.from_json_file(subnet) if subnet and subnet.endswith(".json") else subnet)
    if arguments.freeze_feature_encoder:
        model.freeze_feature_encoder()
    return model


@torch.no_grad()
def begin_with_blanks(output_layer: torch.nn.Linear, blank: int) -> None:
    """Gives the blank most of the probability that a new output layer spreads over all tokens.

    CTC learns this first in any case, and while it does all gradients say no more than "blank": they spoil what the
    encoder knows, and small models do not always recover (benchmarks/README.md).
    """
    num_others = output_layer.out_features - 1
    output_layer.bias.zero_()
    output_layer.bias[blank] = math.log(num_others * BLANK_SHARE / (1 - BLANK_SHARE))


def write_transcripts(trainer: CTCTrainer, speech: TranscribedSpeech, folder: Path, part: str) -> None:
    """Reference and hypothesis of every recording as JSON lines, and their alignments to be read; of every subnet that
    was evaluated."""
    lines, alignments = [], []
    for subnet, hypotheses in trainer.hypotheses.items():
        for index, (text, hypothesis) in enumerate(zip(speech.texts, hypotheses, strict=True)):
            row = {"name": speech.name(index), "subnet": subnet, "reference": text, "hypothesis": hypothesis}
            lines.append(json.dumps(row | {"wer": jiwer.wer(text, hypothesis)}, ensure_ascii=False))
        words = jiwer.process_words(speech.texts, hypotheses)
        alignments.append(f"== {subnet}\n\n{jiwer.visualize_alignment(words, skip_correct=False)}")
    (folder / f"{part}_transcripts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / f"{part}_alignments.txt").write_text("\n".join(alignments), encoding="utf-8")


def describe(data_arguments: DataArguments, test_arguments: TestArguments) -> dict[str, str]:
    """What the card calls each part of the data: names on the Hub, of files the end."""

    def called(files: list[str] | None, splits: list[str] | None) -> str:
        if files is not None:
            return ", ".join(Path(file).name for file in files)
        return f"{', '.join(data_arguments.dataset_name or [])} ({', '.join(splits or [])})"

    return {
        "train": called(data_arguments.train_file, data_arguments.train_split_name),
        "eval": called(data_arguments.validation_file, data_arguments.eval_split_name),
        "test": called(test_arguments.test_file, test_arguments.test_split_name),
    }


def configure(training_arguments: TrainingArguments, ctc: CTCArguments, data_arguments: DataArguments) -> None:
    """Sets what follows from other options."""
    training_arguments.remove_unused_columns = False  # the columns are made when a recording is read
    training_arguments.push_to_hub = False  # once, at the end, and whatever happens to it the run is saved
    if training_arguments.n_gpu > 1:
        raise ValueError(
            f"{training_arguments.n_gpu} GPUs are seen by one process: start one for each, with `accelerate launch` or"
            " `python -m torch.distributed.run --nproc_per_node`, or set CUDA_VISIBLE_DEVICES"
        )
    if data_arguments.streaming:
        training_arguments.accelerator_config.dispatch_batches = False  # names cannot be sent from process to process
        if ctc.per_device_train_batch_seconds is not None:
            raise ValueError(
                "--per_device_train_batch_seconds: the lengths of a stream are not known before it is read"
            )
    if ctc.early_stopping_patience is not None:
        if training_arguments.eval_strategy == "no":
            raise ValueError(
                "--early_stopping_patience needs evaluations: give --eval_strategy steps and --eval_steps"
            )
        training_arguments.save_strategy = training_arguments.eval_strategy
        training_arguments.save_steps = training_arguments.eval_steps
        training_arguments.load_best_model_at_end = True
        training_arguments.metric_for_best_model = training_arguments.metric_for_best_model or "wer"
        training_arguments.greater_is_better = training_arguments.greater_is_better or False


def checkpoint_to_resume(training_arguments: TrainingArguments) -> str | None:
    """The newest checkpoint without damage for "latest", or the one named, if it is without."""
    which = training_arguments.resume_from_checkpoint
    if which is None:
        return None
    found = newest_whole(Path(training_arguments.output_dir)) if which in ("latest", "True") else whole(Path(which))
    return None if found is None else str(found)


def build_speech(
    data: dict[str, Any],
    columns: tuple[str, str],
    text: TextArguments,
    processor: Wav2Vec2Processor,
    model: PreTrainedModel,
    seed: int,
) -> dict[str, TranscribedSpeech | StreamedSpeech]:
    """Every part of the data with its labels, without what is of no use."""
    speech: dict[str, TranscribedSpeech | StreamedSpeech] = {}
    for part, dataset in data.items():
        if isinstance(dataset, IterableDataset):
            shuffled = dataset.shuffle(seed=seed, buffer_size=1000)
            frames = model._get_feat_extract_output_lengths
            speech[part] = StreamedSpeech(shuffled, columns, text, processor, frames)
            continue
        texts = [text.normalised(transcript) for transcript in dataset[columns[1]]]
        report_unknown_characters(texts, processor.tokenizer, part, text.text_case)
        speech[part] = TranscribedSpeech(dataset, columns[0], texts, processor)
        leave_out_useless(speech[part], model, part)
    return speech


def shorten_mask_spans(model: PreTrainedModel, speech: TranscribedSpeech | StreamedSpeech) -> None:
    """transformers' SpecAugment fails in a batch shorter than a masked span; that of LightHuBERT shortens the span."""
    if isinstance(speech, TranscribedSpeech) and not hasattr(model, "subnet"):
        shortest = int(min(speech.seconds) * speech.speech.sampling_rate)
        num_frames = int(model._get_feat_extract_output_lengths(shortest))
        model.config.mask_time_length = min(model.config.mask_time_length, num_frames)


def main() -> None:
    kinds = (ModelArguments, CTCArguments, TextArguments, DataArguments, TestArguments, TrainingArguments)
    parser = HfArgumentParser(kinds, description=__doc__.splitlines()[0])
    arguments, ctc, text, data_arguments, test_arguments, training_arguments = parse_recipe(parser)
    push_to_hub = training_arguments.push_to_hub
    configure(training_arguments, ctc, data_arguments)
    set_seed(training_arguments.seed)
    folder = Path(training_arguments.output_dir)
    columns = (data_arguments.audio_column_name, text.text_column_name)
    parts = ("train", "eval", "test") if training_arguments.do_predict else ("train", "eval")
    data = {part: load_part(data_arguments, test_arguments, part, columns[1]) for part in parts}
    data = {part: dataset for part, dataset in data.items() if dataset is not None}
    transcripts = None if data_arguments.streaming else list(map(text.normalised, data["train"][columns[1]]))
    with training_arguments.main_process_first():
        processor = build_processor(arguments, text, transcripts, folder)
    model = build_model(arguments, ctc, processor)
    speech = build_speech(data, columns, text, processor, model, training_arguments.seed)
    shorten_mask_spans(model, speech["train"])
    trainer = CTCTrainer(
        ctc=ctc,
        eval_subnets=evaluation_subnets(model.search_space, ctc.num_eval_subnets) if ctc.once_for_all else None,
        model=model,
        args=training_arguments,
        data_collator=CTCCollator(processor),
        train_dataset=speech["train"],
        eval_dataset=speech.get("eval"),
        processing_class=processor,
    )
    if ctc.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(ctc.early_stopping_patience))
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(training_arguments))
    trainer.save_model()
    trainer.save_state()
    results = {}
    for part in ("eval", "test"):
        if part in speech:
            results[part] = trainer.evaluate(speech[part], metric_key_prefix=part)
            trainer.log_metrics(part, results[part])
            trainer.save_metrics(part, results[part])
            if trainer.is_world_process_zero():
                write_transcripts(trainer, speech[part], folder, part)
    if trainer.is_world_process_zero():
        history = [entry for entry in trainer.state.log_history if "train_loss" not in entry]  # the mean of all
        plot_losses(history, folder / "loss.png")
        write_card(model, arguments.model_name_or_path, describe(data_arguments, test_arguments), results, folder)
        if push_to_hub:
            push_folder(folder, training_arguments.hub_model_id)
    trainer.accelerator.end_training()  # transformers leaves the process group, whose threads may abort the exit


if __name__ == "__main__":
    main()
