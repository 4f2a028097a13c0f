"""Hidden states of a frozen model for recordings, computed once and kept on disk, or computed each time.

A recording is heard alone: what it is batched with changes nothing, and what is kept is what would be computed.
"""

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm.auto import tqdm
from transformers import AutoFeatureExtractor, AutoModel, PreTrainedModel, SequenceFeatureExtractor

from lighthubert_training.data.audio import UNREADABLE, duration, load_waveform
from lighthubert_training.data.recordings import recording_name
from modeling_lighthubert import LightHubertPreTrainedModel, Subnet


class Upstream:
    """A frozen model of speech, any that transformers loads and that gives hidden states.

    Attributes:
        num_layers: hidden states of a frame, the input of the first layer among them.
        samples_per_frame: of frames, one after another.

    Raises:
        ValueError: the model gives no hidden states.
    """

    def __init__(
        self, model: PreTrainedModel, feature_extractor: SequenceFeatureExtractor, name: str, device: str = "cpu"
    ):
        self.model = model.eval().requires_grad_(False).to(device)
        self.feature_extractor, self.name = feature_extractor, name
        self.sampling_rate: int = feature_extractor.sampling_rate
        self.num_parameters = model.num_parameters()
        one, two = (self(np.random.default_rng(0).standard_normal(seconds * self.sampling_rate)) for seconds in (1, 2))
        self.num_layers, _, self.hidden_size = one.shape
        self.samples_per_frame = round(self.sampling_rate / (two.shape[1] - one.shape[1]))

    @classmethod
    def from_pretrained(cls, model_name_or_path: str, subnet: str | None = None, device: str = "cpu") -> "Upstream":
        """
        Args:
            subnet: of a supernet: a name or a JSON file. Default: the selected.

        Raises:
            ValueError: a subnet of what is no supernet, or no such subnet.
        """
        model = AutoModel.from_pretrained(model_name_or_path)
        extractor = AutoFeatureExtractor.from_pretrained(model_name_or_path)
        name = Path(model_name_or_path).name
        is_supernet = isinstance(model, LightHubertPreTrainedModel) and model.search_space is not None
        if subnet is not None:
            if not is_supernet:
                raise ValueError(f"subnet {subnet}: {model_name_or_path} is no supernet to choose one from")
            name = f"{name}, {Path(subnet).stem}"
        if is_supernet:
            is_file = subnet is not None and subnet.endswith(".json")
            model = model.extract_subnet(Subnet.from_json_file(subnet) if is_file else subnet)
        return cls(model, extractor, name, device)

    @cached_property
    def key(self) -> str:
        """What the hidden states depend on besides the recording: weights, configuration, feature extractor."""
        digest = hashlib.sha256(json.dumps(self.feature_extractor.to_dict(), sort_keys=True, default=str).encode())
        settings = self.model.config.to_diff_dict() | {"_name_or_path": None, "transformers_version": None}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def __call__(self, waveform: np.ndarray) -> torch.Tensor:
        """Hidden states (num_layers, num_frames, hidden_size) of mono samples (num_samples), in fp32 on the CPU."""
        inputs = self.feature_extractor(waveform, sampling_rate=self.sampling_rate, return_tensors="pt")
        name = self.feature_extractor.model_input_names[0]
        heard = inputs[name].to(self.model.device, self.model.dtype)
        try:
            outputs = self.model(heard, output_hidden_states=True)
        except TypeError as error:
            raise ValueError(f"{self.name} cannot be scored: {error}") from error
        hidden_states = getattr(outputs, "hidden_states", None)
        if hidden_states is None:
            raise ValueError(
                f"{self.name}, a {type(self.model).__name__}, gives no hidden states: they are what is scored"
            )
        return torch.stack(hidden_states)[:, 0].float().cpu()


class FeatureCache:
    """Hidden states on disk, a safetensors file for each recording. Processes may share it: a file is whole from the
    moment it is there. One that is damaged is computed and written anew.

    Args:
        folder: of all caches; each model, subnet and dtype has a folder in it.
        dtype: what is kept: fp32, or half the size in fp16.
    """

    def __init__(self, upstream: Upstream, folder: Path, dtype: torch.dtype = torch.float32):
        self.upstream, self.dtype = upstream, dtype
        self.folder = folder / f"{upstream.key}-{str(dtype).removeprefix('torch.')}"

    def file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> torch.Tensor | None:
        """What is kept of a recording; `None` if there is nothing whole."""
        try:
            with safe_open(self.file(key), framework="pt") as kept:
                hidden_states, checksum = kept.get_tensor("hidden_states"), kept.metadata()["crc32"]
        except (OSError, SafetensorError, KeyError, TypeError):
            return None
        return hidden_states.float() if checksum == _checksum(hidden_states) else None

    def write(self, key: str, hidden_states: torch.Tensor) -> torch.Tensor:
        """Keeps hidden states, and returns them as `read` will.

        Raises:
            ValueError: they are too large for the dtype.
        """
        if (largest := float(hidden_states.abs().max())) > torch.finfo(self.dtype).max:
            raise ValueError(
                f"{self.upstream.name} has features of {largest:.3g}, more than {self.dtype} can hold: choose"
                " --features_dtype float32"
            )
        hidden_states = hidden_states.to(self.dtype).contiguous()
        file = self.file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        content = save({"hidden_states": hidden_states}, metadata={"crc32": _checksum(hidden_states)})
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as scratch:
            scratch.write(content)
        os.replace(scratch.name, file)
        return hidden_states.float()

    def bytes_for(self, seconds: float) -> int:
        frames = seconds * self.upstream.sampling_rate / self.upstream.samples_per_frame
        return int(frames * self.upstream.num_layers * self.upstream.hidden_size * self.dtype.itemsize)


def _checksum(tensor: torch.Tensor) -> str:
    return str(zlib.crc32(tensor.numpy().tobytes()))


class Recordings(torch.utils.data.Dataset):
    """Hidden states of a part of the data: item i is (num_layers, num_frames, hidden_size), fp32.

    Args:
        audio: undecoded, in the column `audio`.
        cache: where they are kept. Default: nowhere, each is computed whenever it is asked for.
    """

    def __init__(self, audio: Dataset, upstream: Upstream, cache: FeatureCache | None = None):
        self.audio, self.upstream, self.cache = audio.select_columns(["audio"]), upstream, cache
        rows = tqdm(self.audio, desc="reading recordings", disable=len(audio) < 10_000 or cache is None)
        self.keys: list[str] = [_content(row["audio"]) for row in rows] if cache else []

    def __len__(self) -> int:
        return len(self.audio)

    @cached_property
    def seconds(self) -> list[float]:
        """Of each recording, from its header."""
        return [duration(row["audio"]) for row in self.audio]

    def name(self, index: int) -> str:
        return recording_name(self.audio[index]["audio"], index)

    def __getitem__(self, index: int) -> torch.Tensor:
        """
        Raises:
            ValueError: the recording cannot be read, or is shorter than a frame.
        """
        if self.cache is None:
            return self._hear(index)
        kept = self.cache.read(self.keys[index])
        return self.cache.write(self.keys[index], self._hear(index)) if kept is None else kept

    def _hear(self, index: int) -> torch.Tensor:
        try:
            return self.upstream(load_waveform(self.audio[index]["audio"], self.upstream.sampling_rate))
        except (*UNREADABLE, RuntimeError) as error:
            length = self.seconds[index]
            raise ValueError(
                f"{self.name(index)} ({length:.3f} s) gives no features: {error}. Mend it, or leave it out of the data"
            ) from error


def _content(audio: dict) -> str:
    content = audio["bytes"] if audio.get("bytes") else Path(audio["path"]).read_bytes()
    return hashlib.sha256(content).hexdigest()


def fill(parts: Sequence[Recordings], accelerator: Accelerator) -> None:
    """Computes what the cache lacks of all `parts`; each process takes its share. The size is shown first.

    Raises:
        OSError: the disk has no room for it.
    """
    cache = parts[0].cache
    if cache is not None:
        missing = [(part, at) for part in parts for at, key in enumerate(part.keys) if not cache.file(key).exists()]
        needed = cache.bytes_for(sum(part.seconds[at] for part, at in missing))
        cache.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache.folder).free
        accelerator.print(
            f"features of {len(missing)} recordings will take {needed / 2**20:,.0f} MiB in {cache.folder}"
            f" ({free / 2**30:,.0f} GiB are free)"
        )
        if needed > 0.95 * free:
            raise OSError(
                f"{needed / 2**30:,.1f} GiB of features do not fit in the {free / 2**30:,.1f} GiB that are free in"
                f" {cache.folder}: choose another --cache_dir, --features_dtype float16, or leave --cache_dir out"
            )
        share = missing[accelerator.process_index :: accelerator.num_processes]
        for part, at in tqdm(share, desc="features", disable=not accelerator.is_main_process or not missing):
            part[at]
    accelerator.wait_for_everyone()
