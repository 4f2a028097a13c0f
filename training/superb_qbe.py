"""Query by example: where a spoken word occurs, without learning. Every layer's frames are aligned, and the layer that
does best on the dev part is measured on the test part.

As in s3prl: features normalised over all recordings, exp(cosine distance) - 1 scaled to 0 ... 1 for each frame of the
query, and the cheapest path through any part of the document that moves by one frame in the query and by none to two
in the document; scores are normalised for each query.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from superb_data import Part, Recipe, load_part, load_table
from superb_features import Recordings
from superb_metrics import maximum_term_weighted_value


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

    def scores(self, recordings: dict[str, Recordings]) -> dict[str, Any]:
        """`mtwv` of the `test` and of the `dev` part, and the `layer` that is best on the latter."""
        num_layers = recordings["dev_queries"].upstream.num_layers
        on_dev = [
            self._value("dev", recordings, layer) for layer in tqdm(range(num_layers), desc="aligning", leave=False)
        ]
        layer = int(np.argmax(on_dev))
        test = self._value("test", recordings, layer)
        return {"test": {"mtwv": test}, "dev": {"mtwv": on_dev[layer]}, "layer": layer}

    def _value(self, name: str, recordings: dict[str, Recordings], layer: int) -> float:
        queries, documents = (
            [recordings[f"{name}_{kind}"][at][layer] for at in range(len(recordings[f"{name}_{kind}"]))]
            for kind in ("queries", "documents")
        )
        scores = detection_scores(queries, documents)
        return maximum_term_weighted_value(self.relevant[name], scores)


def detection_scores(queries: list[torch.Tensor], documents: list[torch.Tensor]) -> np.ndarray:
    """How likely each query is in each document, (num_queries, num_documents), of frames (num_frames, hidden_size)."""
    everything = torch.cat([*queries, *documents])
    mean, deviation = everything.mean(dim=0), everything.std(dim=0).clamp(min=1e-9)
    queries, documents = (
        [F.normalize((frames - mean) / deviation, dim=-1) for frames in each] for each in (queries, documents)
    )
    scores = torch.zeros(len(queries), len(documents))
    for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
        some = documents[start : start + DOCUMENTS_AT_ONCE]
        padded = torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
        frames = torch.arange(padded.shape[1]) < torch.tensor([len(each) for each in some])[:, None]
        for number, query in enumerate(queries):
            if len(query) >= SHORTEST_QUERY:
                scores[number, start : start + len(some)] = -subsequence_cost(query, padded, frames)
    centred = scores - scores.mean(dim=1, keepdim=True)
    return (centred / scores.std(dim=1, keepdim=True, correction=0).clamp(min=1e-9)).numpy()


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
