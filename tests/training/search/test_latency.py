"""A table of latencies has every part of every subnet, each with its own time."""

import json
import random
import time
from dataclasses import asdict, replace

import pytest
from conftest import DEVICE, NARROW, SIX_DEEP, TWO_DEEP, WINDOWED, tiny_model

from lighthubert_training.search import latency
from lighthubert_training.search.candidates import SubnetCosts
from lighthubert_training.search.latency import LatencyTable, measurement_subnets, parts_of, time_parts
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.feature_encoder import VALUES_AT_ONCE


SPACES = [
    pytest.param(space, id=name)
    for name, space in {"two-deep": TWO_DEEP, "six-deep": SIX_DEEP, "narrow": NARROW, "windowed": WINDOWED}.items()
]


@pytest.mark.parametrize("space", SPACES)
def test_what_is_measured_has_every_part_of_every_subnet(space):
    measured = {name for subnet in measurement_subnets(space) for name in parts_of(subnet).names()}
    rng = random.Random(0)
    for subnet in [space.smallest, space.largest, *(space.sample(rng) for _ in range(50))]:
        assert measured.issuperset(parts_of(subnet).names())


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_the_latency_of_a_subnet_is_that_of_its_parts(tmp_path, norm):
    space = replace(TWO_DEEP, hidden_size=(16,), conv_dim=((8, 16),) * 7)
    model = tiny_model(search_space=space, feat_extract_norm=norm)
    LatencyTable.measure(model, seconds=0.1, repeats=3, num_checks=2).to_json_file(tmp_path / "latency.json")
    table = LatencyTable.from_json_file(tmp_path / "latency.json")
    assert all(milliseconds > 0 for milliseconds in table.milliseconds.values())
    subnet = space.sample(0)
    assert table(subnet) == pytest.approx(sum(table.milliseconds[name] for name in parts_of(subnet).names()))
    assert SubnetCosts(model, table)(subnet)["latency_ms"] == table(subnet)
    assert table.device == DEVICE.type


@pytest.mark.parametrize("pieces", [1, 2])
def test_the_time_of_each_part_is_its_own(monkeypatch, pieces):
    """By a clock that only convolutions (1 to 7 ms for a piece of audio), layers (5 and 7 ms) and the projection (20
    ms) move on."""
    monkeypatch.setitem(VALUES_AT_ONCE, DEVICE.type, 2**21 if pieces == 1 else 16 * 640 // 5)
    space = replace(TWO_DEEP, hidden_size=(16,), conv_dim=((8, 16),) * 7)
    model, now = tiny_model(search_space=space, feat_extract_norm="layer").extract_subnet("largest"), [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def takes(module, seconds):
        forward = module.forward

        def slow(*inputs, **options):
            now[0] += seconds
            return forward(*inputs, **options)

        monkeypatch.setattr(module, "forward", slow)

    for number, layer in enumerate(model.feature_extractor.conv_layers, start=1):
        takes(layer, number / 1000)
    for layer, seconds in zip(model.encoder.layers, (0.005, 0.007), strict=True):
        takes(layer, seconds)
    takes(model.feature_projection, 0.02)
    parts = parts_of(model.subnet)
    assert len(set(parts.layers)) == 1  # two layers with one name, and so the mean of their times
    expected = dict(zip(parts.convolutions, range(pieces, 8 * pieces, pieces), strict=True)) | {
        parts.layers[0]: 6,
        parts.rest: 20,
    }
    assert time_parts(model, seconds=0.1, repeats=3) == pytest.approx(expected)


def test_the_error_of_a_table_is_how_far_whole_models_are_from_it(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(latency, "time_parts", lambda model, *_: dict.fromkeys(parts_of(model.subnet).names(), 3.0))
    monkeypatch.setattr(
        latency, "measure_latency", lambda model, *_, **__: 0.8 * 3e-3 * len(parts_of(model.subnet).names())
    )
    assert LatencyTable.measure(model).error == pytest.approx(0.25)


def test_tables_from_before_devices_are_still_read_and_other_files_refused_by_name(tmp_path):
    table, file = LatencyTable(5.0, 2, {"rest, all to 16": 1.5}, 0.1), tmp_path / "latency.json"
    old = {name: value for name, value in asdict(table).items() if name != "device"}
    file.write_text(json.dumps(old))
    assert LatencyTable.from_json_file(file) == table
    for text in ("{", '{"rows": []}'):
        file.write_text(text)
        with pytest.raises(UserError, match="latency.json is no table of latencies"):
            LatencyTable.from_json_file(file)


def test_a_table_of_another_supernet_is_refused():
    with pytest.raises(UserError, match="of another supernet: it lacks 'convolutions'"):
        LatencyTable(5.0, 1, {"rest, all to 16": 1.5})(TWO_DEEP.smallest)
