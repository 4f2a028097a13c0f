"""CTC models in PyTorch or ONNX that transcribe recordings of any length."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from transformers import AutoModelForCTC, PreTrainedConfig, Wav2Vec2Processor

from lighthubert_training.data.collators import pad
from lighthubert_training.decoding import Alphabet, Decoder, Transcript, greedy, words_of
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.loading import load_config, load_cut_model, load_model, load_processor, named_classes
from modeling_lighthubert.onnx_export import onnx_session


AcousticModel = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Logits (batch_size, num_frames, vocab_size) of float32 audio and its int64 mask, each (batch_size, num_samples)."""
NO_CTC_HEAD = "{} has no CTC head: fine-tune it with run_speech_recognition_ctc.py"


class Piece(NamedTuple):
    """A part of a recording that the model gets as one input.

    Attributes:
        samples: with their context on both sides, a view.
        skipped: frames of context before those that are kept.
        kept: where their log probabilities are written, a view.
    """

    samples: np.ndarray
    skipped: int
    kept: np.ndarray


class Recognizer:
    """A CTC model with its processor, which transcribes recordings of any length.

    Recordings longer than `chunk_length_s` are split into chunks, which overlap by `stride_length_s` with each
    neighbour; only the frames in the middle of a chunk are kept. Each is normalised on its own, as transformers'
    pipeline does it: levels and offsets of a long recording change. What a recording is batched with changes nothing:
    models whose outputs depend on padding get recordings of one length.

    Attributes:
        batches_at_once: of recordings that are best given to `transcribe` together.

    Args:
        decoder: `greedy`, or a `BeamSearch`.
        batch_size: pieces of audio in a batch.

    Raises:
        UserError: chunks that are nothing but strides.
    """

    batches_at_once = 1

    def __init__(
        self,
        model: AcousticModel,
        config: PreTrainedConfig,
        processor: Wav2Vec2Processor,
        decoder: Decoder = greedy,
        batch_size: int = 8,
        chunk_length_s: float = 20.0,
        stride_length_s: float = 2.0,
    ):
        self.model, self.config, self.processor, self.decoder = model, config, processor, decoder
        self.alphabet, self.batch_size = Alphabet.from_tokenizer(processor.tokenizer), batch_size
        self.sampling_rate: int = processor.feature_extractor.sampling_rate
        self.samples_per_frame = int(np.prod(config.conv_stride))
        self.seconds_per_frame = self.samples_per_frame / self.sampling_rate
        self.chunk, self.stride = self.frames_in(chunk_length_s), self.frames_in(stride_length_s)
        if self.chunk <= 2 * self.stride:
            message = f"chunks of {chunk_length_s} s are nothing but strides of {stride_length_s} s on both sides"
            raise UserError(f"{message}: give chunks more than twice as long as strides")

    @classmethod
    def from_pretrained(
        cls, model_name_or_path: str | Path, subnet: str | None = None, device: str = "cpu", **options: Any
    ) -> Self:
        """
        Args:
            model_name_or_path: a LightHuBERT, HuBERT or wav2vec 2.0 with a CTC head and a processor; or an ONNX file
                with inputs `input_values` and `attention_mask`, beside its `config.json` and processor.
            subnet: of a supernet: a name or a JSON file. Default: the selected.
            device: of a PyTorch model. ONNX files run on the CPU.
            options: of `Recognizer`.

        Raises:
            MissingExtraError: onnxruntime is needed and not installed.
            UserError: no CTC head, no processor, or a subnet of what is no supernet.
        """
        is_onnx = Path(model_name_or_path).suffix == ".onnx"
        if is_onnx and not Path(model_name_or_path).is_file():
            raise UserError(f"{model_name_or_path} does not exist")
        if is_onnx and subnet is not None:
            raise UserError(f"subnet {subnet}: {model_name_or_path} holds one model, no supernet")
        folder = Path(model_name_or_path).parent if is_onnx else model_name_or_path
        config, processor = load_config_and_processor(folder)
        model = _onnx(model_name_or_path) if is_onnx else _pytorch(str(model_name_or_path), subnet, device)
        return cls(model, config, processor, **options)

    def frames_in(self, seconds: float) -> int:
        return round(seconds * self.sampling_rate / self.samples_per_frame)

    def num_frames(self, num_samples: int) -> int:
        """Frames that the convolutions make of so many samples."""
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride, strict=True):
            num_samples = max(0, (num_samples - kernel) // stride + 1)
        return num_samples

    def transcribe(self, waveforms: Sequence[np.ndarray]) -> list[Transcript]:
        """Transcripts of mono recordings at the model's sampling rate, each of shape (num_samples)."""
        found = zip(self.log_probs(waveforms), waveforms, strict=True)
        return [self.transcript(log_probs, len(waveform) / self.sampling_rate) for log_probs, waveform in found]

    def transcript(self, log_probs: np.ndarray, duration: float) -> Transcript:
        """Of a recording of `duration` seconds with these log probabilities (num_frames, vocab_size)."""
        words = words_of(self.decoder(log_probs), log_probs, self.alphabet, self.seconds_per_frame)
        return Transcript(words, duration)

    def log_probs(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log probabilities (num_frames, vocab_size), float32, of each recording; (0, vocab_size) of one that is
        shorter than a frame."""
        shapes = [(self.num_frames(len(each)), self.config.vocab_size) for each in waveforms]
        results = [np.empty(shape, dtype=np.float32) for shape in shapes]
        self.answer([piece for each, result in zip(waveforms, results) for piece in self.pieces(each, result)])
        return results

    def answer(self, pieces: Sequence[Piece]) -> None:
        """Writes the log probabilities of each piece where they are kept."""
        for batch in self._batches(pieces):
            for piece, log_probs in zip(batch, self._run([piece.samples for piece in batch]), strict=True):
                piece.kept[:] = log_probs[piece.skipped : piece.skipped + len(piece.kept)]

    def pieces(self, samples: np.ndarray, result: np.ndarray) -> Iterator[Piece]:
        """A recording as it is, or chunks of it, for each row of its `result`; nothing of one without frames."""
        num_frames = len(result)
        if 0 < num_frames <= self.chunk:
            yield Piece(samples, 0, result)
            return
        for start in range(0, num_frames, self.chunk - 2 * self.stride):
            end = min(start + self.chunk - 2 * self.stride, num_frames)
            first, last = max(0, start - self.stride), min(end + self.stride, num_frames)
            # one frame of samples more, because the receptive field of the last frame ends beyond its own
            part = samples[first * self.samples_per_frame : (last + 1) * self.samples_per_frame]
            yield Piece(part, start - first, result[start:end])

    def _batches(self, pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
        """Pieces of similar length together; of equal length for models whose group norm takes padding for audio."""
        ordered = sorted(pieces, key=lambda piece: len(piece.samples))
        may_differ = self.config.feat_extract_norm != "group"
        for _, group in itertools.groupby(ordered, key=lambda piece: may_differ or len(piece.samples)):
            while batch := list(itertools.islice(group, self.batch_size)):
                yield batch

    def _run(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log probabilities (num_frames, vocab_size) of each of the waveforms, with frames of padding at the end."""
        padded = pad(self.processor.feature_extractor, batch)
        input_values = padded["input_values"].numpy()
        logits = self.model(input_values, padded["attention_mask"].numpy().astype(np.int64))
        expected = (len(batch), self.num_frames(input_values.shape[1]), self.config.vocab_size)
        if logits.shape != expected:
            raise UserError(f"the model gives logits of shape {logits.shape}, but its config.json says {expected}")
        return [torch.from_numpy(each).log_softmax(dim=-1).numpy() for each in logits]


def load_config_and_processor(model_name_or_path: str | Path) -> tuple[PreTrainedConfig, Wav2Vec2Processor]:
    """Of a CTC model.

    Raises:
        UserError: no CTC head, no processor, or one whose tokens the model does not have.
    """
    config = load_config(model_name_or_path)
    if (names := named_classes(config)) and not any(name.endswith("ForCTC") for name in names):
        raise UserError(NO_CTC_HEAD.format(f"{model_name_or_path}, a {names[0]},"))
    processor = load_processor(model_name_or_path)
    check_vocabulary(processor.tokenizer.get_vocab(), config, str(model_name_or_path))
    return config, processor


def check_vocabulary(vocabulary: Mapping[str, Any], config: PreTrainedConfig, name: str) -> None:
    """Raises a `UserError` unless every token is an output of the model."""
    size = config.vocab_size
    for token, index in vocabulary.items():
        if not isinstance(index, int) or not 0 <= index < size:
            raise UserError(f"{name}: the tokenizer gives {token!r} the id {index!r}, but the model has {size} tokens")


def _pytorch(model_name_or_path: str, subnet: str | None, device: str) -> AcousticModel:
    """Runs a checkpoint on `device`, in its own dtype."""
    model = load_ctc_model(model_name_or_path, subnet, device=device, load=load_cut_model)
    return lambda audio, mask: run_model(model, *on_device(model, audio, mask))


def load_ctc_model(
    model_name_or_path: str, subnet: str | None = None, device: str = "cpu", load: Callable[..., Any] = load_model
) -> Any:
    """
    Args:
        load: `load_model`, or `load_cut_model`.

    Raises:
        UserError: a checkpoint without a CTC head.
    """
    options = {"head": AutoModelForCTC, "device": device, "output_loading_info": True}
    model, report = load(model_name_or_path, subnet, **options)
    if any(name.startswith("lm_head") for name in report["missing_keys"]):
        raise UserError(NO_CTC_HEAD.format(model_name_or_path))
    return model


def on_device(model: Any, input_values: np.ndarray, attention_mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Audio in the dtype of a model, and its mask, each (batch_size, num_samples)."""
    audio = torch.from_numpy(input_values).to(model.device, model.dtype)
    return audio, torch.from_numpy(attention_mask).to(model.device)


@torch.inference_mode()
def run_model(model: Any, audio: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """Logits (batch_size, num_frames, vocab_size), float32."""
    return model(audio, attention_mask=mask).logits.float().cpu().numpy()


def _onnx(file: str | Path) -> AcousticModel:
    """Runs an ONNX file with as many threads as torch has."""
    session = onnx_session(file)
    if "logits" not in [output.name for output in session.get_outputs()]:
        raise UserError(NO_CTC_HEAD.format(file))
    return lambda audio, mask: session.run(["logits"], {"input_values": audio, "attention_mask": mask})[0]
