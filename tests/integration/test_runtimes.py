"""What is exported for another program is read by that program, unpatched, and says the same there."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SearchSpace, assert_close, noise, tiny_model
from recognizers import TOKENS, save_processor
from transformers import (
    AutoModel,
    AutoModelForCTC,
    AutoProcessor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2Model,
)

from lighthubert_training.data.audio import load_waveform
from lighthubert_training.data.strings import read_parquet
from lighthubert_training.error_rates import character_error_rate
from lighthubert_training.recognition.recognizer import Recognizer
from modeling_lighthubert import LightHubertForCTC, LightHubertForSequenceClassification, LightHubertModel
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.export import main, to_hubert
from modeling_lighthubert.onnx_export import macs_by_bits
from modeling_lighthubert.runtimes import fast_tokenizer, hubert_to_wav2vec2, tokens


DEMO = Path(__file__).parents[2] / "demo"
MOST_LOST = 0.01
"""Character error rate that 8 bits may add."""
SPACE = SearchSpace((16,), (4,), (2,), (1,), head_dim=4)  # shallow: the exporter is slow


@pytest.fixture
def asr(tmp_path):
    """A supernet with a CTC head."""
    folder = tmp_path / "asr"
    tiny_model(LightHubertForCTC, SPACE, pad_token_id=0, vocab_size=len(TOKENS)).save_pretrained(folder)
    save_processor(folder)
    return folder


def export(asr, folder, form: str, *options: str):
    words = ["--model_name_or_path", str(asr), "--output_dir", str(folder / form), "--format", form, "--repeats", "1"]
    main([*words, *options])
    return folder / form


def texts(folder, recordings) -> list[str]:
    return [each.text for each in Recognizer.from_pretrained(folder).transcribe(recordings)]


@dataclass
class Digits:
    """The demonstration's model in fp32, what it writes of the demonstration's strings of digits, and their texts."""

    folder: Path
    recordings: list[np.ndarray]
    references: list[str]

    def __post_init__(self) -> None:
        self.written = texts(self.folder, self.recordings)
        assert len(self.written) == 108 and self.error_rate(self.written) < 0.2

    def error_rate(self, written: list[str]) -> float:
        """Of characters."""
        return character_error_rate(self.references, written)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    AutoModelForCTC.from_pretrained(DEMO / "asr", dtype=torch.float32).save_pretrained(folder)
    AutoProcessor.from_pretrained(DEMO / "asr").save_pretrained(folder)
    rows = [row for row in read_parquet(DEMO / "speech/test.parquet") if " " in row["text"]]
    return Digits(folder, [load_waveform(row["audio"], 16_000) for row in rows], [row["text"] for row in rows])


# sherpa-onnx


SHERPA = """
import sys

import numpy
import sherpa_onnx

folder, name, audio = sys.argv[1:]
recognizer = sherpa_onnx.OfflineRecognizer.from_omnilingual_asr_ctc(f"{folder}/{name}", f"{folder}/tokens.txt")
streams = []
for waveform in numpy.load(audio).values():
    streams.append(recognizer.create_stream())
    streams[-1].accept_waveform(16_000, waveform)
recognizer.decode_streams(streams)
print(*(stream.result.text for stream in streams), sep="\\n")
"""
"""Run in a process of its own, which imports nothing of ours."""


def sherpa(folder, name: str, audio, recordings) -> list[str]:
    pytest.importorskip("sherpa_onnx")
    np.savez(audio, *recordings)
    command = [sys.executable, "-c", SHERPA, str(folder), name, str(audio)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [" ".join(line.split()) for line in told.split("\n")[: len(recordings)]]


def test_sherpa_onnx_writes_what_pytorch_writes(digits, tmp_path):
    folder = export(digits.folder, tmp_path, "sherpa-onnx")
    assert {file.name for file in folder.iterdir()} == {"model.onnx", "tokens.txt"}
    assert sherpa(folder, "model.onnx", tmp_path / "audio.npz", digits.recordings) == digits.written


def test_sherpa_onnx_loses_little_in_eight_bits(digits, tmp_path, capsys):
    folder = export(digits.folder, tmp_path, "sherpa-onnx", "--quantize", "int8")
    assert re.search(r"in 8 bits: \d+\.\d% of the multiply-accumulates", capsys.readouterr().out)
    assert {file.name for file in folder.iterdir()} == {"model.int8.onnx", "tokens.txt"}
    assert macs_by_bits(folder / "model.int8.onnx")[8] > 0
    written = sherpa(folder, "model.int8.onnx", tmp_path / "audio.npz", digits.recordings)
    assert digits.error_rate(written) < digits.error_rate(digits.written) + MOST_LOST


def test_what_sherpa_onnx_cannot_hold_is_refused(asr, tmp_path):
    other = tmp_path / "other"
    AutoModelForCTC.from_pretrained(asr).save_pretrained(other)
    save_processor(other, do_normalize=False)
    with pytest.raises(UserError, match="sherpa-onnx normalises audio at 16 kHz, which .*do_normalize=False"):
        export(other, tmp_path, "sherpa-onnx")
    tiny_model(LightHubertModel, SPACE).save_pretrained(tmp_path / "base")
    save_processor(tmp_path / "base")
    with pytest.raises(UserError, match="sherpa-onnx transcribes: LightHubertModel has no CTC head"):
        export(tmp_path / "base", tmp_path, "sherpa-onnx")
    assert not (tmp_path / "sherpa-onnx").exists()


def test_tokens_are_those_of_the_model_with_blank_and_space_as_kaldi_names_them(tmp_path):
    processor = save_processor(tmp_path)
    assert tokens(processor) == ["<blk>", "▁", "<unk>", *"abcdefghi"]
    processor.tokenizer.do_lower_case = True
    processor.tokenizer.add_tokens(["Z"])
    assert tokens(processor)[-1] == "z"


# transformers.js


VERSION = "4.3.1"
NODE = """
import { pipeline, env } from "@huggingface/transformers";
import fs from "node:fs";
import path from "node:path";

const [folder, dtype, ...files] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder) + "/";
const transcribe = await pipeline("automatic-speech-recognition", path.basename(folder), { dtype });
for (const file of files) {
  const bytes = fs.readFileSync(file);
  const { text } = await transcribe(new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4));
  console.log(JSON.stringify(text));
}
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """Transcribes recordings with transformers.js in Node; skipped where it cannot be installed."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("there is no Node")
    folder = tmp_path_factory.mktemp("node")
    # scripts would fetch CUDA; what a CPU needs is in the package
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", f"@huggingface/transformers@{VERSION}"]
    if subprocess.run(command, cwd=folder, capture_output=True, timeout=300).returncode:
        pytest.skip("transformers.js cannot be installed")
    (folder / "transcribe.mjs").write_text(NODE)

    def run(model, dtype: str, recordings) -> list[str]:
        files = [folder / f"{number}.f32" for number in range(len(recordings))]
        for file, waveform in zip(files, recordings, strict=True):
            waveform.astype("<f4").tofile(file)
        words = ["node", folder / "transcribe.mjs", model, dtype, *files]
        told = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True).stdout
        return [" ".join(json.loads(line).split()) for line in told.splitlines()]

    return run


@pytest.fixture(scope="module")
def page(digits, tmp_path_factory):
    return export(digits.folder, tmp_path_factory.mktemp("page"), "transformers.js")


def test_a_folder_of_transformers_js_has_the_files_that_it_looks_for(page):
    names = {str(file.relative_to(page)) for file in page.rglob("*") if file.is_file()}
    expected = {"config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names == expected | {"onnx/model.onnx", "onnx/model_fp16.onnx", "onnx/model_quantized.onnx"}
    config = json.loads((page / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("hubert", ["HubertForCTC"])


def test_transformers_js_writes_what_pytorch_writes(digits, page, node):
    assert node(page, "fp32", digits.recordings) == digits.written


@pytest.mark.parametrize("dtype", ["fp16", "q8"])
def test_transformers_js_loses_little_in_fewer_bits(digits, page, node, dtype):
    written = node(page, dtype, digits.recordings)
    assert digits.error_rate(written) < digits.error_rate(digits.written) + MOST_LOST


def test_the_fast_tokenizer_decodes_as_the_slow_one(tmp_path):
    processor = save_processor(tmp_path)
    fast, slow = fast_tokenizer(processor), processor.tokenizer
    path = [TOKENS.index(token) for token in ["a", "a", "<pad>", "a", "|", "<pad>", "|", "b", "b", "c", "<pad>", "c"]]
    assert fast.decode(path) == slow.decode(path) == "aa  bcc"
    assert fast.encode("ab c").ids == slow("ab c").input_ids


def test_a_model_without_ctc_is_refused_for_transformers_js(tmp_path):
    tiny_model(LightHubertModel, SPACE).save_pretrained(tmp_path / "base")
    save_processor(tmp_path / "base")
    with pytest.raises(UserError, match="transformers.js transcribes: LightHubertModel has no CTC head"):
        export(tmp_path / "base", tmp_path, "transformers.js")


def test_transformers_js_has_both_precisions_at_once(asr, tmp_path, capsys):
    with pytest.raises(SystemExit):
        export(asr, tmp_path, "transformers.js", "--quantize", "int8")
    assert "--quantize is for --format onnx and sherpa-onnx, not for transformers.js" in capsys.readouterr().err


# wav2vec 2.0


CLASSES = {
    LightHubertModel: Wav2Vec2Model,
    LightHubertForCTC: Wav2Vec2ForCTC,
    LightHubertForSequenceClassification: Wav2Vec2ForSequenceClassification,
}


@pytest.mark.parametrize("stable", [False, True], ids=["norm last", "norm first"])
@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("head", CLASSES)
def test_the_stock_wav2vec2_answers_like_the_cut_model(head, norm, stable, tmp_path):
    model = tiny_model(head, SPACE, feat_extract_norm=norm, do_stable_layer_norm=stable)
    stock = hubert_to_wav2vec2(to_hubert(model))
    assert type(stock) is CLASSES[head]
    stock.save_pretrained(tmp_path)
    loaded = CLASSES[head].from_pretrained(tmp_path).eval().to(model.device)
    audio = noise(2, 6000).to(model.device)
    with torch.no_grad():
        assert_close(loaded(audio)[0].cpu(), model(audio)[0].cpu())


def test_a_folder_of_wav2vec2_is_one_of_transformers_and_writes_the_same(digits, tmp_path):
    folder = export(digits.folder, tmp_path, "wav2vec2")
    assert not list(folder.glob("*.py"))
    assert AutoModel.from_pretrained(folder).config.model_type == "wav2vec2"
    assert type(AutoModelForCTC.from_pretrained(folder)) is Wav2Vec2ForCTC
    assert texts(folder, digits.recordings) == digits.written


@pytest.mark.parametrize("settings", [{"conv_pos_batch_norm": True}, {"feat_proj_layer_norm": False}])
def test_what_wav2vec2_does_not_have_is_refused(settings):
    (name, value) = next(iter(settings.items()))
    with pytest.raises(UserError, match=f"wav2vec 2.0 has no {name}={value}: export another format"):
        hubert_to_wav2vec2(to_hubert(tiny_model(LightHubertModel, SPACE, **settings)))
