"""A search measures new subnets within its budget, finds better ones than chance does, and survives its processes."""

import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from conftest import SIX_DEEP, tiny_model

from lighthubert_training.search.candidates import Budget, Candidates, SubnetCosts
from lighthubert_training.search.ledger import Ledger
from lighthubert_training.search.search import Search
from modeling_lighthubert import SearchSpace, Subnet


class DistanceFromTarget:
    """An error that takes no time: how far each layer is from that of a target, in three stages."""

    name, num_stages = "distance", 3

    def __init__(self, target: Subnet):
        self.target, self.measured = target, list[Subnet]()

    def errors(self, subnet: Subnet):
        sizes = zip(subnet.num_attention_heads, self.target.num_attention_heads)
        different = sum(heads != wanted for heads, wanted in sizes) + (subnet.hidden_size != self.target.hidden_size)
        units = zip(subnet.intermediate_size, self.target.intermediate_size)
        different += sum(abs(number - wanted) / wanted for number, wanted in units)
        for stage in range(3):
            self.measured.append(subnet)
            yield different + stage / 10


def search(folder: Path, seed: int = 0, **options) -> Search:
    space = SIX_DEEP
    candidates = Candidates(space, SubnetCosts(tiny_model(search_space=space)), options.pop("budget", Budget()))
    fitness = DistanceFromTarget(space.sample(100 + seed))
    with closing(Ledger(folder)) as ledger:
        made = Search(candidates, fitness, ledger, seed=seed, **({"num_evaluations": 150} | options))
        made.run()
    return made


def test_every_subnet_is_measured_once_and_within_the_budget(tmp_path):
    budget = Budget({"params": (0, 20_000)})
    made = search(tmp_path, objectives=["params"], population_size=10, budget=budget)
    subnets = [each.subnet for each in made.evaluations]
    assert len(subnets) == len(set(subnets)) == 150
    model = tiny_model(search_space=SIX_DEEP)
    assert max(model.num_subnet_parameters(subnet) for subnet in subnets) <= 20_000


def hypervolume(made: Search) -> float:
    """What the front dominates, of errors up to 20 and costs up to the most."""
    most = made.candidates.costs(SIX_DEEP.largest)["params"]
    area, error = 0.0, 20.0
    for each in made.front("params"):
        area += (error - made.error(each)) * (most - made.costs[each.number]["params"])
        error = made.error(each)
    return area


@pytest.mark.parametrize("seed", range(3))
def test_breeding_finds_better_subnets_than_drawing(tmp_path, seed):
    drawn = search(tmp_path / "drawn", seed, num_evaluations=300, population_size=300)
    evolved = search(tmp_path / "evolved", seed, num_evaluations=300, population_size=15)
    assert evolved.error(evolved.best()) < drawn.error(drawn.best())
    front = search(tmp_path / "front", seed, num_evaluations=300, population_size=15, objectives=["params"])
    assert hypervolume(front) > hypervolume(drawn)


def test_the_front_has_less_error_for_every_cost_more(tmp_path):
    made = search(tmp_path, objectives=["params"], population_size=15)
    points = [(made.candidates.costs(each.subnet)["params"], made.error(each)) for each in made.front("params")]
    assert len(points) > 2
    assert points == sorted(points)
    assert [error for _, error in points] == sorted((error for _, error in points), reverse=True)
    for each in made.complete:
        cost, error = made.candidates.costs(each.subnet)["params"], made.error(each)
        assert any(other_cost <= cost and other_error <= error for other_cost, other_error in points)


def test_halving_measures_less_and_orders_what_it_stopped(tmp_path):
    whole = search(tmp_path / "whole", population_size=15)
    halved = search(tmp_path / "halved", population_size=15, successive_halving=True)
    assert len(whole.fitness.measured) == 3 * 150
    assert len(halved.fitness.measured) < 0.9 * 3 * 150
    stopped = [each for each in halved.evaluations if len(each.errors) < 3]
    assert stopped
    # what a stage adds is the same for all subnets here
    assert all(halved.error(each) == pytest.approx(each.errors[0] + 0.2) for each in stopped)
    assert halved.best() not in stopped


@pytest.mark.parametrize("seed", range(3))
def test_a_search_goes_on_where_parents_have_no_new_children(tmp_path, seed):
    """In a space of 40 subnets, breeding alone finds 19 to 29 of them before it repeats itself, as a rule."""
    space = SearchSpace((16, 48), (4, 12), (2, 4), (1, 2), head_dim=4)
    candidates = Candidates(space, SubnetCosts(tiny_model(search_space=space)), Budget())
    options = {"objectives": ["macs"], "population_size": 4, "num_evaluations": 36, "seed": seed}
    with closing(Ledger(tmp_path)) as ledger:
        made = Search(candidates, DistanceFromTarget(space.sample(seed + 1)), ledger, **options)
        made.run()
    assert space.num_subnets == 40
    assert len({each.subnet for each in made.evaluations}) == 36


def test_a_space_that_is_all_measured_ends_the_search(tmp_path):
    model = tiny_model()
    space = SearchSpace((16,), (4, 6), (2,), (1, 2), head_dim=4)
    candidates = Candidates(space, SubnetCosts(tiny_model(search_space=space)), Budget())
    assert model.search_space.num_subnets > space.num_subnets == 6
    with closing(Ledger(tmp_path)) as ledger:
        made = Search(candidates, DistanceFromTarget(space.largest), ledger)
        made.run()
    assert len(made.evaluations) == 6


def test_a_search_goes_on_as_if_it_had_not_stopped(tmp_path):
    options = {"objectives": ["params"], "population_size": 10}
    whole = search(tmp_path / "whole", **options)
    search(tmp_path / "parts", **options, num_evaluations=63)
    rest = search(tmp_path / "parts", **options)
    assert len(rest.fitness.measured) == 3 * (150 - 63)
    assert [each.subnet for each in rest.evaluations] == [each.subnet for each in whole.evaluations]


def test_a_search_ends_with_what_others_are_still_measuring(tmp_path):
    """Else the process that ends first would write results without it, perhaps after those of the other."""
    claimed, claiming = SIX_DEEP.sample(1000), threading.Event()

    def measure_slowly() -> None:
        with closing(Ledger(tmp_path)) as ledger:
            number = ledger.claim(claimed, 5)
            claiming.set()
            time.sleep(1)
            ledger.finish(number, [1.0, 1.1, 1.2], 1.0)

    other = threading.Thread(target=measure_slowly)
    other.start()
    claiming.wait()
    made = search(tmp_path, num_evaluations=5)
    other.join()
    assert len(made.evaluations) == 5
    assert claimed in [each.subnet for each in made.evaluations]
