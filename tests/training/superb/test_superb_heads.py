"""SUPERB's heads: what they compute by hand, and that padding changes nothing."""

import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import noise
from scripts import run
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lighthubert_training.superb.heads import (
    FrameClassifier,
    RecurrentClassifier,
    RecurrentLayer,
    SpeakerEmbedder,
    UtteranceClassifier,
    WeightedSum,
    spans_masked,
)
from lighthubert_training.superb.query_by_example import detection_scores, moments, subsequence_cost
from lighthubert_training.superb.tasks import turns_of


HEADS = {
    "utterance": lambda: UtteranceClassifier(6, 3, projector_size=4),
    "frames": lambda: FrameClassifier(6, 3, projector_size=4),
    "one direction": lambda: RecurrentClassifier(6, 3, lstm_size=4, num_layers=1, bidirectional=False),
    "both directions": lambda: RecurrentClassifier(6, 3, 4, num_layers=2, bidirectional=True, projector_size=5),
    "speaker": lambda: SpeakerEmbedder(6, embedding_size=5, pooled_size=7),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_recording_is_heard_the_same_alone_and_padded(name):
    torch.manual_seed(0)
    head, long, short = HEADS[name]().eval(), noise(1, 40, 6), noise(1, 25, 6, seed=1)
    padded = torch.nn.functional.pad(short, (0, 0, 0, 15), value=3.0)
    together = head(torch.cat([long, padded]), torch.tensor([40, 25]))
    for row, (alone, length) in enumerate(((long, 40), (short, 25))):
        expected = head(alone, torch.tensor([length]))[0]
        torch.testing.assert_close(together[row][:length] if expected.ndim == 2 else together[row], expected)


def test_the_layers_are_summed_with_equal_weights_until_they_learn():
    hidden_states = noise(2, 3, 5, 4)
    weighted = WeightedSum(3)
    torch.testing.assert_close(weighted(hidden_states), hidden_states.mean(dim=1))
    weighted.weights.data = torch.tensor([0.0, 1.0, -1.0])
    share = torch.tensor([1.0, np.e, 1 / np.e]) / (1 + np.e + 1 / np.e)
    expected = sum(share[layer] * hidden_states[:, layer] for layer in range(3))
    torch.testing.assert_close(weighted(hidden_states), expected)


def test_a_layer_in_both_directions_is_torchs_on_packed_sequences():
    ours, torchs = RecurrentLayer(6, 4, bidirectional=True), torch.nn.LSTM(6, 4, batch_first=True, bidirectional=True)
    for name, tensor in torchs.named_parameters():
        onward, backward = ours.onward.state_dict(), ours.backward_in_time.state_dict()
        part = backward[name.removesuffix("_reverse")] if name.endswith("_reverse") else onward[name]
        tensor.data = part.clone()
    features, lengths = noise(3, 9, 6), torch.tensor([9, 4, 6])
    packed = pack_padded_sequence(features, lengths, batch_first=True, enforce_sorted=False)
    expected, _ = pad_packed_sequence(torchs(packed)[0], batch_first=True)
    found = ours(features, lengths)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(found[row, :length], expected[row, :length])


def test_masked_spans_are_zeros_inside_the_recording():
    features, lengths = torch.ones(3, 300, 60), [300, 300, 30]
    masked = spans_masked(features, lengths, [random.Random(seed) for seed in (1, 2, 1)]) == 0
    assert features.eq(1).all()
    for row, length in zip(masked, lengths, strict=True):
        frames, dims = row.all(dim=1), row[~row.all(dim=1)].all(dim=0)
        assert 0 < frames.sum() <= min(2 * 40, 2 * length // 5) and not frames[length:].any()
        assert 0 < dims.sum() <= 4 * 60 // 5
        assert torch.equal(row, frames[:, None] | dims)
    assert not torch.equal(masked[0], masked[1])
    alone = spans_masked(features[1:2], lengths[1:2], [random.Random(2)]) == 0
    assert torch.equal(alone[0], masked[1])


def brute_force_cost(costs: np.ndarray) -> float:
    """The cheapest of all paths that move by one in the query and by 0, 1 or 2 in the document."""

    def cheapest(step: int, frame: int) -> float:
        before = [cheapest(step - 1, frame - move) for move in (0, 1, 2) if frame >= move] if step else [0.0]
        return costs[frame, step] + min(before)

    num_frames, num_steps = costs.shape
    return min(cheapest(num_steps - 1, frame) for frame in range(num_frames)) / num_steps


def test_the_cost_of_an_alignment_is_that_of_the_cheapest_path():
    query, document = (torch.nn.functional.normalize(noise(size, 5, seed=size), dim=-1) for size in (4, 7))
    costs = (1 - document @ query.t()).exp() - 1
    costs = (costs - costs.amin(dim=0)) / (costs.amax(dim=0) - costs.amin(dim=0))
    padded = torch.nn.functional.pad(document, (0, 0, 0, 3))[None]
    frames = torch.arange(10)[None] < 7
    assert float(subsequence_cost(query, padded, frames)) == pytest.approx(brute_force_cost(costs.numpy()), rel=1e-5)


def test_a_query_is_found_where_it_occurs_and_one_that_is_too_short_nowhere():
    query = noise(2, 8, 16, seed=1)
    there = torch.cat([noise(2, 9, 16, seed=3), query, noise(2, 12, 16, seed=4)], dim=1)
    documents = [noise(2, 30, 16, seed=2), there]
    scores = detection_scores([query, query[:, :4]], documents, range(2), Accelerator(cpu=True))
    assert (scores[:, 0, 1] > scores[:, 0, 0]).all()
    assert (scores[:, 1, 0] == scores[:, 1, 1]).all()


def test_a_layer_is_scored_the_same_alone_and_documents_whatever_they_are_read_with(monkeypatch):
    queries, documents = ([noise(3, size, 6, seed=size) for size in sizes] for sizes in ((6, 9), (20, 31, 12)))
    together = detection_scores(queries, documents, range(3), Accelerator(cpu=True))
    monkeypatch.setattr("lighthubert_training.superb.query_by_example.DOCUMENTS_AT_ONCE", 1)
    (alone,) = detection_scores(queries, documents, [1], Accelerator(cpu=True))
    np.testing.assert_allclose(alone, together[1], rtol=1e-4, atol=1e-5)


SCORES_ON_EACH_PROCESS = """
import sys, numpy, torch
from accelerate import Accelerator
from lighthubert_training.superb.query_by_example import detection_scores

accelerator = Accelerator(cpu=True)
queries, documents = torch.load(f"{sys.argv[1]}/hidden_states.pt")
numpy.save(f"{sys.argv[1]}/{accelerator.process_index}", detection_scores(queries, documents, range(3), accelerator))
accelerator.end_training()
"""


def test_processes_split_the_documents_and_know_all_scores(tmp_path):
    queries, documents = ([noise(3, size, 6, seed=size) for size in sizes] for sizes in ((6, 9), (20, 31, 12, 17, 25)))
    torch.save((queries, documents), tmp_path / "hidden_states.pt")
    (tmp_path / "script.py").write_text(SCORES_ON_EACH_PROCESS)
    run(tmp_path / "script.py", tmp_path, processes=2)
    first, second = (np.load(tmp_path / f"{process}.npy") for process in range(2))
    assert np.array_equal(first, second)
    alone = detection_scores(queries, documents, range(3), Accelerator(cpu=True))
    np.testing.assert_allclose(first, alone, rtol=1e-4, atol=1e-5)


def test_moments_are_those_of_all_frames_together():
    states = [5 + noise(2, size, 4, seed=size) for size in (3, 7)]
    mean, deviation = moments(states)
    together = torch.cat(states, dim=1)
    torch.testing.assert_close(mean[:, 0], together.mean(dim=1))
    torch.testing.assert_close(deviation[:, 0], together.std(dim=1))


def test_turns_begin_and_end_with_their_frames():
    speaking = np.array([[1, 0], [1, 0], [0, 1], [1, 1]])
    assert turns_of(speaking, 0.5) == [("0", 0.0, 1.0), ("0", 1.5, 2.0), ("1", 1.0, 2.0)]
