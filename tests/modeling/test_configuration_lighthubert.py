"""Claims about the configuration: what it holds, how it travels, what it refuses."""

import copy
import dataclasses
import json

import pytest
import torch
from conftest import BASE, NARROW, SIX_DEEP, SMALL, TWO_DEEP, stock_settings, tiny_config
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, HubertConfig, HubertModel

from modeling_lighthubert import (
    LightHubertConfig,
    LightHubertForPreTraining,
    LightHubertModel,
    SearchSpace,
    Subnet,
)
from modeling_lighthubert.configuration_lighthubert import AUTO_MAP


SMALLEST = {"num_hidden_layers": 1, "conv_dim": (16,) * 7}


@pytest.mark.parametrize("space", [SMALL, BASE, SIX_DEEP], ids=["small", "base", "six-deep"])
def test_a_supernet_selects_its_largest_subnet_by_default(space):
    assert tiny_config(space).selected_subnet() == space.largest


@pytest.mark.parametrize("subnet", ["smallest", TWO_DEEP.smallest, TWO_DEEP.smallest.to_dict()], ids=type)
def test_a_subnet_is_given_by_name_value_or_dict(subnet):
    assert tiny_config(subnet=subnet).selected_subnet() == TWO_DEEP.smallest


def test_a_preset_is_given_by_name():
    config = LightHubertConfig(search_space="small", subnet="a_small")
    assert config.search_space == SearchSpace.small().to_dict()
    assert config.selected_subnet() == SearchSpace.small().named["a_small"]


def test_the_authors_keys_are_read():
    theirs = {"embed_dim": [256], "heads_num": [4], "atten_dim": [256], "ffn_ratio": [3.0], "layer_num": [2]}
    subnet = {"embed_dim": 256, "heads_num": [4, 4], "atten_dim": [256, 256], "ffn_embed": [768, 768], "layer_num": 2}
    config = LightHubertConfig(search_space=theirs, subnet=subnet)
    assert config.search_space == SearchSpace((256,), (4,), (3,), (2,)).to_dict()
    assert config.selected_subnet() == Subnet.uniform(256, 2, 4, 768)


def test_a_config_without_a_search_space_is_one_model():
    config = tiny_config(None)
    assert config.selected_subnet() == Subnet.uniform(48, 2, 12, 192, head_dim=4)


def test_the_defaults_are_those_of_hubert_but_for_what_the_docstring_says():
    changed = {"feat_extract_norm", "layerdrop", "model_type", "auto_map"}
    ours, theirs = LightHubertConfig().to_dict(), HubertConfig().to_dict()
    assert {name for name, value in theirs.items() if ours[name] != value} <= changed
    assert LightHubertConfig().inputs_to_logits_ratio == 320


def test_a_saved_config_names_search_space_subnet_and_every_auto_class(tmp_path):
    tiny_config(SMALL, subnet=SMALL.sample(1)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["search_space"] == SMALL.to_dict()
    assert saved["subnet"] == SMALL.sample(1).to_dict()
    assert saved["auto_map"] == AUTO_MAP
    assert len(AUTO_MAP) == 7


@pytest.mark.parametrize("config", [tiny_config(SMALL, subnet="smallest"), tiny_config(None)], ids=["supernet", "cut"])
def test_a_saved_config_loads_as_it_was(config, tmp_path):
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LightHubertConfig
    assert loaded.selected_subnet() == config.selected_subnet()
    assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}


def test_a_subnet_chosen_at_load_replaces_the_saved_one(tmp_path):
    tiny_config(SMALL, subnet="smallest").save_pretrained(tmp_path)
    config = LightHubertConfig.from_pretrained(tmp_path, subnet=SMALL.sample(2))
    assert config.selected_subnet() == SMALL.sample(2)
    config.to_json_string()


def test_a_copied_config_has_its_own_subnet():
    config = tiny_config(SMALL)
    twin = copy.deepcopy(config)
    twin.subnet = "smallest"
    assert config.selected_subnet() == SMALL.largest


@pytest.mark.parametrize(
    "changes", [{"num_attention_heads": 8}, {"hidden_size": 512, "num_attention_heads": 8}, {"hidden_size": 384}]
)
def test_the_size_of_heads_follows_width_and_number_until_a_model_is_built(changes):
    """Set one after the other, as with stock HuBERT."""
    config, stock = (kind(hidden_size=512, **SMALLEST) for kind in (LightHubertConfig, HubertConfig))
    config.num_attention_heads = stock.num_attention_heads = 16
    for name, value in changes.items():
        setattr(config, name, value)
        setattr(stock, name, value)
    with torch.device("meta"):
        model, expected = LightHubertForPreTraining(config), HubertModel(stock)
    assert model.hubert.encoder.layers[0].attention.head_dim == expected.encoder.layers[0].attention.head_dim
    assert model.config.head_dim == stock.hidden_size // stock.num_attention_heads
    assert model.config.teacher_hidden_size == stock.hidden_size
    assert (config.head_dim, config.teacher_hidden_size) == (None, None)


def test_a_width_without_a_number_of_heads_is_refused_when_a_model_is_built():
    config = LightHubertConfig(hidden_size=512, **SMALLEST)
    with pytest.raises(ValueError, match="hidden_size=512 is not a multiple of num_attention_heads=12: give head_dim"):
        LightHubertModel(config)


def test_a_cut_config_describes_the_subnet_and_nothing_else():
    subnet = SMALL.sample(3)
    cut = tiny_config(SMALL, vocab_size=7).cut_to(subnet)
    assert cut.search_space is None
    assert cut.selected_subnet() == subnet
    assert (cut.hidden_size, cut.num_hidden_layers) == (subnet.hidden_size, subnet.num_hidden_layers)
    assert cut.num_attention_heads == max(subnet.num_attention_heads)
    assert cut.intermediate_size == max(subnet.intermediate_size)
    assert (cut.vocab_size, cut.conv_dim, cut.head_dim) == (7, (16,) * 7, 4)


def test_a_trimmed_config_is_as_wide_as_its_largest_subnet():
    trimmed = tiny_config(SMALL).trimmed()
    assert (trimmed.hidden_size, trimmed.num_attention_heads, trimmed.intermediate_size) == (32, 8, 128)
    assert trimmed.num_hidden_layers == 12
    assert trimmed.selected_subnet() == SMALL.largest


def test_a_trimmed_and_a_cut_config_have_the_channels_of_their_subnet():
    space = dataclasses.replace(NARROW, conv_dim=((4, 8),) * 7)
    assert tiny_config(space).trimmed().conv_dim == (8,) * 7
    assert tiny_config(space).cut_to(space.smallest).conv_dim == (4,) * 7


def test_a_trimmed_ffn_has_whole_blocks():
    space = SearchSpace((16, 32), (4,), (2.5,), (2,), head_dim=4)
    assert tiny_config(space).trimmed().intermediate_size == 96


# Bad input

REFUSED = (ValueError, StrictDataclassError)  # a `@strict` configuration wraps what its validators raise


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"subnet": {"hidden_size": 20, "num_attention_heads": [4], "intermediate_size": [40], "head_dim": 4}},
            "=20 is",
        ),
        ({"subnet": "a_small"}, "'a_small' is not known"),
        ({"subnet": 3}, "a subnet is a name, a Subnet or a dict, not int"),
        ({"search_space": "huge"}, "'huge' is not known"),
        ({"search_space": TWO_DEEP.to_dict() | {"conv_width": [8]}}, r"does not know \['conv_width'\].*newer version"),
        ({"subnet": TWO_DEEP.smallest.to_dict() | {"window": 8}}, r"does not know \['window'\].*newer version"),
        ({"hidden_size": 24, "intermediate_size": 96}, "hidden_size goes up to 48, but the supernet has only 24"),
        ({"num_attention_heads": 8}, "num_attention_heads goes up to 12, but the supernet has only 8"),
        ({"intermediate_size": 144}, "ffn_ratio goes up to 4.0, but the supernet has only 3"),
        ({"intermediate_size": 200}, "intermediate_size=200 is not a multiple of hidden_size=48"),
        ({"num_hidden_layers": 1}, "num_hidden_layers goes up to 2, but the supernet has only 1"),
        ({"head_dim": 8}, "head_dim=4, but heads of the supernet are 8 wide"),
        (
            {"num_conv_pos_embedding_groups": 16},
            "hidden_size=24 is not a multiple of num_conv_pos_embedding_groups=16",
        ),
        ({"use_weighted_layer_sum": True}, r"depth of subnets in this search space varies \(\[1, 2\]\)"),
        ({"adapter_attn_dim": 8}, "no adapters"),
        ({"add_adapter": True}, "no adapters"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_bad_supernet_is_refused_by_its_own_message(changes, message):
    settings = stock_settings(search_space=TWO_DEEP, num_hidden_layers=2)
    with pytest.raises(REFUSED, match=message):
        LightHubertConfig(**settings | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subnet": "largest"}, "no search space to choose from"),
        ({"subnet": TWO_DEEP.smallest}, "not the architecture of this checkpoint"),
        ({"num_conv_pos_embedding_groups": 32}, "num_conv_pos_embedding_groups"),
    ],
    ids=["name", "foreign subnet", "groups that do not divide"],
)
def test_a_bad_single_model_is_refused_by_its_own_message(changes, message):
    with pytest.raises(REFUSED, match=message):
        LightHubertConfig(**stock_settings(num_hidden_layers=2) | changes)


def test_heads_that_do_not_divide_the_width_are_refused_in_a_supernet():
    with pytest.raises(REFUSED, match="head"):
        LightHubertConfig(**stock_settings(search_space=TWO_DEEP, num_hidden_layers=2, num_attention_heads=13))


def test_a_width_that_the_groups_do_not_divide_is_refused_with_both_numbers():
    space = SearchSpace((18, 48), (4,), (4,), (2,), head_dim=4)
    with pytest.raises(REFUSED, match="hidden_size=18 is not a multiple of num_conv_pos_embedding_groups=4"):
        tiny_config(space)
