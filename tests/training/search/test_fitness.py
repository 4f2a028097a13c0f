"""Errors of subnets are those that their cut models have, on a quarter, half, and all of the data."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NARROW, TWO_DEEP, tiny_model
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor
from waits import Waits

from lighthubert_training.data.collators import padded_batches
from lighthubert_training.error_rates import character_error_rate
from lighthubert_training.probing import pooled_features, probe_accuracy
from lighthubert_training.search.building import to_model
from lighthubert_training.search.fitness import CTCError, MeanLoss, ProbeError, split_stages
from modeling_lighthubert import LightHubertForCTC, LightHubertForPreTraining


RNG = np.random.default_rng(0)
WAVEFORMS = [RNG.standard_normal(2000 + 300 * index + 6000 * (index % 2)).astype(np.float32) for index in range(8)]
REFERENCES = ["bad", "dad", "a cab", "bead", "fee", "cab", "ace", "deaf"]
EXTRACTOR = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)


@pytest.mark.parametrize(
    ("num_batches", "ends"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (8, [2, 4, 8]), (10, [3, 5, 10])]
)
def test_stages_end_at_a_quarter_at_half_and_at_the_end(num_batches, ends):
    stages = split_stages(range(num_batches))
    assert [stage[-1] + 1 for stage in stages] == ends
    assert [batch for stage in stages for batch in stage] == list(range(num_batches))


def test_a_mean_loss_is_weighted_by_frames_and_known_after_each_stage():
    model, widths = tiny_model(), {}
    batches = [SimpleNamespace(num_frames=frames, value=value) for frames, value in [(1, 4.0), (3, 2.0), (4, 9.0)]]

    def loss(batch):
        widths[batch.value] = model.subnet.hidden_size
        assert not torch.is_grad_enabled() and not model.training
        return torch.tensor(batch.value)

    fitness = MeanLoss("loss", model.train(), batches, loss)
    assert fitness.num_stages == 3
    assert list(fitness.errors(TWO_DEEP.smallest)) == [4.0, (4 + 3 * 2) / 4, (4 + 3 * 2 + 4 * 9) / 8]
    assert set(widths.values()) == {TWO_DEEP.smallest.hidden_size}


def test_the_device_is_waited_for_once_a_stage():
    model = tiny_model(LightHubertForPreTraining, attn_implementation="eager").to("meta")
    batches = [SimpleNamespace(num_frames=9, audio=torch.zeros(2, 3200, device="meta")) for _ in range(8)]
    fitness = MeanLoss("loss", model, batches, lambda batch: model(batch.audio).predictions[0].mean())
    with Waits() as waits:
        assert list(fitness.errors(TWO_DEEP.smallest)) == [0.0] * 3
    assert list(waits.lines.values()) == [3]


@pytest.fixture
def processor(tmp_path) -> Wav2Vec2Processor:
    tokens = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "|", "<unk>", "<pad>"]  # padded frames would be letters
    (tmp_path / "vocab.json").write_text(str({token: index for index, token in enumerate(tokens)}).replace("'", '"'))
    tokenizer = Wav2Vec2CTCTokenizer(
        str(tmp_path / "vocab.json"), pad_token="<pad>", unk_token="<unk>", bos_token=None, eos_token=None
    )
    return Wav2Vec2Processor(EXTRACTOR, tokenizer)


@pytest.mark.parametrize("space", [pytest.param(TWO_DEEP, id="one-encoder"), pytest.param(NARROW, id="encoders")])
@torch.no_grad()
def test_the_error_of_ctc_is_that_of_the_cut_model_on_each_recording_alone(processor, space):
    model = tiny_model(LightHubertForCTC, space, feat_extract_norm="layer")
    subnet = space.sample(1)
    alone = [to_model(each, model) for each in padded_batches(EXTRACTOR, WAVEFORMS, 1)]
    with model.using_subnet(subnet):  # else each frame has the same character
        model.lm_head.bias -= torch.cat([model(**each).logits[0] for each in alone]).mean(dim=0)
    cut = model.extract_subnet(subnet)
    hypotheses = [processor.decode(cut(each["input_values"]).logits[0].argmax(-1)) for each in alone]
    assert len(set(hypotheses)) == len(WAVEFORMS)
    batches = [to_model(batch, model) for batch in padded_batches(EXTRACTOR, WAVEFORMS, 2)]
    fitness = CTCError(model, processor, batches, REFERENCES)
    expected = [character_error_rate(REFERENCES[:end], hypotheses[:end]) for end in (2, 4, 8)]
    assert list(fitness.errors(subnet)) == expected


@pytest.mark.parametrize(("space", "calls"), [pytest.param(TWO_DEEP, 0, id="one"), pytest.param(NARROW, 4, id="many")])
def test_a_feature_encoder_that_all_subnets_have_is_computed_once(processor, space, calls):
    model = tiny_model(LightHubertForCTC, space)
    batches = [to_model(batch, model) for batch in padded_batches(EXTRACTOR, WAVEFORMS, 2)]
    fitness, called = CTCError(model, processor, batches, REFERENCES), []
    model.hubert.feature_extractor.conv_layers[0].register_forward_hook(lambda *_: called.append(1))
    list(fitness.errors(space.largest))
    assert len(called) == calls


def test_the_error_of_a_probe_is_that_of_the_cut_models_features():
    model = tiny_model()
    labels = [0, 0, 1, 1, 0, 1, 1, 0]
    train, test = (
        [to_model(each, model) for each in padded_batches(EXTRACTOR, part, 3)] for part in (WAVEFORMS, WAVEFORMS[::-1])
    )
    cut = model.extract_subnet("smallest")
    expected = 1 - probe_accuracy(pooled_features(cut, train), labels, pooled_features(cut, test), labels)
    (error,) = ProbeError(model, (train, labels), (test, labels)).errors(TWO_DEEP.smallest)
    assert 0 < error < 1
    assert error == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_searched_in_its_own_precision(processor, dtype):
    model = tiny_model(LightHubertForCTC).to(dtype)
    batches = [to_model(batch, model) for batch in padded_batches(EXTRACTOR, WAVEFORMS, 4)]
    assert all(batch["input_values"].dtype == dtype for batch in batches)
    *_, error = CTCError(model, processor, batches, REFERENCES).errors(TWO_DEEP.smallest)
    (other,) = ProbeError(model.hubert, (batches, list("abababab")), (batches, list("abababab"))).errors(
        TWO_DEEP.smallest
    )
    assert error > 0 and 0 <= other < 1


def test_batches_move_to_the_device_of_the_model():
    batch = to_model(padded_batches(EXTRACTOR, WAVEFORMS)[0], tiny_model().to("meta"))
    assert {name: tensor.device.type for name, tensor in batch.items()} == dict.fromkeys(batch, "meta")
