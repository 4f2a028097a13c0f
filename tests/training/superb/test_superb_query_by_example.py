"""Query by example: alignments cost what the cheapest path costs, and queries are found where they occur."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import DEVICE, new_accelerator, noise

from lighthubert_training.superb import query_by_example
from lighthubert_training.superb.query_by_example import detection_scores, moments, subsequence_cost


def brute_force_cost(costs: np.ndarray) -> float:
    """The cheapest of all paths that move by one in the query and by 0, 1 or 2 in the document."""

    def cheapest(step: int, frame: int) -> float:
        before = [cheapest(step - 1, frame - move) for move in (0, 1, 2) if frame >= move] if step else [0.0]
        return costs[frame, step] + min(before)

    num_frames, num_steps = costs.shape
    return min(cheapest(num_steps - 1, frame) for frame in range(num_frames)) / num_steps


def test_the_cost_of_an_alignment_is_that_of_the_cheapest_path():
    query, document = (torch.nn.functional.normalize(noise(size, 5, seed=size).cpu(), dim=-1) for size in (4, 7))
    costs = (1 - document @ query.t()).exp() - 1
    costs = (costs - costs.amin(dim=0)) / (costs.amax(dim=0) - costs.amin(dim=0))
    padded = torch.nn.functional.pad(document, (0, 0, 0, 3))[None]
    frames = torch.arange(10)[None] < 7
    assert float(subsequence_cost(query, padded, frames)) == pytest.approx(brute_force_cost(costs.numpy()), rel=1e-5)


def test_a_query_is_found_where_it_occurs_and_one_that_is_too_short_nowhere():
    query = noise(2, 8, 16, seed=1)
    there = torch.cat([noise(2, 9, 16, seed=3), query, noise(2, 12, 16, seed=4)], dim=1)
    documents = [noise(2, 30, 16, seed=2), there]
    scores = detection_scores([query, query[:, :4]], documents, range(2), new_accelerator())
    assert (scores[:, 0, 1] > scores[:, 0, 0]).all()
    assert (scores[:, 1, 0] == scores[:, 1, 1]).all()


def test_a_layer_is_scored_the_same_alone_and_documents_whatever_they_are_read_with(monkeypatch):
    queries, documents = ([noise(3, size, 6, seed=size) for size in sizes] for sizes in ((6, 9), (20, 31, 12)))
    together = detection_scores(queries, documents, range(3), new_accelerator())
    monkeypatch.setattr(query_by_example, "DOCUMENTS_AT_ONCE", 1)
    (alone,) = detection_scores(queries, documents, [1], new_accelerator())
    np.testing.assert_allclose(alone, together[1], rtol=1e-4, atol=1e-5)


class Process:
    """One of two, which are threads here: as much of Accelerate as the scores need."""

    num_processes, barrier, shards = 2, threading.Barrier(2, timeout=60), [torch.zeros(0)] * 2
    device = DEVICE

    def __init__(self, rank: int):
        self.process_index, self.is_main_process = rank, rank == 0


def test_processes_split_the_documents_and_know_all_scores(monkeypatch):
    queries, documents = ([noise(3, size, 6, seed=size) for size in sizes] for sizes in ((6, 9), (20, 31, 12, 17, 25)))
    alone = detection_scores(queries, documents, range(3), new_accelerator())
    ranks = threading.local()

    def gather(shards: list[torch.Tensor]) -> list[torch.Tensor]:
        (Process.shards[ranks.rank],) = shards
        Process.barrier.wait()
        return Process.shards

    def scores_of(rank: int) -> np.ndarray:
        ranks.rank = rank
        return detection_scores(queries, documents, range(3), Process(rank))

    monkeypatch.setattr(query_by_example, "gather_object", gather)
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(scores_of, range(2))
    assert [shard.shape for shard in Process.shards] == [(3, 2, 3), (3, 2, 2)]
    assert np.array_equal(first, second)
    np.testing.assert_allclose(first, alone, rtol=1e-4, atol=1e-5)


def test_moments_are_those_of_all_frames_together():
    states = [5 + noise(2, size, 4, seed=size) for size in (3, 7)]
    mean, deviation = moments(states)
    together = torch.cat(states, dim=1)
    torch.testing.assert_close(mean[:, 0], together.mean(dim=1))
    torch.testing.assert_close(deviation[:, 0], together.std(dim=1))
