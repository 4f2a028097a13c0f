"""Cut models as other programs read them: stock wav2vec 2.0 models, for tools that know no HuBERT, and folders for
runtimes of phones, browsers and servers."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    HubertConfig,
    HubertForCTC,
    HubertForSequenceClassification,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2Model,
    Wav2Vec2PreTrainedModel,
    Wav2Vec2Processor,
)
from transformers.models.hubert.modeling_hubert import HubertPreTrainedModel

from . import LightHubertPreTrainedModel
from .errors import UserError
from .files import write_json, write_text
from .onnx_export import ExportedModel, WaveformModel, halve_file, quantize_file, write_graph


WAV2VEC2_CLASSES: dict[type[HubertPreTrainedModel], type[Wav2Vec2PreTrainedModel]] = {
    HubertModel: Wav2Vec2Model,
    HubertForCTC: Wav2Vec2ForCTC,
    HubertForSequenceClassification: Wav2Vec2ForSequenceClassification,
}
NOT_IN_WAV2VEC2 = {"conv_pos_batch_norm": False, "feat_proj_layer_norm": True}
"""Settings of HuBERT that wav2vec 2.0 does not have, and the values that it is made for."""


def hubert_to_wav2vec2(hubert: HubertPreTrainedModel) -> Wav2Vec2PreTrainedModel:
    """The stock wav2vec 2.0 model with the outputs of a stock HuBERT (`to_hubert`).

    Raises:
        UserError: a setting of HuBERT that wav2vec 2.0 does not have.
    """
    config: Any = hubert.config
    for name, expected in NOT_IN_WAV2VEC2.items():
        if getattr(config, name) is not expected:
            raise UserError(f"wav2vec 2.0 has no {name}={getattr(config, name)}: export another format")
    names = ({field.name for field in fields(Wav2Vec2Config)} & set(config.to_dict())) - {"model_type"}
    shared = {name: getattr(config, name) for name in names} | {"architectures": None}
    with torch.device("meta"):
        model = WAV2VEC2_CLASSES[type(hubert)](Wav2Vec2Config(**shared))
    state = {name.replace("hubert.", "wav2vec2.", 1): tensor for name, tensor in hubert.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model.train(hubert.training)


def write_sherpa_onnx(
    model: LightHubertPreTrainedModel, processor: Wav2Vec2Processor, folder: Path, quantize: str | None = None
) -> Path:
    """Writes `model.onnx`, or `model.int8.onnx`, and `tokens.txt`, which sherpa-onnx reads as
    `OfflineRecognizer.from_omnilingual_asr_ctc`: it normalises audio itself, and gives one recording at a time.

    Args:
        model: a cut model with a CTC head, or a supernet, whose selected subnet is exported.
        processor: its own.

    Returns:
        The ONNX file.

    Raises:
        MissingExtraError: the extra `onnx` is not installed.
        UserError: a model without CTC head, a feature extractor that does not normalise or wants another rate than
            16 kHz, or a model that `to_onnx` refuses.
    """
    _require_ctc(model, "sherpa-onnx")
    extractor: Any = processor.feature_extractor
    if not extractor.do_normalize or extractor.sampling_rate != 16_000:
        raise UserError(
            "sherpa-onnx normalises audio at 16 kHz, which this feature extractor does not (do_normalize="
            f"{extractor.do_normalize}, sampling_rate={extractor.sampling_rate}): export another format"
        )
    file = folder / ("model.onnx" if quantize is None else "model.int8.onnx")
    write_graph(WaveformModel(model), file, quantize)
    write_text(folder / "tokens.txt", "".join(f"{token} {number}\n" for number, token in enumerate(tokens(processor))))
    return file


def write_transformers_js(model: LightHubertPreTrainedModel, processor: Wav2Vec2Processor, folder: Path) -> Path:
    """Writes what transformers.js reads as a HuBERT: `onnx/model.onnx` (its dtype `fp32`), `onnx/model_fp16.onnx`
    (`fp16`), `onnx/model_quantized.onnx` (`q8`), `config.json`, `preprocessor_config.json` and `tokenizer.json`.

    Args:
        model: a cut model with a CTC head, or a supernet, whose selected subnet is exported.
        processor: its own.

    Returns:
        The ONNX file in fp32.

    Raises:
        MissingExtraError: the extra `onnx` is not installed.
        UserError: a model without CTC head, or one that `to_onnx` refuses.
    """
    _require_ctc(model, "transformers.js")
    file = write_onnx_folder(model, folder)
    config = model.extract_subnet().config
    shared = {field.name: getattr(config, field.name) for field in fields(HubertConfig)}
    HubertConfig(**shared | {"architectures": [HubertForCTC.__name__]}).save_pretrained(folder)
    feature_extractor: Any = processor.feature_extractor
    feature_extractor.save_pretrained(folder)
    write_text(folder / "tokenizer.json", fast_tokenizer(processor).to_str(pretty=True) + "\n")
    names = {name: getattr(processor.tokenizer, name) for name in ("pad_token", "unk_token", "word_delimiter_token")}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "Wav2Vec2CTCTokenizer", **names})
    return file


def write_onnx_folder(model: LightHubertPreTrainedModel, folder: Path) -> Path:
    """Writes `onnx/model.onnx`, in half precision `onnx/model_fp16.onnx` and in 8 bits `onnx/model_quantized.onnx`, as
    repositories of the Hub have them.

    Args:
        model: a cut model, a supernet, whose selected subnet is exported, or a stock HuBERT.

    Returns:
        The ONNX file in fp32.

    Raises:
        MissingExtraError: the extra `onnx` is not installed.
        UserError: a model that `to_onnx` refuses.
    """
    file = folder / "onnx" / "model.onnx"
    write_graph(ExportedModel(model), file)
    quantize_file(file, file.with_name("model_quantized.onnx"))
    halve_file(file, file.with_name("model_fp16.onnx"))
    return file


def fast_tokenizer(processor: Wav2Vec2Processor) -> Tokenizer:
    """The tokenizer of a CTC model as the library tokenizers has it. The blank is no special token there: those are
    dropped before repeated letters become one, and blanks have to be dropped after."""
    tokenizer: Any = processor.tokenizer
    blank, delimiter = tokenizer.pad_token, tokenizer.word_delimiter_token
    fast = Tokenizer(models.WordLevel(tokenizer.get_vocab(), unk_token=tokenizer.unk_token))
    fast.normalizer = normalizers.Replace(" ", delimiter)
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast.decoder = decoders.CTC(pad_token=blank, word_delimiter_token=delimiter, cleanup=True)
    special = [token for token in tokenizer.all_special_tokens if token not in (blank, delimiter)]
    fast.add_special_tokens([AddedToken(token, special=True) for token in special])
    return fast


def _require_ctc(model: LightHubertPreTrainedModel, runtime: str) -> None:
    if not hasattr(model, "lm_head"):
        raise UserError(f"{runtime} transcribes: {type(model).__name__} has no CTC head")


def tokens(processor: Wav2Vec2Processor) -> list[str]:
    """The tokens of a CTC model in the order of its outputs, the blank as `<blk>` and the space as `▁`."""
    tokenizer: Any = processor.tokenizer
    case = str.lower if getattr(tokenizer, "do_lower_case", False) else str
    names = {tokenizer.pad_token: "<blk>", tokenizer.word_delimiter_token: "▁"}
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if [number for _, number in vocabulary] != list(range(len(vocabulary))):
        raise UserError(f"the tokenizer leaves out numbers below {vocabulary[-1][1]}: give each output a token")
    special = set(tokenizer.all_special_tokens)
    return [names.get(token) or (token if token in special else case(token)) for token, _ in vocabulary]
