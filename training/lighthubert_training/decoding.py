"""From the logits of a recording to words with times: a decoder, `greedy` or a `BeamSearch`, chooses a token for each
frame, the path, and `words_of` reads the words from it.
"""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase, Wav2Vec2Processor


Decoder = Callable[[np.ndarray], np.ndarray]
"""The path, a token id for each frame, shape (num_frames), of log probabilities or logits (num_frames, vocab_size)."""


class Word(NamedTuple):
    """A word as it was heard.

    Attributes:
        start: seconds, where the first frame of its first letter begins.
        end: seconds, where the last frame of its last letter ends.
        confidence: mean over its letters of the highest probability that the letter has in one of its frames, 0 to 1.
    """

    text: str
    start: float
    end: float
    confidence: float


class Transcript(NamedTuple):
    """What was said in a recording of `duration` seconds."""

    words: list[Word]
    duration: float

    @property
    def text(self) -> str:
        return text_of(self.words)


def text_of(words: Sequence[Word]) -> str:
    return " ".join(word.text for word in words)


class Alphabet:
    """What the token ids of a CTC tokenizer stand for.

    Attributes:
        blank: id of the padding token, which is CTC's blank.
        delimiter: id of the token between words; `None` if the vocabulary has none.
        letters: token of each other id that is not special.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        vocabulary = tokenizer.get_vocab()
        self.blank: int = tokenizer.pad_token_id
        self.delimiter: int | None = vocabulary.get(tokenizer.word_delimiter_token)
        special = {*tokenizer.all_special_ids, self.blank, self.delimiter}
        lower = getattr(tokenizer, "do_lower_case", False)
        self.letters: dict[int, str] = {
            index: token.lower() if lower else token for token, index in vocabulary.items() if index not in special
        }


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
    ends = [*starts[1:], len(path)]
    words, runs = [], []
    for start, end in [*zip(starts, ends), (None, None)]:
        token = alphabet.delimiter if start is None else int(path[start])
        if start is not None and token in alphabet.letters:
            runs.append((start, end, alphabet.letters[token], log_probs[start:end, token].max()))
        elif runs and (start is None or token == alphabet.delimiter):
            text = "".join(letter for *_, letter, _ in runs)
            seconds = ((first_frame + frame) * seconds_per_frame for frame in (runs[0][0], runs[-1][1]))
            words.append(Word(text, *seconds, float(np.exp([peak for *_, peak in runs]).mean())))
            runs = []
    return words


class BeamSearch:
    """A decoder for words of a lexicon that an n-gram language model finds likely.

    Args:
        lm_path: KenLM's, or in ARPA format.
        lexicon_path: text file with a word on each line. Default: the unigrams of an ARPA file.
        beam_width: hypotheses kept from frame to frame.
        lm_weight: of the language model's log10 probabilities, next to natural log probabilities of the acoustic one.
        word_score: added for each word: positive for more and shorter words.

    Raises:
        ImportError: flashlight-text is not installed.
        ValueError: a file that is not there or not of its kind, no word that the letters of the model can spell, or a
            tokenizer without delimiter of words.
    """

    BEAM_THRESHOLD = 50.0
    """Hypotheses so much below the best are dropped."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        lm_path: str | Path,
        lexicon_path: str | Path | None = None,
        beam_width: int = 100,
        lm_weight: float = 2.0,
        word_score: float = 0.0,
    ):
        self.flashlight = optional("flashlight.lib.text.decoder", "decode", "beam search with a language model")
        self.alphabet, self.beam_width = Alphabet(tokenizer), beam_width
        self.lm_weight, self.word_score = lm_weight, word_score
        if self.alphabet.delimiter is None:
            raise ValueError(
                f"beam search is over words, and no token of the tokenizer separates them: it lacks"
                f" {tokenizer.word_delimiter_token!r}. Decode greedily"
            )
        for path in filter(None, (lm_path, lexicon_path)):
            if not Path(path).is_file():
                raise ValueError(
                    f"{path} is no file: give an n-gram model (ARPA or KenLM), a lexicon as a list of words"
                )
        words = read_unigrams(lm_path) if lexicon_path is None else read_words(lexicon_path)
        self.decoder = self._build(str(lm_path), self._spell(words, lexicon_path or lm_path))

    def _spell(self, words: Sequence[str], source: str | Path) -> dict[str, list[int]]:
        """Token ids of each word that the letters can spell."""
        ids = {letter: index for index, letter in self.alphabet.letters.items()}
        spellings = {word: [ids[letter] for letter in word] for word in words if set(word) <= ids.keys()}
        if not spellings:
            raise ValueError(
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
            raise ValueError(f"{lm_path} is no n-gram model, ARPA or KenLM: {error}") from error
        trie = self.flashlight.Trie(max(self.alphabet.letters) + 1, self.alphabet.delimiter)
        beginning = language_model.start(False)
        for word, spelling in spellings.items():
            index = dictionary.get_index(word)
            trie.insert([*spelling, self.alphabet.delimiter], index, language_model.score(beginning, index)[1])
        trie.smear(self.flashlight.SmearingMode.MAX)
        options = self.flashlight.LexiconDecoderOptions(
            beam_size=self.beam_width,
            beam_size_token=len(self.alphabet.letters) + 2,
            beam_threshold=self.BEAM_THRESHOLD,
            lm_weight=self.lm_weight,
            word_score=self.word_score,
            unk_score=-np.inf,
            sil_score=0.0,
            log_add=False,
            criterion_type=self.flashlight.CriterionType.CTC,
        )
        alphabet = self.alphabet
        return self.flashlight.LexiconDecoder(
            options, trie, language_model, alphabet.delimiter, alphabet.blank, unknown, [], False
        )

    def __call__(self, log_probs: np.ndarray) -> np.ndarray:
        """
        Raises:
            ValueError: fewer logits than the tokenizer has letters.
        """
        num_frames, vocab_size = log_probs.shape
        if vocab_size <= max(self.alphabet.letters):
            raise ValueError(f"the model knows {vocab_size} tokens, the tokenizer more: they do not belong together")
        # a word is complete with its delimiter, which the last word of a recording lacks: one more frame of it
        frames = np.full((num_frames + 1, vocab_size), -1e4, dtype=np.float32)
        frames[:-1] = log_probs
        frames[-1, self.alphabet.delimiter] = 0.0
        best = self.decoder.decode(frames.ctypes.data, *frames.shape)[0]
        path = np.array(best.tokens[1 : num_frames + 1], dtype=np.int64)  # the decoder adds a frame before and behind
        complete = np.flatnonzero(np.array(best.words[1:]) >= 0)
        path[complete[-1] + 1 if len(complete) else 0 :] = self.alphabet.blank
        return path


def beam_search(
    logits: np.ndarray,
    processor: Wav2Vec2Processor,
    lm_path: str | Path,
    lexicon_path: str | Path | None = None,
    **options: Any,
) -> str:
    """The text of the logits of one recording, shape (num_frames, vocab_size), such as `pipeline` leaves aside.

    It reads the language model each time: for more than a few recordings, make one `BeamSearch`.

    Args:
        options: of `BeamSearch`.
    """
    log_probs = np.asarray(logits, dtype=np.float32)
    search = BeamSearch(processor.tokenizer, lm_path, lexicon_path, **options)
    return text_of(words_of(search(log_probs), log_probs, search.alphabet, 1.0))


def read_unigrams(lm_path: str | Path) -> list[str]:
    """The words of a language model in ARPA format.

    Raises:
        ValueError: another format.
    """
    words, inside = [], False
    with Path(lm_path).open(encoding="utf-8", errors="replace") as lines:
        if next(lines, "").strip() != "\\data\\":
            raise ValueError(f"{lm_path} is not in ARPA format, so its words cannot be listed: give a lexicon as well")
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


def optional(module: str, extra: str, purpose: str) -> Any:
    """A module that `extra` installs.

    Raises:
        ImportError: it is not installed; the message says for what it is needed, and how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs the extra {extra!r}: pip install '.[{extra}]' ({error})") from error
