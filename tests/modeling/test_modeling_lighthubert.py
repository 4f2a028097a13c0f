"""Claims about the models: what a supernet answers, what its subnets answer cut out, and what they refuse."""

import copy
import inspect
import io
import json
import logging
import pickle
import random

import numpy as np
import pytest
import torch
from conftest import (
    BASE,
    DEVICE,
    FLAVOURS,
    GOLDEN,
    HEAD_CLASSES,
    HEADS,
    NARROW,
    SIX_DEEP,
    SMALL,
    TWO_DEEP,
    answer,
    assert_close,
    checkpoint_layers,
    noise,
    randomise,
    stock_settings,
    tiny_config,
    tiny_model,
)
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCTC,
    HubertConfig,
    HubertForCTC,
    HubertForSequenceClassification,
    HubertModel,
    Trainer,
    TrainingArguments,
    Wav2Vec2Config,
    Wav2Vec2ForAudioFrameClassification,
    Wav2Vec2ForPreTraining,
    Wav2Vec2ForXVector,
    Wav2Vec2Model,
)

from modeling_lighthubert import (
    LightHubertConfig,
    LightHubertForAudioFrameClassification,
    LightHubertForCTC,
    LightHubertForPreTraining,
    LightHubertForSequenceClassification,
    LightHubertForXVector,
    LightHubertModel,
    SearchSpace,
    Subnet,
)
from modeling_lighthubert.convert_lighthubert_original_checkpoint_to_pytorch import convert
from modeling_lighthubert.export import to_hubert


CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
SUBNETS = [Subnet.from_dict(case["subnet"]) for case in CASES["cases"]]
GOLDEN_SPACE = SearchSpace.from_dict(CASES["search_space"])
FORMS = [pytest.param(cut, id="cut" if cut else "supernet") for cut in (False, True)]
ATTENTIONS = ["eager", "sdpa"]


def make(head=LightHubertModel, cut=False, subnet=TWO_DEEP.largest, **changes):
    """A tiny supernet with a subnet selected, or the cut model of it."""
    model = tiny_model(head, **changes)
    model.set_subnet(subnet)
    return model.extract_subnet() if cut else model


def draw(space, count, seed=0):
    rng = random.Random(seed)
    return [space.sample(rng) for _ in range(count)]


# The authors' answers


@pytest.fixture(scope="module")
def golden():
    return {name: torch.from_numpy(array).to(DEVICE) for name, array in np.load(GOLDEN / "golden.npz").items()}


@pytest.fixture(scope="module", params=ATTENTIONS)
def golden_model(request):
    model = convert(str(GOLDEN / "checkpoint.pt"), GOLDEN_SPACE).to(DEVICE)
    model.set_attn_implementation(request.param)
    return model


@pytest.mark.parametrize("case", range(12))
def test_a_padded_batch_is_answered_like_the_authors_code(golden_model, golden, case):
    golden_model.set_subnet(SUBNETS[case])
    mask = (torch.arange(8000, device=DEVICE) < golden["lengths"][:, None]).long()
    with torch.no_grad():
        actual = golden_model.hubert(golden["input_values"], attention_mask=mask).last_hidden_state
    expected = golden[f"last_hidden_state_{case}"]
    assert_close(actual[0], expected[0])
    assert_close(actual[1, :19], expected[1, :19])


@pytest.mark.parametrize("case", range(12))
def test_one_recording_is_answered_like_the_authors_code(golden_model, golden, case):
    golden_model.set_subnet(SUBNETS[case])
    with torch.no_grad():
        outputs = golden_model(golden["input_values"][:1], output_hidden_states=True)
    assert_close(outputs.last_hidden_state, golden[f"unpadded_last_hidden_state_{case}"])
    assert_close(outputs.predictions[0], golden[f"distill_prediction_{case}"])
    means = torch.stack([hidden_state.mean(-1) for hidden_state in outputs.hidden_states])
    assert_close(means[1:], golden[f"hidden_state_means_{case}"][1:])  # row 0: before the position convolution


@pytest.mark.parametrize("case", range(12))
def test_a_cut_model_answers_like_the_authors_code(golden_model, golden, case):
    cut = golden_model.extract_subnet(SUBNETS[case])
    with torch.no_grad():
        outputs = cut(golden["input_values"][:1])
    assert_close(outputs.last_hidden_state, golden[f"unpadded_last_hidden_state_{case}"])
    assert_close(outputs.predictions[0], golden[f"distill_prediction_{case}"])


# Sizes


@pytest.mark.parametrize("case", range(12))
def test_the_authors_count_of_a_golden_subnet_follows_from_ours(case):
    with torch.device("meta"):
        model = LightHubertModel(
            LightHubertConfig(
                search_space=GOLDEN_SPACE,
                **stock_settings(hidden_size=128, num_attention_heads=2, intermediate_size=512, conv_dim=(32,) * 7)
                | {"num_conv_pos_embeddings": 128, "num_conv_pos_embedding_groups": 16},
            )
        )
    ours = model.num_subnet_parameters(SUBNETS[case])
    assert CASES["cases"][case]["num_parameters"] == ours + (128 - SUBNETS[case].hidden_size) - 128


@pytest.mark.parametrize(
    ("space", "subnet", "count"),
    [
        ("small", "smallest", 11_449_088),
        ("small", "largest", 44_398_336),
        ("small", "a_small", 26_879_744),
        ("base", "smallest", 41_249_536),
        ("base", "largest", 94_377_728),
        ("base", "a_base", 66_897_664),
    ],
)
def test_the_papers_counts_follow_from_ours(space, subnet, count):
    with torch.device("meta"):
        model = LightHubertModel(LightHubertConfig(search_space=space))
    width = model.set_subnet(subnet).hidden_size
    assert model.num_subnet_parameters() + (768 - width) - 128 == count
    with torch.device("meta"):
        cut = LightHubertModel(model.config.cut_to(model.subnet))
    assert cut.num_parameters() == model.num_subnet_parameters()


def test_stage_one_has_the_papers_count():
    with torch.device("meta"):
        assert LightHubertModel(LightHubertConfig()).num_parameters() - 128 == 94_377_728


@pytest.mark.parametrize("head", HEAD_CLASSES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"conv_pos_batch_norm": True}, {"conv_bias": True}, {"feat_proj_layer_norm": False}, {"mask_time_prob": 0.0}],
    ids=lambda changes: next(iter(changes), "plain"),
)
def test_the_parameters_of_a_cut_model_are_counted_without_it(head, changes):
    model = tiny_model(head, search_space=SIX_DEEP, **changes)
    for subnet in ["largest", "smallest", *draw(SIX_DEEP, 3)]:
        assert model.num_subnet_parameters(subnet) == model.extract_subnet(subnet).num_parameters()
    assert model.subnet == SIX_DEEP.largest, "counting and cutting select nothing"


@pytest.mark.parametrize("head", HEAD_CLASSES)
def test_a_cut_model_counts_itself(head):
    cut = make(head, cut=True, subnet="smallest")
    assert cut.num_subnet_parameters() == cut.num_parameters()


# Largest subnet and stock HuBERT


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_largest_subnet_answers_like_stock_hubert(flavour, attention, waveform):
    stock = randomise(HubertModel(HubertConfig(**stock_settings(num_hidden_layers=6), **flavour))).eval()
    supernet = LightHubertModel(tiny_config(SIX_DEEP, **flavour)).eval()
    supernet.load_state_dict(stock.state_dict())
    stock.set_attn_implementation(attention)
    supernet.set_attn_implementation(attention)
    mask = (torch.arange(4000) < torch.tensor([[4000], [2500]])).long().to(DEVICE)
    inputs = torch.cat([waveform, waveform.flip(1) * mask[1]])
    assert_close(answer(supernet, inputs, attention_mask=mask), answer(stock, inputs, attention_mask=mask))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_model_without_a_search_space_is_stock_hubert(flavour, waveform):
    stock = randomise(HubertModel(HubertConfig(**stock_settings(num_hidden_layers=2), **flavour))).eval()
    model = LightHubertModel(tiny_config(None, **flavour)).eval()
    model.load_state_dict(stock.state_dict())
    assert_close(answer(model, waveform), answer(stock, waveform))


def test_the_largest_full_size_subnet_answers_like_stock_hubert(full_size, waveform):
    with torch.device("meta"):
        stock = HubertModel(HubertConfig(feat_extract_norm="layer"))
    stock.load_state_dict(full_size.state_dict(), assign=True)
    with full_size.using_subnet("largest"):
        assert_close(answer(full_size, waveform), answer(stock.eval(), waveform))


def test_frames_of_the_convolutions_are_those_of_hubert():
    """Of any length: what is padded to whole rows leaves no trace, also not in gradients."""
    stock = randomise(HubertModel(HubertConfig(**stock_settings(feat_extract_norm="layer")))).to(DEVICE)
    stock = stock.feature_extractor
    ours = LightHubertModel(tiny_config(feat_extract_norm="layer")).to(DEVICE).feature_extractor
    ours.load_state_dict(stock.state_dict())
    for num_samples in (400, 401, 719, 720, 4000, 6399, 6400):
        waveforms = noise(2, num_samples)
        one, other = ours(waveforms), stock(waveforms)
        assert_close(one, other)
        weight = noise(*one.shape)
        gradients = [
            torch.autograd.grad((out * weight).sum(), conv.parameters()) for out, conv in ((one, ours), (other, stock))
        ]
        for mine, theirs in zip(*gradients, strict=True):
            assert_close(mine, theirs, terms=100_000)  # of 1279 frames of the first convolution, and more layers


# Selected and cut


@pytest.fixture(scope="module")
def full_size():
    """The base supernet at its real size, every weight random."""
    torch.manual_seed(0)
    return randomise(LightHubertModel(LightHubertConfig(search_space="base"))).eval().to(DEVICE)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("space", [SMALL, BASE, SIX_DEEP, NARROW], ids=["small", "base", "six-deep", "narrow"])
def test_selected_subnets_answer_like_their_cut_models(space, flavour, waveform):
    model = tiny_model(search_space=space, **flavour)
    for subnet in draw(space, 8):
        model.set_subnet(subnet)
        assert_close(answer(model.extract_subnet(), waveform), answer(model, waveform))


@pytest.mark.parametrize("space", ["small", "base"])
def test_full_size_subnets_answer_like_their_cut_models(full_size, space, waveform):
    with torch.device("meta"):
        model = LightHubertModel(LightHubertConfig(search_space=space))
    model.load_state_dict(full_size.state_dict(), assign=True)
    model.eval()
    for subnet in ["smallest", *draw(SearchSpace.preset(space), 2)]:
        model.set_subnet(subnet)
        assert_close(answer(model.extract_subnet(), waveform), answer(model, waveform))


@pytest.mark.parametrize("head", HEAD_CLASSES)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_head_of_a_cut_model_answers_like_the_selected_subnet(head, attention):
    model = tiny_model(head)
    model.set_attn_implementation(attention)
    for subnet in ["smallest", "largest", *draw(TWO_DEEP, 5)]:
        model.set_subnet(subnet)
        cut = model.extract_subnet()
        assert cut.config._attn_implementation == attention
        assert_close(answer(cut, noise(2, 8000)), answer(model, noise(2, 8000)))


@pytest.mark.parametrize(
    "changes",
    [
        {"conv_pos_batch_norm": True},
        {"conv_bias": True},
        {"feat_proj_layer_norm": False},
        {"num_conv_pos_embeddings": 15},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_rarer_forms_of_hubert_are_cut_exactly(changes, waveform):
    model = tiny_model(search_space=SIX_DEEP, **changes)
    for subnet in draw(SIX_DEEP, 5):
        model.set_subnet(subnet)
        assert_close(answer(model.extract_subnet(), waveform), answer(model, waveform))


@pytest.mark.parametrize("cut", FORMS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_there_is_a_hidden_state_for_every_layer_and_one_before(flavour, cut, waveform):
    model = make(search_space=SIX_DEEP, subnet="smallest", cut=cut, **flavour)
    hidden_states = model(waveform, output_hidden_states=True).hidden_states
    assert [tuple(hidden_state.shape) for hidden_state in hidden_states] == [(1, 12, 16)] * 5


@pytest.mark.parametrize("cut", FORMS)
def test_attentions_have_the_heads_of_their_layer(cut, waveform):
    subnet = Subnet(24, (4, 12), (84, 48), head_dim=4)
    model = make(subnet=subnet, cut=cut, attn_implementation="eager")
    attentions = model(waveform, output_attentions=True).attentions
    assert [tuple(attention.shape) for attention in attentions] == [(1, 4, 12, 12), (1, 12, 12, 12)]


def test_hidden_states_of_a_cut_model_are_those_of_the_selected_subnet(waveform):
    model = make(search_space=SIX_DEEP, subnet=SIX_DEEP.sample(1))
    ours = model(waveform, output_hidden_states=True).hidden_states
    cut = model.extract_subnet()(waveform, output_hidden_states=True).hidden_states
    for one, other in zip(ours, cut, strict=True):
        assert_close(one, other)


def test_a_cut_model_has_plain_layers_and_weights_of_its_own():
    model = make(LightHubertForCTC)
    cut = model.extract_subnet("smallest")
    assert not [name for name, module in cut.named_modules() if "elastic" in type(module).__module__]
    supernet_storage = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert not supernet_storage & {parameter.untyped_storage().data_ptr() for parameter in cut.parameters()}
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in cut.parameters())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_a_cut_model_is_in_the_mode_of_the_supernet(training):
    model = make(LightHubertForCTC).train(training)
    assert all(module.training is training for module in model.extract_subnet("smallest").modules())


def test_masked_frames_become_the_mask_embedding_of_the_selected_width(waveform):
    model = make(subnet="smallest")
    masked = torch.zeros(1, 12, dtype=torch.bool, device=DEVICE)
    masked[0, 3:7] = True
    cut = model.extract_subnet()
    with torch.no_grad():
        one = model(waveform, mask_time_indices=masked).last_hidden_state
        assert_close(cut(waveform, mask_time_indices=masked).last_hidden_state, one)
        cut.masked_spec_embed += 1
        assert not torch.allclose(cut(waveform, mask_time_indices=masked).last_hidden_state, one, atol=1e-3)
    assert not torch.allclose(answer(model, waveform), one, atol=1e-3)


# Gradients


def kept_units(subnet, layer, full_width=48):
    """FFN units of a layer: the first of each block of the full width."""
    units = [unit for unit in range(4 * full_width) if unit % full_width < subnet.hidden_size]
    return units[: subnet.intermediate_size[layer]]


def expected_use(name, parameter, subnet):
    """Which entries of a parameter a subnet of a tiny supernet uses, from the published rules alone."""
    used = torch.zeros(parameter.shape, dtype=torch.bool)
    width, parts = range(subnet.hidden_size), name.split(".")
    rows = columns = None
    if "layers" in parts and parts[0] == "encoder":
        kept = [layer for layer in range(6) if layer not in {6: (), 5: (5,), 4: (1, 5)}[subnet.num_hidden_layers]]
        if int(parts[2]) not in kept:
            return used
        index = kept.index(int(parts[2]))
        attention, units = range(4 * subnet.num_attention_heads[index]), kept_units(subnet, index)
        rows, columns = {
            "out_proj": (width, attention),
            "q_proj": (attention, width),
            "k_proj": (attention, width),
            "v_proj": (attention, width),
            "intermediate_dense": (units, width),
            "output_dense": (width, units),
        }.get(parts[-2], (width, None))
    elif parts[0] == "feature_extractor":
        channels, layer = subnet.conv_dim or (16,) * 7, int(parts[2])
        rows, columns = range(channels[layer]), range((1, *channels)[layer])
    elif parts[0] == "feature_projection":
        channels = range(subnet.conv_dim[-1] if subnet.conv_dim else 16)
        rows, columns = (channels, None) if parts[1] == "layer_norm" else (width, channels)
    elif "conv.weight" in name:
        rows, columns = width, range(subnet.hidden_size // 4)
    else:  # projection, its bias, encoder.layer_norm, batch norm, mask embedding
        rows = width
    if parameter.ndim == 1 or columns is None:
        used[list(rows)] = True
    else:
        used[torch.tensor(list(rows))[:, None], torch.tensor(list(columns))] = True
    return used


@pytest.mark.parametrize("form", ["post", "pre", "batch norm", "narrow", "narrow group norm"])
@pytest.mark.parametrize("seed", range(3))
def test_gradients_of_a_subnet_reach_exactly_the_weights_it_uses(form, seed):
    changes = {"do_stable_layer_norm": form == "pre", "conv_pos_batch_norm": form == "batch norm"}
    changes["feat_extract_norm"] = "group" if "group" in form else "layer"
    space = NARROW if "narrow" in form else SIX_DEEP
    model = tiny_model(search_space=space, **changes).double()
    if form != "batch norm":  # the effective kernel; the direction under weight norm is the exception tested below
        torch.nn.utils.parametrize.remove_parametrizations(model.encoder.pos_conv_embed.conv, "weight")
    subnet = model.set_subnet(space.sample(seed))
    masked = torch.arange(12, device=DEVICE)[None] % 3 == 0
    hidden_states = model(noise(1, 4000).double(), mask_time_indices=masked).last_hidden_state
    (hidden_states * noise(*hidden_states.shape, seed=1)).sum().backward()
    for name, parameter in model.named_parameters():
        got = torch.zeros(parameter.shape) if parameter.grad is None else parameter.grad.cpu()
        used = expected_use(name, parameter, subnet)
        assert not got[~used].any(), f"{name}: gradient outside"
        if "k_proj.bias" not in name:  # one score more for all keys changes no attention
            assert got[used].ne(0).all(), f"{name}: no gradient inside"


@pytest.mark.parametrize("head", HEAD_CLASSES[1:])
def test_gradients_of_a_head_reach_the_columns_of_the_selected_width_only(head):
    model = make(head, subnet="smallest").double()
    outputs = model(noise(2, 8000).double())
    logits = torch.cat(outputs.predictions) if "predictions" in outputs else outputs.logits
    (logits * noise(*logits.shape, seed=1)).sum().backward()
    assert model.elastic_heads()
    for layer in model.elastic_heads():
        assert layer.weight.grad[:, :16].ne(0).all()
        assert not layer.weight.grad[:, 16:].any()


def test_weight_norm_of_the_position_convolution_is_the_exception(waveform):
    """Its norm is taken over the full kernel: a narrow subnet moves all directions a little, its bias only in part."""
    model = make(subnet="smallest")
    hidden_states = model(waveform).last_hidden_state
    (hidden_states * noise(*hidden_states.shape)).sum().backward()
    conv = model.encoder.pos_conv_embed.conv
    assert conv.parametrizations.weight.original0.grad.ne(0).all()
    assert conv.parametrizations.weight.original1.grad[16:].ne(0).any()
    assert torch.equal(conv.bias.grad != 0, torch.arange(48, device=DEVICE) < 16)


def test_gradients_belong_to_the_subnet_that_ran_even_if_another_is_selected_since(waveform):
    model = make(subnet="smallest")
    with model.using_subnet("largest"):
        loss = model(waveform).last_hidden_state.square().mean()
    loss.backward()
    assert model.encoder.layers[1].attention.q_proj.weight.grad.ne(0).all()


@pytest.mark.parametrize("cut", FORMS)
@pytest.mark.parametrize("stable", [False, True], ids=["post", "pre"])
def test_gradient_checkpointing_gives_the_same_gradients(cut, stable, waveform):
    plain = make(
        LightHubertForCTC, subnet=TWO_DEEP.sample(0), cut=cut, do_stable_layer_norm=stable, mask_time_prob=0.0
    )
    checkpointed = copy.deepcopy(plain)
    checkpoint_layers(checkpointed)
    assert checkpointed.hubert.encoder.layers[0].gradient_checkpointing
    for model in (plain, checkpointed):
        model.train()(waveform, labels=torch.tensor([[1, 2, 3]], device=DEVICE)).loss.backward()
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            assert torch.equal(other.grad, one.grad)


def test_gradient_checkpointing_recomputes_the_subnet_that_ran_even_if_another_is_selected_since(waveform):
    plain = make(LightHubertForCTC, mask_time_prob=0.0)
    checkpointed = copy.deepcopy(plain)
    checkpoint_layers(checkpointed)
    for model in (plain, checkpointed):
        with model.train().using_subnet("smallest"):
            loss = model(waveform, labels=torch.tensor([[1, 2, 3]], device=DEVICE)).loss
        loss.backward()
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        if one.grad is not None:
            assert torch.equal(other.grad, one.grad)


@pytest.mark.parametrize("cut", FORMS)
@pytest.mark.parametrize("head", [LightHubertForCTC, LightHubertForSequenceClassification])
def test_a_frozen_feature_encoder_has_no_gradients(head, cut):
    model = make(head, cut=cut)
    model.freeze_feature_encoder()
    labels = torch.tensor([[1, 2]] if head is LightHubertForCTC else [1], device=DEVICE)
    model.train()(noise(1, 8000), labels=labels).loss.backward()
    assert all(parameter.grad is None for parameter in model.hubert.feature_extractor.parameters())
    assert model.hubert.encoder.layers[0].attention.q_proj.weight.grad is not None


def test_a_frozen_base_model_leaves_the_head_to_train():
    model = make(LightHubertForXVector)
    model.freeze_base_model()
    model.train()(noise(2, 8000), labels=torch.tensor([0, 1], device=DEVICE)).loss.backward()
    assert all(parameter.grad is None for parameter in model.hubert.parameters())
    assert model.projector.weight.grad is not None


# Selecting


@pytest.mark.parametrize("head", HEAD_CLASSES)
def test_a_selection_reaches_base_model_config_and_head(head):
    model = tiny_model(head)
    subnet = model.set_subnet("smallest")
    assert model.subnet == model.base_model.subnet == subnet == TWO_DEEP.smallest
    assert model.config.selected_subnet() == model.base_model.config.selected_subnet() == subnet
    assert model(noise(1, 8000), output_hidden_states=True).hidden_states[-1].shape[-1] == 16


@pytest.mark.parametrize("head", HEAD_CLASSES)
def test_a_selection_is_restored_when_the_block_raises(head):
    model = make(head, subnet=TWO_DEEP.sample(3))
    expected = answer(model, noise(1, 8000))
    with pytest.raises(RuntimeError, match="inside"), model.using_subnet("smallest") as same:
        assert same is model
        assert model.subnet == TWO_DEEP.smallest
        raise RuntimeError("inside")
    assert model.subnet == TWO_DEEP.sample(3)
    assert torch.equal(answer(model, noise(1, 8000)), expected)


def test_blocks_nest():
    model = make(subnet="largest")
    with model.using_subnet("smallest"):
        with model.using_subnet(TWO_DEEP.sample(0)):
            assert model.subnet == TWO_DEEP.sample(0)
        assert model.subnet == TWO_DEEP.smallest
    assert model.subnet == TWO_DEEP.largest


def test_a_refused_subnet_leaves_the_selection_as_it_was(waveform):
    model = make(subnet="smallest")
    expected = answer(model, waveform)
    for bad in ("a_small", BASE.largest, {"hidden_size": 16}):
        with pytest.raises(ValueError, match=r"(?i)subnet"):
            model.set_subnet(bad)
        with pytest.raises(ValueError, match=r"(?i)subnet"), model.using_subnet(bad):
            pass
    assert model.subnet == TWO_DEEP.smallest
    assert torch.equal(answer(model, waveform), expected)


def test_a_drawn_subnet_is_selected_and_returned():
    model = tiny_model()
    assert model.sample_subnet(5) == model.subnet == TWO_DEEP.sample(5)
    rng = random.Random(1)
    assert model.sample_subnet(rng) == TWO_DEEP.sample(random.Random(1))
    assert model.sample_subnet(rng) != TWO_DEEP.sample(random.Random(1))


def test_the_search_space_is_that_of_the_configuration_whenever_it_is_asked_for():
    model = tiny_model()
    assert model.search_space == TWO_DEEP
    assert model.search_space is model.search_space, "it is validated once"
    twin = copy.deepcopy(model)
    narrower = SearchSpace((16, 24), (4, 6), (2, 3.5), (2,), head_dim=4)
    twin.config.search_space = narrower
    assert twin.search_space == narrower
    assert model.search_space == TWO_DEEP
    twin.config.search_space = None
    assert twin.search_space is None


def test_two_models_of_one_config_do_not_share_a_selection(waveform):
    config = tiny_config()
    one, other = LightHubertModel(config).eval(), LightHubertForCTC(config).eval()
    one.set_subnet("smallest")
    assert other.subnet == TWO_DEEP.largest
    assert config.selected_subnet() == TWO_DEEP.largest
    assert answer(one, waveform).shape[-1] == 16
    assert answer(other.hubert, waveform).shape[-1] == 48


def test_a_selection_leads_to_the_same_answer_from_wherever_it_came(waveform):
    model = make(subnet="smallest")
    expected = answer(model, waveform)
    for subnet in draw(TWO_DEEP, 5):
        model.set_subnet(subnet)
        answer(model, waveform)
    model.set_subnet("smallest")
    assert torch.equal(answer(model, waveform), expected)


def test_weights_changed_after_a_selection_count(waveform):
    """Nothing may be remembered from before: optimisers and `load_state_dict` write in place."""
    model, other = make(subnet=TWO_DEEP.sample(2)), randomise(make(subnet=TWO_DEEP.sample(2)), seed=9)
    answer(model, waveform)
    model.load_state_dict(other.state_dict())
    assert torch.equal(answer(model, waveform), answer(other, waveform))


def test_the_active_subnet_is_printed():
    model = make(LightHubertForCTC, subnet="smallest")
    assert str(TWO_DEEP.smallest) in repr(model)
    assert str(TWO_DEEP.smallest) in repr(model.extract_subnet())
    model.set_subnet("largest")
    assert str(TWO_DEEP.largest) in repr(model)
    assert str(TWO_DEEP.smallest) not in repr(model)


@pytest.mark.parametrize(
    "ask",
    [
        lambda cut: cut.set_subnet("largest"),
        lambda cut: cut.using_subnet("largest").__enter__(),
        lambda cut: cut.sample_subnet(),
        lambda cut: cut.num_subnet_parameters("largest"),
        lambda cut: cut.extract_subnet("largest"),
    ],
    ids=["set", "using", "sample", "count", "extract"],
)
def test_a_cut_model_says_that_it_has_nothing_to_choose_from(ask):
    cut = make(LightHubertForCTC, cut=True, subnet="smallest")
    assert cut.search_space is None
    with pytest.raises(ValueError, match=r"LightHubertForCTC is a cut model .*without a search space"):
        ask(cut)


def test_a_cut_model_can_be_cut_to_itself(waveform):
    cut = make(cut=True, subnet="smallest")
    assert torch.equal(answer(cut.extract_subnet(), waveform), answer(cut, waveform))


# Copying, saving, dtypes, compiling


@pytest.mark.parametrize("cut", FORMS)
@pytest.mark.parametrize("head", HEAD_CLASSES)
def test_a_deep_copy_answers_alike_and_has_its_own_selection(head, cut):
    model = make(head, cut=cut, subnet="smallest")
    twin = copy.deepcopy(model)
    assert torch.equal(answer(twin, noise(1, 8000)), answer(model, noise(1, 8000)))
    if not cut:
        model.set_subnet("largest")
        assert twin.subnet == TWO_DEEP.smallest
        assert twin.config.selected_subnet() == TWO_DEEP.smallest


@pytest.mark.parametrize("cut", FORMS)
@pytest.mark.parametrize("head", [LightHubertModel, LightHubertForCTC])
def test_a_pickled_model_answers_alike(head, cut, waveform):
    model = make(head, cut=cut, subnet="smallest")
    twin = pickle.loads(pickle.dumps(model))
    assert twin.subnet == TWO_DEEP.smallest
    assert torch.equal(answer(twin, waveform), answer(model, waveform))
    assert all(parameter.requires_grad for parameter in twin.parameters())
    assert not twin.training


@pytest.mark.parametrize("cut", FORMS)
def test_a_model_saved_whole_by_torch_answers_alike(cut, waveform):
    model, file = make(cut=cut, subnet="smallest"), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(answer(torch.load(file, weights_only=False), waveform), answer(model, waveform))


@pytest.mark.parametrize("cut", FORMS)
@pytest.mark.parametrize("head", HEAD_CLASSES)
def test_a_state_dict_makes_another_model_answer_alike(head, cut):
    model = make(head, cut=cut, subnet="smallest")
    other = randomise(copy.deepcopy(model), seed=7)
    other.load_state_dict(model.state_dict())
    assert torch.equal(answer(other, noise(1, 8000)), answer(model, noise(1, 8000)))


@pytest.mark.parametrize("cut", FORMS)
@pytest.mark.parametrize("head", HEAD_CLASSES)
def test_a_saved_model_answers_alike_with_the_same_subnet(head, cut, tmp_path):
    model = make(head, cut=cut, subnet=TWO_DEEP.sample(4))
    model.save_pretrained(tmp_path)
    loaded, report = head.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.subnet == TWO_DEEP.sample(4)
    loaded = copy.deepcopy(loaded)  # out of the mapped file: where a matrix lies in memory can change its last digit
    assert torch.equal(answer(loaded, noise(1, 8000)), answer(model, noise(1, 8000)))
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["subnet"] == TWO_DEEP.sample(4).to_dict()
    assert (config["search_space"] is None) is cut


@pytest.mark.parametrize(("auto_class", "head"), HEADS.items(), ids=HEADS)
def test_the_auto_classes_know_the_model(auto_class, head, tmp_path):
    import transformers

    make(head, subnet="smallest").save_pretrained(tmp_path)
    loaded = getattr(transformers, auto_class).from_pretrained(tmp_path)
    assert type(loaded) is head
    assert loaded.subnet == TWO_DEEP.smallest


@pytest.mark.parametrize("subnet", ["smallest", TWO_DEEP.sample(1), TWO_DEEP.sample(1).to_dict()], ids=type)
@pytest.mark.parametrize("head", [LightHubertModel, LightHubertForCTC])
def test_a_subnet_is_selected_at_load(head, subnet, tmp_path, waveform):
    model = make(head)
    model.save_pretrained(tmp_path)
    loaded = head.from_pretrained(tmp_path, subnet=subnet)
    assert loaded.subnet == model.set_subnet(subnet)
    assert torch.equal(answer(loaded, waveform), answer(model, waveform))


def test_an_auto_class_takes_a_subnet_at_load(tmp_path):
    make().save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path, subnet="smallest").subnet == TWO_DEEP.smallest


def test_a_supernet_can_be_given_another_search_space_at_load(tmp_path):
    make().save_pretrained(tmp_path)
    narrower = SearchSpace((16, 24), (4, 6), (2, 3.5), (2,), head_dim=4)
    loaded = LightHubertModel.from_pretrained(tmp_path, search_space=narrower, subnet="largest")
    assert loaded.search_space == narrower
    assert loaded.subnet == narrower.largest


@pytest.mark.parametrize("cut", FORMS)
@pytest.mark.parametrize("head", HEAD_CLASSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
def test_half_precision_answers_about_alike(head, cut, dtype):
    model = make(head, cut=cut, subnet="smallest")
    expected = answer(model, noise(1, 8000))
    lower = model.half() if dtype is torch.float16 else model.bfloat16()
    actual = answer(lower, noise(1, 8000).to(dtype))
    assert actual.dtype is dtype
    assert torch.nn.functional.cosine_similarity(actual.float().flatten(), expected.flatten(), dim=0) > 0.98


def test_a_cut_model_has_the_dtype_of_the_supernet():
    cut = make().bfloat16().extract_subnet("smallest")
    assert {parameter.dtype for parameter in cut.parameters()} == {torch.bfloat16}
    assert cut.dtype is torch.bfloat16


@pytest.mark.parametrize("cut", FORMS)
def test_masking_works_in_half_precision(cut, waveform):
    model = make(cut=cut, subnet="smallest").bfloat16().train()
    assert model(waveform.bfloat16()).last_hidden_state.dtype is torch.bfloat16


# Padding and batching


@pytest.mark.parametrize("stable", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_an_answer_does_not_depend_on_padding_or_company(stable, attention):
    model = tiny_model(search_space=SIX_DEEP, do_stable_layer_norm=stable)
    model.set_attn_implementation(attention)
    lengths = [4000, 2560, 6400, 400]
    recordings = [noise(1, length, seed=length) for length in lengths]
    batch = torch.cat([torch.nn.functional.pad(recording, (0, 8000 - recording.shape[1])) for recording in recordings])
    mask = (torch.arange(8000) < torch.tensor(lengths)[:, None]).long().to(DEVICE)
    for subnet in draw(SIX_DEEP, 8):
        model.set_subnet(subnet)
        together = answer(model, batch, attention_mask=mask)
        for row, recording in enumerate(recordings):
            alone = answer(model, recording)
            assert_close(together[row, : alone.shape[1]], alone[0])


@pytest.mark.parametrize("head", [LightHubertForSequenceClassification, LightHubertForCTC])
def test_the_answer_of_a_head_does_not_depend_on_padding(head):
    model = make(head, subnet="smallest")
    recording = noise(1, 4000)
    mask = (torch.arange(8000, device=DEVICE) < 4000).long()[None]
    alone = answer(model, recording)
    padded = answer(model, torch.nn.functional.pad(recording, (0, 4000)), attention_mask=mask)
    assert_close(padded if head is LightHubertForSequenceClassification else padded[:, :12], alone)


def test_with_a_group_norm_an_answer_depends_on_padding():
    """What the docstring says it cannot promise, and a reason to prefer layer norm."""
    model = make(feat_extract_norm="group", subnet="smallest")
    alone = answer(model, noise(1, 4000))
    mask = (torch.arange(8000, device=DEVICE) < 4000).long()[None]
    padded = answer(model, torch.nn.functional.pad(noise(1, 4000), (0, 4000)), attention_mask=mask)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(padded[:, :12], alone)


# Training


@pytest.mark.parametrize(
    ("head", "labels"),
    [
        (LightHubertForCTC, [[1, 2, 3], [4, 5, 6]]),
        (LightHubertForSequenceClassification, [0, 2]),
        (LightHubertForAudioFrameClassification, torch.nn.functional.one_hot(torch.arange(24).view(2, 12) % 3, 3)),
        (LightHubertForXVector, [0, 1]),
    ],
)
def test_trainer_averages_the_loss_of_a_head_over_accumulated_batches(head, labels, tmp_path):
    model = make(head, mask_time_prob=0.0)
    labels = torch.as_tensor(labels)
    rows = [{"input_values": noise(4000, seed=row).cpu(), "labels": labels[row]} for row in range(2)]
    batches = [{name: value[None].to(DEVICE) for name, value in row.items()} for row in rows]
    losses = [model(**batch).loss.item() for batch in batches]
    arguments = TrainingArguments(
        tmp_path, max_steps=1, gradient_accumulation_steps=2, per_device_train_batch_size=1,
        use_cpu=DEVICE.type == "cpu", report_to="none", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trained = Trainer(model, arguments, train_dataset=rows).train()
    assert trained.training_loss == pytest.approx(sum(losses) / 2, rel=1e-4)


@pytest.mark.parametrize("cut", FORMS)
@pytest.mark.parametrize("head", HEAD_CLASSES)
@pytest.mark.parametrize("samples", [400, 1000, 4000])
def test_clips_shorter_than_a_mask_span_can_be_trained_on(head, cut, samples):
    if head is LightHubertForXVector:
        samples = max(samples, 3500)  # its time-delay layers need 10 frames, and their statistics two of what is left
    model = make(
        head, cut=cut, subnet="smallest", mask_time_prob=0.65, mask_time_length=20, mask_time_min_masks=2
    ).train()
    assert torch.isfinite(_first_tensor(model(noise(2, samples)))).all()


def _first_tensor(outputs):
    first = outputs.to_tuple()[0]
    return first if isinstance(first, torch.Tensor) else first[0]


def test_training_masks_time_and_features():
    model = make(mask_time_prob=0.5, mask_time_length=2, mask_feature_prob=0.5, mask_feature_length=4).train()
    hidden_states = torch.ones(1, 12, 48, device=DEVICE)
    masked = model._mask_hidden_states(hidden_states.clone())
    rows = (masked == model.masked_spec_embed).sum(-1)
    assert (rows > 12).any()
    assert (masked == 0).any()
    assert torch.equal(model.eval()._mask_hidden_states(hidden_states.clone()), hidden_states)


@pytest.mark.parametrize("head", HEAD_CLASSES)
def test_every_head_trains_at_every_width(head):
    model = make(head).train()
    labels = {
        LightHubertForCTC: torch.tensor([[1, 2], [3, -100]]),
        LightHubertForSequenceClassification: torch.tensor([0, 2]),
        LightHubertForAudioFrameClassification: torch.nn.functional.one_hot(torch.arange(24).view(2, 12) % 3, 3),
        LightHubertForXVector: torch.tensor([0, 1]),
    }
    for subnet in ("smallest", "largest", TWO_DEEP.sample(0)):
        model.zero_grad()
        model.set_subnet(subnet)
        outputs = model(noise(2, 4000), **({"labels": labels[head].to(DEVICE)} if head in labels else {}))
        loss = outputs.loss if head in labels else sum(output.square().mean() for output in outputs.to_tuple()[0])
        loss.backward()
        assert torch.isfinite(loss)
        assert model.base_model.encoder.layers[0].attention.q_proj.weight.grad.any()


def test_a_step_of_one_subnet_leaves_what_it_does_not_use():
    model = make(subnet="smallest", mask_time_prob=0.0).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(noise(1, 4000)).last_hidden_state.square().mean().backward()
    optimizer.step()
    weight, old = model.encoder.layers[0].attention.q_proj.weight, before["encoder.layers.0.attention.q_proj.weight"]
    moved = weight != old
    assert moved[:16, :16].any()
    assert not moved[16:].any()
    assert not moved[:, 16:].any()


@pytest.mark.parametrize(
    "head", [LightHubertForSequenceClassification, LightHubertForAudioFrameClassification, LightHubertForXVector]
)
def test_layers_are_summed_with_weights_where_all_subnets_are_as_deep(head):
    space = SearchSpace((16, 48), (4, 12), (2, 4), (5,), head_dim=4)
    model = tiny_model(head, search_space=space, num_hidden_layers=6, use_weighted_layer_sum=True)
    assert model.layer_weights.shape == (6,)
    for subnet in ("largest", "smallest"):
        model.set_subnet(subnet)
        cut = model.extract_subnet()
        assert torch.equal(cut.layer_weights, model.layer_weights)
        assert_close(answer(cut, noise(2, 8000)), answer(model, noise(2, 8000)))
        assert model.num_subnet_parameters() == cut.num_parameters()


@pytest.mark.parametrize("depth", [1, 2])
def test_layers_of_a_cut_model_can_be_summed_with_weights(depth, tmp_path):
    make(cut=True, subnet=Subnet(16, (4,) * depth, (32,) * depth, head_dim=4)).save_pretrained(tmp_path)
    model = LightHubertForSequenceClassification.from_pretrained(tmp_path, use_weighted_layer_sum=True, num_labels=4)
    assert model.layer_weights.shape == (depth + 1,)
    assert answer(model.eval(), noise(1, 4000)).shape == (1, 4)


# Heads


@pytest.mark.parametrize(
    ("head", "stock_head", "stock_config"),
    [
        (LightHubertForCTC, HubertForCTC, HubertConfig),
        (LightHubertForSequenceClassification, HubertForSequenceClassification, HubertConfig),
        (LightHubertForAudioFrameClassification, Wav2Vec2ForAudioFrameClassification, Wav2Vec2Config),
        (LightHubertForXVector, Wav2Vec2ForXVector, Wav2Vec2Config),
    ],
)
def test_a_head_answers_like_that_of_transformers(head, stock_head, stock_config):
    settings = stock_settings(num_hidden_layers=2, feat_extract_norm="layer")
    for name in ("tdnn_dim", "tdnn_kernel", "tdnn_dilation", "xvector_output_dim"):
        settings[name] = getattr(tiny_config(), name)
    stock = randomise(stock_head(stock_config(**settings))).eval().to(DEVICE)
    model = head(tiny_config()).eval().to(DEVICE)
    model.load_state_dict(
        {name.replace("wav2vec2.", "hubert."): tensor for name, tensor in stock.state_dict().items()}
    )
    labels = {
        LightHubertForCTC: torch.tensor([[1, 2], [3, -100]]),
        LightHubertForAudioFrameClassification: torch.nn.functional.one_hot(torch.arange(48).view(2, 24) % 3, 3),
    }.get(head, torch.tensor([0, 2])).to(DEVICE)
    with torch.no_grad():
        ours, theirs = model(noise(2, 8000), labels=labels), stock(noise(2, 8000), labels=labels)
    assert_close(ours.logits, theirs.logits)
    assert_close(ours.loss, theirs.loss)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_there_is_a_prediction_for_each_head(count, waveform):
    model = make(LightHubertForPreTraining, subnet="smallest", num_prediction_heads=count)
    outputs = model(waveform)
    assert [tuple(prediction.shape) for prediction in outputs.predictions] == [(1, 12, 20)] * count
    assert outputs.last_hidden_state.shape == (1, 12, 16)
    assert all(head.bias is None for head in model.prediction_heads)


@pytest.mark.parametrize("head", HEAD_CLASSES)
def test_outputs_come_as_a_tuple_on_request(head):
    outputs = make(head)(noise(1, 8000), return_dict=False)
    assert isinstance(outputs, tuple)


# Starting from HuBERT and wav2vec 2.0

CHECKPOINTS = {
    "HubertModel": (HubertModel, HubertConfig, {}),
    "HubertForCTC": (HubertForCTC, HubertConfig, {}),
    "Wav2Vec2Model": (Wav2Vec2Model, Wav2Vec2Config, {}),
    "Wav2Vec2ForPreTraining": (
        Wav2Vec2ForPreTraining,
        Wav2Vec2Config,
        {"codevector_dim": 8, "proj_codevector_dim": 8, "num_codevectors_per_group": 4},
    ),
}


def rename_as_of_old(folder):
    """Renames the position convolution as checkpoints before torch 2.1 have it, such as facebook/hubert-base-ls960."""
    weights = load_file(folder / "model.safetensors")
    renamed = {
        name.replace("conv.parametrizations.weight.original0", "conv.weight_g").replace(
            "conv.parametrizations.weight.original1", "conv.weight_v"
        ): tensor
        for name, tensor in weights.items()
    }
    assert renamed.keys() != weights.keys()
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(params=CHECKPOINTS.values(), ids=CHECKPOINTS)
def checkpoint(request, tmp_path):
    """A tiny stock model and the folder it is saved in."""
    model_class, config_class, changes = request.param
    torch.manual_seed(0)
    stock = randomise(model_class(config_class(**stock_settings(num_hidden_layers=2, **changes)))).eval()
    stock.save_pretrained(tmp_path / "stock")
    return stock, tmp_path / "stock"


@pytest.mark.parametrize("names", ["new names", "old names"])
@pytest.mark.parametrize("head", [LightHubertModel, LightHubertForCTC, LightHubertForPreTraining])
def test_a_stock_checkpoint_starts_a_supernet(checkpoint, head, names, waveform):
    stock, folder = checkpoint
    if names == "old names":
        rename_as_of_old(folder)
    model, report = head.from_pretrained(folder, search_space=TWO_DEEP, output_loading_info=True)
    encoder = stock.base_model
    assert encoder.state_dict().keys() == model.base_model.state_dict().keys()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(model.base_model.state_dict()[name], tensor), name
    assert_close(answer(model.base_model.eval(), waveform), answer(encoder, waveform))
    of_head = (
        {name for name in model.state_dict() if not name.startswith("hubert.")}
        if head is not LightHubertModel
        else set()
    )
    kept = set(stock.state_dict()) if head is LightHubertForCTC and isinstance(stock, HubertForCTC) else set()
    assert set(report["missing_keys"]) == of_head - kept


def test_the_head_of_a_stock_checkpoint_is_kept(tmp_path, waveform):
    stock = randomise(HubertForCTC(HubertConfig(**stock_settings(num_hidden_layers=2)))).eval()
    stock.save_pretrained(tmp_path)
    model = LightHubertForCTC.from_pretrained(tmp_path, search_space=TWO_DEEP)
    assert_close(answer(model, waveform), answer(stock, waveform))


@pytest.mark.parametrize("names", ["new names", "old names"])
@pytest.mark.parametrize("head", [LightHubertModel, LightHubertForCTC])
def test_a_supernet_that_started_from_a_stock_checkpoint_is_saved_under_its_own_names(
    checkpoint, head, names, tmp_path, waveform
):
    _, folder = checkpoint
    if names == "old names":
        rename_as_of_old(folder)
    model = head.from_pretrained(folder, search_space=TWO_DEEP, subnet="smallest")
    model.save_pretrained(tmp_path / "supernet")
    assert load_file(tmp_path / "supernet" / "model.safetensors").keys() == model.state_dict().keys()
    loaded, report = head.from_pretrained(tmp_path / "supernet", output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.search_space == TWO_DEEP
    assert torch.equal(answer(loaded, waveform), answer(model, waveform))


def test_a_cut_of_a_supernet_that_started_from_a_stock_checkpoint_is_saved_under_its_own_names(checkpoint, tmp_path):
    _, folder = checkpoint
    cut = LightHubertForCTC.from_pretrained(folder, search_space=TWO_DEEP).extract_subnet("smallest")
    cut.save_pretrained(tmp_path / "cut")
    assert load_file(tmp_path / "cut" / "model.safetensors").keys() == cut.state_dict().keys()
    assert not any(LightHubertForCTC.from_pretrained(tmp_path / "cut", output_loading_info=True)[1].values())


def test_a_config_saved_from_a_stock_start_is_one_of_lighthubert(checkpoint, tmp_path):
    _, folder = checkpoint
    LightHubertForCTC.from_pretrained(folder, search_space=TWO_DEEP).save_pretrained(tmp_path / "supernet")
    config = json.loads((tmp_path / "supernet" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "lighthubert"
    assert config["architectures"] == ["LightHubertForCTC"]
    assert "AutoModelForCTC" in config["auto_map"]
    assert type(AutoModelForCTC.from_pretrained(tmp_path / "supernet")) is LightHubertForCTC


@pytest.mark.parametrize("head", [LightHubertForCTC, LightHubertForPreTraining])
def test_a_head_starts_from_a_saved_base_model_and_back(head, tmp_path, waveform):
    base = make(subnet="smallest")
    base.save_pretrained(tmp_path / "base")
    with_head = head.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(answer(with_head.hubert, waveform), answer(base, waveform))
    with_head.save_pretrained(tmp_path / "head")
    assert torch.equal(answer(LightHubertModel.from_pretrained(tmp_path / "head"), waveform), answer(base, waveform))


# Trimming


@pytest.fixture(scope="module")
def narrow_golden():
    """The golden supernet for widths that leave something to trim, and the same trimmed."""
    space = SearchSpace((64, 96), GOLDEN_SPACE.num_attention_heads, GOLDEN_SPACE.ffn_ratio, (10, 11, 12))
    supernet = convert(str(GOLDEN / "checkpoint.pt"), space).to(DEVICE)
    return supernet, supernet.trim()


@pytest.mark.parametrize("case", [case for case in range(12) if SUBNETS[case].hidden_size < 128])
def test_a_trimmed_supernet_answers_like_the_authors_code(narrow_golden, golden, case):
    _, trimmed = narrow_golden
    trimmed.set_subnet(SUBNETS[case])
    with torch.no_grad():
        outputs = trimmed(golden["input_values"][:1])
    assert_close(outputs.last_hidden_state, golden[f"unpadded_last_hidden_state_{case}"])
    assert_close(outputs.predictions[0], golden[f"distill_prediction_{case}"])


def test_a_trimmed_supernet_answers_like_the_untrimmed_one(narrow_golden, waveform):
    supernet, trimmed = narrow_golden
    for subnet in ["largest", "smallest", *draw(supernet.search_space, 10)]:
        supernet.set_subnet(subnet)
        trimmed.set_subnet(subnet)
        assert_close(answer(trimmed, waveform), answer(supernet, waveform))


def test_trimming_leaves_the_supernet_as_it_was(waveform):
    space = SearchSpace((16, 32), (4, 8), (2, 4), (1, 2), head_dim=4)
    supernet = tiny_model(LightHubertForCTC, search_space=space)
    subnet = supernet.set_subnet(space.sample(0))
    expected = answer(supernet, waveform)
    trimmed = supernet.trim()
    assert supernet.subnet == trimmed.subnet == subnet
    assert torch.equal(answer(supernet, waveform), expected)
    assert type(trimmed) is LightHubertForCTC
    assert_close(answer(trimmed, waveform), expected)


def test_a_trimmed_supernet_is_as_small_as_its_largest_subnet(narrow_golden):
    supernet, trimmed = narrow_golden
    assert trimmed.num_parameters() == supernet.num_subnet_parameters("largest") < supernet.num_parameters()
    assert trimmed.config.hidden_size == 96


def test_trimming_with_broken_ffn_blocks_and_fewer_heads_changes_no_answer(waveform):
    space = SearchSpace((16, 32), (4, 8), (1.5, 2.5), (3, 4), head_dim=4)
    supernet = tiny_model(LightHubertForPreTraining, search_space=space, num_hidden_layers=6)
    trimmed = supernet.trim()
    assert (trimmed.config.intermediate_size, trimmed.config.num_attention_heads) == (96, 8)
    for subnet in ["largest", "smallest", *draw(space, 10)]:
        supernet.set_subnet(subnet)
        trimmed.set_subnet(subnet)
        assert_close(answer(trimmed, waveform), answer(supernet, waveform))


def test_a_cut_model_cannot_be_trimmed():
    with pytest.raises(ValueError, match="only a supernet can be trimmed"):
        make(LightHubertForPreTraining, cut=True).trim()


# Bad input


@pytest.mark.parametrize("cut", FORMS)
@pytest.mark.parametrize(
    ("inputs", "mask", "message"),
    [
        (torch.zeros(1, 399), None, "399 samples, but one frame needs 400: pad the recording, or leave it out"),
        (
            torch.zeros(2, 4000),
            (torch.arange(4000) >= torch.tensor([[0], [300]])).long(),
            "pad recordings on the right",
        ),
        (torch.zeros(0, 4000), None, "at least one recording"),
        (torch.zeros(1, 0), None, "0 samples, but"),
        (torch.zeros(4000), None, r"has to be \(batch_size, num_samples\)"),
        (torch.zeros(1, 1, 4000), None, r"has to be \(batch_size, num_samples\)"),
        (torch.zeros(1, 4000, dtype=torch.int16), None, "input_values is torch.int16: audio has to be floating point"),
        (torch.tensor([[0.0], [float("nan")]]).expand(2, 4000), None, "recording 1 of the batch has NaN or infinite"),
        (torch.full((1, 4000), float("inf")), None, "NaN or infinite samples"),
    ],
    ids=["short", "padded on the left", "empty batch", "no samples", "1-d", "3-d", "integer", "NaN", "infinite"],
)
def test_bad_audio_is_refused_by_its_own_message(cut, inputs, mask, message):
    with pytest.raises(ValueError, match=message):
        make(LightHubertForCTC, cut=cut)(inputs, attention_mask=mask)


@pytest.mark.parametrize("num_samples", [0, 300], ids=["wholly masked", "shorter than a frame"])
@pytest.mark.parametrize("cut", FORMS)
def test_a_clip_without_a_frame_is_answered_in_a_batch_as_stock_hubert_does(cut, num_samples):
    """Its frames are blanks, and the other clips are what they are alone."""
    model = make(LightHubertForCTC, cut=cut, subnet=TWO_DEEP.largest)
    mask = (torch.arange(4000) < torch.tensor([[4000], [num_samples]])).long().to(DEVICE)
    audio = noise(2, 4000) * mask
    logits = answer(model, audio, attention_mask=mask)
    stock = answer(to_hubert(model), audio, attention_mask=mask)
    assert torch.isfinite(logits).all()
    assert (logits[1].argmax(-1) == model.config.pad_token_id).all()
    assert_close(logits[0], stock[0])
    base, stock = model.base_model, to_hubert(model).base_model
    assert_close(answer(base, audio, attention_mask=mask), answer(stock, audio, attention_mask=mask))


def test_float64_audio_is_answered_in_the_dtype_of_the_model(waveform):
    model = make()
    assert_close(answer(model, waveform.double()), answer(model, waveform))
    assert answer(model.bfloat16(), waveform).dtype is torch.bfloat16


@pytest.mark.parametrize("return_dict", [True, False])
def test_the_arguments_of_forward_are_those_of_stock_hubert(waveform, return_dict):
    """In the same places: stock HuBERT of transformers 5.23 takes them, but acts on keywords alone."""
    model = make(subnet=TWO_DEEP.largest)
    model.set_attn_implementation("eager")
    stock = to_hubert(model)
    stock.set_attn_implementation("eager")
    found = model(waveform, None, None, True, True, return_dict)
    expected = stock(waveform, output_attentions=True, output_hidden_states=True, return_dict=return_dict)
    assert type(found) is type(expected)
    assert_close(torch.stack(found[1]), torch.stack(expected[1]))
    assert_close(torch.stack(found[2]), torch.stack(expected[2]))
    ours, theirs = (list(inspect.signature(kind.forward).parameters) for kind in (LightHubertModel, HubertModel))
    assert ours == theirs


@pytest.mark.parametrize("cut", FORMS)
@pytest.mark.parametrize("head", HEAD_CLASSES)
def test_audio_on_another_device_is_not_waited_for(head, cut):
    """To look at its values would be to wait: the meta device has none."""
    model = make(head, cut=cut, subnet="smallest").to("meta").train()
    model(torch.zeros(2, 4000, device="meta"))


def test_a_recording_of_one_frame_is_answered():
    assert answer(make(), noise(1, 400)).shape == (1, 1, 48)


def test_a_frame_needs_as_many_samples_as_the_convolutions_see():
    model = make(conv_kernel=(8, 4), conv_stride=(4, 2), conv_dim=(16, 16))
    assert model.config.samples_per_first_frame == 20
    assert answer(model, noise(1, 20)).shape[1] == 1
    with pytest.raises(ValueError, match="19 samples, but one frame needs 20"):
        model(noise(1, 19))


def test_a_folder_without_weights_is_refused(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        LightHubertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("kept", [0.5, 0.0], ids=["truncated", "empty"])
def test_damaged_safetensors_are_refused(kept, tmp_path):
    make().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises((SafetensorError, OSError), match=r"(?i)header|incomplete|invalid|corrupt"):
        LightHubertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("field", "message"),
    [("search_space", "newer version of LightHuBERT"), ("subnet", "newer version of LightHuBERT")],
)
def test_a_folder_written_by_a_newer_version_is_refused(field, message, tmp_path):
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config[field]["from_the_future"] = [1]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        LightHubertModel.from_pretrained(tmp_path)


def test_a_subnet_outside_the_space_is_refused_at_load(tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises((ValueError, StrictDataclassError), match="hidden_size=20 is not in this search space"):
        LightHubertModel.from_pretrained(tmp_path, subnet=Subnet(20, (4,), (40,), head_dim=4))


def test_another_subnet_of_a_cut_model_is_refused_at_load(tmp_path):
    make(cut=True, subnet="smallest").save_pretrained(tmp_path)
    for subnet, message in (("largest", "no search space to choose from"), (TWO_DEEP.largest, "not the architecture")):
        with pytest.raises((ValueError, StrictDataclassError), match=message):
            LightHubertModel.from_pretrained(tmp_path, subnet=subnet)


def test_a_search_space_larger_than_a_stock_checkpoint_is_refused_at_load(checkpoint):
    _, folder = checkpoint
    with pytest.raises((ValueError, StrictDataclassError), match="num_hidden_layers goes up to 6"):
        LightHubertModel.from_pretrained(folder, search_space=SIX_DEEP)


def test_loading_prints_no_warning_about_an_ordinary_folder(tmp_path, caplog):
    make(LightHubertForCTC, cut=True, subnet="smallest").save_pretrained(tmp_path)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        LightHubertForCTC.from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
