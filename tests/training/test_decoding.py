"""Decoding: which words a path of tokens says and when, and which path beam search chooses."""

import sys

import numpy as np
import pytest
from recognizers import TOKENS, save_processor

from lighthubert_training.decoding import Alphabet, BeamSearch, greedy, read_unigrams, text_of, words_of
from modeling_lighthubert.errors import MissingExtraError, UserError


# "ab" and "ac" are alike; after "b", only "ac" has been seen
ARPA = """\\data\\
ngram 1=6
ngram 2=2

\\1-grams:
-2.0\t<unk>
-99\t<s>\t-0.3
-1.0\t</s>
-0.8\tab\t-0.5
-0.9\tac\t-0.5
-0.9\tb\t-0.5

\\2-grams:
-0.1\tb ac
-2.5\tb ab

\\end\\
"""


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return save_processor(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def alphabet(processor) -> Alphabet:
    return Alphabet.from_tokenizer(processor.tokenizer)


@pytest.fixture(scope="module")
def arpa(tmp_path_factory):
    pytest.importorskip("flashlight")
    path = tmp_path_factory.mktemp("lm") / "lm.arpa"
    path.write_text(ARPA)
    return path


def logits_of(path: str, probability: float = 0.9, **unsure: float) -> np.ndarray:
    """Log probabilities of a path; "_" is blank. `unsure` gives letters other probabilities wherever they are."""
    probs = np.zeros((len(path), len(TOKENS)))
    for frame, token in enumerate(path):
        chosen = unsure.get(token, probability)
        probs[frame] = (1 - chosen) / (len(TOKENS) - 1)
        probs[frame, TOKENS.index("<pad>" if token == "_" else token)] = chosen
    return np.log(probs).astype(np.float32)


def search(log_probs: np.ndarray, alphabet: Alphabet, *files, **options) -> str:
    """The text that beam search finds."""
    decoder = BeamSearch(alphabet, *files, **options)
    return text_of(words_of(decoder(log_probs), log_probs, alphabet, 0.02))


# Paths


def test_repeated_tokens_are_one_letter_and_blanks_separate_equal_ones(alphabet):
    log_probs = logits_of("_aa_a|b__b||_c")
    words = words_of(greedy(log_probs), log_probs, alphabet, 0.02)
    assert text_of(words) == "aa bb c"


def test_words_say_what_the_tokenizer_decodes(processor, alphabet):
    rng = np.random.default_rng(0)
    for _ in range(50):
        path = rng.choice(len(TOKENS), size=40, p=[0.2, 0.2, 0.0] + [0.6 / 9] * 9)
        words = words_of(path, np.zeros((40, len(TOKENS)), dtype=np.float32), alphabet, 0.02)
        assert text_of(words) == " ".join(processor.tokenizer.decode(path).split())


def test_a_word_lasts_from_its_first_to_its_last_frame(alphabet):
    log_probs = logits_of("__a_bb_|___c_")
    first, second = words_of(greedy(log_probs), log_probs, alphabet, 0.02)
    assert (first.start, first.end) == pytest.approx((0.04, 0.12))
    assert (second.start, second.end) == pytest.approx((0.22, 0.24))


def test_confidence_is_the_mean_of_the_peaks_of_letters(alphabet):
    log_probs = logits_of("_aab__|b", a=0.8, b=0.6)
    log_probs[2] = logits_of("a", 0.5)
    first, second = words_of(greedy(log_probs), log_probs, alphabet, 0.02)
    assert first.confidence == pytest.approx((0.8 + 0.6) / 2)
    assert second.confidence == pytest.approx(0.6)


@pytest.mark.parametrize("path", ["", "___", "_|_|", "|"])
def test_silence_has_no_words(alphabet, path):
    log_probs = logits_of(path)
    assert words_of(greedy(log_probs), log_probs, alphabet, 0.02) == []


def test_times_count_from_the_frame_that_a_path_begins_with(alphabet):
    log_probs = logits_of("_a_|_b")
    first, second = words_of(greedy(log_probs), log_probs, alphabet, 0.02, first_frame=100)
    assert (first.start, first.end) == pytest.approx((2.02, 2.04))
    assert (second.start, second.end) == pytest.approx((2.10, 2.12))


def test_without_a_delimiter_all_letters_are_one_word(alphabet):
    log_probs = logits_of("_a_|_b")
    letters = Alphabet(alphabet.blank, None, alphabet.letters)
    assert text_of(words_of(greedy(log_probs), log_probs, letters, 0.02)) == "ab"


# Beam search


def ambiguous() -> np.ndarray:
    """ "b ab", in which the last letter is nearly "c"."""
    log_probs = logits_of("_b_|_a_b_")
    log_probs[7] = np.log(0.01)
    log_probs[7, [TOKENS.index("b"), TOKENS.index("c")]] = np.log([0.5, 0.4])
    return log_probs


def test_a_language_model_changes_what_greedy_decoding_gives(alphabet, arpa):
    log_probs = ambiguous()
    assert text_of(words_of(greedy(log_probs), log_probs, alphabet, 0.02)) == "b ab"
    assert search(log_probs, alphabet, arpa) == "b ac"
    assert search(log_probs, alphabet, arpa, lm_weight=0.0) == "b ab"
    assert search(log_probs + 3, alphabet, arpa) == "b ac"  # logits are as good


def test_beam_search_gives_times_and_the_probability_of_what_it_chose(alphabet, arpa):
    log_probs = ambiguous()
    first, second = words_of(BeamSearch(alphabet, arpa)(log_probs), log_probs, alphabet, 0.02)
    assert (first.text, second.text) == ("b", "ac")
    assert (first.start, first.end) == pytest.approx((0.02, 0.04))
    assert (second.start, second.end) == pytest.approx((0.10, 0.16))
    assert second.confidence == pytest.approx((0.9 + 0.4) / 2, rel=1e-5)


def test_a_lexicon_says_which_words_there_are(alphabet, arpa, tmp_path):
    (tmp_path / "words.txt").write_text("b\nab\n\nqqq\n")
    assert search(ambiguous(), alphabet, arpa, lm_weight=0.5) == "b ac"
    assert search(ambiguous(), alphabet, arpa, tmp_path / "words.txt", lm_weight=0.5) == "b ab"
    assert read_unigrams(arpa) == ["ab", "ac", "b"]


def test_a_word_score_makes_more_words(alphabet, arpa):
    log_probs = logits_of("a|b", 0.4)
    assert search(log_probs, alphabet, arpa, word_score=-20.0) == ""
    assert search(log_probs, alphabet, arpa, word_score=20.0).count(" ") >= 1


@pytest.mark.parametrize("path", ["", "___", "|||", "_i_"])
def test_beam_search_of_silence_or_of_no_word_gives_no_words(alphabet, arpa, path):
    assert search(logits_of(path, 0.999999), alphabet, arpa) == ""


def test_a_word_that_the_beam_lost_before_its_end_is_no_word(alphabet, arpa):
    assert search(logits_of("_b_|_a_", 0.999999), alphabet, arpa, beam_width=1) == "b"


def test_words_that_the_letters_cannot_spell_are_refused_with_examples(alphabet, arpa, tmp_path):
    (tmp_path / "upper.arpa").write_text(ARPA.replace("ab", "AB").replace("ac", "AC").replace("\tb", "\tB"))
    with pytest.raises(UserError, match="a b c d e f g h i.* spell none of the 3 words .* AB, AC, B"):
        BeamSearch(alphabet, tmp_path / "upper.arpa")


def test_files_of_another_kind_are_refused(alphabet, arpa, tmp_path):
    (tmp_path / "notes.txt").write_text("b\n")
    with pytest.raises(UserError, match="notes.txt is not in ARPA format"):
        BeamSearch(alphabet, tmp_path / "notes.txt")
    with pytest.raises(UserError, match="notes.txt is no n-gram model"):
        BeamSearch(alphabet, tmp_path / "notes.txt", tmp_path / "notes.txt")
    with pytest.raises(UserError, match="missing.arpa is no file"):
        BeamSearch(alphabet, tmp_path / "missing.arpa")


def test_a_model_or_tokenizer_that_beam_search_cannot_use_is_refused(alphabet, arpa):
    with pytest.raises(UserError, match="no token that separates words .* decode greedily"):
        BeamSearch(Alphabet(alphabet.blank, None, alphabet.letters), arpa)
    with pytest.raises(UserError, match="the model knows 5 tokens, the tokenizer more"):
        BeamSearch(alphabet, arpa)(ambiguous()[:, :5])


def test_the_extra_of_beam_search_is_named_where_it_is_missing(alphabet, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashlight.lib.text.decoder", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lighthubert-transformers\[decode\]'"):
        BeamSearch(alphabet, "lm.arpa")
