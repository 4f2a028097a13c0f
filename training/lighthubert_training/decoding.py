"""From the logits of a recording to words with times: a decoder, `greedy` or a `BeamSearch`, chooses a token for each
frame, the path, and `words_of` reads the words from it."""

import importlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from transformers import PreTrainedTokenizerBase

from modeling_lighthubert.errors import UserError, optional_module


Decoder = Callable[[np.ndarray], np.ndarray]
"""The path, a token id for each frame, shape (num_frames), of log probabilities or logits (num_frames, vocab_size)."""


class Word(NamedTuple):
    """A word of a transcript.

    Attributes:
        start: seconds, where the first frame of its first letter begins.
        end: seconds, where the last frame of its last letter ends.
        confidence: mean over its letters of the highest probability that the letter has in one of its frames, 0 to 1.
    """

    text: str
    start: float
    end: float
    confidence: float

    def as_json(self) -> dict[str, Any]:
        """Its fields by name, numbers to three decimals."""
        return {name: value if name == "text" else round(value, 3) for name, value in self._asdict().items()}


class Transcript(NamedTuple):
    """What was said in a recording of `duration` seconds."""

    words: list[Word]
    duration: float

    @property
    def text(self) -> str:
        return text_of(self.words)

    def as_json(self) -> dict[str, Any]:
        """Its text, duration and words, numbers to three decimals."""
        words = [word.as_json() for word in self.words]
        return {"text": self.text, "duration": round(self.duration, 3), "words": words}


def text_of(words: Sequence[Word]) -> str:
    return " ".join(word.text for word in words)


@dataclass(frozen=True)
class Alphabet:
    """What the token ids of a CTC model stand for.

    Attributes:
        blank: id of CTC's blank.
        delimiter: id of the token between words; `None` if the vocabulary has none.
        letters: token of each other id that is not special.
    """

    blank: int
    delimiter: int | None
    letters: Mapping[int, str]

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Of a CTC tokenizer, whose padding token is the blank."""
        vocabulary = tokenizer.get_vocab()
        delimiter = vocabulary.get(tokenizer.word_delimiter_token)
        special = {*tokenizer.all_special_ids, tokenizer.pad_token_id, delimiter}
        case = str.lower if getattr(tokenizer, "do_lower_case", False) else str
        letters = {index: case(token) for token, index in vocabulary.items() if index not in special}
        return cls(tokenizer.pad_token_id, delimiter, letters)


def greedy(log_probs: np.ndarray) -> np.ndarray:
    """The path of the likeliest token of each frame."""
    return log_probs.argmax(axis=-1)


def words_of(
    path: np.ndarray, log_probs: np.ndarray, alphabet: Alphabet, seconds_per_frame: float, first_frame: int = 0
) -> list[Word]:
    """The words of a path. Equal tokens in a row are one; blanks and special tokens are silent.

    Args:
        path: token ids, shape (num_frames).
        log_probs: of which it was chosen, shape (num_frames, vocab_size).
        first_frame: of the recording that `path` begins with.
    """
    starts = np.flatnonzero(np.diff(path, prepend=-1)).tolist()
    runs = [(int(path[start]), start, end) for start, end in zip(starts, [*starts[1:], len(path)])]
    words = []
    for _, group in itertools.groupby(runs, key=lambda run: run[0] == alphabet.delimiter):
        letters = [run for run in group if run[0] in alphabet.letters]
        if letters:
            begin, end = ((first_frame + frame) * seconds_per_frame for frame in (letters[0][1], letters[-1][2]))
            peaks = [log_probs[start:stop, token].max() for token, start, stop in letters]
            text = "".join(alphabet.letters[token] for token, *_ in letters)
            words.append(Word(text, begin, end, float(np.exp(peaks).mean())))
    return words


class BeamSearch:
    """A decoder for words of a lexicon that an n-gram language model finds likely.

    Args:
        alphabet: of the model.
        lm_path: KenLM's, or in ARPA format.
        lexicon_path: text file with a word on each line. Default: the unigrams of an ARPA file.
        beam_width: hypotheses kept from frame to frame.
        lm_weight: of the language model's log10 probabilities, next to natural log probabilities of the acoustic one.
        word_score: added for each word: positive for more and shorter words.

    Raises:
        MissingExtraError: flashlight-text is not installed.
        UserError: a file that is not there or not of its kind, no word that the letters of the model can spell, or a
            tokenizer without delimiter of words.
    """

    def __init__(
        self,
        alphabet: Alphabet,
        lm_path: str | Path,
        lexicon_path: str | Path | None = None,
        beam_width: int = 100,
        lm_weight: float = 2.0,
        word_score: float = 0.0,
    ):
        self.flashlight = optional_module("flashlight.lib.text.decoder", "decode", "beam search with a language model")
        self.alphabet, self.beam_width = alphabet, beam_width
        self.lm_weight, self.word_score = lm_weight, word_score
        if alphabet.delimiter is None:
            raise UserError("the tokenizer has no token that separates words (word_delimiter_token): decode greedily")
        for path in (lm_path, lexicon_path):
            if path is not None and not Path(path).is_file():
                raise UserError(f"{path} is no file: give an n-gram model (ARPA or KenLM), a lexicon as list of words")
        words = read_unigrams(lm_path) if lexicon_path is None else read_words(lexicon_path)
        self.decoder = self._build(str(lm_path), self._spell(words, lexicon_path or lm_path))

    def _spell(self, words: Sequence[str], source: str | Path) -> dict[str, list[int]]:
        """Token ids of each word that the letters can spell."""
        ids = {letter: index for index, letter in self.alphabet.letters.items()}
        spellings = {word: [ids[letter] for letter in word] for word in words if set(word) <= ids.keys()}
        if not spellings:
            raise UserError(
                f"the model's letters ({' '.join(sorted(ids))}) spell none of the {len(words)} words of {source}, such"
                f" as {', '.join(words[:3]) or 'none'}: is it another language, or the case of letters?"
            )
        return spellings

    def _build(self, lm_path: str, spellings: dict[str, list[int]]) -> Any:
        kenlm = importlib.import_module("flashlight.lib.text.decoder.kenlm")
        dictionary = importlib.import_module("flashlight.lib.text.dictionary").Dictionary([*spellings, "<unk>"])
        unknown = dictionary.get_index("<unk>")
        dictionary.set_default_index(unknown)
        try:
            language_model = kenlm.KenLM(lm_path, dictionary)
        except RuntimeError as error:
            raise UserError(f"{lm_path} is no n-gram model, ARPA or KenLM: {error}") from error
        flashlight, alphabet = self.flashlight, self.alphabet
        trie = flashlight.Trie(max(alphabet.letters) + 1, alphabet.delimiter)
        beginning = language_model.start(False)
        for word, spelling in spellings.items():
            index = dictionary.get_index(word)
            trie.insert([*spelling, alphabet.delimiter], index, language_model.score(beginning, index)[1])
        trie.smear(flashlight.SmearingMode.MAX)
        options = flashlight.LexiconDecoderOptions(
            beam_size=self.beam_width,
            beam_size_token=len(alphabet.letters) + 2,
            beam_threshold=50.0,  # hypotheses so much below the best are dropped
            lm_weight=self.lm_weight,
            word_score=self.word_score,
            unk_score=-np.inf,
            sil_score=0.0,
            log_add=False,
            criterion_type=flashlight.CriterionType.CTC,
        )
        tokens = (alphabet.delimiter, alphabet.blank, unknown)
        return flashlight.LexiconDecoder(options, trie, language_model, *tokens, [], False)

    def __call__(self, log_probs: np.ndarray) -> np.ndarray:
        """The path (see `Decoder`). Raises `UserError` where there are fewer logits than the tokenizer has letters."""
        num_frames, vocab_size = log_probs.shape
        if vocab_size <= max(self.alphabet.letters):
            raise UserError(f"the model knows {vocab_size} tokens, the tokenizer more: they do not belong together")
        # a word is complete with its delimiter, which the last word of a recording lacks: one more frame of it
        frames = np.full((num_frames + 1, vocab_size), -1e4, dtype=np.float32)
        frames[:-1] = log_probs
        frames[-1, self.alphabet.delimiter] = 0.0
        best = self.decoder.decode(frames.ctypes.data, *frames.shape)[0]
        path = np.array(best.tokens[1 : num_frames + 1], dtype=np.int64)  # the decoder adds a frame before and behind
        complete = np.flatnonzero(np.array(best.words[1:]) >= 0)
        path[complete[-1] + 1 if len(complete) else 0 :] = self.alphabet.blank
        return path


def read_unigrams(lm_path: str | Path) -> list[str]:
    """The words of a language model in ARPA format. Another format raises `UserError`."""
    words, inside = [], False
    with Path(lm_path).open(encoding="utf-8", errors="replace") as lines:
        if next(lines, "").strip() != "\\data\\":
            raise UserError(f"{lm_path} is not in ARPA format, so its words cannot be listed: give a lexicon as well")
        for line in lines:
            if line.startswith("\\"):
                if inside:
                    break
                inside = line.strip() == "\\1-grams:"
            elif inside and line.strip():
                words.append(line.split()[1])
    return [word for word in words if not (word.startswith("<") and word.endswith(">"))]


def read_words(lexicon_path: str | Path) -> list[str]:
    """The first word of each line."""
    lines = Path(lexicon_path).read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))
