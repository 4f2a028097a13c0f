"""Subnets that a search measured are chosen by the names, parameters and MACs that `subnets.json` has."""

import json

import pytest
import torch
from conftest import TWO_DEEP, answer, noise, tiny_model
from transformers import AutoConfig, AutoModel

from modeling_lighthubert import LightHubertConfig, LightHubertForCTC, LightHubertModel, SearchSpace
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.loading import load_config, load_model
from modeling_lighthubert.measured_subnets import SUBNETS_FILE, MeasuredSubnet, MeasuredSubnets, names_of
from modeling_lighthubert.profiling import macs_per_second


@pytest.fixture
def folder(tmp_path):
    """Of a supernet with three measured subnets, the larger the better."""
    model = tiny_model(LightHubertModel)
    model.save_pretrained(tmp_path)
    found = [TWO_DEEP.smallest, TWO_DEEP.middle, TWO_DEEP.largest]
    costs = [{"params": model.num_subnet_parameters(each), "macs": macs_per_second(model, each)} for each in found]
    rows = [MeasuredSubnet(each, 0.3 - 0.1 * at, costs[at]) for at, each in enumerate(found)]
    text = json.dumps(MeasuredSubnets.of(TWO_DEEP, "loss", rows).to_dict())
    (tmp_path / SUBNETS_FILE).write_text(text)
    return tmp_path


def names(folder) -> list[str]:
    return list(json.loads((folder / SUBNETS_FILE).read_text())["subnets"])


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([9_213_000, 27_412_345, 94_371_712], ["9M", "27M", "94M"]),
        ([27_412_345, 27_040_000, 31_000_000], ["27.4M", "27.0M", "31M"]),
        ([512, 23_900, 2e9], ["512", "24k", "2G"]),
        ([27_000_000, 27_000_000, 27_000_000], ["27M", "27M-2", "27M-3"]),
    ],
)
def test_a_name_is_as_short_as_tells_subnets_apart(sizes, expected):
    assert names_of(sizes) == expected


@pytest.mark.parametrize("load", [AutoModel.from_pretrained, LightHubertModel.from_pretrained, load_model])
def test_a_supernet_is_loaded_with_a_measured_subnet_selected(folder, load):
    for name, subnet in zip(names(folder), (TWO_DEEP.smallest, TWO_DEEP.middle, TWO_DEEP.largest), strict=True):
        assert load(folder, subnet=name).subnet == subnet


def test_names_work_wherever_a_subnet_is_given(folder):
    model, (name, *_) = LightHubertModel.from_pretrained(folder), names(folder)
    expected = answer(model.extract_subnet("smallest"), noise(1, 4000))
    assert torch.equal(answer(model.extract_subnet(name), noise(1, 4000)), expected)
    assert model.with_subnet(name).subnet == model.set_subnet(name) == TWO_DEEP.smallest
    assert model.num_subnet_parameters(name) == model.measured_subnets().subnets[name].costs["params"]
    for config_class in (LightHubertConfig, AutoConfig):
        assert load_config(folder, config_class).resolve_subnet(name) == TWO_DEEP.smallest
    config = LightHubertConfig.from_pretrained(folder, subnet=name)
    assert LightHubertForCTC.from_pretrained(folder, config=config).subnet == TWO_DEEP.smallest


def test_a_selection_is_saved_as_it_is_and_not_by_its_name(folder, tmp_path):
    LightHubertModel.from_pretrained(folder, subnet=names(folder)[0]).save_pretrained(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere" / SUBNETS_FILE).exists()  # errors are of the weights that were measured
    assert LightHubertModel.from_pretrained(tmp_path / "elsewhere").subnet == TWO_DEEP.smallest


def test_the_best_subnet_within_a_budget_is_cut_out(folder):
    model = LightHubertModel.from_pretrained(folder)
    smallest, middle, largest = (each.costs for each in model.measured_subnets().subnets.values())
    assert model.extract_subnet(max_params=middle["params"]).subnet == TWO_DEEP.middle
    assert model.extract_subnet(max_params=middle["params"] - 1).subnet == TWO_DEEP.smallest
    assert model.extract_subnet(max_macs=largest["macs"]).subnet == TWO_DEEP.largest
    cut = model.extract_subnet(max_params=largest["params"], max_macs=smallest["macs"])
    assert cut.subnet == TWO_DEEP.smallest and cut.num_parameters() == smallest["params"]
    assert model.subnet == TWO_DEEP.largest  # the selection stays


def test_a_budget_that_cannot_be_met_names_the_nearest_that_can(folder):
    model, (name, *_) = LightHubertModel.from_pretrained(folder), names(folder)
    least = model.measured_subnets().subnets[name].costs["params"]
    wanted = rf"no measured subnet has at most 100 parameters: the nearest is '{name}' with {least:,} parameters"
    with pytest.raises(ValueError, match=wanted):
        model.extract_subnet(max_params=100)
    with pytest.raises(ValueError, match="at most 100 parameters and at most 1,000 MACs per second of audio"):
        model.extract_subnet(max_params=100, max_macs=1e3)


@pytest.mark.parametrize("limit", [0, -1.0, float("nan")])
def test_a_budget_is_above_zero(folder, limit):
    with pytest.raises(ValueError, match="max_params and max_macs have to be above 0"):
        LightHubertModel.from_pretrained(folder).extract_subnet(max_macs=limit)


def test_a_budget_and_a_subnet_at_once_are_refused(folder):
    with pytest.raises(ValueError, match="give a subnet, or what it may cost"):
        LightHubertModel.from_pretrained(folder).extract_subnet("smallest", max_params=1e9)


def test_unknown_names_list_the_known_ones(folder):
    known = ["largest", "smallest", "middle", *names(folder)]
    model = LightHubertModel.from_pretrained(folder)
    with pytest.raises(ValueError) as error:
        model.set_subnet("26M")
    assert str(error.value) == f"subnet '26M' is not known in this search space: choose from {known}"
    with pytest.raises(UserError, match=r"'26M' is not known in this search space: choose from \['largest'"):
        load_model(folder, "26M")


def test_a_supernet_that_was_not_searched_says_so(tmp_path):
    tiny_model(LightHubertModel).save_pretrained(tmp_path)
    model = LightHubertModel.from_pretrained(tmp_path)
    assert model.measured_subnets() is None
    with pytest.raises(ValueError, match="has no subnets.json, which names measured subnets: search it with"):
        model.extract_subnet(max_params=1e6)
    with pytest.raises(ValueError, match=r"choose from \['largest', 'smallest', 'middle'\]"):
        model.set_subnet("27M")
    with pytest.raises(ValueError, match=r"choose from \['largest', 'smallest', 'middle'\]"):
        tiny_model(LightHubertModel).set_subnet("27M")  # from no folder at all


def test_a_cut_model_has_nothing_to_choose(folder):
    cut = LightHubertModel.from_pretrained(folder).extract_subnet("smallest")
    for choose in (lambda: cut.measured_subnets(), lambda: cut.extract_subnet(max_params=1e6)):
        with pytest.raises(ValueError, match="is a cut model"):
            choose()


OTHER = SearchSpace((8, 16), (1, 2), (2,), (2,), head_dim=4)


def broken(change) -> str:
    row = MeasuredSubnet(TWO_DEEP.smallest, 0.1, {"params": 10, "macs": 20})
    values = MeasuredSubnets.of(TWO_DEEP, "loss", [row]).to_dict()
    change(values)
    return json.dumps(values)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (broken(lambda file: file.update(search_space=OTHER.to_dict())), "it is of another supernet"),
        (broken(lambda file: file.pop("subnets")), "it has no subnets"),
        (broken(lambda file: file["subnets"].clear()), "it has no subnets"),
        (broken(lambda file: file["subnets"]["10"].pop("macs")), "a measured subnet has macs, which is missing"),
        (broken(lambda file: file["subnets"]["10"].update(error="low")), "error of a measured subnet is a number"),
        (broken(lambda file: file["subnets"]["10"].update(params=float("inf"))), "params of a measured subnet"),
        (broken(lambda file: file["subnets"]["10"].pop("subnet")), "subnet"),
        (broken(lambda file: file["subnets"]["10"]["subnet"].update(hidden_size=12)), "hidden_size"),
        (broken(lambda file: file["subnets"].update({"10": "small"})), "a measured subnet is a JSON object"),
        ("no JSON", "Expecting value"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(folder, text, reason):
    (folder / SUBNETS_FILE).write_text(text)
    model = LightHubertModel.from_pretrained(folder)
    for choose in (lambda: model.set_subnet("27M"), lambda: model.extract_subnet(max_params=1e9)):
        with pytest.raises(ValueError, match=f"{SUBNETS_FILE} cannot be used: .*{reason}"):
            choose()
    assert model.set_subnet("smallest") == TWO_DEEP.smallest  # other names do without
