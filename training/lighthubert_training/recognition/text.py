"""Transcripts as text: how they are normalised, the vocabulary of their characters, and the labels of CTC."""

import json
import logging
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase, Wav2Vec2CTCTokenizer

from lighthubert_training.runs.options import option
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.files import write_text


logger = logging.getLogger(__name__)


@dataclass
class ReferenceArguments:
    """What the transcripts are."""

    text_column_name: str = option("text", "Column with the transcripts.")
    text_case: str = option("keep", "Case of the letters.", choices=("keep", "lower", "upper"))
    chars_to_ignore: list[str] | None = option(None, "Characters that are taken out of the transcripts.")

    def normalize(self, text: str) -> str:
        """A transcript as the model is trained to write it: composed characters (NFC), the case and the characters
        asked for, and single spaces."""
        text = unicodedata.normalize("NFC", text)
        text = text if self.text_case == "keep" else getattr(text, self.text_case)()
        return " ".join(text.translate(dict.fromkeys(map(ord, "".join(self.chars_to_ignore or ())))).split())


@dataclass
class TextArguments(ReferenceArguments):
    """What the transcripts are, and which characters the model writes."""

    tokenizer_name_or_path: str | None = option(
        None, "Tokenizer, or a model with one. Default: a fine-tuned model's own, or characters of the transcripts."
    )


def build_tokenizer(transcripts: Sequence[str], folder: Path) -> Wav2Vec2CTCTokenizer:
    """A tokenizer whose vocabulary is the characters of `transcripts`; `vocab.json` is written to `folder`.

    Raises:
        UserError: a transcript has the sign that stands for a space, `|`.
    """
    _refuse_special_characters(transcripts, {"|"}, "train")
    characters = sorted(set("".join(transcripts)) - {" "})
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<unk>", "|", *characters])}
    write_text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False) + "\n")
    return Wav2Vec2CTCTokenizer(
        str(folder / "vocab.json"), pad_token="<pad>", unk_token="<unk>", bos_token=None, eos_token=None
    )


def special_characters(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Characters that a transcript cannot have, because they mean something else: a space, or a blank."""
    tokens = [*tokenizer.all_special_tokens, getattr(tokenizer, "word_delimiter_token", None)]
    return {token for token in tokens if token is not None and len(token) == 1} - {" "}


def _refuse_special_characters(transcripts: Sequence[str], special: set[str], part: str) -> None:
    found = [text for text in transcripts if special.intersection(text)]
    if found:
        characters = " ".join(sorted(special.intersection("".join(found))))
        raise UserError(
            f"{len(found)} of {len(transcripts)} {part} transcripts have {characters!r}, which means a space or a"
            f" blank in the vocabulary, such as {found[0]!r:.80}: take it out, with --chars_to_ignore '{characters}'"
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
    """Warns of characters that the model cannot write, and says what may be done about them.

    Raises:
        UserError: most characters are unknown: these transcripts are not what the tokenizer is for; or some mean
            something else (see `special_characters`).
    """
    _refuse_special_characters(transcripts, special_characters(tokenizer), part)
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
        raise UserError(f"{message}. Choose another --tokenizer_name_or_path, or leave it out")
    logger.warning(f"{message}. The model is trained to write {tokenizer.unk_token}; --chars_to_ignore omits them")


def num_frames_needed(labels: Sequence[int]) -> int:
    """Frames that CTC needs for a transcript: one for each label, and a blank between two that are the same."""
    return len(labels) + sum(one == other for one, other in zip(labels, labels[1:]))
