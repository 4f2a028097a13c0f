"""CTC on top of features: units, their loss and their decoding; the phones of texts; and a linear map after which a
linear layer learns fast.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import get_scheduler

from modeling_lighthubert.errors import UserError


ESPEAK_VOICES = {"en": "en-us", "es": "es-419", "fr": "fr-fr", "it": "it"}

Logits = Callable[[Sequence[int]], tuple[torch.Tensor, torch.Tensor]]
"""Of a batch of recordings: logits (batch_size, num_frames, num_units), and frames of each recording."""


class Alphabet:
    """Units that CTC writes. The blank is unit 0."""

    def __init__(self, texts: Iterable[Sequence[str]]):
        self.units = ["", *sorted({unit for text in texts for unit in text})]
        self.numbers = {unit: number for number, unit in enumerate(self.units)}

    def __len__(self) -> int:
        return len(self.units)

    def loss(self, logits: torch.Tensor, lengths: torch.Tensor, texts: Sequence[Sequence[str]]) -> torch.Tensor:
        """CTC's, the mean over units.

        Args:
            logits: (batch_size, num_frames, num_units).
            lengths: frames of each recording.
        """
        targets = [[self.numbers[unit] for unit in text] for text in texts]
        flat, sizes = torch.tensor(sum(targets, []), device=logits.device), torch.tensor(list(map(len, targets)))
        log_probs = logits.log_softmax(dim=-1).transpose(0, 1)
        return F.ctc_loss(log_probs, flat, lengths, sizes, reduction="sum", zero_infinity=True) / len(flat)

    def decode(self, logits: torch.Tensor) -> list[str]:
        """Units of the likeliest path, of logits (num_frames, num_units)."""
        return [self.units[unit] for unit in logits.argmax(-1).unique_consecutive().tolist() if unit]


@torch.enable_grad()
def train_ctc(
    logits: Logits,
    module: nn.Module,
    batches: Sequence[Sequence[int]],
    texts: Mapping[int, Sequence[str]],
    alphabet: Alphabet,
    num_steps: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Trains what `logits` computes, the weights of `module`, on batches in random order."""
    parameters = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    scheduler = get_scheduler("linear", optimizer, num_steps // 10, num_steps)
    rng = random.Random(seed)
    order: list[Sequence[int]] = []
    for _ in range(num_steps):
        order = order or rng.sample(list(batches), len(batches))
        batch = order.pop()
        loss = alphabet.loss(*logits(batch), [texts[number] for number in batch])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@torch.no_grad()
def transcribe(logits: Logits, batches: Sequence[Sequence[int]], alphabet: Alphabet) -> dict[int, list[str]]:
    """Units of every recording."""
    found = {}
    for batch in batches:
        outputs, lengths = logits(batch)
        for number, of_frames, length in zip(batch, outputs, lengths.tolist(), strict=True):
            found[number] = alphabet.decode(of_frames[:length])
    return found


def whiten(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of features (num_frames, hidden_size), and a matrix (hidden_size, hidden_size) that makes them, without
    that mean, uncorrelated, of variance one. A linear layer on top can say the same as before, but gradient descent
    finds it in hundreds of steps. On the correlated features of a transformer it is far from it after thousands, and
    MFCCs seem to know more of phones. Directions of next to no variance stay small."""
    mean = features.mean(dim=0)
    variances, directions = torch.linalg.eigh((features - mean).T.cov())
    return mean, directions / variances.clamp(min=1e-4 * variances.max()).sqrt()


def phonemize(texts: Sequence[str], languages: Sequence[str]) -> list[list[str]]:
    """Phones of each text, by espeak-ng, which comes with the package espeakng-loader.

    Raises:
        UserError: a language without a voice.
    """
    import espeakng_loader
    from phonemizer.backend import EspeakBackend
    from phonemizer.backend.espeak.wrapper import EspeakWrapper
    from phonemizer.separator import Separator

    if unknown := set(languages) - ESPEAK_VOICES.keys():
        raise UserError(
            f"no phones for the language {', '.join(sorted(unknown))}: there are {', '.join(ESPEAK_VOICES)}"
        )
    EspeakWrapper.set_library(espeakng_loader.get_library_path())
    EspeakWrapper.set_data_path(espeakng_loader.get_data_path())
    phones: list[list[str]] = [[] for _ in texts]
    for language in sorted(set(languages)):
        chosen = [at for at, each in enumerate(languages) if each == language]
        backend = EspeakBackend(ESPEAK_VOICES[language], language_switch="remove-flags", words_mismatch="ignore")
        lines = backend.phonemize(
            [texts[at] for at in chosen], Separator(phone=" ", word="|", syllable=""), strip=True
        )
        for at, line in zip(chosen, lines, strict=True):
            phones[at] = line.replace("|", " ").split()
    return phones
