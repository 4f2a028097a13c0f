"""CTC on features: phones of texts, whitening, training."""

import torch
from tiny_bench import benchmarks_on_the_path, load  # noqa: F401


def test_phones_are_those_of_the_language():
    phones = load("ctc").phonemize(["press 1", "due"], ["en", "it"])
    assert phones[0][:3] == ["p", "ɹ", "ɛ"]
    assert phones[0][-1] == "n", "a figure is read out"
    assert phones[1] == ["d", "u", "e"]


def test_whitened_features_are_uncorrelated_and_of_variance_one():
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    mixed = torch.randn(4000, 8, generator=generator) @ torch.diag(torch.logspace(0, 1.5, 8)) @ rotation + 3
    mean, whitening = load("ctc").whiten(mixed)
    torch.testing.assert_close(((mixed - mean) @ whitening).T.cov(), torch.eye(8), rtol=0, atol=1e-3)
    constant = torch.cat([mixed, torch.ones(4000, 1)], dim=1)
    mean, whitening = load("ctc").whiten(constant)
    assert ((constant - mean) @ whitening).abs().max() < 10, "what never changes is no feature"


def test_ctc_learns_units_from_features():
    ctc = load("ctc")
    texts = {number: ["ab", "ba", "aab"][number % 3] for number in range(6)}
    alphabet = ctc.Alphabet(texts.values())
    codes = torch.nn.functional.one_hot(torch.arange(3), 3).float()

    def frames(number: int) -> torch.Tensor:
        return torch.cat([codes[[0, alphabet.numbers[unit]]] for unit in texts[number]])

    layer = torch.nn.Linear(3, len(alphabet))

    def logits(batch):
        states = [frames(number) for number in batch]
        return layer(torch.nn.utils.rnn.pad_sequence(states, batch_first=True)), torch.tensor(list(map(len, states)))

    batches = [[0, 1, 2], [3, 4, 5]]
    ctc.train_ctc(logits, layer, batches, texts, alphabet, 200, 0.1, seed=0)
    assert {number: "".join(units) for number, units in ctc.transcribe(logits, batches, alphabet).items()} == texts
