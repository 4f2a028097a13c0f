"""Claims about transcripts: what a path of tokens says and when, whichever form of the model chose it, and how."""

import json
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import SearchSpace, randomise, stock_settings, tiny_model
from test_pipelines import speech
from transformers import (
    AutoModelForCTC,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
)

from lighthubert_training.decoding import Alphabet, BeamSearch, beam_search, greedy, read_unigrams, text_of, words_of
from lighthubert_training.recognition.recognizer import Recognizer
from modeling_lighthubert import LightHubertForCTC
from modeling_lighthubert.export import to_hubert


TOKENS = ["<pad>", "|", "<unk>", *"abcdefghi"]
EXPORTABLE = SearchSpace((32, 48), (4, 8), (3, 4), (1, 2), head_dim=4)
FORMS = ["supernet", "cut", "stock", "onnx"]

# "ab" and "ac" sound alike; after "b", only "ac" has been seen
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


def save_processor(folder, **extractor):
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), bos_token=None, eos_token=None)
    extractor = Wav2Vec2FeatureExtractor(**({"do_normalize": True, "return_attention_mask": True} | extractor))
    Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer).save_pretrained(folder)
    return Wav2Vec2Processor.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return save_processor(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def arpa(tmp_path_factory):
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


def export_to_onnx(model, folder):
    """`model.onnx` for any number of recordings of any length."""

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_values, attention_mask):
            return self.model(input_values, attention_mask=attention_mask).logits

    inputs = (torch.randn(2, 8000), torch.ones(2, 8000, dtype=torch.long))
    names = {"input_names": ["input_values", "attention_mask"], "output_names": ["logits"]}
    axes = {name: {0: "batch", 1: "time"} for name in ("input_values", "attention_mask", "logits")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older exporter takes a second where the newer takes ten
        torch.onnx.export(
            Logits().eval(), inputs, str(folder / "model.onnx"), **names, dynamic_axes=axes, dynamo=False
        )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model in all forms, which gives stretches of different noise different letters."""
    root = tmp_path_factory.mktemp("recognizers")
    model = tiny_model(LightHubertForCTC, EXPORTABLE, feat_extract_norm="layer", pad_token_id=0)
    model.set_subnet(EXPORTABLE.sample(4))
    forms = {"supernet": model, "cut": model.extract_subnet(), "stock": to_hubert(model)}
    for form, each in forms.items():
        each.save_pretrained(root / form)
        save_processor(root / form)
    return root


def load(folders, form: str, **options) -> Recognizer:
    folder = folders / form
    if form != "onnx":
        return Recognizer.from_pretrained(folder, **options)
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    if not folder.exists():
        save_processor(folder)
        cut = AutoModelForCTC.from_pretrained(folders / "cut")
        cut.config.save_pretrained(folder)
        export_to_onnx(cut.eval(), folder)
    return Recognizer.from_pretrained(folder / "model.onnx", **options)


# Paths


def test_repeated_tokens_are_one_letter_and_blanks_separate_equal_ones(processor):
    log_probs = logits_of("_aa_a|b__b||_c")
    words = words_of(greedy(log_probs), log_probs, Alphabet(processor.tokenizer), 0.02)
    assert text_of(words) == "aa bb c"


def test_words_say_what_the_tokenizer_decodes(processor):
    rng, alphabet = np.random.default_rng(0), Alphabet(processor.tokenizer)
    for _ in range(50):
        path = rng.choice(len(TOKENS), size=40, p=[0.2, 0.2, 0.0] + [0.6 / 9] * 9)
        words = words_of(path, np.zeros((40, len(TOKENS)), dtype=np.float32), alphabet, 0.02)
        assert text_of(words) == " ".join(processor.tokenizer.decode(path).split())


def test_a_word_lasts_from_its_first_to_its_last_frame(processor):
    log_probs = logits_of("__a_bb_|___c_")
    first, second = words_of(greedy(log_probs), log_probs, Alphabet(processor.tokenizer), 0.02)
    assert (first.start, first.end) == pytest.approx((0.04, 0.12))
    assert (second.start, second.end) == pytest.approx((0.22, 0.24))


def test_confidence_is_the_mean_of_the_peaks_of_letters(processor):
    log_probs = logits_of("_aab__|b", a=0.8, b=0.6)
    log_probs[2] = logits_of("a", 0.5)
    first, second = words_of(greedy(log_probs), log_probs, Alphabet(processor.tokenizer), 0.02)
    assert first.confidence == pytest.approx((0.8 + 0.6) / 2)
    assert second.confidence == pytest.approx(0.6)


@pytest.mark.parametrize("path", ["", "___", "_|_|", "|"])
def test_silence_has_no_words(processor, path):
    log_probs = logits_of(path)
    assert words_of(greedy(log_probs), log_probs, Alphabet(processor.tokenizer), 0.02) == []


# Beam search


def ambiguous() -> np.ndarray:
    """ "b ab", in which the last letter is nearly "c"."""
    log_probs = logits_of("_b_|_a_b_")
    log_probs[7] = np.log(0.01)
    log_probs[7, [TOKENS.index("b"), TOKENS.index("c")]] = np.log([0.5, 0.4])
    return log_probs


def test_a_language_model_changes_what_greedy_decoding_hears(processor, arpa):
    pytest.importorskip("flashlight")
    log_probs, alphabet = ambiguous(), Alphabet(processor.tokenizer)
    assert text_of(words_of(greedy(log_probs), log_probs, alphabet, 0.02)) == "b ab"
    assert beam_search(log_probs, processor, arpa) == "b ac"
    assert beam_search(log_probs, processor, arpa, lm_weight=0.0) == "b ab"
    assert beam_search(log_probs + 3, processor, arpa) == "b ac"  # logits are as good


def test_beam_search_gives_times_and_the_probability_of_what_it_chose(processor, arpa):
    pytest.importorskip("flashlight")
    log_probs, alphabet = ambiguous(), Alphabet(processor.tokenizer)
    first, second = words_of(BeamSearch(processor.tokenizer, arpa)(log_probs), log_probs, alphabet, 0.02)
    assert (first.text, second.text) == ("b", "ac")
    assert (first.start, first.end) == pytest.approx((0.02, 0.04))
    assert (second.start, second.end) == pytest.approx((0.10, 0.16))
    assert second.confidence == pytest.approx((0.9 + 0.4) / 2, rel=1e-5)


def test_a_lexicon_says_which_words_there_are(processor, arpa, tmp_path):
    pytest.importorskip("flashlight")
    (tmp_path / "words.txt").write_text("b\nab\n\nqqq\n")
    assert beam_search(ambiguous(), processor, arpa, lm_weight=0.5) == "b ac"
    assert beam_search(ambiguous(), processor, arpa, tmp_path / "words.txt", lm_weight=0.5) == "b ab"
    assert read_unigrams(arpa) == ["ab", "ac", "b"]


def test_a_word_score_makes_more_words(processor, arpa):
    pytest.importorskip("flashlight")
    log_probs = logits_of("a|b", 0.4)
    assert beam_search(log_probs, processor, arpa, word_score=-20.0) == ""
    assert beam_search(log_probs, processor, arpa, word_score=20.0).count(" ") >= 1


@pytest.mark.parametrize("path", ["", "___", "|||", "_i_"])
def test_beam_search_of_silence_or_of_no_word_ends_well(processor, arpa, path):
    pytest.importorskip("flashlight")
    text = beam_search(logits_of(path, 0.999999), processor, arpa)
    assert text in {"", "b"}


def test_a_word_that_the_beam_lost_before_its_end_is_no_word(processor, arpa):
    pytest.importorskip("flashlight")
    assert beam_search(logits_of("_b_|_a_", 0.999999), processor, arpa, beam_width=1) == "b"


def test_words_that_the_letters_cannot_spell_are_refused_with_examples(processor, tmp_path):
    pytest.importorskip("flashlight")
    (tmp_path / "upper.arpa").write_text(ARPA.replace("ab", "AB").replace("ac", "AC").replace("\tb", "\tB"))
    with pytest.raises(ValueError, match="a b c d e f g h i.* spell none of the 3 words .* AB, AC, B"):
        BeamSearch(processor.tokenizer, tmp_path / "upper.arpa")


def test_files_of_another_kind_are_refused(processor, arpa, tmp_path):
    pytest.importorskip("flashlight")
    (tmp_path / "notes.txt").write_text("b\n")
    with pytest.raises(ValueError, match="notes.txt is not in ARPA format"):
        BeamSearch(processor.tokenizer, tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="notes.txt is no n-gram model"):
        BeamSearch(processor.tokenizer, tmp_path / "notes.txt", tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="missing.arpa is no file"):
        BeamSearch(processor.tokenizer, tmp_path / "missing.arpa")


@pytest.mark.parametrize(
    ("module", "extra"), [("flashlight.lib.text.decoder", "decode"), ("onnxruntime", "onnx")], ids=str
)
def test_a_missing_library_is_named_with_its_extra(processor, folders, arpa, monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install '\.\[{extra}\]'"):
        if extra == "decode":
            BeamSearch(processor.tokenizer, arpa)
        else:
            save_processor(folders / "no-runtime")
            AutoModelForCTC.from_pretrained(folders / "stock").config.save_pretrained(folders / "no-runtime")
            Recognizer.from_pretrained(folders / "no-runtime" / "model.onnx")


# Models


RECORDINGS = [speech(seconds, seed=seed) for seed, seconds in enumerate((1.0, 3.1, 2.0, 0.4))]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_model_transcribes_alike_alone_and_in_a_batch(folders, form):
    expected = load(folders, "cut").transcribe(RECORDINGS)
    assert len({transcript.text for transcript in expected}) == len(RECORDINGS)
    recognizer = load(folders, form, batch_size=3)
    together = recognizer.transcribe(RECORDINGS)
    alone = [recognizer.transcribe([recording])[0] for recording in RECORDINGS]
    for ours, single, right in zip(together, alone, expected, strict=True):
        assert ours.text == single.text == right.text
        assert ours.duration == right.duration
        np.testing.assert_allclose([word[1:] for word in ours.words], [word[1:] for word in right.words], atol=1e-4)


def test_frames_are_those_of_transformers_without_padding(folders):
    recognizer = load(folders, "stock")
    model, extractor = AutoModelForCTC.from_pretrained(folders / "stock"), recognizer.processor.feature_extractor
    for ours, recording in zip(recognizer.log_probs(RECORDINGS), RECORDINGS, strict=True):
        with torch.no_grad():
            logits = model(**extractor(recording, sampling_rate=16_000, return_tensors="pt")).logits[0]
        assert len(ours) == model._get_feat_extract_output_lengths(torch.tensor(len(recording)))
        torch.testing.assert_close(torch.from_numpy(ours), logits.log_softmax(-1), rtol=0, atol=1e-4)


def test_a_subnet_can_be_chosen_by_name_and_file(folders, tmp_path):
    model = AutoModelForCTC.from_pretrained(folders / "supernet")
    model.set_subnet("smallest")
    model.subnet.to_json_file(tmp_path / "subnet.json")
    model.extract_subnet().save_pretrained(tmp_path / "cut")
    save_processor(tmp_path / "cut")
    expected = Recognizer.from_pretrained(tmp_path / "cut").transcribe(RECORDINGS)
    assert expected != load(folders, "supernet").transcribe(RECORDINGS)
    for subnet in ("smallest", str(tmp_path / "subnet.json")):
        assert load(folders, "supernet", subnet=subnet).transcribe(RECORDINGS) == expected


def test_a_stock_wav2vec2_is_transcribed_too(tmp_path):
    config = Wav2Vec2Config(**stock_settings(num_hidden_layers=1, feat_extract_norm="layer", pad_token_id=0))
    torch.manual_seed(0)
    model = randomise(Wav2Vec2ForCTC(config)).eval()
    model.save_pretrained(tmp_path)
    processor = save_processor(tmp_path)
    (transcript,) = Recognizer.from_pretrained(tmp_path).transcribe(RECORDINGS[:1])
    inputs = processor(RECORDINGS[0], sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        (expected,) = processor.batch_decode(model(**inputs).logits.argmax(-1))
    assert transcript.text == " ".join(expected.split()) != ""


def test_a_group_norm_does_not_hear_padding(tmp_path):
    model = tiny_model(LightHubertForCTC, None, feat_extract_norm="group", pad_token_id=0)
    model.save_pretrained(tmp_path)
    save_processor(tmp_path, return_attention_mask=False)
    recognizer = Recognizer.from_pretrained(tmp_path)
    recordings = [*RECORDINGS, RECORDINGS[0][::-1].copy()]
    alone = [recognizer.log_probs([recording])[0] for recording in recordings]
    for ours, single in zip(recognizer.log_probs(recordings), alone, strict=True):
        np.testing.assert_allclose(ours, single, atol=1e-4)


@pytest.mark.parametrize("num_samples", [0, 1, 399, 400, 719, 720])
def test_recordings_shorter_than_a_frame_have_no_words(folders, num_samples):
    recognizer, short = load(folders, "cut"), speech(1)[:num_samples]
    log_probs, other = recognizer.log_probs([short, RECORDINGS[0]])
    assert log_probs.shape == (max(0, (num_samples - 80) // 320), len(TOKENS))
    assert len(other) == 49
    if num_samples < 400:
        assert recognizer.transcribe([short])[0].text == ""


# Chunks


class Watched:
    """A model that writes down what it hears."""

    def __init__(self, model):
        self.model, self.shapes = model, []

    def __call__(self, input_values, attention_mask):
        self.shapes.append(input_values.shape)
        return self.model(input_values, attention_mask)


@pytest.fixture(scope="module")
def local_folder(tmp_path_factory):
    """A model whose frames depend on those near by, through convolutions, and on no others."""
    folder = tmp_path_factory.mktemp("local")
    model = tiny_model(LightHubertForCTC, None, feat_extract_norm="layer", pad_token_id=0)
    with torch.no_grad():
        for layer in model.hubert.encoder.layers:
            layer.attention.out_proj.weight.zero_()
    model.save_pretrained(folder)
    save_processor(folder, do_normalize=False)
    return folder


@pytest.mark.parametrize("seconds", [4.0, 4.01, 11.987, 12.0, 14.02])
def test_chunks_of_a_recording_answer_like_the_whole(local_folder, seconds):
    whole = Recognizer.from_pretrained(local_folder)
    chunked = Recognizer.from_pretrained(local_folder, chunk_length_s=4.0, stride_length_s=0.5, batch_size=2)
    chunked.model = Watched(chunked.model)
    recording = speech(seconds) * np.linspace(0.1, 1, int(16_000 * seconds), dtype=np.float32)  # loudness drifts
    (ours,), (expected,) = chunked.log_probs([recording]), whole.log_probs([recording])
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, atol=1e-3)
    assert chunked.transcribe([recording])[0].text == whole.transcribe([recording])[0].text
    assert all(batch <= 2 and samples <= 4 * 16_000 + 320 for batch, samples in chunked.model.shapes)
    assert len(chunked.model.shapes) > 1 or seconds < 4.1


def test_each_chunk_is_normalised_on_its_own(folders):
    recognizer = load(folders, "cut", chunk_length_s=4.0, stride_length_s=0.5, batch_size=1)
    heard, model = [], recognizer.model
    recognizer.model = lambda audio, mask: heard.append(audio[0]) or model(audio, mask)
    recognizer.log_probs([speech(12) + np.linspace(0, 1, 12 * 16_000, dtype=np.float32)])
    assert len(heard) == 4
    assert [chunk.mean() for chunk in heard] == pytest.approx([0] * 4, abs=1e-3)
    assert [chunk.std() for chunk in heard] == pytest.approx([1] * 4, abs=1e-2)


def test_attention_over_chunks_changes_little(folders):
    recording = speech(12)
    (whole,) = load(folders, "cut").log_probs([recording])
    (ours,) = load(folders, "cut", chunk_length_s=6.0, stride_length_s=1.5).log_probs([recording])
    assert (greedy(ours) == greedy(whole)).mean() > 0.9


# Errors


def test_a_model_without_a_head_is_refused(folders, tmp_path):
    AutoModelForCTC.from_pretrained(folders / "stock").hubert.save_pretrained(tmp_path)
    save_processor(tmp_path)
    with pytest.raises(ValueError, match="has no CTC head: fine-tune it"):
        Recognizer.from_pretrained(tmp_path)


def test_a_folder_without_a_processor_is_refused(folders, tmp_path):
    AutoModelForCTC.from_pretrained(folders / "stock").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks a configuration, a tokenizer or a feature extractor"):
        Recognizer.from_pretrained(tmp_path)


def test_a_subnet_of_no_supernet_is_refused(folders):
    with pytest.raises(ValueError, match="subnet smallest: .* is no supernet"):
        load(folders, "cut", subnet="smallest")


def test_chunks_that_are_all_stride_are_refused(folders):
    with pytest.raises(ValueError, match="chunks of 4.0 s are nothing but strides of 2.0 s"):
        load(folders, "cut", chunk_length_s=4.0, stride_length_s=2.0)
