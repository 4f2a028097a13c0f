"""Fine-tunes a model for speech recognition with CTC, with transformers' Trainer.

    python training/run_speech_recognition_ctc.py --model_name_or_path supernet --subnet a_small \\
        --train_file train.parquet --validation_file test.parquet --output_dir asr --max_steps 1000

The result is an ordinary folder for `pipeline("automatic-speech-recognition")`: model, code, tokenizer, feature
extractor.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCTC,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    set_seed,
)

from modeling_lighthubert import Subnet

from speech_data import DataArguments, SpeechDataset, load_speech


@dataclass
class ModelArguments:
    """What is fine-tuned, and how."""

    model_name_or_path: str = field(metadata={"help": "Supernet, cut model or stock HuBERT."})
    subnet: str | None = field(
        default=None,
        metadata={"help": "Subnet to cut out of a supernet: a name or a JSON file. Default: the selected."},
    )
    text_column_name: str = field(default="text", metadata={"help": "Column with the transcripts."})
    freeze_feature_encoder: bool = field(default=True, metadata={"help": "Keep the convolutions as they are."})
    mask_time_prob: float = field(default=0.05, metadata={"help": "Share of frames SpecAugment masks in training."})
    attention_dropout: float = field(default=0.0, metadata={"help": "Dropout of attention weights."})
    hidden_dropout: float = field(default=0.0, metadata={"help": "Dropout in the encoder."})
    final_dropout: float = field(default=0.0, metadata={"help": "Dropout before the classifier."})


def build_processor(transcripts: Sequence[str], folder: Path) -> Wav2Vec2Processor:
    """A processor over the characters of `transcripts`, saved in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    characters = sorted(set("".join(transcripts)) - {" "})
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<unk>", "|", *characters])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    tokenizer = Wav2Vec2CTCTokenizer(
        str(folder / "vocab.json"), pad_token="<pad>", unk_token="<unk>", bos_token=None, eos_token=None
    )
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    processor = Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer)
    processor.save_pretrained(folder)
    return processor


def build_model(arguments: ModelArguments, processor: Wav2Vec2Processor) -> PreTrainedModel:
    """The model to fine-tune: cut out of a supernet, or as it is, with a fresh output layer for the vocabulary."""
    config = AutoConfig.from_pretrained(arguments.model_name_or_path)
    options = {
        "vocab_size": len(processor.tokenizer),
        "pad_token_id": processor.tokenizer.pad_token_id,
        "ctc_loss_reduction": "mean",
        "ctc_zero_infinity": True,
        "mask_time_prob": arguments.mask_time_prob,
        "attention_dropout": arguments.attention_dropout,
        "hidden_dropout": arguments.hidden_dropout,
        "final_dropout": arguments.final_dropout,
        "layerdrop": 0.0,
    }
    model = AutoModelForCTC.from_pretrained(arguments.model_name_or_path, **options)
    if getattr(config, "search_space", None) is not None:
        subnet = arguments.subnet
        if subnet is not None and subnet.endswith(".json"):
            subnet = Subnet.from_json_file(subnet)
        model = model.extract_subnet(subnet)
    elif arguments.subnet is not None:
        raise ValueError(f"--subnet {arguments.subnet}: {arguments.model_name_or_path} is no supernet to cut one from")
    if arguments.freeze_feature_encoder:
        model.freeze_feature_encoder()
    return model


class TranscribedSpeech(torch.utils.data.Dataset):
    """Recordings with transcripts: item i is `{"input_values": (num_samples), "labels": token ids}`."""

    def __init__(self, dataset: Dataset, audio_column_name: str, text_column_name: str, processor: Wav2Vec2Processor):
        self.speech = SpeechDataset(dataset, audio_column_name, processor.feature_extractor.sampling_rate)
        self.labels = processor.tokenizer(list(dataset[text_column_name])).input_ids

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_values": self.speech[index], "labels": self.labels[index]}


@dataclass
class CTCCollator:
    """Pads waveforms and labels; padded labels are -100, which the loss leaves out."""

    processor: Wav2Vec2Processor

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        extractor = self.processor.feature_extractor
        batch = extractor(
            [item["input_values"] for item in items],
            sampling_rate=extractor.sampling_rate,
            padding=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        labels = [torch.tensor(item["labels"]) for item in items]
        return {**batch, "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)}


class CTCTrainer(Trainer):
    """A Trainer whose predictions are token ids, with padding after the last true frame."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if logits is None:
            return loss, logits, labels
        ids = logits.argmax(dim=-1)
        lengths = self.model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(-1))
        padding = torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None].to(ids.device)
        return loss, ids.masked_fill(padding, self.model.config.pad_token_id), labels


def build_metrics(processor: Wav2Vec2Processor) -> Callable[[EvalPrediction], dict[str, float]]:
    """Word and character error rate of greedy transcripts."""
    tokenizer = processor.tokenizer

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        arrays = (prediction.predictions, prediction.label_ids)
        ids, labels = (np.where(array < 0, tokenizer.pad_token_id, array) for array in arrays)
        hypotheses = tokenizer.batch_decode(ids)
        references = tokenizer.batch_decode(labels, group_tokens=False)
        return {"wer": jiwer.wer(references, hypotheses), "cer": jiwer.cer(references, hypotheses)}

    return metrics


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments), description=__doc__.splitlines()[0])
    arguments, data_arguments, training_arguments = parser.parse_args_into_dataclasses()
    training_arguments.remove_unused_columns = False  # the columns are made when a recording is read
    set_seed(training_arguments.seed)

    if data_arguments.streaming:
        raise ValueError("--streaming: all transcripts have to be at hand, for the vocabulary")
    columns = (data_arguments.audio_column_name, arguments.text_column_name)
    train_data, eval_data = (load_speech(data_arguments, training, columns[1:]) for training in (True, False))
    processor = build_processor(train_data[arguments.text_column_name], Path(training_arguments.output_dir))
    trainer = CTCTrainer(
        model=build_model(arguments, processor),
        args=training_arguments,
        data_collator=CTCCollator(processor),
        train_dataset=TranscribedSpeech(train_data, *columns, processor),
        eval_dataset=None if eval_data is None else TranscribedSpeech(eval_data, *columns, processor),
        processing_class=processor,
        compute_metrics=build_metrics(processor),
    )
    trainer.train()
    trainer.save_model()
    if eval_data is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
