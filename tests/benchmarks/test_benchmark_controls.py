"""What distilled subnets are compared with is what its name says."""

import pytest
import torch
from conftest import answer, assert_close, noise
from tiny_bench import benchmarks_on_the_path, load, tiny_bench_arguments  # noqa: F401

from modeling_lighthubert import LightHubertModel
from modeling_lighthubert.loading import load_model
from modeling_lighthubert.profiling import macs_per_second


@pytest.fixture
def bench_arguments(tmp_path):
    return tiny_bench_arguments(tmp_path)


def test_controls_are_what_their_names_say(bench_arguments):
    bench, common = load("gains").Gains(bench_arguments), load("common")
    subnet = bench.subnets["smallest"]

    def is_slice_of(whole: torch.nn.Module, model: torch.nn.Module, name: str) -> bool:
        own = model.state_dict()[name]
        return torch.equal(own, whole.state_dict()[name][tuple(slice(size) for size in own.shape)])

    encoder, layer = "feature_extractor.conv_layers.3.conv.weight", "encoder.layers.0.attention.q_proj.weight"
    for kind, expected in {
        common.RANDOM: (False, False),
        common.SLICE: (True, True),
        common.ORDERED: (True, False),
        common.ENCODER: (True, False),
    }.items():
        model = bench.control(kind, subnet, 0)
        assert model.subnet == subnet
        assert tuple(is_slice_of(bench.untrained, model, name) for name in (encoder, layer)) == expected
        assert is_slice_of(bench.ordered, model, layer) == (kind == common.ORDERED)
    first = bench.first_layers(bench.subnets["middle"])
    assert first.config.hidden_size == 32
    assert first.config.num_hidden_layers < 3
    assert is_slice_of(bench.ordered, first, layer)
    assert macs_per_second(first) <= macs_per_second(bench.untrained, bench.subnets["middle"])


def test_the_ordered_teacher_has_other_slices_and_the_same_features(bench_arguments):
    bench = load("gains").Gains(bench_arguments)
    folder = bench.order(bench_arguments.search_space)
    models = bench.untrained, load_model(folder, head=LightHubertModel)
    full, small = (
        [answer(model.extract_subnet(name), noise(1, 4000)).sort(dim=-1).values for model in models]
        for name in ("largest", "smallest")
    )
    assert_close(*full)
    assert not torch.allclose(*small, atol=0.01)
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert (bench.order(bench_arguments.search_space) / "model.safetensors").stat().st_mtime_ns == made, "once"
