"""The moving average of the weights is what it is called, and takes their place where it is asked to."""

import pytest
import torch
from tiny_distillation import tiny_student

from lighthubert_training.distillation.average import AveragedWeights


def test_the_average_follows_the_weights_that_learn():
    student = tiny_student()
    student.freeze_feature_encoder()
    average, name = AveragedWeights(student, 0.5), "prediction_heads.0.weight"
    weight = student.get_parameter(name)
    expected, frozen = weight.detach().clone(), student.hubert.feature_extractor.conv_layers[0].conv.weight.clone()
    for step, decay in enumerate([0.1, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5]):
        with torch.no_grad():
            weight.add_(1.0)
        average.update(step)
        expected = decay * expected + (1 - decay) * weight.detach()
    last = weight.detach().clone()
    with pytest.raises(OSError), average.in_place():
        torch.testing.assert_close(weight.detach(), expected)
        assert torch.equal(student.hubert.feature_extractor.conv_layers[0].conv.weight, frozen)
        raise OSError
    assert torch.equal(weight, last)
    restored = AveragedWeights(student, 0.5)
    restored.load_state_dict(average.state_dict())
    with restored.in_place():
        torch.testing.assert_close(weight.detach(), expected)
