"""Costs are what the model really has and does."""

import random

import pytest
import torch
from conftest import DEVICE, NARROW, SIX_DEEP, noise, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.hubert.modeling_hubert import HubertFeatureEncoder

from modeling_lighthubert import (
    LightHubertConfig,
    LightHubertForAudioFrameClassification,
    LightHubertForCTC,
    LightHubertForPreTraining,
    LightHubertModel,
    SearchSpace,
    profiling,
)
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.profiling import (
    format_table,
    macs_per_second,
    main,
    measure_latency,
    median_ratio,
    profile_subnet,
    time_in_turns,
)


@pytest.mark.parametrize(
    "head",
    [LightHubertModel, LightHubertForPreTraining, LightHubertForCTC, LightHubertForAudioFrameClassification],
)
@pytest.mark.parametrize("seconds", [0.5, 1.3])
@pytest.mark.parametrize("taps", [16, 15])
@pytest.mark.parametrize("space", [SIX_DEEP, NARROW], ids=["six-deep", "narrow"])
def test_macs_are_what_a_flop_counter_counts(head, seconds, taps, space):
    model = tiny_model(head, space, attn_implementation="eager", num_conv_pos_embeddings=taps)
    for seed in range(3):
        cut = model.extract_subnet(model.search_space.sample(seed))
        counted = HubertFeatureEncoder(cut.config).to(DEVICE)  # ours runs up to a frame more, to have whole rows
        cut.base_model.feature_extractor.forward = counted.forward
        with FlopCounterMode(display=False) as counter:
            cut(noise(1, int(seconds * 16_000)))
        assert profile_subnet(cut, seconds=seconds).macs == counter.get_total_flops() // 2


@pytest.mark.parametrize("head", [LightHubertModel, LightHubertForCTC])
@pytest.mark.parametrize("space", [SIX_DEEP, NARROW], ids=["six-deep", "narrow"])
def test_parameters_of_the_parts_add_up(head, space):
    model = tiny_model(head, space)
    rng = random.Random(0)
    for _ in range(5):
        subnet = model.search_space.sample(rng)
        profile = profile_subnet(model, subnet)
        assert profile.num_parameters == model.extract_subnet(subnet).num_parameters()
        assert len(profile.layers) == subnet.num_hidden_layers
        assert (profile.head is None) == (head is LightHubertModel)


def test_a_supernet_and_its_cut_model_cost_the_same():
    model = tiny_model(LightHubertModel, SIX_DEEP)
    assert profile_subnet(model, "smallest", 2.0) == profile_subnet(model.extract_subnet("smallest"), seconds=2.0)


def test_the_feature_encoder_of_the_real_size_costs_what_is_published():
    """FACTS of the method: 2.45 GMAC for a second, whatever the subnet; 3.59 in all for a_small."""
    model = LightHubertModel(LightHubertConfig(search_space=SearchSpace.small()))
    assert profile_subnet(model, "a_small").feature_encoder.macs / 1e9 == pytest.approx(2.45, abs=0.005)
    assert macs_per_second(model, "a_small") / 1e9 == pytest.approx(3.59, abs=0.01)


def test_our_space_spans_what_it_says():
    with torch.device("meta"):
        model = LightHubertModel(LightHubertConfig(search_space="tiny_to_base"))
    for subnet, millions, gigamacs in (("smallest", 2.96, 0.295), ("largest", 94.4, 6.91)):
        assert profile_subnet(model, subnet).num_parameters / 1e6 == pytest.approx(millions, 0.01)
        assert macs_per_second(model, subnet) / 1e9 == pytest.approx(gigamacs, 0.01)


def test_a_clip_shorter_than_one_frame_is_refused():
    with pytest.raises(ValueError, match="shorter than one frame"):
        profile_subnet(tiny_model(), seconds=0.01)


def test_the_table_has_every_part_and_their_sum():
    model = tiny_model(LightHubertForCTC, SIX_DEEP)
    profile = profile_subnet(model, "smallest")
    titles = [title for title, _ in profile.rows()]
    assert titles[:4] == ["feature encoder", "feature projection", "position convolution", "layer 0 (4 heads, FFN 32)"]
    assert titles[-3:] == ["layer 3 (4 heads, FFN 32)", "layer norm, mask embedding", "head"]
    lines = format_table(profile, 1.0).splitlines()
    assert [line.split("  ")[0] for line in lines[2:-2]] == titles
    assert lines[-1].startswith("total")
    assert f" {model.num_subnet_parameters('smallest'):,} " in lines[-1]


def test_runs_take_turns_in_an_order_that_is_drawn_anew_in_every_repeat():
    order, waited = [], []
    runs = {name: lambda name=name: order.append(name) for name in "cab"}
    times = time_in_turns(runs, repeats=20, warm_up=2, synchronize=lambda: waited.append(len(order)))
    rounds = [tuple(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert len(rounds) == 22
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) == 6
    assert waited == list(range(1, 67)), "the device is waited for after each run"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 20, "b": 20, "c": 20}
    again = []
    time_in_turns({name: lambda name=name: again.append(name) for name in "abc"}, repeats=20, warm_up=2)
    assert again == order, "the order depends on the names alone"


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self):
        self.now = 0.0

    def advance(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: clock.now)
    return clock


def test_only_the_run_and_the_wait_for_its_device_are_timed(clock):
    advance = clock.advance
    runs = {"fast": lambda: advance(1), "slow": lambda: advance(4)}
    assert time_in_turns(runs, 3) == {"fast": [1, 1, 1], "slow": [4, 4, 4]}
    assert time_in_turns(runs, 2, synchronize=lambda: advance(0.5)) == {"fast": [1.5] * 2, "slow": [4.5] * 2}


def test_a_ratio_is_the_median_of_the_ratios_within_a_repeat():
    """Not the ratio of the medians, which would be 2 / 4."""
    assert median_ratio([1, 2, 30], [1, 4, 5]) == 1
    with pytest.raises(ValueError, match="argument"):
        median_ratio([1, 2], [1])


class SlowModel(torch.nn.Linear):
    """A model that takes 1, 2, 4, 8 ... seconds."""

    def __init__(self, clock):
        super().__init__(1, 1, dtype=torch.bfloat16)
        self.clock, self.inputs = clock, []

    def forward(self, audio):
        assert not torch.is_grad_enabled()
        self.clock.advance(2 ** len(self.inputs))
        self.inputs.append((tuple(audio.shape), audio.dtype))


def test_latency_is_the_median_after_the_warm_up(clock):
    model = SlowModel(clock)
    assert measure_latency(model, seconds=0.5, batch_size=2, repeats=3, warm_up=1) == 4, "of 2, 4 and 8"
    assert model.inputs == [((2, 8000), torch.bfloat16)] * 4


# The command


def test_the_command_prints_a_table(tmp_path, capsys):
    tiny_model(LightHubertModel, SIX_DEEP).save_pretrained(tmp_path)
    main(["--model_name_or_path", str(tmp_path), "--subnet", "smallest", "--seconds", "0.2", "--repeats", "2"])
    printed = capsys.readouterr().out
    assert "hidden_size=16, num_hidden_layers=4" in printed
    assert "layer 3 (4 heads, FFN 32)" in printed
    assert "real-time factor" in printed
    assert "torch.float32, cpu)" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--subnet", "a_base"], "'a_base' is not known in this search space: choose from"),
        (["--seconds", "0.01"], "seconds=0.01 is shorter than one frame"),
        (["--device", "gpu"], "device gpu cannot be used"),
    ],
)
def test_a_mistake_in_the_command_is_explained(tmp_path, options, message):
    tiny_model(LightHubertModel, SIX_DEEP).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        main(["--model_name_or_path", str(tmp_path), *options])
