"""Compiled models answer like those that are not: the compiler is slow."""

import pytest
import torch
from conftest import TWO_DEEP, answer, assert_close, noise, tiny_model

from modeling_lighthubert import LightHubertForCTC


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("cut", [False, True], ids=["supernet", "cut"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_answers_alike(cut, backend, waveform):
    model = tiny_model(LightHubertForCTC)
    model.set_subnet("smallest")
    model = model.extract_subnet() if cut else model
    expected = answer(model, waveform)
    assert_close(answer(torch.compile(model, backend=backend), waveform), expected)


def test_a_compiled_model_answers_padded_batches_alike():
    model = tiny_model()
    model.set_subnet("smallest")
    mask = (torch.arange(4000) < torch.tensor([[4000], [2500]])).long()
    expected = answer(model, noise(2, 4000), attention_mask=mask)
    assert_close(answer(torch.compile(model, backend="eager"), noise(2, 4000), attention_mask=mask), expected)


def test_a_compiled_supernet_answers_for_the_subnet_selected_since(waveform):
    model = tiny_model(LightHubertForCTC)
    compiled = torch.compile(model, backend="eager")
    for subnet in ("largest", "smallest", TWO_DEEP.sample(0), "largest"):
        model.set_subnet(subnet)
        expected = answer(model, waveform)
        compiled.set_subnet(subnet)
        assert_close(answer(compiled, waveform), expected)
