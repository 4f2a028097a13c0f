"""Recognizers: every form of a model gives the transcripts of the model, alone, in batches, and in chunks."""

import json
import shutil
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import DEVICE, SearchSpace, assert_close, randomise, stock_settings, tiny_model
from recognizers import TOKENS, babble, save_processor
from transformers import AutoModelForCTC, Wav2Vec2Config, Wav2Vec2ForCTC

from lighthubert_training.decoding import greedy
from lighthubert_training.recognition.recognizer import Recognizer
from modeling_lighthubert import LightHubertForCTC
from modeling_lighthubert.errors import MissingExtraError, UserError
from modeling_lighthubert.export import to_hubert


EXPORTABLE = SearchSpace((32, 48), (4, 8), (3, 4), (1, 2), head_dim=4)
FORMS = ["supernet", "cut", "stock", "onnx"]


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
        return Recognizer.from_pretrained(folder, device=str(DEVICE), **options)
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    if not folder.exists():
        save_processor(folder)
        cut = AutoModelForCTC.from_pretrained(folders / "cut")
        cut.config.save_pretrained(folder)
        export_to_onnx(cut.eval(), folder)
    return Recognizer.from_pretrained(folder / "model.onnx", **options)


# Models


RECORDINGS = [babble(seconds, seed=seed) for seed, seconds in enumerate((1.0, 3.1, 2.0, 0.4))]


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
        assert_close([word[1:] for word in ours.words], [word[1:] for word in right.words])


def test_frames_are_those_of_transformers_without_padding(folders):
    recognizer = load(folders, "stock")
    model, extractor = AutoModelForCTC.from_pretrained(folders / "stock"), recognizer.processor.feature_extractor
    for ours, recording in zip(recognizer.log_probs(RECORDINGS), RECORDINGS, strict=True):
        with torch.no_grad():
            logits = model(**extractor(recording, sampling_rate=16_000, return_tensors="pt")).logits[0]
        assert len(ours) == model._get_feat_extract_output_lengths(torch.tensor(len(recording)))
        assert_close(ours, logits.log_softmax(-1))


def confidences(transcripts) -> torch.Tensor:
    return torch.tensor([word.confidence for each in transcripts for word in each.words])


def test_a_subnet_can_be_chosen_by_name_and_file(folders, tmp_path):
    model = AutoModelForCTC.from_pretrained(folders / "supernet")
    model.set_subnet("smallest")
    model.subnet.to_json_file(tmp_path / "subnet.json")
    model.extract_subnet().save_pretrained(tmp_path / "cut")
    save_processor(tmp_path / "cut")
    expected = Recognizer.from_pretrained(tmp_path / "cut", device=str(DEVICE)).transcribe(RECORDINGS)
    assert expected != load(folders, "supernet").transcribe(RECORDINGS)
    for subnet in ("smallest", str(tmp_path / "subnet.json")):
        chosen = load(folders, "supernet", subnet=subnet).transcribe(RECORDINGS)
        assert [each.text for each in chosen] == [each.text for each in expected]
        assert_close(confidences(chosen), confidences(expected))


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


def test_a_model_in_half_precision_gets_audio_in_half_precision(folders, tmp_path):
    model = AutoModelForCTC.from_pretrained(folders / "cut").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    save_processor(tmp_path)
    recognizer, inputs = Recognizer.from_pretrained(tmp_path, device=str(DEVICE)), RECORDINGS[0]
    (ours,) = recognizer.log_probs([inputs])
    extracted = recognizer.processor.feature_extractor(inputs, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval().to(DEVICE)(extracted.input_values.to(DEVICE, torch.bfloat16)).logits[0]
    np.testing.assert_array_equal(ours, logits.float().cpu().log_softmax(-1))


def test_a_group_norm_ignores_padding(tmp_path):
    model = tiny_model(LightHubertForCTC, None, feat_extract_norm="group", pad_token_id=0)
    model.save_pretrained(tmp_path)
    save_processor(tmp_path, return_attention_mask=False)
    recognizer = Recognizer.from_pretrained(tmp_path)
    recordings = [*RECORDINGS, RECORDINGS[0][::-1].copy()]
    alone = [recognizer.log_probs([recording])[0] for recording in recordings]
    for ours, single in zip(recognizer.log_probs(recordings), alone, strict=True):
        assert_close(ours, single)


@pytest.mark.parametrize("num_samples", [0, 1, 399, 400, 719, 720])
def test_recordings_shorter_than_a_frame_have_no_words(folders, num_samples):
    recognizer, short = load(folders, "cut"), babble(1)[:num_samples]
    log_probs, other = recognizer.log_probs([short, RECORDINGS[0]])
    assert log_probs.shape == (max(0, (num_samples - 80) // 320), len(TOKENS))
    assert len(other) == 49
    if num_samples < 400:
        assert recognizer.transcribe([short])[0].text == ""


# Chunks


class Watched:
    """A model that writes down the shapes of its inputs."""

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
    recording = babble(seconds) * np.linspace(0.1, 1, int(16_000 * seconds), dtype=np.float32)  # loudness drifts
    (ours,), (expected,) = chunked.log_probs([recording]), whole.log_probs([recording])
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, atol=1e-3)
    assert chunked.transcribe([recording])[0].text == whole.transcribe([recording])[0].text
    assert all(batch <= 2 and samples <= 4 * 16_000 + 320 for batch, samples in chunked.model.shapes)
    assert len(chunked.model.shapes) > 1 or seconds < 4.1


def test_each_chunk_is_normalised_on_its_own(folders):
    recognizer = load(folders, "cut", chunk_length_s=4.0, stride_length_s=0.5, batch_size=1)
    inputs, model = [], recognizer.model
    recognizer.model = lambda audio, mask: inputs.append(audio[0]) or model(audio, mask)
    recognizer.log_probs([babble(12) + np.linspace(0, 1, 12 * 16_000, dtype=np.float32)])
    assert len(inputs) == 4
    assert [chunk.mean() for chunk in inputs] == pytest.approx([0] * 4, abs=1e-3)
    assert [chunk.std() for chunk in inputs] == pytest.approx([1] * 4, abs=1e-2)


def test_attention_over_chunks_changes_little(folders):
    recording = babble(12)
    (whole,) = load(folders, "cut").log_probs([recording])
    (ours,) = load(folders, "cut", chunk_length_s=6.0, stride_length_s=1.5).log_probs([recording])
    assert (greedy(ours) == greedy(whole)).mean() > 0.9


# Errors


def test_a_model_without_a_head_is_refused(folders, tmp_path):
    """For its head, also where it has no tokenizer, which only models with this head have."""
    tiny_model().save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="base, a LightHubertModel, has no CTC head: fine-tune it"):
        Recognizer.from_pretrained(tmp_path / "base")
    AutoModelForCTC.from_pretrained(folders / "stock").hubert.save_pretrained(tmp_path)
    save_processor(tmp_path)
    with pytest.raises(UserError, match="has no CTC head: fine-tune it"):
        Recognizer.from_pretrained(tmp_path)


def test_a_folder_without_a_processor_is_refused(folders, tmp_path):
    AutoModelForCTC.from_pretrained(folders / "stock").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no tokenizer and feature extractor that can be read: there is no"):
        Recognizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        Recognizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("index", ["b", -1, 1000])
def test_a_tokenizer_of_other_tokens_than_the_models_is_refused(folders, tmp_path, index):
    shutil.copytree(folders / "cut", tmp_path / "cut")
    vocabulary = json.loads((tmp_path / "cut" / "vocab.json").read_text())
    (tmp_path / "cut" / "vocab.json").write_text(json.dumps(vocabulary | {"a": index}))
    with pytest.raises(UserError, match=f"the tokenizer gives 'a' the id {index!r}, but the model has 12 tokens"):
        Recognizer.from_pretrained(tmp_path / "cut")


def test_a_subnet_of_no_supernet_is_refused(folders):
    with pytest.raises(UserError, match="subnet smallest: .* is one model, no supernet"):
        load(folders, "cut", subnet="smallest")


def test_chunks_that_are_all_stride_are_refused(folders):
    with pytest.raises(UserError, match="chunks of 4.0 s are nothing but strides of 2.0 s"):
        load(folders, "cut", chunk_length_s=4.0, stride_length_s=2.0)


def test_the_extra_of_onnx_files_is_named_where_it_is_missing(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    save_processor(tmp_path)
    AutoModelForCTC.from_pretrained(folders / "stock").config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="model.onnx does not exist"):
        Recognizer.from_pretrained(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").touch()
    with pytest.raises(MissingExtraError, match=r"pip install 'lighthubert-transformers\[onnx\]'"):
        Recognizer.from_pretrained(tmp_path / "model.onnx")
