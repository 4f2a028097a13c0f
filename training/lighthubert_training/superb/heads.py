"""Trained parts on top of a frozen model: a weighted sum of its layers, and SUPERB's light head for each kind of task.

Each head takes `features` (batch_size, num_frames, hidden_size) and `lengths`, the true frames of each recording
(batch_size). Sizes and shapes are those of the SUPERB paper and of s3prl.
"""

import random
from collections.abc import Sequence

import torch
from torch import nn
from transformers import Wav2Vec2Config
from transformers.models.wav2vec2.modeling_wav2vec2 import TDNNLayer

from lighthubert_training.models import frame_mask


class WeightedSum(nn.Module):
    """Learned softmax-weighted sum of layers, initialised uniformly."""

    def __init__(self, num_layers: int):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(num_layers))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch_size, num_layers, num_frames, hidden_size) -> (batch_size, num_frames, hidden_size)."""
        return torch.einsum("l,blth->bth", self.weights.softmax(dim=0), hidden_states)


class Downstream(nn.Module):
    """A weighted sum of layers with a head on top: everything that is trained."""

    def __init__(self, num_layers: int, head: nn.Module):
        super().__init__()
        self.weighted_sum, self.head = WeightedSum(num_layers), head

    def forward(self, hidden_states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.head(self.weighted_sum(hidden_states), lengths)


def mean_over_frames(features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Mean of the true frames: (batch_size, num_frames, size) -> (batch_size, size)."""
    mask = frame_mask(lengths, features.shape[1]).unsqueeze(-1)
    return (features * mask).sum(dim=1) / lengths[:, None]


class FrameClassifier(nn.Module):
    """Projection and a linear layer: logits (batch_size, num_frames, num_labels)."""

    def __init__(self, hidden_size: int, num_labels: int, projector_size: int):
        super().__init__()
        self.projector = nn.Linear(hidden_size, projector_size)
        self.classifier = nn.Linear(projector_size, num_labels)

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.projector(features))


class UtteranceClassifier(FrameClassifier):
    """The same with the mean over frames between: logits (batch_size, num_labels); those of several labels are
    concatenated."""

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.classifier(mean_over_frames(self.projector(features), lengths))


class RecurrentLayer(nn.Module):
    """An LSTM in one direction, or one in each; the outputs of true frames do not depend on padding, on the right.

    It computes what torch's LSTM does on packed sequences, whose training steps take ten times as long on a CPU.
    """

    def __init__(self, input_size: int, lstm_size: int, bidirectional: bool):
        super().__init__()
        self.onward = nn.LSTM(input_size, lstm_size, batch_first=True)
        self.backward_in_time = nn.LSTM(input_size, lstm_size, batch_first=True) if bidirectional else None

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        onward = self.onward(features)[0]
        if self.backward_in_time is None:
            return onward
        back = self.backward_in_time(reversed_in_time(features, lengths))[0]
        return torch.cat([onward, reversed_in_time(back, lengths)], dim=-1)


def reversed_in_time(features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The true frames of each recording from the last to the first; padding stays where it is."""
    frames = torch.arange(features.shape[1], device=features.device).expand(len(features), -1)
    order = torch.where(frame_mask(lengths, features.shape[1]), lengths[:, None] - 1 - frames, frames)
    return features.take_along_dim(order.unsqueeze(-1), dim=1)


class RecurrentClassifier(nn.Module):
    """LSTM layers, in one direction or in both, and a linear layer: logits (batch_size, num_frames, num_labels).

    Args:
        projector_size: of a linear projection in front. Default: there is none.
    """

    def __init__(
        self,
        hidden_size: int,
        num_labels: int,
        lstm_size: int,
        num_layers: int,
        bidirectional: bool,
        projector_size: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.projector = nn.Identity() if projector_size is None else nn.Linear(hidden_size, projector_size)
        width = 2 * lstm_size if bidirectional else lstm_size
        sizes = [projector_size or hidden_size, *[width] * (num_layers - 1)]
        self.layers = nn.ModuleList(RecurrentLayer(size, lstm_size, bidirectional) for size in sizes)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, num_labels)

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        hidden = self.projector(features)
        for layer in self.layers:
            hidden = self.dropout(layer(hidden, lengths))
        return self.classifier(hidden)


class SpeakerEmbedder(nn.Module):
    """X-vectors: time-delay layers, mean and standard deviation over frames, a linear layer: (batch_size,
    embedding_size)."""

    def __init__(self, hidden_size: int, embedding_size: int, pooled_size: int):
        super().__init__()
        config = Wav2Vec2Config(
            tdnn_dim=[embedding_size] * 4 + [pooled_size], tdnn_kernel=[5, 3, 3, 1, 1], tdnn_dilation=[1, 2, 3, 1, 1]
        )
        self.projector = nn.Linear(hidden_size, embedding_size)
        self.layers = nn.ModuleList(TDNNLayer(config, number) for number in range(5))
        self.context = sum((size - 1) * dilation for size, dilation in zip(config.tdnn_kernel, config.tdnn_dilation))
        self.embedding = nn.Linear(2 * pooled_size, embedding_size)

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        hidden = self.projector(features)
        short = self.context + 1 - hidden.shape[1]
        if short > 0:  # shorter than the context of the layers
            hidden = nn.functional.pad(hidden, (0, 0, 0, short))
        for layer in self.layers:
            hidden = layer(hidden)
        lengths = (lengths - self.context).clamp(min=1)
        mean = mean_over_frames(hidden, lengths)
        variance = mean_over_frames((hidden - mean[:, None]).square(), lengths)
        return self.embedding(torch.cat([mean, (variance + 1e-5).sqrt()], dim=-1))


def spans_masked(features: torch.Tensor, lengths: Sequence[int], rngs: Sequence[random.Random]) -> torch.Tensor:
    """SpecAugment as in SUPERB's speech recognition, but without time warping: two spans of at most 40 frames and four
    of at most 50 features become zeros. Each recording has its own of `rngs`, and no span takes more than a fifth of
    its frames or features."""
    masked = features.clone()
    for row, (length, rng) in enumerate(zip(lengths, rngs, strict=True)):
        for dim, (count, most, size) in enumerate(((2, 40, int(length)), (4, 50, features.shape[2]))):
            for _ in range(count):
                width = rng.randint(0, min(most, size // 5))
                start = rng.randint(0, size - width)
                masked[row].narrow(dim, start, width).zero_()
    return masked
