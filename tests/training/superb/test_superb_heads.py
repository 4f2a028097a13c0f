"""SUPERB's heads: what they compute by hand, and that padding changes nothing."""

import math
import random

import pytest
import torch
from conftest import DEVICE, noise
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


HEADS = {
    "utterance": lambda: UtteranceClassifier(6, 3, projector_size=4),
    "frames": lambda: FrameClassifier(6, 3, projector_size=4),
    "one direction": lambda: RecurrentClassifier(6, 3, lstm_size=4, num_layers=1, bidirectional=False),
    "both directions": lambda: RecurrentClassifier(6, 3, 4, num_layers=2, bidirectional=True, projector_size=5),
    "speaker": lambda: SpeakerEmbedder(6, embedding_size=5, pooled_size=7),
}


@pytest.mark.parametrize("name", HEADS)
def test_outputs_of_a_recording_do_not_depend_on_its_padding(name):
    torch.manual_seed(0)
    head, long, short = HEADS[name]().eval().to(DEVICE), noise(1, 40, 6), noise(1, 25, 6, seed=1)
    padded = torch.nn.functional.pad(short, (0, 0, 0, 15), value=3.0)
    together = head(torch.cat([long, padded]), torch.tensor([40, 25], device=DEVICE))
    for row, (alone, length) in enumerate(((long, 40), (short, 25))):
        expected = head(alone, torch.tensor([length], device=DEVICE))[0]
        torch.testing.assert_close(together[row][:length] if expected.ndim == 2 else together[row], expected)


def test_layers_are_summed_with_a_softmax_of_weights_that_begin_equal():
    hidden_states = noise(2, 3, 5, 4).cpu()
    weighted = WeightedSum(3)
    torch.testing.assert_close(weighted(hidden_states), hidden_states.mean(dim=1))
    weighted.weights.data = torch.tensor([0.0, 1.0, -1.0])
    softmax = torch.tensor([1.0, math.e, 1 / math.e]) / (1 + math.e + 1 / math.e)
    expected = sum(softmax[layer] * hidden_states[:, layer] for layer in range(3))
    torch.testing.assert_close(weighted(hidden_states), expected)


def test_a_layer_in_both_directions_is_torchs_on_packed_sequences():
    ours, torchs = RecurrentLayer(6, 4, bidirectional=True), torch.nn.LSTM(6, 4, batch_first=True, bidirectional=True)
    for name, tensor in torchs.named_parameters():
        onward, backward = ours.onward.state_dict(), ours.backward_in_time.state_dict()
        part = backward[name.removesuffix("_reverse")] if name.endswith("_reverse") else onward[name]
        tensor.data = part.clone()
    features, lengths = noise(3, 9, 6).cpu(), torch.tensor([9, 4, 6])
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
