"""What a search teaches: which choices matter, what good subnets look like from the cheap to the dear, and whether
the error of a subnet that was only taken out says how good it is after further training."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import optuna
import torch
from scipy.stats import spearmanr
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm
from transformers import get_scheduler, set_seed

from lighthubert_training.search.candidates import COSTS
from lighthubert_training.search.fitness import Fitness
from lighthubert_training.search.ledger import Evaluation
from lighthubert_training.search.search import Search
from modeling_lighthubert import LightHubertPreTrainedModel, SearchSpace, Subnet


matplotlib.use("Agg")
from matplotlib import pyplot


PARTS_OF_FRONT = ("cheapest", "middle", "dearest")


def choices(space: SearchSpace, subnet: Subnet) -> dict[str, float]:
    """A subnet in the few numbers that its choices come to."""
    subnet = space.resolve(subnet)
    ratios = [units / subnet.hidden_size for units in subnet.intermediate_size]
    summed = {
        "hidden_size": subnet.hidden_size,
        "num_hidden_layers": subnet.num_hidden_layers,
        "num_attention_heads, mean": statistics.mean(subnet.num_attention_heads),
        "ffn_ratio, mean": statistics.mean(ratios),
    }
    if subnet.conv_dim is not None:
        summed["conv_dim, mean"] = statistics.mean(subnet.conv_dim)
    if subnet.attention_window is not None:
        summed["attention_window, share of layers"] = statistics.mean(
            window is not None for window in subnet.attention_window
        )
    return {name: float(value) for name, value in summed.items()}


def importances(search: Search, space: SearchSpace) -> dict[str, float]:
    """Share of the variance of the error that each choice explains, by Optuna's fANOVA, the largest first.

    Choices that were the same in all evaluations are left out; where all errors are, too, there is nothing to say.
    """
    rows = [choices(space, each.subnet) for each in search.complete]
    ends = {name: (min(row[name] for row in rows), max(row[name] for row in rows)) for name in rows[0]}
    distributions = {
        name: optuna.distributions.FloatDistribution(*ends_of)
        for name, ends_of in ends.items()
        if len(set(ends_of)) > 1
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


def shares(values: Sequence[float], allowed: Sequence[float]) -> dict[str, float]:
    """How much of `values` is each of what is allowed."""
    return {f"{choice:g}": sum(value == choice for value in values) / len(values) for choice in allowed}


def along_the_front(search: Search, space: SearchSpace, cost: str) -> dict[str, dict[str, Any]]:
    """Thirds of the front: error, costs, and the share of layers by heads and FFN ratio."""
    front, described = search.front(cost), {}
    for number, name in enumerate(PARTS_OF_FRONT):
        part = front[number * len(front) // 3 : (number + 1) * len(front) // 3]
        if not part:
            continue
        subnets = [space.resolve(each.subnet) for each in part]
        heads = [heads for subnet in subnets for heads in subnet.num_attention_heads]
        ratios = [
            nearest(units / subnet.hidden_size, space.ffn_ratio)
            for subnet in subnets
            for units in subnet.intermediate_size
        ]
        costs, rows = [search.costs[each.number] for each in part], [choices(space, subnet) for subnet in subnets]
        described[name] = {
            "num_subnets": len(part),
            "error": statistics.mean(map(search.error, part)),
            **{key: statistics.mean(each[key] for each in costs) for key in costs[0]},
            **{key: statistics.mean(row[key] for row in rows) for key in rows[0]},
            "heads": shares(heads, space.num_attention_heads),
            "ratios": shares(ratios, space.ffn_ratio),
        }
    return described


def nearest(value: float, allowed: Sequence[float]) -> float:
    """FFN units are whole, so their ratio to the width may be a little less than what was chosen."""
    return min(allowed, key=lambda choice: abs(choice - value))


@dataclass
class FurtherTraining:
    """Training of single subnets, each from the weights of the supernet.

    Attributes:
        loss: mean loss of the selected subnet on one of `batches`.
    """

    model: LightHubertPreTrainedModel
    loss: Callable[[Any], torch.Tensor]
    batches: Sequence[Any]
    steps: int
    learning_rate: float
    seed: int

    def errors(self, fitness: Fitness, subnets: Sequence[Subnet]) -> list[float]:
        """Errors of the subnets after training, each alone. The supernet is left as it was."""
        kept = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        errors = []
        with tqdm(total=self.steps * len(subnets), desc="further training") as bar:
            for subnet in subnets:
                self.train(subnet, bar)
                *_, error = fitness.errors(subnet)
                errors.append(error)
                self.model.load_state_dict(kept)
        return errors

    def train(self, subnet: Subnet, bar: tqdm) -> None:
        """AdamW, warm-up in a tenth of the steps and linear decay. A frozen feature encoder stays so."""
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


def spread(search: Search, number: int) -> list[Evaluation]:
    """Evaluations from the best to the worst, evenly spaced in rank."""
    ranked = sorted(search.complete, key=search.error)
    number = min(number, len(ranked))
    return [ranked[rank * (len(ranked) - 1) // max(1, number - 1)] for rank in range(number)]


def rank_correlation(search: Search, training: FurtherTraining, num_subnets: int) -> dict[str, Any]:
    """Spearman's, of the error in the supernet and the error after further training; `None` where all are equal.

    Raises:
        ValueError: too few evaluations for that many subnets.
    """
    if len(search.complete) < num_subnets:
        raise ValueError(f"{len(search.complete)} evaluations are too few for a report on {num_subnets} subnets")
    chosen = spread(search, num_subnets)
    before = [search.error(each) for each in chosen]
    after = training.errors(search.fitness, [each.subnet for each in chosen])
    varies = len(set(before)) > 1 and len(set(after)) > 1
    correlation, probability = spearmanr(before, after) if varies else (None, None)
    rows = [
        {"subnet": each.subnet.to_dict(), **search.costs[each.number], "supernet": one, "trained": other}
        for each, one, other in zip(chosen, before, after, strict=True)
    ]
    return {"spearman": correlation, "p": probability, "steps": training.steps, "subnets": rows}


def write_report(
    search: Search, space: SearchSpace, folder: Path, cost: str, training: FurtherTraining | None, num_subnets: int
) -> None:
    """`report.json`, `report.md`, and `report.png`.

    Args:
        cost: along which the front is described.
        training: without it, no subnet is trained further.
    """
    report: dict[str, Any] = {
        "fitness": search.fitness.name,
        "num_evaluations": len(search.complete),
        "cost": cost,
        "importance": importances(search, space),
        "front": along_the_front(search, space, cost),
    }
    if training is not None:
        report["further_training"] = rank_correlation(search, training, num_subnets)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "report.md").write_text(markdown(report))
    plot(report, folder / "report.png")


def markdown(report: Mapping[str, Any]) -> str:
    """The report, to read."""
    lines = [f"# {report['num_evaluations']} subnets, {report['fitness']}", ""]
    lines += ["## Which choices matter", "", "Share of the variance of the error that each explains (fANOVA):", ""]
    lines += ["| choice | share |", "|---|---|"]
    lines += [f"| {name} | {share:.0%} |" for name, share in report["importance"].items()]
    front = report["front"]
    lines += ["", f"## Along the front, by {COSTS[report['cost']]}", "", f"|  | {' | '.join(front)} |"]
    lines += [f"|---|{'---|' * len(front)}"]
    for name in next(iter(front.values())):
        values = [part[name] for part in front.values()]
        if isinstance(values[0], dict):
            title = {"heads": "layers with {} heads", "ratios": "layers with FFN ratio {}"}[name]
            lines += [row(title.format(key), [f"{value[key]:.0%}" for value in values]) for key in values[0]]
        else:
            lines.append(
                row(COSTS.get(name, name.replace("num_subnets", "subnets")), [rounded(value) for value in values])
            )
    if trained := report.get("further_training"):
        lines += ["", "## After further training", ""]
        lines += [
            f"{len(trained['subnets'])} subnets from the best to the worst, each trained alone for"
            f" {trained['steps']} steps: {in_words(trained)}.",
            "",
            "| parameters | error in the supernet | after training |",
            "|---|---|---|",
        ]
        lines += [
            f"| {each['params']:,} | {each['supernet']:.4f} | {each['trained']:.4f} |" for each in trained["subnets"]
        ]
    return "\n".join(lines) + "\n"


def in_words(trained: Mapping[str, Any]) -> str:
    """The rank correlation."""
    if trained["spearman"] is None:
        return "no rank correlation, for all errors are the same"
    return f"Spearman's rank correlation {trained['spearman']:.2f} (p = {trained['p']:.2g})"


def row(title: str, cells: Sequence[str]) -> str:
    return f"| {title} | {' | '.join(cells)} |"


def rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Shares of layers along the front and, if it was measured, error after training against error before."""
    front, trained = report["front"], report.get("further_training")
    figure, panels = pyplot.subplots(1, 3 if trained else 2, figsize=(12 if trained else 8, 3.6))
    for axes, key, title in zip(panels, ("heads", "ratios"), ("attention heads", "FFN ratio"), strict=False):
        bottom = [0.0] * len(front)
        for choice in next(iter(front.values()))[key]:
            heights = [part[key][choice] for part in front.values()]
            axes.bar(list(front), heights, bottom=bottom, label=choice)
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
        axes.set(ylabel="share of layers", title=title)
        axes.legend()
    if trained:
        points = [(each["supernet"], each["trained"]) for each in trained["subnets"]]
        panels[2].plot(*zip(*points, strict=True), "o")
        panels[2].set(xlabel="error in the supernet", ylabel="after further training")
        panels[2].set_title(in_words(trained))
        panels[2].grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
