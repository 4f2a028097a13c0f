"""CTC models in PyTorch or ONNX that transcribe recordings of any length."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCTC, PreTrainedConfig, Wav2Vec2Processor

from lighthubert_training.decoding import Alphabet, Decoder, Transcript, greedy, optional, words_of
from modeling_lighthubert import Subnet  # registers our models with the Auto classes


AcousticModel = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Logits (batch_size, num_frames, vocab_size) of float32 audio and its int64 mask, each (batch_size, num_samples)."""


class Piece(NamedTuple):
    """A part of a recording that the model hears at once.

    Attributes:
        samples: with their context on both sides, a view.
        recording: which one, `first_frame` of it is the first that is kept, `num_frames` are.
        skipped: frames of context before these.
    """

    samples: np.ndarray
    recording: int
    first_frame: int
    num_frames: int
    skipped: int


class Recognizer:
    """A CTC model with its processor, which transcribes recordings of any length.

    Recordings longer than `chunk_length_s` are heard in chunks, which share `stride_length_s` with each neighbour on
    either side; only the frames in the middle of a chunk are kept. Each is normalised on its own, as transformers'
    pipeline does it: levels and offsets of a long recording change. What a recording is batched with changes nothing:
    models whose answers depend on padding get recordings of one length.

    Args:
        model: gives logits.
        batch_size: pieces of audio that the model hears together.
        decoder: `greedy`, or a `BeamSearch`.

    Raises:
        ValueError: chunks that are nothing but strides.
    """

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
        self.alphabet, self.batch_size = Alphabet(processor.tokenizer), batch_size
        self.sampling_rate: int = processor.feature_extractor.sampling_rate
        self.samples_per_frame = int(np.prod(config.conv_stride))
        self.chunk, self.stride = self.frames_in(chunk_length_s), self.frames_in(stride_length_s)
        if self.chunk <= 2 * self.stride:
            raise ValueError(
                f"chunks of {chunk_length_s} s are nothing but strides of {stride_length_s} s on both sides"
            )

    @classmethod
    def from_pretrained(
        cls, model_name_or_path: str | Path, subnet: str | None = None, device: str = "cpu", **options: Any
    ) -> "Recognizer":
        """
        Args:
            model_name_or_path: a LightHuBERT, HuBERT or wav2vec 2.0 with a CTC head and a processor; or an ONNX file
                with inputs `input_values` and `attention_mask`, beside its `config.json` and processor.
            subnet: of a supernet: a name or a JSON file. Default: the selected.
            options: of `Recognizer`.

        Raises:
            ImportError: onnxruntime is needed and not installed.
            ValueError: no CTC head, no processor, or a subnet of what is no supernet.
        """
        is_onnx = Path(model_name_or_path).suffix == ".onnx"
        folder = Path(model_name_or_path).parent if is_onnx else model_name_or_path
        try:
            processor = Wav2Vec2Processor.from_pretrained(folder)
            config = AutoConfig.from_pretrained(folder)
        except (OSError, TypeError) as error:
            raise ValueError(f"{folder} lacks a configuration, a tokenizer or a feature extractor: {error}") from error
        if is_onnx and subnet is not None:
            raise ValueError(f"subnet {subnet}: {model_name_or_path} holds one model, no supernet")
        model = _onnx(model_name_or_path) if is_onnx else _pytorch(str(model_name_or_path), subnet, device)
        return cls(model, config, processor, **options)

    @property
    def seconds_per_frame(self) -> float:
        return self.samples_per_frame / self.sampling_rate

    def frames_in(self, seconds: float) -> int:
        return round(seconds * self.sampling_rate / self.samples_per_frame)

    def num_frames(self, num_samples: int) -> int:
        """Frames that the convolutions make of so many samples."""
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride, strict=True):
            num_samples = max(0, (num_samples - kernel) // stride + 1)
        return num_samples

    def normalize(self, waveform: np.ndarray) -> np.ndarray:
        """What the model hears at once, as it wants it, shape (num_samples)."""
        extractor = self.processor.feature_extractor
        return extractor(waveform, sampling_rate=self.sampling_rate, return_tensors="np").input_values[0]

    def transcribe(self, waveforms: Sequence[np.ndarray]) -> list[Transcript]:
        """Transcripts of mono recordings at the model's sampling rate, each of shape (num_samples)."""
        transcripts = []
        for waveform, log_probs in zip(waveforms, self.log_probs(waveforms), strict=True):
            path = self.decoder(log_probs)
            words = words_of(path, log_probs, self.alphabet, self.seconds_per_frame)
            transcripts.append(Transcript(words, len(waveform) / self.sampling_rate))
        return transcripts

    def log_probs(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log probabilities (num_frames, vocab_size), float32, of each recording; none of one shorter than a frame."""
        shapes = [(self.num_frames(len(each)), self.config.vocab_size) for each in waveforms]
        results = [np.empty(shape, dtype=np.float32) for shape in shapes]
        pieces = [piece for number, each in enumerate(waveforms) for piece in self._pieces(each, number)]
        for batch in self._batches(pieces):
            heard = self._run([self.normalize(piece.samples) for piece in batch])
            for piece, log_probs in zip(batch, heard, strict=True):
                kept = log_probs[piece.skipped : piece.skipped + piece.num_frames]
                results[piece.recording][piece.first_frame : piece.first_frame + piece.num_frames] = kept
        return results

    def _pieces(self, samples: np.ndarray, recording: int) -> Iterator[Piece]:
        """A recording as it is, or chunks of it; nothing of one without frames."""
        num_frames = self.num_frames(len(samples))
        if 0 < num_frames <= self.chunk:
            yield Piece(samples, recording, 0, num_frames, 0)
            return
        for start in range(0, num_frames, self.chunk - 2 * self.stride):
            end = min(start + self.chunk - 2 * self.stride, num_frames)
            first, last = max(0, start - self.stride), min(end + self.stride, num_frames)
            # one frame of samples more, because the last frame sees beyond its own
            part = samples[first * self.samples_per_frame : (last + 1) * self.samples_per_frame]
            yield Piece(part, recording, start, end - start, start - first)

    def _batches(self, pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
        """Pieces of similar length together; of equal length where a group norm would take padding for audio."""
        ordered = sorted(pieces, key=lambda piece: len(piece.samples))
        groups: list[list[Piece]] = [ordered]
        if self.config.feat_extract_norm == "group":
            groups = [list(group) for _, group in itertools.groupby(ordered, key=lambda piece: len(piece.samples))]
        for group in groups:
            for at in range(0, len(group), self.batch_size):
                yield group[at : at + self.batch_size]

    def _run(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log probabilities of what is heard at once, each with frames of padding behind."""
        longest = max(map(len, batch))
        input_values = np.zeros((len(batch), longest), dtype=np.float32)
        attention_mask = np.zeros((len(batch), longest), dtype=np.int64)
        for row, samples in enumerate(batch):
            input_values[row, : len(samples)], attention_mask[row, : len(samples)] = samples, 1
        logits = self.model(input_values, attention_mask)
        expected = (len(batch), self.num_frames(longest), self.config.vocab_size)
        if logits.shape != expected:
            raise ValueError(f"the model gives logits of shape {logits.shape}, its config.json says {expected}")
        return [_log_softmax(each) for each in logits]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).log_softmax(dim=-1).numpy()


def _pytorch(model_name_or_path: str, subnet: str | None, device: str) -> AcousticModel:
    model, report = AutoModelForCTC.from_pretrained(model_name_or_path, output_loading_info=True)
    if any(name.startswith("lm_head") for name in report["missing_keys"]):
        raise ValueError(
            f"{model_name_or_path} has no CTC head: fine-tune it first, with run_speech_recognition_ctc.py"
        )
    if getattr(model.config, "search_space", None) is not None:
        is_file = subnet is not None and subnet.endswith(".json")
        model = model.extract_subnet(Subnet.from_json_file(subnet) if is_file else subnet)
    elif subnet is not None:
        raise ValueError(f"subnet {subnet}: {model_name_or_path} is no supernet to choose one from")
    model = model.eval().to(device)

    @torch.inference_mode()
    def logits(input_values: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        audio, mask = (torch.from_numpy(array).to(device) for array in (input_values, attention_mask))
        return model(audio, attention_mask=mask).logits.float().cpu().numpy()

    return logits


def _onnx(file: str | Path) -> AcousticModel:
    onnxruntime = optional("onnxruntime", "onnx", f"running {file}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def logits(input_values: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        return session.run(["logits"], {"input_values": input_values, "attention_mask": attention_mask})[0]

    return logits
