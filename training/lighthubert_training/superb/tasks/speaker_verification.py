"""Speaker verification: whether two recordings are of the same speaker."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.wav2vec2.modeling_wav2vec2 import AMSoftmaxLoss

from lighthubert_training.superb.heads import SpeakerEmbedder
from lighthubert_training.superb.metrics import equal_error_rate
from lighthubert_training.superb.tasks.base import Task, label_ids


class SpeakerVerification(Task):
    """Embeddings that separate training speakers; the score of a trial is the cosine of two of them."""

    columns, eval_columns = ("speaker",), ("id",)
    higher_is_better = {"eer": False}

    def prepare(self) -> None:
        self.ids = label_ids({str(row["speaker"]) for row in self.parts["train"].rows})
        self.trials = {
            name: self.data.pairs(f"{name}_trials", dict.fromkeys(("enrolment", "trial"), self.parts[name]), ("same",))
            for name in ("dev", "test")
        }

    def build_head(self) -> nn.Module:
        head = SpeakerEmbedder(self.upstream.hidden_size, self.settings.embedding_size, self.settings.pooled_size)
        head.objective = AMSoftmaxLoss(self.settings.embedding_size, len(self.ids), scale=30.0, margin=0.4)
        return head

    def loss(self, head, outputs, lengths, rows) -> torch.Tensor:
        targets = torch.tensor([self.ids[str(row["speaker"])] for row in rows], device=outputs.device)
        return head.objective(outputs, targets)

    def scores(self, outputs, part) -> dict[str, float]:
        embeddings = F.normalize(torch.stack(list(outputs)), dim=-1)
        first, second, same = zip(*self.trials[part.name])
        cosines = (embeddings[list(first)] * embeddings[list(second)]).sum(dim=-1)
        return {"eer": equal_error_rate(same, cosines.tolist())}
