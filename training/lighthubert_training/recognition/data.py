"""Transcribed speech for CTC: text and its vocabulary, recordings with labels, and the batches that Trainer sees."""

import json
import logging
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, Wav2Vec2CTCTokenizer, Wav2Vec2Processor

from lighthubert_training.data.batches import RandomAccessSampler, durations, recording_name
from lighthubert_training.data.sources import UNREADABLE, SpeechDataset, load_waveform


logger = logging.getLogger(__name__)


@dataclass
class TextArguments:
    """What the transcripts are, and which characters the model writes."""

    text_column_name: str = field(default="text", metadata={"help": "Column with the transcripts."})
    text_case: str = field(
        default="keep", metadata={"help": "Case of the letters.", "choices": ("keep", "lower", "upper")}
    )
    chars_to_ignore: list[str] | None = field(
        default=None, metadata={"help": "Characters that are taken out of the transcripts."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer, or a model that has one. Default: that of a fine-tuned model, else the characters of"
            " the training transcripts are the vocabulary."
        },
    )

    def normalised(self, text: str) -> str:
        """A transcript as it is learnt: composed characters (NFC), the case and the characters asked for, and single
        spaces."""
        text = unicodedata.normalize("NFC", text)
        text = text if self.text_case == "keep" else getattr(text, self.text_case)()
        return " ".join(text.translate(dict.fromkeys(map(ord, "".join(self.chars_to_ignore or ())))).split())


def build_tokenizer(transcripts: Sequence[str], folder: Path) -> Wav2Vec2CTCTokenizer:
    """A tokenizer whose vocabulary is the characters of `transcripts`; it is written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    characters = sorted(set("".join(transcripts)) - {" "})
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<unk>", "|", *characters])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    return Wav2Vec2CTCTokenizer(
        str(folder / "vocab.json"), pad_token="<pad>", unk_token="<unk>", bos_token=None, eos_token=None
    )


def unknown_characters(transcripts: Sequence[str], tokenizer: Wav2Vec2CTCTokenizer) -> Counter[str]:
    """How often each character occurs that `tokenizer` does not know."""
    counts = Counter("".join(transcripts))
    del counts[" "]
    known = {character: tokenizer.convert_tokens_to_ids(character) != tokenizer.unk_token_id for character in counts}
    return Counter({character: count for character, count in counts.items() if not known[character]})


def report_unknown_characters(
    transcripts: Sequence[str], tokenizer: Wav2Vec2CTCTokenizer, part: str, text_case: str
) -> None:
    """Says which characters the model cannot write, and what may be done about it.

    Raises:
        ValueError: most characters are unknown: these transcripts are not what the tokenizer is for.
    """
    unknown = unknown_characters(transcripts, tokenizer)
    if not unknown:
        return
    total, num_unknown = sum(map(len, transcripts)), sum(unknown.values())
    listed = ", ".join(f"{character!r} ({count})" for character, count in unknown.most_common(20))
    message = f"{num_unknown} of {total} characters of the {part} transcripts are not in the vocabulary: {listed}"
    other_case = Counter(character.swapcase() for character in unknown.elements())
    if not unknown_characters(list(other_case), tokenizer) and text_case == "keep":
        message += ". It has them in the other case: choose --text_case lower or upper"
    if num_unknown > total / 2:
        raise ValueError(f"{message}. Choose another --tokenizer_name_or_path, or leave it out")
    logger.warning(f"{message}. They are learnt as {tokenizer.unk_token}; --chars_to_ignore leaves them out")


def num_frames_needed(labels: Sequence[int]) -> int:
    """Frames that CTC needs for a transcript: one for each label, and a blank between two that are the same."""
    return len(labels) + sum(one == other for one, other in zip(labels, labels[1:]))


class TranscribedSpeech(torch.utils.data.Dataset):
    """Recordings with transcripts: item i is `{"input_values": (num_samples), "labels": token ids, "name"}`.

    Attributes:
        texts: normalised transcripts.
        seconds: of each recording.
    """

    def __init__(self, dataset: Dataset, audio_column_name: str, texts: Sequence[str], processor: Wav2Vec2Processor):
        self.speech = SpeechDataset(dataset, audio_column_name, processor.feature_extractor.sampling_rate)
        self.texts, self.seconds = list(texts), durations(self.speech)
        self.labels = processor.tokenizer(self.texts).input_ids if self.texts else []

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.name(index)
        try:
            waveform = self.speech[index]
        except UNREADABLE as error:
            raise ValueError(f"{name} cannot be read: {error}. Mend it, or leave it out of the data") from error
        return {"input_values": waveform, "labels": self.labels[index], "name": name}

    def name(self, index: int) -> str:
        """What a message calls a recording."""
        return recording_name(self.speech.encoded(index), index)

    def select(self, indices: Sequence[int]) -> None:
        """Keeps these recordings alone, in this order."""
        self.speech.audio = self.speech.audio.select(indices)
        for name in ("texts", "seconds", "labels"):
            setattr(self, name, [getattr(self, name)[index] for index in indices])


def leave_out_useless(speech: TranscribedSpeech, model: PreTrainedModel, part: str) -> None:
    """Leaves out, and names, what nothing can be learnt from: unreadable or empty recordings, recordings shorter than
    a frame, empty transcripts, and in training transcripts that are longer than their recording has frames (CTC gives
    them an infinite loss).

    Raises:
        ValueError: nothing is left.
    """
    rate = speech.speech.sampling_rate
    reasons: dict[str, list[int]] = {}
    for index, (text, labels, seconds) in enumerate(zip(speech.texts, speech.labels, speech.seconds, strict=True)):
        num_frames = int(model._get_feat_extract_output_lengths(round(seconds * rate)))
        if seconds == 0:
            reasons.setdefault("no audio that can be read", []).append(index)
        elif num_frames < 1:
            reasons.setdefault("shorter than one frame", []).append(index)
        elif not text:
            reasons.setdefault("no transcript", []).append(index)
        elif part == "train" and num_frames_needed(labels) > num_frames:
            reasons.setdefault("a transcript longer than the recording has frames, one for 20 ms", []).append(index)
    for reason, indices in reasons.items():
        names = ", ".join(map(speech.name, indices[:5]))
        more = f" and {len(indices) - 5} more" if len(indices) > 5 else ""
        logger.warning(f"left out of {part}: {len(indices)} of {len(speech)} recordings, {reason}: {names}{more}")
    useless = {index for indices in reasons.values() for index in indices}
    if len(useless) == len(speech):
        counts = "; ".join(f"{len(indices)}: {reason}" for reason, indices in reasons.items())
        raise ValueError(f"no recording of {part} is of use. {counts}")
    if useless:
        speech.select([index for index in range(len(speech)) if index not in useless])


class StreamedSpeech(torch.utils.data.IterableDataset):
    """Transcribed recordings of a stream, in its order; what nothing can be learnt from is passed over and named."""

    def __init__(
        self,
        stream: IterableDataset,
        columns: tuple[str, str],
        text: TextArguments,
        processor: Wav2Vec2Processor,
        num_frames: Callable[[int], Any],
    ):
        self.stream, self.columns, self.text, self.num_frames = stream, columns, text, num_frames
        self.tokenizer, self.rate = processor.tokenizer, processor.feature_extractor.sampling_rate

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        audio_column, text_column = self.columns
        for index, row in enumerate(self.stream):
            name = recording_name(row[audio_column], index)
            try:
                waveform = load_waveform(row[audio_column], self.rate)
            except UNREADABLE as error:
                logger.warning(f"passed over: {name} ({error})")
                continue
            labels = self.tokenizer(self.text.normalised(row[text_column])).input_ids
            if not labels or num_frames_needed(labels) > int(self.num_frames(len(waveform))):
                logger.warning(f"passed over: {name} (no transcript, or one longer than the recording has frames)")
                continue
            yield {"input_values": waveform, "labels": labels, "name": name}
