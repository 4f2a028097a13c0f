"""Further training of single subnets, which shows whether the error in the supernet predicts the error after it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm
from transformers import get_scheduler, set_seed

from lighthubert_training.search.fitness import Fitness
from modeling_lighthubert import LightHubertPreTrainedModel, Subnet


@dataclass
class FurtherTraining:
    """Training of single subnets, each from the weights of the supernet.

    Attributes:
        loss: mean loss of the selected subnet on one of `batches`.
        steps: of each subnet; the batches are used in turn.
        learning_rate: peak.
        seed: of dropout and SpecAugment.
    """

    model: LightHubertPreTrainedModel
    loss: Callable[[Any], torch.Tensor]
    batches: Sequence[Any]
    steps: int
    learning_rate: float
    seed: int

    def errors(self, fitness: Fitness, subnets: Sequence[Subnet]) -> list[float]:
        """Errors of the subnets after training, each alone. The supernet is left as it was."""
        kept = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        errors = []
        with tqdm(total=self.steps * len(subnets), desc="further training") as bar:
            for subnet in subnets:
                self.train(subnet, bar)
                *_, error = fitness.errors(subnet)
                errors.append(error)
                self.model.load_state_dict(kept)
        return errors

    def train(self, subnet: Subnet, bar: tqdm) -> None:
        """AdamW, with a warm-up in a tenth of the steps and a linear decay. A frozen feature encoder stays so."""
        set_seed(self.seed)  # NumPy too: it draws the masks of SpecAugment
        self.model.set_subnet(subnet)
        self.model.train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate)
        scheduler = get_scheduler("linear", optimizer, self.steps // 10, self.steps)
        for step in range(self.steps):
            loss = self.loss(self.batches[step % len(self.batches)])
            loss.backward()
            clip_grad_norm_(trained, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{float(loss.detach()):.3g}", refresh=False)
            bar.update()
        self.model.eval()
