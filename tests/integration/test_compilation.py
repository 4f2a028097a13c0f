"""Compiled models answer like those that are not: the compiler is slow."""

import random
from functools import partial, partialmethod

import pytest
import torch
from conftest import DEVICE, TWO_DEEP, answer, assert_close, noise, stock_settings, tiny_model
from torch._dynamo.exc import FailOnRecompileLimitHit
from transformers import HubertConfig, HubertModel

from lighthubert_training.distillation.arguments import ObjectiveArguments
from lighthubert_training.distillation.loop import compile_layers, compiling
from lighthubert_training.distillation.teacher import Teacher
from modeling_lighthubert import LightHubertForCTC, LightHubertForPreTraining, SearchSpace


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


def tiny_teacher() -> Teacher:
    """A teacher whose upper two of three layers are targets."""
    torch.manual_seed(0)
    model = HubertModel(HubertConfig(**stock_settings(num_hidden_layers=3)))
    return Teacher(model, ObjectiveArguments(num_target_layers=2)).to(DEVICE)


@pytest.fixture
def graphs(monkeypatch) -> list:
    """What is compiled, traced in full and run without code of its own."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    return compiled


def test_a_compiled_teacher_gives_the_targets_of_every_batch(graphs):
    """Layers that are targets have a hook, others do not, and both run the same code."""
    plain, teacher = tiny_teacher(), tiny_teacher()
    compile_layers(tiny_model(LightHubertForPreTraining, teacher_hidden_size=48), teacher)
    for samples in (4000, 4640, 8000):
        batch = noise(2, samples), torch.ones(2, samples, dtype=torch.long, device=DEVICE)
        assert_close(teacher(*batch).targets[0], plain(*batch).targets[0])
    assert len(graphs) == 2, "of attention and feed-forward layer"


def test_two_hundred_subnets_compile_each_combination_of_sizes_once(graphs):
    space = SearchSpace((16, 24, 32), (2, 3, 4), (2, 2.5, 3), (1, 2), head_dim=4)
    student, rng = tiny_model(LightHubertForPreTraining, space, teacher_hidden_size=48).train(), random.Random(0)
    compile_layers(student, tiny_teacher())
    with compiling(space):
        for number in range(200):
            student.set_subnet(space.sample(rng))
            student(noise(1, 4000 + 320 * (number % 5))).predictions[0].sum().backward()
    assert len(graphs) == 27


def test_what_cannot_be_compiled_any_more_is_an_error(graphs):
    student = tiny_model(LightHubertForPreTraining, TWO_DEEP, teacher_hidden_size=48)
    compile_layers(student, tiny_teacher())
    with compiling(None), torch._dynamo.config.patch(recompile_limit=1), pytest.raises(FailOnRecompileLimitHit):
        for subnet in (TWO_DEEP.largest, TWO_DEEP.smallest):
            student.set_subnet(subnet)
            student(noise(1, 4000))
