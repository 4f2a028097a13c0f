"""The card of a cut subnet: facts that are measured once and kept as JSON, and the model card that is made of them."""

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lighthubert_training.cards.render import render
from modeling_lighthubert import LightHubertForCTC, LightHubertForSequenceClassification, LightHubertPreTrainedModel
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.export import Runner, speed_up
from modeling_lighthubert.profiling import macs_per_second


FACTS_FILE = "facts.json"
TASKS: dict[type, tuple[str, str]] = {
    LightHubertForCTC: ("automatic-speech-recognition", "speech recognition with CTC"),
    LightHubertForSequenceClassification: ("audio-classification", "audio classification"),
}
"""Pipeline of each head, and what the card calls it."""
LIMITS = {
    "automatic-speech-recognition": "It writes what its training transcripts are like, of speech like theirs.",
    "audio-classification": "It knows the classes of its training data, and no others.",
    "feature-extraction": "Features of a self-supervised model: what they are good for on other speech than it was"
    " trained on has to be measured.",
}


def machine() -> str:
    """The processor, as far as the system tells."""
    file = Path("/proc/cpuinfo")
    names = [line for line in file.read_text().splitlines() if line.startswith("model name")] if file.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def subnet_facts(model: LightHubertPreTrainedModel, supernet: str, form: str = "transformers") -> dict[str, Any]:
    """What a cut model is, in numbers.

    Args:
        supernet: what it was cut from, by its name.
        form: in which it is shipped, `transformers` or `hubert`.
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
    """Speed on this machine, alone and against the largest subnet in fp32, both taking turns."""
    times_the_largest, latency = speed_up(largest, run, seconds, repeats)
    return {
        "seconds": seconds,
        "real_time_factor": latency / seconds,
        "times_the_largest": times_the_largest,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "torch": torch.__version__,
    }


def read_results(
    files: Sequence[str], subnet: Mapping[str, Any], names: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Figures of a subnet from JSON files that our scripts wrote: `results.json` of a search, and `eval_results.json`
    or `all_results.json` of a training run.

    Args:
        names: of the subnet in its supernet, by which the run of a supernet tells the figures of its subnets apart.
            `None`: the run was that of the model itself.

    Raises:
        UserError: a file cannot be read, is about another subnet, or has no figures of this one.
    """
    found = []
    for file in files:
        try:
            content = json.loads(Path(file).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"--results {file} cannot be read: {error}") from error
        if "fitness" in content:
            if content["best"]["subnet"] != dict(subnet):
                raise UserError(f"--results {file} is about another subnet than this: give the best.json beside it")
            found.append({"metric": content["fitness"], "value": content["best"]["error"]})
            continue
        figures = {
            name.removeprefix("eval_").removeprefix("test_"): value
            for name, value in content.items()
            if name.startswith(("eval_", "test_")) and not name.endswith(("_runtime", "_per_second"))
        }
        if names is not None:
            figures = {
                figure.removesuffix(f"_{name}"): value
                for figure, value in figures.items()
                for name in names
                if figure.endswith(f"_{name}")
            }
        if not figures:
            raise UserError(
                f"--results {file} has no figures of this subnet: give eval_results.json of its training, or"
                " results.json of the search that found it"
            )
        found += [{"metric": name, "value": value} for name, value in figures.items()]
    return found


EXAMPLES = {
    "automatic-speech-recognition": 'recogniser = pipeline("automatic-speech-recognition", model="{name}"{remote})\n'
    'recogniser("recording.wav")["text"]',
    "audio-classification": 'classifier = pipeline("audio-classification", model="{name}"{remote})\n'
    'classifier("recording.wav")',
    "feature-extraction": 'extractor = AutoFeatureExtractor.from_pretrained("{name}")\n'
    'model = AutoModel.from_pretrained("{name}"{remote})\n'
    'inputs = extractor(waveform, sampling_rate=16_000, return_tensors="pt")\n'
    "features = model(**inputs).last_hidden_state",
}


def example(name: str, pipeline_tag: str, form: str) -> str:
    """How the model is used, as Python."""
    classes = "AutoFeatureExtractor, AutoModel" if pipeline_tag == "feature-extraction" else "pipeline"
    remote = ", trust_remote_code=True" if form == "transformers" else ""
    return f"from transformers import {classes}\n\n" + EXAMPLES[pipeline_tag].format(name=name, remote=remote)


def render_subnet_card(
    facts: Mapping[str, Any],
    name: str,
    license: str,
    training_data: str,
    dataset: str | None = None,
    language: str | None = None,
    limits: str | None = None,
) -> ModelCard:
    """The card. Every figure in it is from `facts`.

    Args:
        facts: of `subnet_facts`, with `speed`, `results` and `teacher` as far as they are known.
        name: of the repository.
        dataset: what the results were measured on.
        limits: Default: what holds for the task.
    """
    results, tag = facts.get("results", []), facts["pipeline_tag"]
    measured = [
        EvalResult(
            task_type=tag,
            dataset_type="speech",
            dataset_name=dataset or "held-out speech",
            metric_type=each["metric"].replace(" ", "_"),
            metric_name=each["metric"],
            metric_value=round(each["value"], 4),
        )
        for each in results
    ]
    lines = ["| figure | value |", "|---|---|", *(f"| {each['metric']} | {each['value']:.4f} |" for each in results)]
    return render(
        "subnet",
        ModelCardData(
            model_name=name,
            language=language,
            license=license,
            library_name="transformers",
            pipeline_tag=tag,
            tags=["speech", "hubert", "lighthubert"],
            eval_results=measured or None,
        ),
        name=name,
        supernet=facts["cut_from"],
        teacher=facts.get("teacher"),
        task=facts["task"],
        form=facts["form"],
        subnet=facts["subnet"],
        num_parameters=facts["num_parameters"],
        macs_per_second=facts["macs_per_second"],
        speed=facts.get("speed"),
        hubert_exportable=facts["hubert_exportable"],
        example=example(name, tag, facts["form"]),
        training_data=training_data,
        results="\n".join([f"On {dataset or 'held-out speech'}:", "", *lines]) if results else "It was not evaluated.",
        limits=limits or LIMITS[tag],
    )
