"""Candidates cost what their cut models cost, and stay within the budget."""

import random
import re

import pytest
from conftest import NARROW, SIX_DEEP, TWO_DEEP, WINDOWED, tiny_model

from lighthubert_training.search.candidates import Budget, Candidates, SubnetCosts
from modeling_lighthubert import LightHubertForCTC, LightHubertModel
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.profiling import macs_per_second


SPACES = [
    pytest.param(space, id=name)
    for name, space in {"two-deep": TWO_DEEP, "six-deep": SIX_DEEP, "narrow": NARROW, "windowed": WINDOWED}.items()
]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("head", [LightHubertModel, LightHubertForCTC])
def test_costs_are_those_of_the_cut_model(head, space):
    model, rng = tiny_model(head, space), random.Random(0)
    selected, costs = model.subnet, SubnetCosts(model)
    for subnet in [space.smallest, space.largest, *(space.sample(rng) for _ in range(10))]:
        cut = model.extract_subnet(subnet)
        assert costs(subnet) == {"params": cut.num_parameters(), "macs": macs_per_second(cut)}
    assert model.subnet == selected


@pytest.mark.parametrize("space", SPACES)
def test_drawn_and_bred_subnets_are_within_the_budget(space):
    costs = SubnetCosts(tiny_model(search_space=space))
    ends = [costs(subnet) for subnet in (space.smallest, space.largest)]
    low, high = (
        {name: (1 - fraction) * ends[0][name] + fraction * ends[1][name] for name in ends[0]}
        for fraction in (0.3, 0.5)
    )
    budget = Budget({name: (low[name], high[name]) for name in low})
    candidates, rng = Candidates(space, costs, budget), random.Random(0)
    drawn = [candidates.draw(rng) for _ in range(20)]
    for subnet in [*drawn, *(candidates.child(drawn, rng) for _ in range(20))]:
        assert subnet in space
        assert all(low[name] <= cost <= high[name] for name, cost in costs(subnet).items())


def test_candidates_for_a_stock_hubert_are_all_exportable():
    costs, rng = SubnetCosts(tiny_model(search_space=SIX_DEEP)), random.Random(0)
    assert not all(SIX_DEEP.sample(rng).is_hubert_exportable for _ in range(20))
    candidates = Candidates(SIX_DEEP, costs, Budget(hubert_exportable=True))
    assert all(candidates.draw(rng).is_hubert_exportable for _ in range(20))


def test_the_excess_adds_up_how_far_each_cost_is_from_its_limits():
    budget = Budget({"params": (100, 200), "macs": (0, 50)})
    subnet = TWO_DEEP.smallest
    assert budget.excess(subnet, {"params": 100, "macs": 50}) == 0
    assert budget.excess(subnet, {"params": 300, "macs": 60}) == pytest.approx(0.5 + 0.2)
    assert budget.excess(subnet, {"params": 80, "macs": 50}) == pytest.approx(100 / 80 - 1)


def test_an_impossible_budget_says_what_the_least_is():
    model = tiny_model()
    least = model.num_subnet_parameters("smallest")
    with pytest.raises(UserError, match=re.escape(f"the smallest has {least:,}")):
        Candidates(TWO_DEEP, SubnetCosts(model), Budget({"params": (0, least - 1)}))
    with pytest.raises(UserError, match="no subnet was found with at most .* parameters, at least .* MACs"):
        most = {"params": (0, least), "macs": (SubnetCosts(model)(TWO_DEEP.largest)["macs"], float("inf"))}
        Candidates(TWO_DEEP, SubnetCosts(model), Budget(most))
