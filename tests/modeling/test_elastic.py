"""Claims about the elastic layers, each against the plain torch layer of the cut size."""

import copy

import pytest
import torch
from conftest import DEVICE, assert_close, noise, randomise
from torch import nn

from modeling_lighthubert.elastic import (
    ElasticBatchNorm1d,
    ElasticConv1d,
    ElasticGroupNorm,
    ElasticLayerList,
    ElasticLayerNorm,
    ElasticLinear,
    ElasticLinearFromBlocks,
    ElasticLinearToBlocks,
    ElasticPositionalConv1d,
    cut_state,
    leading,
    num_selected_parameters,
)
from modeling_lighthubert.feature_encoder import ElasticFrameConv1d, FrameConv1d


TAPS, GROUPS = 6, 4


def elastic_linear():
    return ElasticLinear(12, 10)


def into_ffn():
    """8 wide, 4 blocks of 8 units."""
    return ElasticLinearToBlocks(8, 32)


def out_of_ffn():
    return ElasticLinearFromBlocks(32, 8)


def elastic_conv(weight_norm: bool):
    conv = ElasticPositionalConv1d(16, TAPS, GROUPS)
    return nn.utils.parametrizations.weight_norm(conv, name="weight", dim=2) if weight_norm else conv


def plain_conv(channels: int, weight_norm: bool):
    conv = nn.Conv1d(channels, channels, TAPS, padding=TAPS // 2, groups=GROUPS)
    return nn.utils.parametrizations.weight_norm(conv, name="weight", dim=2) if weight_norm else conv


def strided(kind: type, in_channels: int = 12, out_channels: int = 10):
    return kind(in_channels, out_channels, kernel_size=3, stride=2, bias=True)


# Each: an elastic layer, what to select, the plain layer of that size, an input for it
LAYERS = {
    "linear": (elastic_linear, (5, 7), lambda: nn.Linear(5, 7), (2, 3, 5)),
    "linear without bias": (lambda: ElasticLinear(12, 10, bias=False), (5, 7), lambda: nn.Linear(5, 7, False), (3, 5)),
    "into an FFN": (into_ffn, (6, 18), lambda: nn.Linear(6, 18), (2, 3, 6)),
    "into an FFN, part of a block": (into_ffn, (6, 20), lambda: nn.Linear(6, 20), (2, 3, 6)),
    "into an FFN, less than a block": (into_ffn, (6, 4), lambda: nn.Linear(6, 4), (2, 3, 6)),
    "into an FFN, full width": (into_ffn, (8, 20), lambda: nn.Linear(8, 20), (2, 3, 8)),
    "out of an FFN": (out_of_ffn, (18, 6), lambda: nn.Linear(18, 6), (2, 3, 18)),
    "out of an FFN, part of a block": (out_of_ffn, (20, 6), lambda: nn.Linear(20, 6), (2, 3, 20)),
    "out of an FFN, less than a block": (out_of_ffn, (4, 6), lambda: nn.Linear(4, 6), (2, 3, 4)),
    "out of an FFN, full width": (out_of_ffn, (20, 8), lambda: nn.Linear(20, 8), (2, 3, 20)),
    "layer norm": (lambda: ElasticLayerNorm(12), (5,), lambda: nn.LayerNorm(5), (2, 3, 5)),
    "batch norm": (lambda: ElasticBatchNorm1d(12), (5,), lambda: nn.BatchNorm1d(5), (2, 5, 3)),
    "group norm": (lambda: ElasticGroupNorm(12), (5,), lambda: nn.GroupNorm(5, 5), (2, 5, 9)),
    "strided convolution": (lambda: strided(ElasticConv1d), (5, 7), lambda: strided(nn.Conv1d, 5, 7), (2, 5, 10)),
    "first convolution": (lambda: strided(ElasticConv1d, 1), (1, 7), lambda: strided(nn.Conv1d, 1, 7), (2, 1, 10)),
    "convolution of frames": (
        lambda: strided(ElasticFrameConv1d),
        (5, 7),
        lambda: strided(FrameConv1d, 5, 7),
        (2, 5, 10),
    ),
    "convolution": (lambda: elastic_conv(False), (8,), lambda: plain_conv(8, False), (2, 8, 9)),
    "weight-normed convolution": (lambda: elastic_conv(True), (8,), lambda: plain_conv(8, True), (2, 8, 9)),
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS.keys())
def layer(request):
    """A randomised elastic layer with a part selected, the plain layer of that size, an input."""
    build, selection, build_plain, shape = request.param
    elastic = randomise(build(), seed=1).to(DEVICE)
    elastic.select(*selection)
    return elastic, build_plain().to(DEVICE), noise(*shape)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_a_selected_layer_answers_like_its_cut_form(layer, training):
    elastic, plain, inputs = layer
    plain.load_state_dict(cut_state(elastic))
    assert_close(elastic.train(training)(inputs), plain.train(training)(inputs), terms=20)


def test_a_selected_layer_answers_like_its_cut_form_under_autocast(layer):
    elastic, plain, inputs = layer
    plain.load_state_dict(cut_state(elastic))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        torch.testing.assert_close(elastic(inputs), plain(inputs), rtol=0, atol=0.05)


def test_the_parameters_of_the_cut_form_are_counted_without_it(layer):
    elastic, plain, _ = layer
    assert num_selected_parameters(elastic) == sum(parameter.numel() for parameter in plain.parameters())


@pytest.mark.parametrize("build", [build for build, *_ in LAYERS.values()], ids=LAYERS.keys())
def test_a_new_layer_uses_all_its_weights(build):
    full = build()
    assert num_selected_parameters(full) == sum(parameter.numel() for parameter in full.parameters())


def test_a_selection_is_printed(layer):
    elastic, *_ = layer
    assert "selected=" in repr(elastic)


@pytest.mark.parametrize(("build", "selection"), [case[:2] for case in LAYERS.values()], ids=LAYERS.keys())
def test_selecting_touches_no_weight(build, selection):
    elastic = build()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in elastic.state_dict().items()}
    elastic.select(*selection)
    for name, tensor in elastic.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])


@pytest.mark.parametrize(("size", "width"), [(5, 5), (20, 6), (32, 8)], ids=["rows", "blocks", "all"])
def test_a_selection_is_made_of_views(size, width):
    weight = torch.zeros(32, 8)
    for part in leading(weight, 0, size, block=8, width=width):
        part += 1
    assert weight.sum() == size * 8


def test_gradients_of_a_linear_layer_reach_its_leading_rows_and_columns_only():
    elastic = elastic_linear().to(DEVICE)
    elastic.select(5, 7)
    elastic(noise(3, 5)).square().sum().backward()
    used = torch.zeros(10, 12, dtype=torch.bool, device=DEVICE)
    used[:7, :5] = True
    assert torch.equal(elastic.weight.grad != 0, used)
    assert torch.equal(elastic.bias.grad != 0, torch.arange(10, device=DEVICE) < 7)


# The block-wise FFN


@pytest.mark.parametrize(
    ("width", "size", "units"),
    [
        (384, 1536, [range(384), range(768, 1152), range(1536, 1920), range(2304, 2688)]),
        (512, 1792, [range(512), range(768, 1280), range(1536, 2048), range(2304, 2560)]),
        (640, 640, [range(640)]),
        (256, 768, [range(256), range(768, 1024), range(1536, 1792)]),
        (768, 2688, [range(2688)]),
        (768, 3072, [range(3072)]),
    ],
)
def test_ffn_units_are_the_first_of_each_block(width, size, units):
    taken = torch.cat(leading(torch.arange(3072), 0, size, block=768, width=width))
    assert taken.tolist() == [unit for block in units for unit in block]


def test_units_are_taken_along_the_named_dimension():
    matrix = torch.arange(2 * 8).view(2, 8)
    assert torch.cat(leading(matrix, 1, 5, block=4, width=3), dim=1).tolist() == [[0, 1, 2, 4, 5], [8, 9, 10, 12, 13]]


def test_an_ffn_reads_the_units_that_it_wrote():
    up, down = randomise(into_ffn()).to(DEVICE), randomise(out_of_ffn()).to(DEVICE)
    up.select(6, 20)
    down.select(20, 6)
    units = [unit for unit in range(32) if unit % 8 < 6][:20]
    expected = noise(3, 6) @ up.weight[units, :6].T + up.bias[units]
    expected = expected @ down.weight[:6][:, units].T + down.bias[:6]
    assert_close(down(up(noise(3, 6))), expected, terms=30)


# The position convolution


def test_weight_norm_is_taken_over_the_full_kernel():
    conv = randomise(elastic_conv(weight_norm=True)).to(DEVICE)
    conv.select(8)
    gain, direction = conv.parametrizations.weight.original0, conv.parametrizations.weight.original1
    kernel = gain * direction / direction.norm(dim=(0, 1), keepdim=True)
    assert_close(conv.selected()[0], kernel[:8, :2], terms=100)


def test_the_gain_of_a_cut_convolution_is_the_norm_of_its_kernel():
    conv = randomise(elastic_conv(weight_norm=True)).to(DEVICE)
    conv.select(8)
    state = conv.cut_state()
    kernel = conv.selected()[0]
    norms = kernel.pow(2).sum((0, 1)).sqrt()
    assert_close(state["parametrizations.weight.original0"].flatten() / norms, torch.ones(TAPS), terms=100)


def test_a_tap_without_gain_is_cut_like_the_others():
    conv = randomise(elastic_conv(weight_norm=True)).to(DEVICE)
    with torch.no_grad():
        conv.parametrizations.weight.original0[..., 2] = 0
    conv.select(8)
    plain = plain_conv(8, weight_norm=True).to(DEVICE)
    plain.load_state_dict(conv.cut_state())
    assert_close(plain(noise(2, 8, 9)), conv(noise(2, 8, 9)), terms=20)


def test_the_groups_of_a_narrow_convolution_are_those_of_the_full_one():
    conv = elastic_conv(weight_norm=False).to(DEVICE)
    conv.select(8)
    inputs = torch.zeros(1, 8, 9, device=DEVICE)
    inputs[:, 2:4] = 1  # the second of 4 groups of 2 channels
    changed = (conv(inputs) - conv(torch.zeros_like(inputs))).abs().sum((0, 2)) > 0
    assert changed.tolist() == [False, False, True, True, False, False, False, False]


# Batch norm


def test_batch_norm_in_training_moves_the_statistics_of_the_selected_channels_only():
    norm = ElasticBatchNorm1d(6).train().to(DEVICE)
    norm.select(4)
    norm(noise(3, 4, 5) + 2)
    assert (norm.running_mean[:4] != 0).all()
    assert (norm.running_var[:4] != 1).all()
    assert (norm.running_mean[4:] == 0).all()
    assert (norm.running_var[4:] == 1).all()


# The layer list


def test_iterating_over_a_layer_list_gives_the_kept_layers_in_order():
    layers = ElasticLayerList(nn.Linear(1, 1) for _ in range(4))
    layers.select((0, 2))
    assert list(layers) == [layers[0], layers[2]]
    assert len(layers) == 4
    assert "kept=[0, 2]" in repr(layers)


def test_the_cut_state_of_a_layer_list_numbers_the_kept_layers_anew():
    layers = ElasticLayerList(nn.Linear(1, 1, bias=False) for _ in range(4))
    layers.select((0, 2))
    state = cut_state(layers, "layers.")
    assert list(state) == ["layers.0.weight", "layers.1.weight"]
    assert state["layers.1.weight"] is layers[2].weight


@pytest.mark.parametrize("num_selected", [8, 16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_the_position_convolution_is_right_in_bfloat16_whatever_the_cpu(num_selected, dtype, autocast):
    conv = ElasticPositionalConv1d(64, 16, GROUPS)
    conv.select(num_selected)
    hidden_states = torch.randn(1, num_selected, 25, generator=torch.Generator().manual_seed(0))
    expected = conv(hidden_states)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = (conv if autocast else conv.to(dtype))(hidden_states.to(dtype))
    assert actual.dtype is (torch.bfloat16 if autocast else dtype)
    assert (actual.float() - expected).norm() < 0.02 * expected.norm()


def test_a_copied_layer_has_its_own_selection(layer):
    elastic, *_ = layer
    twin = copy.deepcopy(elastic)
    assert num_selected_parameters(twin) == num_selected_parameters(elastic)
    twin.select(*[4] * (2 if isinstance(elastic, ElasticLinear | ElasticConv1d) else 1))
    assert num_selected_parameters(twin) != num_selected_parameters(elastic)
