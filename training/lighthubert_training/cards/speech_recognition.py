"""The card of a model that was fine-tuned with CTC."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from lighthubert_training.cards.render import (
    NUM_AVAILABLE,
    NUM_RECORDINGS,
    is_partial,
    public_name,
    render,
    save_card,
)
from modeling_lighthubert.profiling import macs_per_second


def write_recognition_card(
    model: Any, start: str, sources: Mapping[str, str], results: Mapping[str, Any], folder: Path
) -> None:
    """Writes `README.md`, with the measured error rates, as fractions, in its metadata, but for those of a small part
    of the data.

    Args:
        sources: what each part of the data is called.
        results: metrics by part, `eval` and `test`, with the numbers of their recordings.
    """
    counts = {
        part: {name: metrics[f"{part}_{name}"] for name in (NUM_RECORDINGS, NUM_AVAILABLE)}
        for part, metrics in results.items()
    }
    measured = [
        EvalResult(
            task_type="automatic-speech-recognition",
            dataset_type="speech",
            dataset_name=sources[part],
            metric_type=measure,
            metric_value=round(metrics[f"{part}_{measure}"], 4),
        )
        for part, metrics in results.items()
        if not is_partial(counts[part])
        for measure in ("wer", "cer")
    ]
    supernet = getattr(model, "search_space", None)
    card = render(
        "speech_recognition",
        ModelCardData(
            model_name=folder.resolve().name,
            library_name="transformers",
            pipeline_tag="automatic-speech-recognition",
            tags=["speech", "hubert", *(["lighthubert"] if hasattr(model, "subnet") else [])],
            eval_results=measured or None,
        ),
        name=folder.resolve().name,
        space=supernet,
        num_parameters=model.num_parameters(),
        macs=macs_per_second(model) if hasattr(model, "subnet") else None,
        subnets=[] if supernet is None else list(supernet.named),
        start=public_name(start),
        sources=sources,
        results=results,
        counts=counts,
    )
    save_card(card, folder / "README.md")
