"""ONNX files answer like torch, for any number and length of recordings, and are refused where they do not."""

import math
import sys

import numpy as np
import pytest
import torch
from conftest import DEVICE, answer, assert_close, noise, tiny_model
from transformers import AutoConfig

from modeling_lighthubert import (
    LightHubertConfig,
    LightHubertForCTC,
    LightHubertModel,
    SearchSpace,
    Subnet,
    onnx_export,
)
from modeling_lighthubert.errors import MissingExtraError, UserError
from modeling_lighthubert.export import main, to_hubert
from modeling_lighthubert.onnx_export import macs_by_bits, onnx_session, to_onnx
from modeling_lighthubert.profiling import macs_per_second


onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


SHALLOW = SearchSpace((16,), (4,), (2,), (1,), head_dim=4, conv_dim=((4, 8),) * 7)  # the exporter is slow


def make(form: str):
    if form == "cut CTC":
        return tiny_model(LightHubertForCTC, SHALLOW).cpu().extract_subnet("smallest")
    return to_hubert(tiny_model(LightHubertModel, SHALLOW, feat_extract_norm="group").cpu())


@pytest.fixture(scope="module", params=["cut CTC in bfloat16", "stock base model"])
def exported(request, tmp_path_factory):
    """A model, in full precision, and the folder of its ONNX file."""
    model, folder = make(request.param.removesuffix(" in bfloat16")), tmp_path_factory.mktemp("onnx")
    in_half_precision = "bfloat16" in request.param
    model = model.bfloat16() if in_half_precision else model
    assert to_onnx(model, folder) < 1e-4
    assert model.dtype is (torch.bfloat16 if in_half_precision else torch.float32)
    return model.float(), folder


def run(file, audio: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    return onnx_session(file).run(None, {"input_values": audio.cpu().numpy(), "attention_mask": mask.cpu().numpy()})[0]


def test_answers_are_those_of_torch_for_twenty_lengths_and_three_batch_sizes(exported):
    model, folder = exported
    for number in range(20):
        audio = noise((1, 2, 5)[number % 3], 3000 + 1237 * number, seed=number)
        mask = torch.ones(audio.shape, dtype=torch.long, device=DEVICE)
        mask[-1, 2000:] = 0
        audio *= mask
        expected = answer(model, audio, attention_mask=mask).cpu().numpy()
        frames = model._get_feat_extract_output_lengths(mask.sum(-1)).cpu()
        found = run(folder / "model.onnx", audio, mask)
        assert found.shape == expected.shape
        if found.ndim == 3:
            kept = (torch.arange(found.shape[1]) < frames[:, None]).numpy()
            found, expected = found[kept], expected[kept]
        assert_close(found, expected, terms=10_000)  # group norm takes means over thousands of frames


def test_a_folder_has_the_configuration_and_nothing_half_written(exported):
    model, folder = exported
    assert {path.name for path in folder.iterdir() if path.suffix != ".py"} == {"model.onnx", "config.json"}
    assert AutoConfig.from_pretrained(folder).hidden_size == model.config.hidden_size
    assert hasattr(model.base_model.encoder.pos_conv_embed.conv, "parametrizations")  # a copy was folded


def test_no_path_of_this_machine_is_in_a_file(exported):
    _, folder = exported
    written = (folder / "model.onnx").read_bytes()
    assert b".py" not in written and b"onnx_export" not in written
    weights = sum(4 * math.prod(each.dims) for each in onnx.load(folder / "model.onnx").graph.initializer)
    assert len(written) - weights < 100_000


def test_the_graph_has_plain_products_of_constant_weights(exported):
    """No copies by index, and nothing that quantisers do not know as a weight."""
    model, folder = exported
    graph = onnx.load(folder / "model.onnx").graph
    assert not {"ScatterND", "ScatterElements", "NonZero", "Gemm", "Split"} & {node.op_type for node in graph.node}
    constants, products = {each.name for each in graph.initializer}, [n for n in graph.node if n.op_type == "MatMul"]
    of_activations = [node for node in products if node.input[1] not in constants]
    assert len(of_activations) == 2 * model.config.num_hidden_layers  # queries and keys, scores and values
    assert sum(node.op_type == "Conv" for node in graph.node) == 1  # that of positions


def test_macs_of_a_file_are_those_of_the_model(exported):
    model, folder = exported
    expected = macs_per_second(model) if isinstance(model, LightHubertForCTC) else None
    macs = macs_by_bits(folder / "model.onnx")
    assert macs[8] == 0
    if expected is not None:
        assert macs[32] == pytest.approx(expected, rel=0.01)  # the file also multiplies what it fills up with


def test_nearly_all_products_are_in_eight_bits(tmp_path):
    """Of two layers of the width of a_small. The products in 32 bits are those of the waveform, of positions, and
    within attention."""
    space = SearchSpace((384,), (6,), (4,), (2,), head_dim=64)
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_hidden_layers": 2}
    sizes |= {"conv_dim": (512,) * 7, "num_conv_pos_embeddings": 128, "num_conv_pos_embedding_groups": 16}
    model = LightHubertModel(LightHubertConfig(**sizes, search_space=space)).extract_subnet()
    to_onnx(model, tmp_path, quantize="int8")
    macs = macs_by_bits(tmp_path / "model_int8.onnx")
    assert macs[8] / sum(macs.values()) > 0.95
    assert (tmp_path / "model_int8.onnx").stat().st_size < 0.4 * 4 * model.num_parameters()


def test_eight_bits_say_nearly_the_same(exported, tmp_path, monkeypatch):
    model, folder = exported
    monkeypatch.setattr(onnx_export, "_write", lambda _, file: file.write_bytes((folder / "model.onnx").read_bytes()))
    assert to_onnx(model.cpu(), tmp_path, quantize="int8") > 1e-4
    inputs = (noise(1, 16_000), torch.ones(1, 16_000, dtype=torch.long))
    exact, quantised = run(folder / "model.onnx", *inputs), run(tmp_path / "model_int8.onnx", *inputs)
    assert np.corrcoef(exact.ravel(), quantised.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("fault", ["an operator set of the future", "an operator that is not there"])
def test_a_file_that_the_runtime_does_not_know_is_refused_in_one_line(exported, tmp_path, fault):
    model = onnx.load(exported[1] / "model.onnx")
    if "set" in fault:
        model.opset_import[0].version = 999
    else:
        next(node for node in model.graph.node if node.op_type == "MatMul").op_type = "MatMulInteger4"
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(UserError, match=r"other.onnx cannot be run: .*(999|MatMulInteger4)"):
        onnx_session(tmp_path / "other.onnx")


def test_half_precision_says_nearly_the_same(exported, tmp_path, monkeypatch):
    model, folder = exported
    monkeypatch.setattr(onnx_export, "_write", lambda _, file: file.write_bytes((folder / "model.onnx").read_bytes()))
    assert to_onnx(model.cpu(), tmp_path, quantize="float16") > 0
    file = tmp_path / "model_fp16.onnx"
    weights = [each for each in onnx.load(file).graph.initializer if each.data_type == onnx.TensorProto.FLOAT]
    assert not weights and file.stat().st_size < (folder / "model.onnx").stat().st_size
    inputs = (noise(1, 16_000), torch.ones(1, 16_000, dtype=torch.long))
    exact, halved = run(folder / "model.onnx", *inputs), run(file, *inputs)
    assert halved.dtype == np.float32
    assert 0 < np.abs(halved - exact).max() < 0.05 * exact.std()


def test_a_file_that_answers_differently_is_not_written(exported, tmp_path, monkeypatch):
    model, folder = exported
    monkeypatch.setattr(onnx_export, "_write", lambda _, file: file.write_bytes((folder / "model.onnx").read_bytes()))
    with pytest.raises(ValueError, match="differs from torch by .* nothing is written"):
        to_onnx(model.cpu(), tmp_path, max_difference=0.0)
    assert not list(tmp_path.iterdir())


def test_an_unknown_quantisation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="quantize='int4' is not known: choose 'int8' or 'float16' or None"):
        to_onnx(make("cut CTC"), tmp_path, quantize="int4")


def test_the_command_exports_eight_bits(exported, tmp_path, monkeypatch, capsys):
    model, folder = exported
    if not isinstance(model, LightHubertForCTC):
        pytest.skip("the command exports models of ours")
    monkeypatch.setattr(onnx_export, "_write", lambda _, file: file.write_bytes((folder / "model.onnx").read_bytes()))
    model.save_pretrained(tmp_path / "cut")
    words = ["--format", "onnx", "--quantize", "int8", "--repeats", "1", "--output_dir", str(tmp_path / "out")]
    main(["--model_name_or_path", str(tmp_path / "cut"), *words])
    told = capsys.readouterr().out
    assert f"{tmp_path / 'out' / 'model_int8.onnx'}: " in told
    macs = macs_by_bits(tmp_path / "out" / "model_int8.onnx")
    assert f"in 8 bits: {macs[8] / sum(macs.values()):.1%} of the multiply-accumulates" in told
    assert {path.name for path in (tmp_path / "out").glob("*.onnx")} == {"model_int8.onnx"}


def test_a_session_has_as_many_threads_as_torch_or_as_are_asked_for(exported):
    _, folder = exported
    for num_threads, expected in ((None, torch.get_num_threads()), (2, 2)):
        options = onnx_session(folder / "model.onnx", num_threads).get_session_options()
        assert options.intra_op_num_threads == expected
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"
        assert onnx_session(folder / "model.onnx").get_providers() == ["CPUExecutionProvider"]


def test_a_file_that_cannot_be_run_is_named(tmp_path):
    (tmp_path / "broken.onnx").write_text("no model")
    for name in ("broken.onnx", "nowhere.onnx"):
        with pytest.raises(UserError, match=f"{name} cannot be run: "):
            onnx_session(tmp_path / name)


@pytest.mark.parametrize("module", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_before_anything_is_written(module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"writing an ONNX file needs the extra 'onnx': pip install"):
        to_onnx(make("cut CTC"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_windows_of_attention_are_refused_by_their_layer(tmp_path):
    space = SearchSpace((16,), (4,), (2,), (2,), head_dim=4, attention_window=(9, None))
    model = tiny_model(LightHubertForCTC, space)
    model.set_subnet(Subnet(16, (4, 4), (32, 32), 4, attention_window=(None, 9)))
    with pytest.raises(UserError, match="layer 1 attends within a window, which an ONNX file cannot have"):
        to_onnx(model, tmp_path)
    assert not list(tmp_path.iterdir())
