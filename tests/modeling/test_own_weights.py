"""Weights that subnets of one width, or one depth, have for themselves: they are merged into those of a cut model."""

import copy

import pytest
import torch
from conftest import TWO_DEEP, answer, assert_close, noise, randomise, tiny_config, tiny_model

from modeling_lighthubert import LightHubertForCTC, LightHubertForPreTraining, LightHubertModel, SearchSpace
from modeling_lighthubert.export import to_hubert


KINDS = {
    "norms": {"norms_per_width": True},
    "corrections": {"correction_rank": 2},
    "heads": {"head_per_width": True},
    "heads for depths": {"head_per_depth": True},
    "heads for both": {"head_per_width": True, "head_per_depth": True},
    "all": {"norms_per_width": True, "correction_rank": 2, "head_per_width": True},
}
WAVEFORM = noise(1, 4000)
SUBNETS = ["smallest", "middle", "largest", TWO_DEEP.sample(3)]


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def options(request) -> dict:
    return request.param


@pytest.fixture
def supernet(options) -> LightHubertForPreTraining:
    """Randomised, so that what a width has for itself is not what it shares."""
    return tiny_model(LightHubertForPreTraining, **options)


def answers(model) -> dict[str, torch.Tensor]:
    found = {}
    for subnet in SUBNETS:
        with model.using_subnet(subnet):
            found[str(subnet)] = answer(model, WAVEFORM)
    return found


def assert_same_answers(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, each in expected.items():
        assert_close(found[name], each)


@pytest.mark.parametrize("stable", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("subnet", SUBNETS, ids=str)
def test_a_cut_model_is_an_ordinary_one_with_the_same_answers(options, subnet, stable):
    supernet = tiny_model(LightHubertForPreTraining, do_stable_layer_norm=stable, **options)
    cut = supernet.extract_subnet(subnet)
    plain = tiny_model(LightHubertForPreTraining, do_stable_layer_norm=stable).extract_subnet(subnet)
    assert cut.state_dict().keys() == plain.state_dict().keys()
    assert cut.config.to_diff_dict() == plain.config.to_diff_dict()
    assert cut.num_parameters() == supernet.num_subnet_parameters(subnet)
    with supernet.using_subnet(subnet):
        assert_close(answer(cut, WAVEFORM), answer(supernet, WAVEFORM))
    assert_close(answer(supernet.with_subnet(subnet), WAVEFORM), answer(cut, WAVEFORM))


def test_smaller_subnets_use_what_they_have_for_themselves_and_the_largest_does_not(supernet):
    before = answers(supernet)
    shared = tiny_model(LightHubertForPreTraining).state_dict()
    with torch.no_grad():
        for name, weight in supernet.named_parameters():
            if name not in shared:
                weight.add_(1.0)
    after = answers(supernet)
    unchanged = {name for name in before if torch.equal(after[name], before[name])}
    by_depth = supernet.config.head_per_depth and not supernet.config.head_per_width
    assert unchanged == ({"middle", "largest"} if by_depth else {"largest"})


def test_a_saved_supernet_answers_alike(supernet, tmp_path):
    supernet.save_pretrained(tmp_path)
    assert_same_answers(answers(LightHubertForPreTraining.from_pretrained(tmp_path)), answers(supernet))


def test_a_supernet_without_them_begins_with_what_it_shares(options, tmp_path):
    plain = tiny_model(LightHubertForPreTraining)
    plain.save_pretrained(tmp_path)
    loaded = LightHubertForPreTraining.from_pretrained(tmp_path, **options)
    assert_same_answers(answers(loaded.eval()), answers(plain))
    assert loaded.state_dict().keys() > plain.state_dict().keys()


def test_a_new_supernet_begins_with_what_it_shares(options):
    new = LightHubertForPreTraining(tiny_config(**options)).eval()
    shared = LightHubertForPreTraining(tiny_config()).eval()
    shared.load_state_dict({name: new.state_dict()[name] for name in shared.state_dict()})
    assert_same_answers(answers(new), answers(shared))


def test_a_trimmed_supernet_answers_alike(options):
    """Of 48 there are 40 left, and 9 heads of 12, and 3 blocks of FFN units of 4."""
    space = SearchSpace((16, 24, 32), (4, 6, 9), (1, 2.5), (1, 2), head_dim=4)
    supernet = tiny_model(LightHubertForPreTraining, space, **options)
    trimmed = supernet.trim()
    assert trimmed.config.hidden_size == 32
    for seed in range(4):
        for model in (supernet, trimmed):
            model.set_subnet(space.sample(seed))
        assert_close(answer(trimmed, WAVEFORM), answer(supernet, WAVEFORM))
        cut = trimmed.extract_subnet()
        assert_close(answer(cut, WAVEFORM), answer(trimmed, WAVEFORM))


@pytest.mark.parametrize("head", [LightHubertModel, LightHubertForCTC])
def test_a_stock_hubert_answers_alike(options, head):
    supernet = tiny_model(head, **options)
    supernet.set_subnet("smallest")
    assert_close(answer(to_hubert(supernet), WAVEFORM), answer(supernet, WAVEFORM))


def test_heads_of_layers_are_of_training_alone(tmp_path):
    supernet = tiny_model(LightHubertForPreTraining, layer_heads=True)
    plain = tiny_model(LightHubertForPreTraining).extract_subnet("smallest")
    cut = supernet.extract_subnet("smallest")
    assert cut.state_dict().keys() == plain.state_dict().keys()
    assert cut.num_parameters() == supernet.num_subnet_parameters("smallest") == plain.num_parameters()
    assert len(supernet.trim().layer_heads) == 2
    supernet.save_pretrained(tmp_path)
    saved = LightHubertForPreTraining.from_pretrained(tmp_path)
    assert torch.equal(saved.layer_heads[1].weight, supernet.layer_heads[1].weight)
    _, report = LightHubertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]


def test_a_copy_has_its_own(supernet):
    twin = copy.deepcopy(supernet)
    expected = answers(supernet)
    randomise(supernet, seed=5)
    assert_same_answers(answers(twin), expected)
