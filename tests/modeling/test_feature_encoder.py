"""The convolutions give the frames of HuBERT's: in pieces, where nobody looks, and as a whole to hooks and tracers."""

import io
import warnings

import pytest
import torch
from conftest import DEVICE, answer, assert_close, noise, tiny_model

from modeling_lighthubert import LightHubertForCTC, LightHubertModel, feature_encoder


@pytest.fixture
def short_pieces(monkeypatch):
    """15 ms of full width at once."""
    monkeypatch.setitem(feature_encoder.VALUES_AT_ONCE, DEVICE.type, 240 * 16)


def test_long_audio_is_encoded_in_pieces_with_the_same_frames(monkeypatch):
    encoder = tiny_model(LightHubertModel).feature_extractor
    for num_samples in (3599, 3600, 3601, 3680, 3681, 10_000):
        audio = noise(2, num_samples)
        with torch.no_grad():
            whole = encoder(audio)
            with monkeypatch.context() as patch:
                patch.setitem(feature_encoder.VALUES_AT_ONCE, DEVICE.type, 240 * encoder.num_channels)
                pieces = encoder(audio)
        assert_close(pieces, whole)


def test_a_large_batch_is_encoded_in_parts_and_hooks_of_the_encoder_get_the_whole(monkeypatch):
    encoder, audio, hooked = tiny_model(LightHubertModel).feature_extractor, noise(5, 1200), []
    batch_sizes, frames = [], encoder._frames
    with torch.no_grad():
        whole = encoder(audio)
        monkeypatch.setitem(feature_encoder.VALUES_AT_ONCE, DEVICE.type, 2 * 240 * encoder.num_channels)
        monkeypatch.setattr(encoder, "_frames", lambda part: batch_sizes.append(len(part)) or frames(part))
        encoder.register_forward_hook(lambda module, inputs, output: hooked.append(output))
        parts = encoder(audio)
    assert batch_sizes == [2, 2, 1]
    assert [output.shape for output in hooked] == [whole.shape]
    assert_close(parts, whole)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("cut", [False, True], ids=["supernet", "cut"])
@pytest.mark.parametrize("gradients", [False, True], ids=["no gradients", "gradients"])
def test_hooks_on_a_convolution_see_all_of_its_frames_and_no_more(cut, gradients):
    """5 s: 16,000 frames after the first convolution, 249 after the last, as in HuBERT."""
    model = tiny_model(LightHubertModel)
    model, seen = model.extract_subnet() if cut else model, []
    audio = noise(1, 80_000)
    expected = answer(model, audio)
    for layer in (model.feature_extractor.conv_layers[0].conv, model.feature_extractor.conv_layers[6]):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    with torch.set_grad_enabled(gradients):
        found = model(audio).last_hidden_state
    assert seen == [15_999, 249]
    assert_close(found, expected)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("form", ["supernet", "cut"])
def test_a_traced_model_answers_for_other_lengths_and_batch_sizes(form):
    model = tiny_model(LightHubertForCTC)
    model.set_subnet("smallest")
    model = model if form == "supernet" else model.extract_subnet()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, of transformers
        traced = torch.jit.trace(model, noise(1, 80_000), strict=False)
        for batch_size, num_samples in ((1, 80_000), (1, 160_000), (3, 12_345)):
            audio = noise(batch_size, num_samples)
            assert_close(traced(audio)["logits"], answer(model, audio))


@pytest.mark.usefixtures("short_pieces")
def test_the_older_exporter_keeps_the_length_open():
    onnxruntime = pytest.importorskip("onnxruntime")
    model, file = tiny_model(LightHubertForCTC).extract_subnet("smallest").cpu(), io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, of itself
        axes = {"input_values": {0: "batch", 1: "samples"}}
        names = {"input_names": ["input_values"], "output_names": ["logits"], "dynamic_axes": axes}
        torch.onnx.export(model, (noise(1, 80_000).cpu(),), file, dynamo=False, opset_version=17, **names)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for batch_size, num_samples in ((1, 80_000), (1, 160_000), (3, 12_345)):
        audio = noise(batch_size, num_samples)
        (found,) = session.run(None, {"input_values": audio.cpu().numpy()})
        assert_close(found, answer(model, audio))
