"""What tests of distillation share: a tiny teacher, a tiny student, and a padded batch."""

from typing import Any

import torch
from conftest import DEVICE, TWO_DEEP, noise, randomise, stock_settings, tiny_model
from transformers import HubertConfig, HubertModel

from lighthubert_training.distillation.arguments import ObjectiveArguments
from lighthubert_training.distillation.teacher import Teacher
from lighthubert_training.models import draw_time_mask
from modeling_lighthubert import LightHubertForPreTraining, SearchSpace


def tiny_teacher(model=HubertModel, config=HubertConfig, changes=None, **objective) -> Teacher:
    """A teacher of three layers; the target is the mean over the last two."""
    torch.manual_seed(0)
    settings = stock_settings(num_hidden_layers=3, **(changes or {"feat_extract_norm": "layer"}))
    arguments = ObjectiveArguments(**({"num_target_layers": 2} | objective))
    return Teacher(randomise(model(config(**settings))), arguments).to(DEVICE)


def tiny_student(search_space: SearchSpace | None = TWO_DEEP, **changes) -> LightHubertForPreTraining:
    settings = {"teacher_hidden_size": 48, "num_prediction_heads": 1} | changes
    return tiny_model(LightHubertForPreTraining, search_space, **settings)


def padded_batch(mask_time_prob: float = 0.65) -> dict[str, Any]:
    """Two recordings, of 18 and 9 frames; the padding is noise, which must not matter."""
    attention_mask = torch.ones(2, 6000, dtype=torch.long, device=DEVICE)
    attention_mask[1, 3200:] = 0
    mask = draw_time_mask([18, 9], mask_time_prob, 10, seeds=[0, 1]).to(DEVICE)
    teacher_input_values = noise(2, 6000, seed=1)
    return {
        "input_values": noise(2, 6000),
        "teacher_input_values": teacher_input_values,
        "waveforms": [teacher_input_values[0].cpu().numpy(), teacher_input_values[1, :3200].cpu().numpy()],
        "attention_mask": attention_mask,
        "mask": mask,
        "num_samples": 9200,
        "num_frames": 18 + 9,
        "num_masked": int(mask.sum()),
    }
