"""The results and the report of a search are those of its evaluations, and further training leaves the supernet."""

import csv
import json
import math
from contextlib import closing, nullcontext

import pytest
import torch
from conftest import SIX_DEEP, TWO_DEEP, noise, tiny_model

from lighthubert_training.search.candidates import Budget, Candidates, SubnetCosts
from lighthubert_training.search.ledger import Ledger
from lighthubert_training.search.report import (
    FurtherTraining,
    describe_front,
    format_correlation,
    importances,
    rank_correlation,
    spearman,
    spread_ranks,
    write_report,
    write_results,
)
from lighthubert_training.search.search import Search
from modeling_lighthubert import LightHubertModel, Subnet
from modeling_lighthubert.errors import UserError


class SizeOfOutputs:
    """An error that training can lower."""

    name, num_stages = "size", 1

    def __init__(self, model: LightHubertModel):
        self.model, self.waveform = model, noise(1, 4000)

    def loss(self, waveform: torch.Tensor) -> torch.Tensor:
        return (self.model(waveform).last_hidden_state - 1).square().mean()

    @torch.no_grad()
    def errors(self, subnet: Subnet):
        self.model.set_subnet(subnet)
        yield float(self.loss(self.waveform))


def test_each_subnet_is_trained_further_from_the_weights_of_the_supernet_which_stay():
    model = tiny_model()
    fitness, kept = SizeOfOutputs(model), {name: weight.clone() for name, weight in model.state_dict().items()}
    training = FurtherTraining(model, fitness.loss, [fitness.waveform], steps=5, learning_rate=1e-2, seed=0)
    subnet = TWO_DEEP.sample(0)
    (before,), (first, second) = fitness.errors(subnet), training.errors(fitness, [subnet, subnet])
    assert first == second < before
    assert not model.training
    assert all(torch.equal(weight, kept[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("fails", [False, True], ids=["after training", "on an error"])
def test_further_training_leaves_the_supernet_as_it_was(fails):
    model = tiny_model().train()
    selected = TWO_DEEP.sample(1)
    model.set_subnet(selected)
    fitness, kept = SizeOfOutputs(model), {name: weight.clone() for name, weight in model.state_dict().items()}
    losses = iter([fitness.loss] * 3)

    def loss(waveform: torch.Tensor) -> torch.Tensor:
        return next(losses)(waveform) if fails else fitness.loss(waveform)

    training = FurtherTraining(model, loss, [fitness.waveform], steps=5, learning_rate=1e-2, seed=0)
    with pytest.raises(StopIteration) if fails else nullcontext():
        training.errors(fitness, [TWO_DEEP.sample(0)])
    assert model.training and model.subnet == selected
    assert all(torch.equal(weight, kept[name]) for name, weight in model.state_dict().items())
    assert not any(weight.grad is not None for weight in model.parameters())


class WidthAndDepth:
    """An error that falls with width and, a little, with depth, in two stages; heads and FFN units do not matter."""

    name, num_stages = "narrowness", 2

    def errors(self, subnet: Subnet):
        error = 100.0 / subnet.hidden_size + 0.01 / subnet.num_hidden_layers
        yield error / 2
        yield error


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Search:
    candidates = Candidates(SIX_DEEP, SubnetCosts(tiny_model(search_space=SIX_DEEP)), Budget())
    with closing(Ledger(tmp_path_factory.mktemp("search"))) as ledger:
        search = Search(candidates, WidthAndDepth(), ledger, objectives=["params"], num_evaluations=60)
        search.run()
    return search


def test_importance_goes_to_the_choice_that_makes_the_error(made):
    explained = importances(made)
    assert next(iter(explained)) == "hidden_size"
    assert explained["hidden_size"] > 0.9
    assert sum(explained.values()) == pytest.approx(1.0)


def test_results_are_those_of_the_best_of_the_named_and_of_all(made, tmp_path):
    returned = write_results(made, tmp_path, "params")
    assert returned == json.loads((tmp_path / "results.json").read_text())
    best, costs = made.best(), made.candidates.costs
    assert Subnet.from_json_file(tmp_path / "best.json") == best.subnet
    assert returned["best"] == {"error": best.errors[-1], **costs(best.subnet), "subnet": best.subnet.to_dict()}
    assert set(returned["named"]) == {"largest", "smallest", "middle"}
    for name, row in returned["named"].items():
        *_, error = made.fitness.errors(SIX_DEEP.named[name])
        assert row == {"error": error, **costs(SIX_DEEP.named[name])}
    with (tmp_path / "evaluations.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Subnet.from_json_string(row["subnet"]) for row in rows] == [each.subnet for each in made.evaluations]
    assert [float(row["error"]) for row in rows] == [each.errors[-1] for each in made.evaluations]
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


def test_thirds_of_the_front_are_means_of_their_subnets(made):
    front, described = made.front("params"), describe_front(made, "params")
    assert len(front) > 3
    assert list(described) == ["cheapest", "middle", "most expensive"]
    assert sum(third["num_subnets"] for third in described.values()) == len(front)
    first = front[: described["cheapest"]["num_subnets"]]
    assert described["cheapest"]["params"] == pytest.approx(
        sum(made.costs[each.number]["params"] for each in first) / len(first)
    )
    heads = [heads for each in first for heads in each.subnet.num_attention_heads]
    assert described["cheapest"]["heads"] == {str(choice): heads.count(choice) / len(heads) for choice in (4, 8, 12)}
    for third in described.values():
        assert sum(third["ratios"].values()) == pytest.approx(1.0)
    errors = [third["error"] for third in described.values()]
    assert errors == sorted(errors, reverse=True)


def test_the_subnets_of_the_report_go_from_the_best_to_the_worst(made):
    errors, chosen = sorted(map(made.error, made.complete)), [made.error(each) for each in spread_ranks(made, 5)]
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[2], chosen[-1]) == (errors[0], errors[59 // 2], errors[-1])


class Reversal(FurtherTraining):
    """Training after which the best is the worst."""

    def errors(self, fitness, subnets):
        return [1.0 - sum(fitness.errors(subnet)) for subnet in subnets]


def test_the_rank_correlation_compares_errors_before_and_after_training(made, tmp_path):
    training = Reversal(tiny_model(), noise, [], 7, 0.0, 0)
    reversed_ranks = rank_correlation(made, training, 5)
    assert reversed_ranks["spearman"] == pytest.approx(-1.0)
    write_report(made, tmp_path, "params", training, 5)
    text = (tmp_path / "report.md").read_text()
    assert "each trained alone for 7 steps: Spearman's rank correlation -1.00 (p = 0.017)" in text
    for each in reversed_ranks["subnets"]:
        assert f"| {each['params']:,} | {each['supernet']:.4f} | {each['trained']:.4f} |" in text
    with pytest.raises(UserError, match="60 evaluations are too few for a report on 61 subnets"):
        rank_correlation(made, training, 61)
    assert format_correlation({"spearman": None}) == "no rank correlation, because all errors are the same"


def test_the_probability_of_a_correlation_is_that_of_chance_and_never_0():
    for number in (5, 6, 20):
        values = list(range(number))
        correlation, probability = spearman(values, values[::-1])
        assert correlation == pytest.approx(-1.0)
        chance = 2 / math.factorial(number)
        assert probability == pytest.approx(chance) if number < 8 else 0 < probability < 1e-3
    assert spearman([1, 2, 3, 4, 5], [2, 4, 1, 5, 3])[1] > 0.5


def test_a_report_without_further_training_says_nothing_of_it(made, tmp_path):
    write_report(made, tmp_path, "params", None, 3)
    text = (tmp_path / "report.md").read_text()
    assert "After further training" not in text
    assert "| hidden_size | 100% |" in text
    assert "further_training" not in json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
