"""Results of a search, and its report: importance of each choice (fANOVA), the Pareto front in thirds, and the rank
correlation of the error in the supernet with the error after further training."""

import csv
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from scipy.stats import permutation_test, rankdata, spearmanr
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm
from transformers import get_scheduler, set_seed

from lighthubert_training.runs.plots import new_figure, save_figure
from lighthubert_training.runs.tables import markdown_table
from lighthubert_training.search.fitness import Fitness
from lighthubert_training.search.ledger import Evaluation
from lighthubert_training.search.search import Search
from modeling_lighthubert import LightHubertPreTrainedModel, SearchSpace, Subnet
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.files import whole_file, write_json, write_text
from modeling_lighthubert.measured_subnets import COSTS, SUBNETS_FILE, MeasuredSubnet, MeasuredSubnets


THIRDS = ("cheapest", "middle", "most expensive")
"""Names of the thirds of a front."""
WHEN = {"supernet": "error in the supernet", "trained": "error after training"}
"""The errors that a report correlates."""
FEWEST_SUBNETS = 5
"""For a correlation: the ranks of four agree by chance in one of twelve cases, those of five in one of sixty."""


def write_results(search: Search, folder: Path, cost: str, counts: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Writes `best.json`, `subnets.json` (the front), `results.json`, `evaluations.csv` and `front.png`.

    Args:
        cost: of the front, by its name in `COSTS`.
        counts: the recordings that the errors are of, and those that the data have, for cards.

    Returns:
        What is in `results.json`.
    """

    def to_row(evaluation: Evaluation) -> dict[str, Any]:
        return {"error": search.error(evaluation)} | search.costs[evaluation.number]

    best, front, named = search.best(), search.front(cost), measure_named(search)
    results = {
        "fitness": search.fitness.name,
        **(counts or {}),
        "num_evaluations": len(search.evaluations),
        "seconds": sum(each.seconds for each in search.evaluations),
        "best": to_row(best) | {"subnet": best.subnet.to_dict()},
        "named": named,
    }
    write_text(folder / "best.json", best.subnet.to_json_string() + "\n")
    of_front = [MeasuredSubnet(each.subnet, search.error(each), search.costs[each.number]) for each in front]
    measured = MeasuredSubnets.of(search.candidates.space, search.fitness.name, of_front)
    write_json(folder / SUBNETS_FILE, measured.to_dict())
    write_json(folder / "results.json", results)
    with whole_file(folder / "evaluations.csv") as unfinished, unfinished.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["number", *to_row(best), "on_all_data", "seconds", "subnet"])
        for each in search.evaluations:
            complete = len(each.errors) == search.fitness.num_stages
            row = [each.number, *to_row(each).values(), complete, each.seconds, each.subnet.to_json_string()]
            writer.writerow(row)
    plot_front(search, named, cost, folder / "front.png")
    return results


def measure_named(search: Search) -> dict[str, dict[str, float]]:
    """Error and costs of the subnets of the space that have a name, whether or not the budget allows them."""
    rows = {}
    for name, subnet in search.candidates.space.named.items():
        *_, error = search.fitness.errors(subnet)
        rows[name] = {"error": error} | search.candidates.costs(subnet)
    return rows


def plot_front(search: Search, named: Mapping[str, Mapping[str, float]], cost: str, path: Path) -> None:
    """Plots error against cost of all complete evaluations, of the front, and of the named subnets."""
    figure, (axes,) = new_figure()

    for evaluations, style, label in ((search.complete, "C0.", "measured"), (search.front(cost), "k.-", "front")):
        costs = [search.costs[each.number][cost] for each in evaluations]
        axes.plot(costs, list(map(search.error, evaluations)), style, label=label)
    for name, row in named.items():
        axes.plot(row[cost], row["error"], "r*")
        axes.annotate(name, (row[cost], row["error"]), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel=COSTS[cost], ylabel=search.fitness.name)
    axes.legend()
    save_figure(figure, path)


def summarise(space: SearchSpace, subnet: Subnet) -> dict[str, float]:
    """The choices of a subnet in a few numbers: its width, its depth, and means over its layers."""
    subnet = space.resolve(subnet)
    ratios = [units / subnet.hidden_size for units in subnet.intermediate_size]
    summary = {
        "hidden_size": subnet.hidden_size,
        "num_hidden_layers": subnet.num_hidden_layers,
        "num_attention_heads, mean": statistics.mean(subnet.num_attention_heads),
        "ffn_ratio, mean": statistics.mean(ratios),
    }
    if subnet.conv_dim is not None:
        summary["conv_dim, mean"] = statistics.mean(subnet.conv_dim)
    if subnet.attention_window is not None:
        windows = [window is not None for window in subnet.attention_window]
        summary["attention_window, fraction of layers"] = statistics.mean(windows)
    return {name: float(value) for name, value in summary.items()}


def importances(search: Search) -> dict[str, float]:
    """Fraction of the variance of the error that each choice explains, by Optuna's fANOVA, the largest first.

    Choices that are the same in all evaluations are left out. If all errors are the same, the result is empty.
    """
    rows = [summarise(search.candidates.space, each.subnet) for each in search.complete]
    ends = {name: (min(row[name] for row in rows), max(row[name] for row in rows)) for name in rows[0]}
    distributions: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.FloatDistribution(low, high) for name, (low, high) in ends.items() if low < high
    }
    if not distributions or len(set(map(search.error, search.complete))) < 2:
        return {}
    study = optuna.create_study()
    for row, each in zip(rows, search.complete, strict=True):
        params = {name: row[name] for name in distributions}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=search.error(each))
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def fractions(values: Sequence[float], choices: Sequence[float]) -> dict[str, float]:
    """The fraction of `values` that each of the choices makes up."""
    return {f"{choice:g}": sum(value == choice for value in values) / len(values) for choice in choices}


def nearest(value: float, choices: Sequence[float]) -> float:
    """The choice behind a ratio: FFN units are whole, so that it may be a little less than what was chosen."""
    return min(choices, key=lambda choice: abs(choice - value))


def describe_front(search: Search, cost: str) -> dict[str, dict[str, Any]]:
    """Thirds of the front: means of errors, costs and choices, and fractions of layers by heads and FFN ratio."""
    space, front, described = search.candidates.space, search.front(cost), {}
    for number, name in enumerate(THIRDS):
        third = front[number * len(front) // 3 : (number + 1) * len(front) // 3]
        if not third:
            continue
        subnets = [space.resolve(each.subnet) for each in third]
        heads = [heads for subnet in subnets for heads in subnet.num_attention_heads]
        ratios = [
            nearest(units / subnet.hidden_size, space.ffn_ratio)
            for subnet in subnets
            for units in subnet.intermediate_size
        ]
        rows = [search.costs[each.number] | summarise(space, each.subnet) for each in third]
        described[name] = {
            "num_subnets": len(third),
            "error": statistics.mean(map(search.error, third)),
            **{key: statistics.mean(row[key] for row in rows) for key in rows[0]},
            "heads": fractions(heads, space.num_attention_heads),
            "ratios": fractions(ratios, space.ffn_ratio),
        }
    return described


@dataclass
class FurtherTraining:
    """Training of single subnets, each from the weights of the supernet.

    Attributes:
        loss: mean loss of the selected subnet on one of `batches`.
        steps: of each subnet; the batches are used in turn.
        learning_rate: peak.
        seed: of dropout and SpecAugment.
    """

    model: LightHubertPreTrainedModel
    loss: Callable[[Any], torch.Tensor]
    batches: Sequence[Any]
    steps: int
    learning_rate: float
    seed: int

    def errors(self, fitness: Fitness, subnets: Sequence[Subnet]) -> list[float]:
        """Errors of the subnets after training, each alone. The supernet is left as it was, also on an error."""
        model = self.model
        kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        selected, training, errors = model.subnet, model.training, []
        try:
            with tqdm(total=self.steps * len(subnets), desc="further training") as bar:
                for subnet in subnets:
                    self.train(subnet, bar)
                    *_, error = fitness.errors(subnet)
                    errors.append(error)
                    model.load_state_dict(kept)
        finally:
            model.load_state_dict(kept)
            model.set_subnet(selected)
            model.train(training)
            model.zero_grad()
        return errors

    def train(self, subnet: Subnet, bar: tqdm) -> None:
        """AdamW, with a warm-up in a tenth of the steps and a linear decay. A frozen feature encoder stays so."""
        set_seed(self.seed)  # NumPy too: it draws the masks of SpecAugment
        self.model.set_subnet(subnet)
        self.model.train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate)
        scheduler = get_scheduler("linear", optimizer, self.steps // 10, self.steps)
        for step in range(self.steps):
            loss = self.loss(self.batches[step % len(self.batches)])
            loss.backward()
            clip_grad_norm_(trained, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{float(loss.detach()):.3g}", refresh=False)
            bar.update()
        self.model.eval()


def spread_ranks(search: Search, number: int) -> list[Evaluation]:
    """Complete evaluations from the best to the worst, evenly spaced in rank."""
    ranked = sorted(search.complete, key=search.error)
    return [ranked[rank * (len(ranked) - 1) // (number - 1)] for rank in range(number)]


def spearman(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Spearman's rank correlation, and how often ranks at random would correlate as much or more, in either direction.

    The probability is that of a permutation test, which is never 0: SciPy's own is for hundreds of pairs, and 0 for
    three that agree.
    """
    ranks, others = (rankdata(values) - (len(values) + 1) / 2 for values in (one, other))

    def covariance(permuted: Any, axis: int) -> Any:
        return (permuted * others).sum(axis=axis)

    test: Any = permutation_test((ranks,), covariance, permutation_type="pairings", vectorized=True, random_state=0)
    return float(spearmanr(one, other).statistic), float(test.pvalue)


def rank_correlation(search: Search, training: FurtherTraining, num_subnets: int) -> dict[str, Any]:
    """Spearman's rank correlation of the errors in the supernet and after further training; `None` if all are equal.

    Args:
        num_subnets: number of subnets that are trained, at least `FEWEST_SUBNETS`.

    Raises:
        UserError: too few evaluations for that many subnets.
    """
    assert num_subnets >= FEWEST_SUBNETS
    if len(search.complete) < num_subnets:
        raise UserError(f"{len(search.complete)} evaluations are too few for a report on {num_subnets} subnets")
    chosen = spread_ranks(search, num_subnets)
    before = [search.error(each) for each in chosen]
    after = training.errors(search.fitness, [each.subnet for each in chosen])
    varies = len(set(before)) > 1 and len(set(after)) > 1
    correlation, probability = spearman(before, after) if varies else (None, None)
    rows = [
        {"subnet": each.subnet.to_dict(), **search.costs[each.number], "supernet": one, "trained": other}
        for each, one, other in zip(chosen, before, after, strict=True)
    ]
    return {"spearman": correlation, "p": probability, "steps": training.steps, "subnets": rows}


def write_report(search: Search, folder: Path, cost: str, training: FurtherTraining | None, num_subnets: int) -> None:
    """Writes `report.json`, `report.md` and `report.png`.

    Args:
        cost: of the front, by its name in `COSTS`.
        training: `None` trains no subnet further.
    """
    report: dict[str, Any] = {
        "fitness": search.fitness.name,
        "num_evaluations": len(search.complete),
        "cost": cost,
        "importance": importances(search),
        "front": describe_front(search, cost),
    }
    if training is not None:
        report["further_training"] = rank_correlation(search, training, num_subnets)
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", format_report(report))
    plot_report(report, folder / "report.png")


def format_report(report: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    importance = [[name, f"{fraction:.0%}"] for name, fraction in report["importance"].items()]
    front = report["front"]
    rows = []
    for key in next(iter(front.values())):
        values = [third[key] for third in front.values()]
        if isinstance(values[0], dict):
            title = {"heads": "layers with {} heads", "ratios": "layers with FFN ratio {}"}[key]
            rows += [[title.format(choice), *(f"{value[choice]:.0%}" for value in values)] for choice in values[0]]
        else:
            title = COSTS.get(key, key.replace("num_subnets", "subnets"))
            rows.append([title, *(f"{value:,.0f}" if value >= 1000 else f"{value:.4g}" for value in values)])
    lines = [
        f"# {report['num_evaluations']} subnets, {report['fitness']}",
        "## Which choices matter",
        "Fraction of the variance of the error that each explains (fANOVA):",
        markdown_table(("choice", "fraction"), importance),
        f"## Along the front, by {COSTS[report['cost']]}",
        markdown_table(("", *front), rows),
    ]
    if trained := report.get("further_training"):
        errors = [[f"{each['params']:,}", *(f"{each[when]:.4f}" for when in WHEN)] for each in trained["subnets"]]
        lines += [
            "## After further training",
            f"{len(errors)} subnets from the best to the worst, each trained alone for {trained['steps']} steps:"
            f" {format_correlation(trained)}.",
            markdown_table(("parameters", *WHEN.values()), errors),
        ]
    return "\n\n".join(lines) + "\n"


def format_correlation(trained: Mapping[str, Any]) -> str:
    """Spearman's rho and p in words."""
    if trained["spearman"] is None:
        return "no rank correlation, because all errors are the same"
    return f"Spearman's rank correlation {trained['spearman']:.2f} (p = {trained['p']:.2g})"


def plot_report(report: Mapping[str, Any], path: Path) -> None:
    """Plots fractions of layers along the front and, if it was measured, error after training against error before."""
    front, trained = report["front"], report.get("further_training")
    figure, panels = new_figure(3 if trained else 2, (12 if trained else 8, 3.6))
    for axes, key, title in zip(panels, ("heads", "ratios"), ("attention heads", "FFN ratio"), strict=False):
        bottom = [0.0] * len(front)
        for choice in next(iter(front.values()))[key]:
            heights = [third[key][choice] for third in front.values()]
            axes.bar(list(front), heights, bottom=bottom, label=choice)
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
        axes.set(ylabel="fraction of layers", title=title)
        axes.legend()
    if trained:
        points = [(each["supernet"], each["trained"]) for each in trained["subnets"]]
        panels[2].plot(*zip(*points, strict=True), "o")
        panels[2].set(xlabel=WHEN["supernet"], ylabel=WHEN["trained"], title=format_correlation(trained))
    save_figure(figure, path)
