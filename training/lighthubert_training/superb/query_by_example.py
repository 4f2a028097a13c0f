"""Query by example: where a spoken word occurs, without learning. Every layer's frames are aligned, and the layer that
does best on the dev part is measured on the test part.

As in s3prl: features normalised over all recordings, exp(cosine distance) - 1 scaled to 0 ... 1 for each frame of the
query, and the cheapest path through any part of the document that moves by one frame in the query and by none to two
in the document; scores are normalised for each query.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from lighthubert_training.superb.data import Part, Recipe, load_part, load_table
from lighthubert_training.superb.features import Recordings
from lighthubert_training.superb.metrics import maximum_term_weighted_value


SHORTEST_QUERY = 5
"""Frames; a shorter query is not looked for."""
DOCUMENTS_AT_ONCE = 64


class QueryByExample:
    """The task.

    Attributes:
        parts: queries and documents of dev and test.
        relevant: of dev and test, bool (num_queries, num_documents).
    """

    higher_is_better = {"mtwv": True}

    def __init__(self, recipe: Recipe, data_dir: Path | None):
        self.recipe = recipe
        self.parts: dict[str, Part] = {}
        self.relevant: dict[str, np.ndarray] = {}
        for name in ("dev", "test"):
            for kind in ("queries", "documents"):
                self.parts[f"{name}_{kind}"] = load_part(recipe, data_dir, f"{name}_{kind}", ("id",))
            queries, documents = (
                {str(row["id"]): at for at, row in enumerate(self.parts[f"{name}_{kind}"].rows)}
                for kind in ("queries", "documents")
            )
            self.relevant[name] = np.zeros((len(queries), len(documents)), dtype=bool)
            for row in load_table(recipe, data_dir, f"{name}_pairs", ("query", "document")):
                for column, known in (("query", queries), ("document", documents)):
                    if str(row[column]) not in known:
                        raise ValueError(f"{recipe.task}: {name}_pairs.csv names {row[column]}, which is no {column}")
                self.relevant[name][queries[str(row["query"])], documents[str(row["document"])]] = True

    def scores(self, recordings: dict[str, Recordings], accelerator: Accelerator) -> dict[str, Any]:
        """`mtwv` of the `test` and of the `dev` part, and the `layer` that is best on the latter: for all processes,
        which share the documents."""

        def values(name: str, layers: Sequence[int]) -> list[float]:
            queries, documents = recordings[f"{name}_queries"], recordings[f"{name}_documents"]
            scores = detection_scores(queries, documents, layers, accelerator)
            return [maximum_term_weighted_value(self.relevant[name], of_layer) for of_layer in scores]

        on_dev = values("dev", range(recordings["dev_queries"].upstream.num_layers))
        layer = int(np.argmax(on_dev))
        (on_test,) = values("test", [layer])
        return {"test": {"mtwv": on_test}, "dev": {"mtwv": on_dev[layer]}, "layer": layer}


def detection_scores(
    queries: Sequence[torch.Tensor],
    documents: Sequence[torch.Tensor],
    layers: Sequence[int],
    accelerator: Accelerator,
) -> np.ndarray:
    """How likely each query is in each document, by each of `layers`: (num_layers, num_queries, num_documents).

    Args:
        queries: hidden states, each (all layers, num_frames, hidden_size); they are all kept in memory.
        documents: likewise, but each is read twice, and few are kept at a time. Processes share them.
    """
    chosen = list(layers)
    mean, deviation = moments(
        states[chosen] for part in (queries, documents) for states in map(part.__getitem__, range(len(part)))
    )

    def unit_vectors(states: torch.Tensor) -> torch.Tensor:
        return F.normalize((states[chosen] - mean) / deviation, dim=-1)

    asked = [unit_vectors(queries[at]) for at in range(len(queries))]
    share = np.array_split(np.arange(len(documents)), accelerator.num_processes)[accelerator.process_index].tolist()
    of_share = torch.zeros(len(chosen), len(queries), len(share))
    starts = range(0, len(share), DOCUMENTS_AT_ONCE)
    for start in tqdm(starts, desc="aligning", leave=False, disable=not accelerator.is_main_process):
        some = [unit_vectors(documents[at]) for at in share[start : start + DOCUMENTS_AT_ONCE]]
        lengths = torch.tensor([each.shape[1] for each in some])
        padded = pad_sequence([each.transpose(0, 1) for each in some], batch_first=True)
        frames = torch.arange(padded.shape[1]) < lengths[:, None]
        for number, query in enumerate(asked):
            for layer in range(len(chosen)) if query.shape[1] >= SHORTEST_QUERY else ():
                cost = subsequence_cost(query[layer], padded[:, :, layer], frames)
                of_share[layer, number, start : start + len(some)] = -cost
    scores = torch.cat(gather_object([of_share]), dim=-1)
    centred = scores - scores.mean(dim=-1, keepdim=True)
    return (centred / scores.std(dim=-1, keepdim=True, correction=0).clamp(min=1e-9)).numpy()


def moments(hidden_states: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of every feature over all frames, each (num_layers, 1, hidden_size)."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for states in hidden_states:
        states, count = states.double(), count + states.shape[1]
        total, squares = total + states.sum(dim=1), squares + states.square().sum(dim=1)
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0) * count / max(1, count - 1)
    return mean.float().unsqueeze(1), variance.sqrt().float().clamp(min=1e-9).unsqueeze(1)


def subsequence_cost(query: torch.Tensor, documents: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Mean cost of the cheapest alignment of a query with a part of each document, (num_documents).

    Args:
        query: unit vectors, (num_query_frames, hidden_size).
        documents: unit vectors, (num_documents, num_frames, hidden_size).
        frames: which of these are no padding, bool (num_documents, num_frames).
    """
    costs = (1 - documents @ query.t()).exp() - 1  # (num_documents, num_frames, num_query_frames)
    lowest = costs.masked_fill(~frames[..., None], float("inf")).amin(dim=1, keepdim=True)
    highest = costs.masked_fill(~frames[..., None], -float("inf")).amax(dim=1, keepdim=True)
    costs = ((costs - lowest) / (highest - lowest).clamp(min=1e-9)).masked_fill(~frames[..., None], float("inf"))
    paths = costs[..., 0]  # an alignment may begin anywhere
    for step in costs.unbind(dim=-1)[1:]:
        one, two = (F.pad(paths, (shift, 0), value=float("inf"))[:, : paths.shape[1]] for shift in (1, 2))
        paths = step + torch.minimum(paths, torch.minimum(one, two))
    return paths.amin(dim=1) / len(query)
