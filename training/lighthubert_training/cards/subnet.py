"""The card of a cut subnet: facts that are measured once and kept as JSON, and the model card that is made of them."""

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lighthubert_training.cards.render import NUM_AVAILABLE, NUM_RECORDINGS, is_partial, render
from modeling_lighthubert import LightHubertForCTC, LightHubertForSequenceClassification, LightHubertPreTrainedModel
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.export import Runner, speed_up
from modeling_lighthubert.profiling import macs_per_second


FACTS_FILE = "facts.json"
COUNTS = (NUM_RECORDINGS, NUM_AVAILABLE)
RATES = ("wer", "cer", "character error rate", "probe error")
"""Metrics that are fractions in JSON and in metadata, and percentages in text."""
TASKS: dict[type, tuple[str, str]] = {
    LightHubertForCTC: ("automatic-speech-recognition", "speech recognition with CTC"),
    LightHubertForSequenceClassification: ("audio-classification", "audio classification"),
}
"""The pipeline of transformers for each head, and what the card calls its task."""


def subnet_facts(model: LightHubertPreTrainedModel, supernet: str, form: str = "transformers") -> dict[str, Any]:
    """What a cut model is, as JSON; the rest of the facts are `teacher`, `speed`, `results` and `sha256`.

    Args:
        supernet: name of what it was cut from.
        form: in which it is published, `transformers` or `hubert`.
    """
    subnet = model.subnet
    pipeline_tag, task = TASKS.get(type(model), ("feature-extraction", None))
    return {
        "cut_from": supernet,
        "form": form,
        "pipeline_tag": pipeline_tag,
        "task": task,
        "subnet": subnet.to_dict(),
        "num_parameters": model.num_parameters(),
        "macs_per_second": macs_per_second(model),
        "hubert_exportable": subnet.is_hubert_exportable,
    }


def measured_speed(run: Runner, largest: Runner, dtype: str, repeats: int, seconds: float = 5.0) -> dict[str, Any]:
    """Speed on this machine, alone and against the largest subnet in fp32, both taking turns: the facts `speed`.

    Args:
        dtype: of the weights that `run` runs.
        seconds: of audio in each run.
    """
    times_the_largest, latency = speed_up(largest, run, seconds, repeats)
    return {
        "seconds": seconds,
        "real_time_factor": latency / seconds,
        "times_the_largest": times_the_largest,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }


def read_results(
    files: Sequence[str], subnet: Mapping[str, Any], names: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Figures of a subnet, as `training_figures` gives them, from JSON files that our scripts wrote: `results.json` of
    a search, and `eval_results.json` or `all_results.json` of a training run.

    Args:
        names: of the subnet in its supernet, by which the run of a supernet tells the figures of its subnets apart.
            `None`: the run was that of the model itself.

    Raises:
        UserError: a file cannot be read, is about another subnet, has no figures of this one, or figures of a part of
            the data.
    """
    found = []
    for file in files:
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"--results {file} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise UserError(f"--results {file} is no JSON object: give a file that a search or a training run wrote")
        if "fitness" not in content:
            figures = training_figures(content, names)
        elif content["best"]["subnet"] == dict(subnet):
            counts = {name: content[name] for name in COUNTS if name in content}
            figures = [{"metric": content["fitness"], "value": content["best"]["error"]} | counts]
        else:
            raise UserError(f"--results {file} is about another subnet than this: give the best.json beside it")
        if not figures:
            raise UserError(
                f"--results {file} has no figures of this subnet: give eval_results.json of its training, or"
                " results.json of the search that found it"
            )
        for figure in figures:
            if is_partial(figure):
                raise UserError(
                    f"--results {file} is of {figure[NUM_RECORDINGS]} of {figure[NUM_AVAILABLE]} recordings, and no"
                    " result of all of them: evaluate with --max_eval_samples none"
                )
        found += figures
    return found


def training_figures(results: Mapping[str, float], names: Sequence[str] | None) -> list[dict[str, Any]]:
    """Figures of a subnet in the results of a training run: each `metric` and `value`, and, if they are known, on how
    many recordings of how many they were measured. A figure of the test data goes before that of the evaluation data.

    Results are named as Trainer names them, `{part}_{metric}`, and those of a supernet `{part}_{metric}_{subnet}`,
    where the part is `eval` or `test`. How long a part took is no figure.

    Args:
        names: of the subnet; `None` for the run of one model.
    """
    figures: dict[str, dict[str, Any]] = {}
    for part in ("eval", "test"):
        counts = {name: results[f"{part}_{name}"] for name in COUNTS if f"{part}_{name}" in results}
        for name, value in results.items():
            metric = name.removeprefix(f"{part}_")
            if metric == name or metric in (*COUNTS, "runtime") or metric.endswith("_per_second"):
                continue
            if names is None:
                figures[metric] = {"metric": metric, "value": value} | counts
            for each in names or ():
                if metric.endswith(f"_{each}"):
                    of_subnet = metric.removesuffix(f"_{each}")
                    figures[of_subnet] = {"metric": of_subnet, "value": value} | counts
    return list(figures.values())


def render_subnet_card(
    facts: Mapping[str, Any],
    name: str,
    license: str,
    training_data: str,
    dataset: str | None = None,
    language: str | None = None,
    limits: str | None = None,
) -> ModelCard:
    """The card. Every figure in it is one of `facts`.

    Args:
        facts: of `subnet_facts`, with `teacher`, `speed` and `results` as far as they are known.
        name: of the repository.
        license: identifier, such as `apache-2.0`.
        training_data: what the model was trained on, in words.
        dataset: what the results were measured on. Default: held-out speech.
        limits: what the model cannot do, in words. Default: what holds for its task.
    """
    dataset, results = dataset or "held-out speech", facts.get("results", [])
    measured = [
        EvalResult(
            task_type=facts["pipeline_tag"],
            dataset_type="speech",
            dataset_name=dataset,
            metric_type=result["metric"].replace(" ", "_"),
            metric_name=result["metric"],
            metric_value=round(result["value"], 4),
        )
        for result in results
        if not is_partial(result)
    ]
    data = ModelCardData(
        model_name=name,
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag=facts["pipeline_tag"],
        tags=["speech", "hubert", "lighthubert"],
        eval_results=measured or None,
    )
    known = {"teacher": None, "speed": None, **facts, "results": results, "rates": RATES}
    return render("subnet", data, name=name, training_data=training_data, dataset=dataset, limits=limits, **known)
