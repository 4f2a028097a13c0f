"""Features: the hidden states of a frozen model for recordings, computed once and kept on disk, or each time anew.

Features of a recording do not depend on others: in a batch, those of models that take padding for audio are encoded
alone.
"""

import hashlib
import json
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoFeatureExtractor, AutoModel, PreTrainedModel, SequenceFeatureExtractor

from lighthubert_training.data.audio import duration
from lighthubert_training.data.recordings import SpeechDataset, Unreadable
from modeling_lighthubert.errors import UserError, user_error
from modeling_lighthubert.files import whole_file
from modeling_lighthubert.loading import SubnetLike, load_cut_model, load_processor


BATCH_SECONDS = 160.0
"""Of a padded batch that goes through the model at once."""
RECORDINGS_READ = 32
"""At a time, to fill the cache."""
NUM_READERS = 4
"""Threads that read what is kept, or decode audio."""
Stored = torch.Tensor | np.ndarray
"""Of a recording: kept features, in the dtype in which they are kept, or its waveform."""


class Upstream:
    """A frozen model of speech: any that transformers loads and that returns hidden states.

    Attributes:
        num_layers: hidden states of a frame: the input of the first layer, and the output of each.
        samples_per_frame: hop between frames, in samples.

    Raises:
        UserError: the model returns no hidden states.
    """

    def __init__(self, model: PreTrainedModel, feature_extractor: SequenceFeatureExtractor, name: str):
        self.model = model.eval().requires_grad_(False)
        self.feature_extractor: Any = feature_extractor
        self.name = name
        self.sampling_rate: int = feature_extractor.sampling_rate
        self.num_parameters = model.num_parameters()
        one, two = (self(np.random.default_rng(0).standard_normal(seconds * self.sampling_rate)) for seconds in (1, 2))
        self.num_layers, _, self.hidden_size = one.shape
        self.samples_per_frame = round(self.sampling_rate / (two.shape[1] - one.shape[1]))
        self.seconds_per_frame = self.samples_per_frame / self.sampling_rate

    @classmethod
    def from_pretrained(
        cls, model_name_or_path: str, subnet: SubnetLike | None = None, device: str | torch.device | None = None
    ) -> "Upstream":
        """A checkpoint, or a subnet that is cut out of it: see `load_cut_model`, also for what is raised."""
        model = load_cut_model(model_name_or_path, subnet, head=AutoModel, device=device)
        extractor = load_processor(model_name_or_path, AutoFeatureExtractor)
        name = Path(model_name_or_path).name
        return cls(model, extractor, name if subnet is None else f"{name}, {Path(str(subnet)).stem}")

    @cached_property
    def key(self) -> str:
        """Digest of what features depend on besides the recording: weights, configuration, feature extractor."""
        digest = hashlib.sha256(json.dumps(self.feature_extractor.to_dict(), sort_keys=True, default=str).encode())
        settings = self.model.config.to_diff_dict() | {"_name_or_path": None, "transformers_version": None}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def pads(self) -> bool:
        """Whether padding changes nothing: the model is told of it, and its convolutions have no group norm."""
        masks = getattr(self.feature_extractor, "return_attention_mask", False)
        return bool(masks) and getattr(self.model.config, "feat_extract_norm", "group") == "layer"

    def __call__(self, waveform: np.ndarray) -> torch.Tensor:
        """Hidden states (num_layers, num_frames, hidden_size) of mono samples (num_samples), in fp32 on the device."""
        return self.batch([waveform])[0]

    def batch(self, waveforms: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """The same of several recordings, which go through the model together if padding changes nothing, at most
        `BATCH_SECONDS` at a time."""
        found: dict[int, torch.Tensor] = {}
        for batch in self._batches(list(map(len, waveforms))):
            found |= dict(zip(batch, self._run([waveforms[at] for at in batch]), strict=True))
        return [found[at] for at in range(len(waveforms))]

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Recordings by their numbers, the shortest first."""
        most = BATCH_SECONDS * self.sampling_rate if self.pads else 0
        batches: list[list[int]] = []
        for at in sorted(range(len(lengths)), key=lambda at: lengths[at]):
            if not batches or (len(batches[-1]) + 1) * lengths[at] > most:
                batches.append([])
            batches[-1].append(at)
        return batches

    @torch.no_grad()
    def _run(self, waveforms: Sequence[np.ndarray]) -> list[torch.Tensor]:
        is_padded = len(set(map(len, waveforms))) > 1
        options = {"padding": True, "return_attention_mask": True} if is_padded else {}
        inputs = self.feature_extractor(
            list(waveforms), sampling_rate=self.sampling_rate, return_tensors="pt", **options
        )
        name, device = self.feature_extractor.model_input_names[0], self.model.device
        masks = {"attention_mask": inputs["attention_mask"].to(device)} if is_padded else {}
        try:
            outputs = self.model(inputs[name].to(device, self.model.dtype), output_hidden_states=True, **masks)
        except TypeError as error:
            raise UserError(f"{self.name} cannot be scored: {error}") from error
        hidden_states = getattr(outputs, "hidden_states", None)
        if hidden_states is None:
            raise UserError(
                f"{self.name}, a {type(self.model).__name__}, returns no hidden states, which are what is scored"
            )
        states = torch.stack(hidden_states, dim=1).float()
        if not is_padded:
            return list(states)
        model: Any = self.model
        lengths = (int(model._get_feat_extract_output_lengths(len(waveform))) for waveform in waveforms)
        return [state[:, :length] for state, length in zip(states, lengths, strict=True)]


class FeatureCache:
    """Features on disk, a safetensors file for each recording. Files are whole from the moment they are there, so
    several processes may use the same cache; one with a wrong checksum is written anew.

    Args:
        folder: of all caches; each model, subnet and dtype has a folder in it.
        dtype: of kept features: fp16, or fp32, twice the size.
    """

    def __init__(self, upstream: Upstream, folder: Path, dtype: torch.dtype = torch.float16):
        self.upstream, self.dtype = upstream, dtype
        self.folder = folder / f"{upstream.key}-{str(dtype).removeprefix('torch.')}"

    def file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def missing(self, key: str) -> bool:
        """Whether there is no file of a recording.

        Raises:
            UserError: its folder may not be read.
        """
        try:
            return not self.file(key).exists()
        except PermissionError as error:
            raise UserError(f"kept features may not be read ({error}): choose another --cache_dir") from error

    def read(self, key: str) -> torch.Tensor | None:
        """The features that are kept of a recording, in their dtype, on the CPU; `None` if there is no whole file.

        Raises:
            UserError: the file is there, and may not be read.
        """
        try:
            self.file(key).open("rb").close()  # safetensors does not tell a file without permission from none
            with safe_open(self.file(key), framework="pt") as kept:
                hidden_states, checksum = kept.get_tensor("hidden_states"), kept.metadata()["crc32"]
        except PermissionError as error:
            raise UserError(f"kept features may not be read ({error}): choose another --cache_dir") from error
        except (FileNotFoundError, SafetensorError, KeyError, TypeError):
            return None
        return hidden_states if checksum == _checksum(hidden_states) else None

    def write(self, key: str, hidden_states: torch.Tensor) -> torch.Tensor:
        """Keeps features, and returns them as `read` will.

        Raises:
            UserError: they are too large for the dtype, or the file cannot be written.
        """
        if (largest := float(hidden_states.abs().max())) > torch.finfo(self.dtype).max:
            raise UserError(
                f"{self.upstream.name} has features of {largest:.3g}, more than {self.dtype} can hold: choose"
                " --features_dtype float32"
            )
        hidden_states = hidden_states.to(self.dtype).cpu().contiguous()
        try:
            with whole_file(self.file(key)) as unfinished:
                save_file({"hidden_states": hidden_states}, unfinished, metadata={"crc32": _checksum(hidden_states)})
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"features cannot be kept in {self.folder} ({error}): make room, or choose another --cache_dir"
            ) from error
        return hidden_states

    def bytes_for(self, seconds: float) -> int:
        """Size of the features of that much audio."""
        frames = seconds * self.upstream.sampling_rate / self.upstream.samples_per_frame
        return int(frames * self.upstream.num_layers * self.upstream.hidden_size * self.dtype.itemsize)


def _checksum(tensor: torch.Tensor) -> str:
    return str(zlib.crc32(tensor.numpy().tobytes()))


class FeatureDataset(torch.utils.data.Dataset):
    """Features of a part of the data: item i is (num_layers, num_frames, hidden_size), fp32, on the device of the
    model.

    Args:
        audio: encoded, in the column `audio`.
        cache: where features are kept. Default: they are computed whenever they are asked for.
    """

    def __init__(self, audio: Dataset, upstream: Upstream, cache: FeatureCache | None = None):
        self.speech = SpeechDataset(audio, "audio", upstream.sampling_rate)
        self.upstream, self.cache, self.keys = upstream, cache, list[str]()
        if cache:
            rows = tqdm(range(len(audio)), desc="reading recordings", disable=len(audio) < 10_000)
            self.keys = [self._digest(index) for index in rows]

    def __len__(self) -> int:
        return len(self.speech)

    def seconds(self, index: int) -> float:
        """Length of a recording, from its header."""
        return duration(self.speech.encoded(index))

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.states([index], [self.read(index)])[0]

    def read(self, index: int) -> Stored:
        """What is kept of a recording, or else its waveform.

        Raises:
            UserError: the recording cannot be read.
        """
        if self.cache is not None and (kept := self.cache.read(self.keys[index])) is not None:
            return kept
        recording = self.speech[index]
        if recording.waveform is None:
            Unreadable(0.0, len(self)).add(recording.name, recording.problem)
        assert recording.waveform is not None  # a share of 0 allows no other
        return recording.waveform

    def states(self, indices: Sequence[int], stored: Sequence[Stored]) -> list[torch.Tensor]:
        """Features of recordings, from what `read` returned for them. Those that are kept are computed one by one, so
        that they do not depend on which are kept already.

        Raises:
            UserError: a recording is shorter than a frame.
        """
        new = {at: each for at, each in enumerate(stored) if isinstance(each, np.ndarray)}
        found = dict(enumerate(stored))
        if self.cache is None:
            try:
                found |= dict(zip(new, self.upstream.batch(list(new.values())), strict=True))
            except (ValueError, RuntimeError):  # one of them has no features
                found |= {at: self._alone(indices[at], each) for at, each in new.items()}
        else:
            for at, each in new.items():
                found[at] = self.cache.write(self.keys[indices[at]], self._alone(indices[at], each))
        device = self.upstream.model.device
        return [torch.as_tensor(each).to(device, non_blocking=True).float() for each in found.values()]

    def _alone(self, index: int, waveform: np.ndarray) -> torch.Tensor:
        try:
            return self.upstream(waveform)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"{self.speech.name(index)} ({self.seconds(index):.3f} s) gives no features: {error}. Mend it, or"
                " leave it out of the data"
            ) from error

    def _digest(self, index: int) -> str:
        """Of a file, by its name, size and time of change, without reading it; of bytes, by what they are."""
        audio = self.speech.encoded(index) or {}
        content = audio.get("bytes") or b""
        if not content:
            with suppress(OSError, TypeError):  # what is missing is named when its features are to be computed
                file = Path(audio["path"]).resolve(strict=True)
                content = f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}".encode(errors="replace")
        return hashlib.sha256(content).hexdigest()


def read_ahead(features: FeatureDataset, batches: Iterable[Sequence[int]]) -> Iterator[list[Stored]]:
    """What is stored of the recordings of each batch, read by threads while the batch before is used."""
    with ThreadPoolExecutor(NUM_READERS) as readers:
        coming: list[Future[Stored]] = []
        for number, batch in enumerate(batches):
            before, coming = coming, [readers.submit(features.read, index) for index in batch]
            if number:
                yield [each.result() for each in before]
        yield [each.result() for each in coming]


Features = dict[str, FeatureDataset]
"""Of each part of a task."""


def fill_cache(parts: Sequence[FeatureDataset], accelerator: Accelerator) -> None:
    """Computes the features that the cache lacks of all `parts`, split among processes. Says first how large they are.

    Raises:
        UserError: the disk has no room for them.
    """
    cache = parts[0].cache
    if cache is not None:
        missing = [(part, at) for part in parts for at, key in enumerate(part.keys) if cache.missing(key)]
        needed = cache.bytes_for(sum(part.seconds(at) for part, at in missing))
        with user_error("features cannot be kept: "):
            cache.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache.folder).free
        accelerator.print(
            f"features of {len(missing)} recordings will take {needed / 2**20:,.0f} MiB in {cache.folder}"
            f" ({free / 2**30:,.0f} GiB are free)",
            file=sys.stderr,
        )
        if needed > 0.95 * free:
            raise UserError(
                f"{needed / 2**30:,.1f} GiB of features do not fit in the {free / 2**30:,.1f} GiB that are free in"
                f" {cache.folder}: choose another --cache_dir, --features_dtype float16, or leave --cache_dir out"
            )
        ours = missing[accelerator.process_index :: accelerator.num_processes]
        is_hidden = not accelerator.is_main_process or not missing
        with tqdm(total=len(ours), desc="features", disable=is_hidden) as progress:
            for part in parts:
                own = [at for other, at in ours if other is part]
                batches = [own[start : start + RECORDINGS_READ] for start in range(0, len(own), RECORDINGS_READ)]
                for batch, stored in zip(batches, read_ahead(part, batches)):
                    part.states(batch, stored)
                    progress.update(len(batch))
    accelerator.wait_for_everyone()
