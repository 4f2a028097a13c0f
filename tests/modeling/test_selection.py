"""One selection for all threads: they take turns, questions about other subnets do not disturb, and it is set whole or
not at all."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import TWO_DEEP, answer, assert_close, checkpoint_layers, noise, randomise, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_lighthubert import LightHubertConfig, LightHubertForCTC, LightHubertModel, SearchSpace
from modeling_lighthubert.profiling import profile_subnet


NAMES = ("largest", "smallest")


@pytest.fixture
def supernet() -> LightHubertForCTC:
    return tiny_model(LightHubertForCTC)


@pytest.fixture
def answers(supernet, waveform) -> dict[str, torch.Tensor]:
    return {name: answer(supernet.extract_subnet(name), waveform) for name in NAMES}


def test_threads_take_turns_in_using_subnet(supernet, answers, waveform):
    def request(number: int) -> tuple[str, torch.Tensor]:
        with supernet.using_subnet(NAMES[number % 2]):
            return NAMES[number % 2], answer(supernet, waveform)

    with ThreadPoolExecutor(2) as pool:
        for name, found in pool.map(request, range(400)):
            assert_close(found, answers[name])
    assert supernet.subnet == TWO_DEEP.largest


def test_threads_with_a_selection_of_their_own_run_at_once(supernet, answers, waveform):
    both_inside = threading.Barrier(2, timeout=60)

    def requests(name: str) -> list[torch.Tensor]:
        model = supernet.with_subnet(name)
        both_inside.wait()
        return [answer(model, waveform) for _ in range(50)]

    with ThreadPoolExecutor(2) as pool:
        for name, found in zip(NAMES, pool.map(requests, NAMES)):
            for each in found:
                assert_close(each, answers[name])
    assert supernet.with_subnet("smallest").lm_head.weight is supernet.lm_head.weight


@pytest.mark.parametrize(
    "question",
    [
        lambda model: model.num_subnet_parameters("smallest"),
        lambda model: profile_subnet(model, "smallest"),
        lambda model: model.extract_subnet("smallest"),
        lambda model: model.with_subnet("smallest"),
        lambda model: model.trim(),
    ],
    ids=["num_subnet_parameters", "profile_subnet", "extract_subnet", "with_subnet", "trim"],
)
def test_a_question_about_another_subnet_neither_waits_nor_touches_the_selection(supernet, question, monkeypatch):
    """It is asked while another thread is inside a block, and every selection of the supernet is counted."""
    inside, asked, selections = threading.Event(), threading.Event(), []

    def stay_inside() -> None:
        with supernet.using_subnet("largest"):
            inside.set()
            asked.wait(60)

    thread = threading.Thread(target=stay_inside)
    thread.start()
    assert inside.wait(60)
    select = LightHubertModel.select
    with monkeypatch.context() as patch:
        patch.setattr(
            LightHubertModel, "select", lambda model, subnet: selections.append(model) or select(model, subnet)
        )
        question(supernet)
    assert thread.is_alive()
    asked.set()
    thread.join(60)
    assert all(model is not supernet.hubert for model in selections)
    assert supernet.subnet == supernet.config.selected_subnet() == TWO_DEEP.largest


def test_a_selection_waits_for_the_block_of_another_thread(supernet):
    order = []
    with supernet.using_subnet("smallest"):
        thread = threading.Thread(target=lambda: (supernet.set_subnet("middle"), order.append("selected")))
        thread.start()
        thread.join(0.2)
        order.append("block")
        assert supernet.subnet == TWO_DEEP.smallest
    thread.join(60)
    assert order == ["block", "selected"]
    assert supernet.subnet == TWO_DEEP.middle


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_does_not_wait_for_the_original(supernet, duplicate):
    with supernet.using_subnet("smallest"):
        twin = duplicate(supernet)
        thread = threading.Thread(target=twin.set_subnet, args=("middle",))
        thread.start()
        thread.join(60)
    assert twin.subnet == TWO_DEEP.middle


def test_a_layer_is_recomputed_in_another_thread_while_a_block_waits_for_it(supernet, waveform):
    """As the backward pass of a GPU does."""
    checkpoint_layers(supernet.train())
    supernet.set_subnet("smallest")
    loss = supernet(waveform).logits.sum()
    with supernet.using_subnet("largest"):
        thread = threading.Thread(target=loss.backward, daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive(), "it waits for the block, which waits for it"
        assert supernet.subnet == TWO_DEEP.largest


# Adapters, quantisers, offloaded weights

peft_asks = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def lora(model, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options
    return peft.get_peft_model(model, peft.LoraConfig(r=2, **settings))


@peft_asks
@pytest.mark.parametrize("options", [{}, {"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_a_selection_that_an_adapter_prevents_is_not_half_made(supernet, waveform, options):
    adapted = lora(supernet, **options).eval()
    expected = answer(adapted, waveform)
    for _ in range(2):
        with pytest.raises(ValueError, match="an adapter sits on it. Adapt a cut model instead"):
            adapted.set_subnet("smallest")
        assert supernet.subnet == TWO_DEEP.largest
        assert_close(answer(adapted, waveform), expected)


@peft_asks
def test_an_adapter_on_the_largest_subnet_is_merged_and_every_subnet_can_be_selected(supernet, waveform):
    adapted = lora(supernet).eval()
    expected = answer(adapted, waveform)
    merged = adapted.merge_and_unload()
    assert_close(answer(merged, waveform), expected)
    merged.set_subnet("smallest")
    assert_close(answer(merged, waveform), answer(merged.extract_subnet(), waveform))


@peft_asks
@pytest.mark.parametrize(
    "target_modules",
    [
        ["q_proj", "out_proj", "intermediate_dense", "output_dense", "projection"],
        r".*conv_layers\.\d\.conv",
    ],
    ids=["linear", "convolutions"],
)
def test_a_cut_model_takes_the_adapters_that_a_stock_hubert_takes(supernet, target_modules):
    cut, audio = supernet.extract_subnet("smallest"), noise(2, 5431)
    before = answer(cut, audio)
    adapted = lora(cut, target_modules=target_modules).eval()
    expected = answer(adapted, audio)
    assert (expected - before).abs().max() > 1e-3 * before.abs().max()
    adapted(audio).logits.sum().backward()
    gradients = [weight.grad for name, weight in adapted.named_parameters() if "lora_" in name]
    assert gradients and all(gradient is not None for gradient in gradients)
    assert_close(answer(adapted.merge_and_unload(), audio), expected)


def test_a_supernet_is_not_quantised_in_silence(supernet, tmp_path):
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config("nothing_at_all")
    class NothingConfig(QuantizationConfigMixin):
        def __init__(self, **kwargs):
            self.quant_method = "nothing_at_all"

    @register_quantizer("nothing_at_all")
    class NothingQuantizer(HfQuantizer):
        requires_calibration = False
        is_serializable = is_trainable = True

        def update_dtype(self, dtype):
            return dtype

    supernet.save_pretrained(tmp_path / "supernet")
    supernet.extract_subnet("smallest").save_pretrained(tmp_path / "cut")
    with pytest.raises(ValueError, match="is a supernet, which quantisers leave as it is: cut a subnet out"):
        LightHubertForCTC.from_pretrained(tmp_path / "supernet", quantization_config=NothingConfig())
    LightHubertForCTC.from_pretrained(tmp_path / "cut", quantization_config=NothingConfig())


@pytest.mark.parametrize("head", [LightHubertModel, LightHubertForCTC])
def test_a_subnet_of_offloaded_weights_is_not_cut(tmp_path, head):
    tiny_model(head).save_pretrained(tmp_path / "supernet")
    model = head.from_pretrained(tmp_path / "supernet", device_map={"": "disk"}, offload_folder=tmp_path / "offloaded")
    with pytest.raises(ValueError, match="are offloaded, not in memory: load it without device_map"):
        model.extract_subnet("smallest")


# Any subnet of any search space


def choices(*values: float | None) -> st.SearchStrategy[tuple]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=3, unique=True).map(tuple)


@st.composite
def spaces(draw) -> SearchSpace:
    """Search spaces of every kind for a supernet 20 wide, with 3 heads, 60 FFN units and up to 3 layers."""
    least, most = (st.lists(st.sampled_from(ends), min_size=7, max_size=7).map(sorted) for ends in ([2, 4], [4, 6]))
    channels = st.tuples(least, most).map(lambda ends: tuple(zip(*ends, strict=True)))
    return SearchSpace(
        draw(choices(8, 12, 20)),
        draw(choices(1, 2, 3)),
        draw(choices(1, 1.5, 2.5)),
        draw(choices(1, 2, 3)),
        head_dim=draw(st.sampled_from([2, 4])),
        conv_dim=draw(st.none() | channels),
        attention_window=draw(st.none() | choices(1, 4, None)),
    )


@given(spaces(), st.integers(0, 2**32), st.booleans(), st.booleans(), st.sampled_from(["layer", "group"]))
@settings(max_examples=60)
def test_any_subnet_of_any_search_space_answers_as_its_cut_model(space, seed, pre_norm, padded, norm):
    config = LightHubertConfig(
        search_space=space,
        hidden_size=20,
        num_attention_heads=3,
        head_dim=space.head_dim,
        intermediate_size=60,
        num_hidden_layers=max(space.num_hidden_layers),
        conv_dim=(6,) * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        do_stable_layer_norm=pre_norm,
        feat_extract_norm=norm,
        vocab_size=5,
    )
    model = randomise(LightHubertForCTC(config)).eval()
    subnet = model.sample_subnet(seed)
    mask = (torch.arange(2000) < torch.tensor([[2000], [1400]])).long() if padded else None
    audio = noise(2, 2000, seed=seed % 97)
    cut = model.extract_subnet()
    assert_close(answer(model, audio, attention_mask=mask), answer(cut, audio, attention_mask=mask))
    assert (cut.subnet, cut.num_parameters()) == (subnet, model.num_subnet_parameters(subnet))
