"""A stock HuBERT made from a cut model answers like it, or is refused with the layer that stands in the way."""

import random
import re
from dataclasses import replace

import pytest
import torch
from conftest import SMALL, answer, assert_close, noise, tiny_model
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForCTC, HubertForCTC, Wav2Vec2FeatureExtractor

from modeling_lighthubert import (
    LightHubertForCTC,
    LightHubertForPreTraining,
    LightHubertForSequenceClassification,
    LightHubertForXVector,
    LightHubertModel,
    SearchSpace,
)
from modeling_lighthubert.export import load, main, to_hubert


# widths that are multiples of the head size, and heads that always fit into the narrowest
EXPORTABLE = SearchSpace((32, 40, 48), (4, 6, 8), (3, 3.5, 4), (10, 12), head_dim=4)


@pytest.mark.parametrize("head", [LightHubertModel, LightHubertForCTC, LightHubertForSequenceClassification])
@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("conv_dim", [None, ((4, 8, 16),) * 7], ids=["full", "narrow"])
def test_the_stock_hubert_answers_like_the_cut_model(head, stable, conv_dim):
    model = tiny_model(head, replace(EXPORTABLE, conv_dim=conv_dim), do_stable_layer_norm=stable)
    rng = random.Random(0)
    for _ in range(5):
        subnet = model.sample_subnet(rng)
        assert subnet.is_hubert_exportable
        hubert = to_hubert(model.extract_subnet())
        assert not type(hubert).__module__.startswith("modeling_lighthubert")
        padded, mask = noise(2, 6000), torch.ones(2, 6000, dtype=torch.long)
        mask[1, 4000:] = 0
        expected, found = (answer(each, padded, attention_mask=mask) for each in (model, hubert))
        if head is LightHubertForCTC:  # ours has blanks on padding
            frames = torch.arange(18) < model._get_feat_extract_output_lengths(mask.sum(-1))[:, None]
            assert (expected[~frames].argmax(dim=-1) == model.config.pad_token_id).all()
            expected, found = expected[frames], found[frames]
        assert_close(found, expected)


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_fifty_subnets_with_narrow_convolutions_answer_like_their_stock_huberts(norm, waveform):
    model = tiny_model(LightHubertModel, replace(EXPORTABLE, conv_dim=((4, 8, 16),) * 7), feat_extract_norm=norm)
    rng = random.Random(1)
    for _ in range(50):
        subnet = model.sample_subnet(rng)
        hubert = to_hubert(model)
        assert tuple(hubert.config.conv_dim) == subnet.conv_dim
        assert_close(answer(hubert, waveform), answer(model, waveform))


def test_a_supernet_exports_the_selected_subnet_and_keeps_its_selection():
    model = tiny_model(LightHubertModel, EXPORTABLE)
    subnet = model.sample_subnet(1)
    assert to_hubert(model).config.hidden_size == subnet.hidden_size
    assert model.subnet == subnet


def test_a_saved_export_needs_no_code_of_ours(tmp_path, waveform):
    model = tiny_model(LightHubertForCTC, EXPORTABLE).extract_subnet("smallest")
    to_hubert(model).save_pretrained(tmp_path)
    loaded = AutoModelForCTC.from_pretrained(tmp_path)
    assert type(loaded) is HubertForCTC
    assert not list(tmp_path.glob("*.py"))
    assert_close(answer(loaded, waveform), answer(model, waveform))


def test_too_many_heads_are_refused_with_the_layer_named():
    model = tiny_model(LightHubertModel, SMALL)
    wide = {**SMALL.smallest.to_dict(), "num_attention_heads": [4, 4, 4, 6, 4, 4, 4, 4, 4, 4]}
    model.set_subnet(wide)
    assert not model.subnet.is_hubert_exportable
    with pytest.raises(ValueError, match="layer 3 has 6 heads of 4"):
        to_hubert(model)


def test_a_width_that_is_no_multiple_of_the_head_size_is_refused():
    model = tiny_model(LightHubertModel, SearchSpace((36,), (4,), (4,), (2,), head_dim=8), head_dim=8)
    with pytest.raises(ValueError, match="hidden_size=36 is not a multiple of the head size 8"):
        to_hubert(model)


def test_units_cannot_be_filled_up_where_zero_does_not_stay_zero():
    model = tiny_model(LightHubertModel, EXPORTABLE, hidden_act="sigmoid")
    uneven = {**EXPORTABLE.smallest.to_dict(), "intermediate_size": [128] * 4 + [96] + [128] * 5}
    model.set_subnet(uneven)
    with pytest.raises(ValueError, match=r"layer 4 has fewer FFN units .* sigmoid\(0\) is not 0"):
        to_hubert(model)


def test_a_head_that_hubert_does_not_have_is_refused():
    with pytest.raises(ValueError, match="no HuBERT like LightHubertForXVector"):
        to_hubert(tiny_model(LightHubertForXVector, EXPORTABLE))


# The command


@pytest.fixture
def supernet(tmp_path):
    """A folder with a supernet that was fine-tuned, and its feature extractor."""
    # one group: stock HuBERT in bfloat16 is wrong on some CPUs if a group has fewer than 16 channels
    tiny_model(LightHubertForCTC, EXPORTABLE, num_conv_pos_embedding_groups=1).save_pretrained(tmp_path / "supernet")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "supernet")
    return tmp_path / "supernet"


@pytest.mark.parametrize("form", ["transformers", "hubert"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_exports_a_subnet_and_says_what_it_costs(supernet, tmp_path, capsys, waveform, form, dtype):
    subnet = EXPORTABLE.sample(1)
    subnet.to_json_file(tmp_path / "best.json")
    words = ["--subnet", tmp_path / "best.json", "--format", form, "--dtype", dtype, "--output_dir", tmp_path / "out"]
    main(list(map(str, [supernet, *words, "--repeats", 1])))
    said = capsys.readouterr().out
    exported = AutoModelForCTC.from_pretrained(tmp_path / "out", dtype="auto")
    assert exported.config.model_type == ("hubert" if form == "hubert" else "lighthubert")
    assert exported.dtype == getattr(torch, dtype)
    expected = answer(LightHubertForCTC.from_pretrained(supernet).extract_subnet(subnet), waveform)
    found = answer(exported.eval(), waveform.to(exported.dtype)).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if dtype == "float32" else 0.2 * expected.std())
    difference = float(re.search(r"on noise: (\S+) of", said).group(1))
    assert 0 <= difference < (1e-5 if dtype == "float32" else 0.1)
    assert re.search(r"times that of the cut model", said)
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "out").sampling_rate == 16_000


def test_what_distillation_left_is_exported_without_its_heads(tmp_path):
    tiny_model(LightHubertForPreTraining, EXPORTABLE).save_pretrained(tmp_path / "supernet")
    main([str(tmp_path / "supernet"), "--output_dir", str(tmp_path / "out"), "--subnet", "smallest", "--repeats", "1"])
    exported = AutoModel.from_pretrained(tmp_path / "out")
    assert type(exported) is LightHubertModel
    assert exported.subnet == EXPORTABLE.smallest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quantize", "int8"], "--quantize is for --format onnx"),
        (["--format", "onnx", "--dtype", "bfloat16"], "--dtype is not for --format onnx"),
    ],
)
def test_options_of_an_export_that_make_no_sense_are_explained(supernet, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit):
        main([str(supernet), "--output_dir", str(tmp_path), *words])
    assert message in capsys.readouterr().err


def test_a_subnet_of_one_model_and_a_stranger_are_refused(tmp_path):
    cut = tiny_model(LightHubertForCTC, EXPORTABLE).extract_subnet("smallest")
    cut.save_pretrained(tmp_path / "cut")
    with pytest.raises(ValueError, match="is one model, no supernet to choose from"):
        load(str(tmp_path / "cut"), "smallest")
    to_hubert(cut).save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="is a HubertForCTC: export a LightHuBERT"):
        load(str(tmp_path / "stock"))
