"""Fine-tunes for speech recognition with CTC, with transformers' Trainer: a subnet cut out of a supernet, a cut model
or stock HuBERT as it is, or a supernet once for all.

    python training/run_speech_recognition_ctc.py --model_name_or_path supernet --subnet a_small \\
        --train_file train.parquet --validation_file test.parquet --output_dir asr --max_steps 1000
    python training/run_speech_recognition_ctc.py --model_name_or_path supernet --once_for_all \\
        --config ctc_small_budget --output_dir asr-supernet

A recipe holds any of the options below; those on the command line have the last word. The result is an ordinary folder
for `pipeline("automatic-speech-recognition")` and `training/transcribe.py`: model, code, tokenizer, feature extractor.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    AutoFeatureExtractor,
    AutoModelForCTC,
    AutoTokenizer,
    PreTrainedModel,
    TrainingArguments,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    set_seed,
)

from lighthubert_training.cards.render import NUM_AVAILABLE, NUM_RECORDINGS
from lighthubert_training.cards.speech_recognition import write_recognition_card
from lighthubert_training.data.collators import CTCCollator
from lighthubert_training.data.sources import DataArguments
from lighthubert_training.recognition.arguments import CTCArguments, ModelArguments, configure, find_start
from lighthubert_training.recognition.data import (
    TestArguments,
    build_speech,
    count_available,
    describe_sources,
    load_parts,
)
from lighthubert_training.recognition.text import TextArguments, build_tokenizer
from lighthubert_training.recognition.trainer import CTCTrainer, begin_with_blanks, shorten_mask_spans
from lighthubert_training.recognition.transcripts import write_evaluation
from lighthubert_training.runs.checkpoints import saving_results
from lighthubert_training.runs.distributed import locked_by_main_process, on_main_process
from lighthubert_training.runs.hub import check_push, push_folder
from lighthubert_training.runs.options import OptionParser, parse_options
from lighthubert_training.runs.plots import plot_losses
from lighthubert_training.sampling import evaluation_subnets
from modeling_lighthubert.errors import UserError, run
from modeling_lighthubert.loading import (
    has_processor,
    is_supernet,
    load_config,
    load_cut_model,
    load_model,
    load_processor,
    named_classes,
)


KINDS = (ModelArguments, CTCArguments, TextArguments, DataArguments, TestArguments, TrainingArguments)
"""All options."""


def is_ctc(config: Any) -> bool:
    """Whether a checkpoint has been fine-tuned with CTC."""
    return any(name.endswith("ForCTC") for name in named_classes(config))


def build_processor(
    arguments: ModelArguments, text: TextArguments, transcripts: list[str] | None, folder: Path
) -> Wav2Vec2Processor:
    """The processor that the result is saved with: feature extractor of the model, and a tokenizer.

    Args:
        transcripts: normalised, of the training data; `None` of a stream, which needs a tokenizer that is given.
    """
    source, tokenizer_source = arguments.model_name_or_path, text.tokenizer_name_or_path
    if tokenizer_source is None and is_ctc(load_config(source)) and not arguments.ignore_mismatched_sizes:
        tokenizer_source = source
    if tokenizer_source is not None:
        tokenizer = load_processor(tokenizer_source, AutoTokenizer)
    elif transcripts is None:
        raise UserError("--streaming: no transcripts are at hand for a vocabulary: give --tokenizer_name_or_path")
    else:
        tokenizer = build_tokenizer(transcripts, folder)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    if has_processor(source, AutoFeatureExtractor):  # cut models may have been saved without one
        extractor = load_processor(source, AutoFeatureExtractor)
    return Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer)


def share_processor(
    training_arguments: TrainingArguments, build: Callable[[], Wav2Vec2Processor], folder: Path
) -> Wav2Vec2Processor:
    """The processor that `build` makes on the process that saves. It is written to `folder`, where others read it."""
    with training_arguments.main_process_first(local=training_arguments.save_on_each_node):
        if not training_arguments.should_save:
            return Wav2Vec2Processor.from_pretrained(folder)
        processor = build()
        processor.save_pretrained(folder)
        return processor


def build_model(arguments: ModelArguments, ctc: CTCArguments, processor: Wav2Vec2Processor) -> PreTrainedModel:
    """The model to fine-tune: a supernet, cut out of one, or as it is; with a new output layer, if it has none yet,
    which begins with blanks.

    Raises:
        UserError: there is no such model or subnet, or the output layer is for other tokens.
    """
    source, num_tokens = arguments.model_name_or_path, len(processor.tokenizer)
    config = load_config(source)
    if is_ctc(config) and config.vocab_size != num_tokens and not arguments.ignore_mismatched_sizes:
        raise UserError(
            f"{source} writes {config.vocab_size} tokens, but the tokenizer has {num_tokens}: leave out"
            " --tokenizer_name_or_path to use its own, or give --ignore_mismatched_sizes for a new output layer"
        )
    if not is_supernet(config) and (arguments.subnet is not None or ctc.once_for_all):
        option = "--once_for_all" if ctc.once_for_all else f"--subnet {arguments.subnet}"
        raise UserError(f"{option}: {source} is no supernet. Leave it out, or give a supernet")
    if ctc.once_for_all and arguments.subnet is not None:
        raise UserError(f"--once_for_all trains every subnet: leave out --subnet {arguments.subnet}")
    load = load_model if ctc.once_for_all else load_cut_model
    model, loaded = load(
        source,
        arguments.subnet,
        head=AutoModelForCTC,
        dtype=torch.float32,
        output_loading_info=True,
        vocab_size=num_tokens,
        pad_token_id=processor.tokenizer.pad_token_id,
        ctc_loss_reduction="sum",  # CTCTrainer divides
        ctc_zero_infinity=True,
        ignore_mismatched_sizes=arguments.ignore_mismatched_sizes,
        **arguments.config_options,
    )
    if any("lm_head.bias" in str(key) for key in (*loaded["missing_keys"], *loaded["mismatched_keys"])):
        begin_with_blanks(model.lm_head, model.config.pad_token_id)
    if ctc.once_for_all:
        model = model.trim()
    if arguments.freeze_feature_encoder:
        model.freeze_feature_encoder()
    return model


def save_results(
    trainer: CTCTrainer, speech: dict[str, Any], count_available: Callable[[str], int]
) -> dict[str, dict[str, float]]:
    """Saves the model, evaluates it on all parts of the data but `train`, and saves metrics, transcripts and a plot of
    the losses.

    Args:
        count_available: recordings that a part has, before any are left out.

    Returns:
        The metrics of each part, with how many recordings they are of, and of how many.
    """
    folder = Path(trainer.args.output_dir)
    trainer.save_model()
    trainer.save_state()
    results = {}
    for part, held_out in speech.items():
        if part == "train":
            continue
        counts = {f"{part}_{NUM_RECORDINGS}": len(held_out), f"{part}_{NUM_AVAILABLE}": count_available(part)}
        results[part] = trainer.evaluate(held_out, metric_key_prefix=part) | counts
        trainer.log_metrics(part, results[part])
        trainer.save_metrics(part, results[part])
        if trainer.is_world_process_zero():
            names = [held_out.name(index) for index in range(len(held_out))]
            write_evaluation(names, held_out.texts, trainer.hypotheses, folder, part)
    if trainer.is_world_process_zero():
        history = [entry for entry in trainer.state.log_history if "train_loss" not in entry]  # the mean of all
        plot_losses(history, folder / "loss.png")
    return results


def fine_tune(
    arguments: ModelArguments,
    ctc: CTCArguments,
    text: TextArguments,
    data_arguments: DataArguments,
    test_arguments: TestArguments,
    training_arguments: TrainingArguments,
) -> None:
    """Trains the model, evaluates it, and saves it with its processor, results and card."""
    folder = Path(str(training_arguments.output_dir))
    start = on_main_process(lambda: find_start(folder, training_arguments.resume_from_checkpoint))
    set_seed(training_arguments.seed)

    column = text.text_column_name
    parts = load_parts(data_arguments, test_arguments, column, training_arguments.do_predict)
    transcripts = None if data_arguments.streaming else list(map(text.normalize, parts["train"][column]))
    build = partial(build_processor, arguments, text, transcripts, folder)
    processor = share_processor(training_arguments, build, folder)
    model = build_model(arguments, ctc, processor)
    speech = build_speech(parts, data_arguments, text, processor, model, training_arguments.seed)
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
    trainer.train(resume_from_checkpoint=None if start is None else str(start))

    with saving_results(folder):
        results = save_results(trainer, speech, partial(count_available, data_arguments, test_arguments))
        if trainer.is_world_process_zero():
            sources = describe_sources(data_arguments, test_arguments)
            write_recognition_card(model, arguments.model_name_or_path, sources, results, folder)


def main() -> None:
    parser = OptionParser(KINDS, description=__doc__)
    _, ctc, _, data_arguments, _, training_arguments = parsed = parse_options(parser, "recognition")
    push_to_hub = training_arguments.push_to_hub
    if push_to_hub:
        check_push(str(training_arguments.output_dir), training_arguments.hub_model_id)
    configure(training_arguments, ctc, data_arguments)
    folder = Path(str(training_arguments.output_dir))
    with locked_by_main_process(folder):
        fine_tune(*parsed)
    is_main = PartialState().is_main_process
    PartialState().destroy_process_group()  # transformers leaves it, and its threads may abort the exit
    if push_to_hub and is_main:
        push_folder(folder, training_arguments.hub_model_id)


if __name__ == "__main__":
    run(main)
