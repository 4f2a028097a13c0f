"""The graph for inference engines has the outputs of the model, whatever its norms, its head and its settings."""

import pytest
import torch
from conftest import SearchSpace, assert_close, tiny_model

from modeling_lighthubert import (
    LightHubertForAudioFrameClassification,
    LightHubertForCTC,
    LightHubertForSequenceClassification,
    LightHubertForXVector,
    LightHubertModel,
)
from modeling_lighthubert.configuration_lighthubert import receptive_field
from modeling_lighthubert.export import to_hubert
from modeling_lighthubert.inference_graph import ProductFeatureEncoder, as_inference_graph


SPACE = SearchSpace((16,), (4,), (2,), (1, 2), head_dim=4)
HEADS = [
    *(LightHubertModel, LightHubertForCTC, LightHubertForSequenceClassification),
    *(LightHubertForAudioFrameClassification, LightHubertForXVector),
]


@torch.no_grad()
def outputs(model, num_samples: int) -> torch.Tensor:
    """Of two recordings, of which the second is half padding; without frames of padding."""
    audio = torch.randn(2, num_samples, generator=torch.Generator().manual_seed(num_samples))
    mask = torch.ones(2, num_samples, dtype=torch.long)
    mask[1, num_samples // 2 :] = 0
    found = model(audio * mask, attention_mask=mask)[0]
    if found.ndim == 2:
        return found
    num_frames = model._get_feat_extract_output_lengths(mask.sum(-1))
    return torch.cat([row[:length] for row, length in zip(found, num_frames, strict=True)])


@pytest.mark.parametrize("num_samples", [8000, 16_123, 31_999])
@pytest.mark.parametrize("stable", [False, True], ids=["norm last", "norm first"])
@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("head", HEADS)
def test_outputs_are_those_of_the_model(head, norm, stable, num_samples):
    model = tiny_model(head, SPACE, feat_extract_norm=norm, do_stable_layer_norm=stable).cpu()
    forms = [model.extract_subnet(), to_hubert(model)] if head in HEADS[:3] else [model.extract_subnet()]
    for form in forms:
        expected = outputs(form.eval(), num_samples)
        as_inference_graph(form)
        assert isinstance(form.base_model.feature_extractor, ProductFeatureEncoder)
        assert_close(outputs(form, num_samples), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"conv_bias": True},
        {"feat_proj_layer_norm": False},
        {"conv_pos_batch_norm": True},
        {"hidden_act": "relu"},
        {"feat_extract_activation": "relu"},
        {"conv_kernel": (10, 5, 3, 3, 3, 2, 2)},  # longer than two strides: torch's convolution stays
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_every_setting_of_hubert_is_kept(settings):
    model = tiny_model(LightHubertForCTC, SPACE, **settings).cpu().extract_subnet()
    expected = outputs(model, 9000)
    as_inference_graph(model)
    assert isinstance(model.base_model.feature_extractor, ProductFeatureEncoder) is ("conv_kernel" not in settings)
    assert_close(outputs(model, 9000), expected)


@pytest.mark.parametrize("num_samples", [*range(395, 410), *range(715, 725), 16_000, 123_456])
def test_frames_are_counted_by_one_division(num_samples):
    config = tiny_model(LightHubertModel).config
    field, hop = receptive_field(config)
    assert (field, hop) == (400, 320)
    assert max(0, (num_samples - field) // hop + 1) == max(0, config.num_frames(num_samples))


def test_torch_exports_the_graph_of_a_cut_model_for_any_length():
    torch.manual_seed(0)
    model = tiny_model(LightHubertForCTC, SPACE).cpu().extract_subnet("smallest")
    expected = {num_samples: outputs(model, num_samples) for num_samples in (4000, 16_123)}
    as_inference_graph(model)
    two_frames = sum(receptive_field(model.config))  # one frame is a shape of its own
    length = torch.export.Dim("num_samples", min=two_frames)
    inputs = {"input_values": torch.randn(2, 8000), "attention_mask": torch.ones(2, 8000, dtype=torch.long)}
    shapes = {name: {1: length} for name in inputs}
    # its solver cannot prove that 320 is a multiple of 5, which is asserted in the graph instead
    settings = {"dynamic_shapes": shapes, "prefer_deferred_runtime_asserts_over_guards": True}
    exported = torch.export.export(model, (), inputs, **settings).module()
    for num_samples, found in expected.items():
        model.forward = lambda audio, attention_mask: exported(input_values=audio, attention_mask=attention_mask)
        assert_close(outputs(model, num_samples), found)
