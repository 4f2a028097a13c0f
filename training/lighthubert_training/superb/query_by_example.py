"""Query by example: in which documents a spoken query occurs. Nothing is trained: the frames of every layer are
aligned, and the layer that is best on the dev part is scored on the test part.

As in s3prl: features are normalised over all recordings; the cost of two frames is exp(cosine distance) - 1, scaled to
0 ... 1 for each frame of the query; the cheapest path through any part of the document moves by one frame in the query
and by 0 to 2 in the document; scores are normalised for each query.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from lighthubert_training.models import frame_mask
from lighthubert_training.superb.data import TaskData
from lighthubert_training.superb.features import FeatureDataset, Features
from lighthubert_training.superb.metrics import maximum_term_weighted_value


SHORTEST_QUERY = 5
"""Frames; shorter queries are not searched for."""
DOCUMENTS_AT_ONCE = 64
States = Sequence[torch.Tensor] | FeatureDataset


class QueryByExample:
    """The task.

    Attributes:
        parts: queries and documents of dev and test.
        relevant: of dev and test, bool (num_queries, num_documents).
    """

    def __init__(self, data: TaskData):
        names = [f"{part}_{kind}" for part in ("dev", "test") for kind in ("queries", "documents")]
        self.parts = {name: data.part(name, ("id",)) for name in names}
        self.relevant = {}
        for name in ("dev", "test"):
            queries, documents = self.parts[f"{name}_queries"], self.parts[f"{name}_documents"]
            self.relevant[name] = np.zeros((len(queries), len(documents)), dtype=bool)
            for query, document in data.pairs(f"{name}_pairs", {"query": queries, "document": documents}):
                self.relevant[name][query, document] = True

    def scores(self, features: Features, accelerator: Accelerator) -> dict[str, Any]:
        """`mtwv` of the `test` and of the `dev` part, and the `layer` that is best on the latter. Processes split the
        documents, and return the same."""

        def values(name: str, layers: Sequence[int]) -> list[float]:
            queries, documents = features[f"{name}_queries"], features[f"{name}_documents"]
            scores = detection_scores(queries, documents, layers, accelerator)
            return [maximum_term_weighted_value(self.relevant[name], of_layer) for of_layer in scores]

        on_dev = values("dev", range(features["dev_queries"].upstream.num_layers))
        layer = int(np.argmax(on_dev))
        (on_test,) = values("test", [layer])
        return {"test": {"mtwv": on_test}, "dev": {"mtwv": on_dev[layer]}, "layer": layer}


def detection_scores(
    queries: States, documents: States, layers: Sequence[int], accelerator: Accelerator
) -> np.ndarray:
    """How likely each query is in each document, by each of `layers`: (num_layers, num_queries, num_documents).

    Args:
        queries: hidden states, each (all layers, num_frames, hidden_size). All of them are kept in memory.
        documents: likewise, but each is read twice, and few are kept at a time. They are split among processes.
    """
    device = accelerator.device

    def read(states: States) -> Iterator[torch.Tensor]:
        return (states[at][list(layers)].to(device) for at in range(len(states)))

    mean, deviation = moments(itertools.chain(read(queries), read(documents)))

    def unit_vectors(states: torch.Tensor) -> torch.Tensor:
        return F.normalize((states - mean) / deviation, dim=-1)

    query_vectors = list(map(unit_vectors, read(queries)))
    shards = np.array_split(np.arange(len(documents)), accelerator.num_processes)
    shard = shards[accelerator.process_index].tolist()
    scores = torch.zeros(len(layers), len(queries), len(shard), device=device)
    starts = range(0, len(shard), DOCUMENTS_AT_ONCE)
    for start in tqdm(starts, desc="aligning", leave=False, disable=not accelerator.is_main_process):
        at_once = [documents[at] for at in shard[start : start + DOCUMENTS_AT_ONCE]]
        vectors = list(map(unit_vectors, read(at_once)))
        padded = pad_sequence([each.transpose(0, 1) for each in vectors], batch_first=True)
        frames = frame_mask(torch.tensor([each.shape[1] for each in vectors], device=device), padded.shape[1])
        for number, query in enumerate(query_vectors):
            for layer in range(len(layers)) if query.shape[1] >= SHORTEST_QUERY else ():
                cost = subsequence_cost(query[layer], padded[:, :, layer], frames)
                scores[layer, number, start : start + len(vectors)] = -cost
    scores = torch.cat(gather_object([scores.cpu()]), dim=-1)
    centred = scores - scores.mean(dim=-1, keepdim=True)
    return (centred / scores.std(dim=-1, keepdim=True, correction=0).clamp(min=1e-9)).numpy()


def moments(hidden_states: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of every feature over all frames, each (num_layers, 1, hidden_size)."""
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
        frames: which of them are true, not padding, bool (num_documents, num_frames).
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
