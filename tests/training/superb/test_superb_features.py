"""Features are the hidden states of any model, of each recording alone, and kept ones are those that were computed."""

import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEVICE, assert_close, new_accelerator, small_disk, tiny_model
from safetensors.torch import load_file
from speech import RATE, TONE, encoded, undecoded
from superb_toys import EXTRACTOR, SETTINGS, STOCK, noise_of, stock
from transformers import HubertConfig, HubertModel

from lighthubert_training.superb import features as features_module
from lighthubert_training.superb.features import FeatureCache, FeatureDataset, Upstream, fill_cache
from modeling_lighthubert import LightHubertModel
from modeling_lighthubert.errors import UserError


@pytest.mark.parametrize("name", STOCK)
def test_hidden_states_are_the_input_of_the_first_layer_and_the_output_of_each(name):
    """On a waveform that is normalised first, as s3prl's `hf_hubert_custom` has it."""
    upstream, waveform, seen = stock(name), 3 + noise_of(8000), []

    def hook(layer, inputs, outputs) -> None:
        seen.extend([] if seen else [inputs[0]])
        seen.append(outputs[0] if isinstance(outputs, tuple) else outputs)

    hooks = [layer.register_forward_hook(hook) for layer in upstream.model.encoder.layers]
    with torch.no_grad():
        upstream.model(torch.from_numpy((waveform - waveform.mean()) / waveform.std())[None].to(DEVICE))
    for each in hooks:
        each.remove()
    assert_close(upstream(waveform), torch.cat(seen))
    assert (upstream.num_layers, upstream.hidden_size, upstream.samples_per_frame) == (3, 48, 320)
    assert upstream.seconds_per_frame == 0.02


class Silent(HubertModel):
    """A model that returns no hidden states."""

    def forward(self, *inputs, **options):
        outputs = super().forward(*inputs, **options)
        outputs.hidden_states = None
        return outputs


class Closed(HubertModel):
    """A model that cannot be asked for hidden states."""

    def forward(self, input_values):
        return super().forward(input_values)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Silent, "other, a Silent, returns no hidden states"),
        (Closed, "other cannot be scored: .*hidden_states"),
    ],
)
def test_a_model_without_hidden_states_is_refused(kind, message):
    with pytest.raises(UserError, match=message):
        Upstream(kind(HubertConfig(**SETTINGS)), EXTRACTOR, "other")


def test_a_checkpoint_in_half_precision_is_run_in_it(tmp_path):
    stock().model.to(torch.bfloat16).save_pretrained(tmp_path)
    EXTRACTOR.save_pretrained(tmp_path)
    upstream = Upstream.from_pretrained(str(tmp_path), device=DEVICE)
    assert upstream.model.dtype == torch.bfloat16
    halved, exact = upstream(noise_of(8000)), stock()(noise_of(8000))
    assert halved.dtype == torch.float32
    assert 0 < (halved - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_a_subnet_is_cut_out_and_named(tmp_path):
    supernet = tiny_model(LightHubertModel)
    supernet.save_pretrained(tmp_path / "supernet")
    EXTRACTOR.save_pretrained(tmp_path / "supernet")
    best = supernet.search_space.sample(0)
    best.to_json_file(tmp_path / "best.json")
    for subnet, chosen in (("smallest", "smallest"), (str(tmp_path / "best.json"), best)):
        upstream = Upstream.from_pretrained(str(tmp_path / "supernet"), subnet)
        assert upstream.name == f"supernet, {Path(subnet).stem}"
        assert upstream.num_parameters == supernet.num_subnet_parameters(chosen)
        assert_close(
            upstream(noise_of(8000)), Upstream(supernet.extract_subnet(chosen), EXTRACTOR, "")(noise_of(8000))
        )
    assert Upstream.from_pretrained(str(tmp_path / "supernet")).name == "supernet"
    with pytest.raises(UserError, match="no supernet to choose one from"):
        supernet.extract_subnet("smallest").save_pretrained(tmp_path / "cut")
        Upstream.from_pretrained(str(tmp_path / "cut"), "smallest")


def test_the_key_depends_on_weights_settings_feature_extractor_and_subnet():
    supernet = tiny_model(LightHubertModel)
    cut = [Upstream(supernet.extract_subnet(subnet), EXTRACTOR, "").key for subnet in ("smallest", "largest")]
    torch.manual_seed(0)
    other_settings = HubertModel(HubertConfig(**SETTINGS, layer_norm_eps=1e-3))
    raw = type(EXTRACTOR)(do_normalize=False)
    torch.manual_seed(0)
    different = [
        stock(),
        stock("wavlm"),
        Upstream(other_settings, EXTRACTOR, ""),
        Upstream(STOCK["hubert"](), raw, ""),
    ]
    keys = [*cut, *(upstream.key for upstream in different)]
    assert len(set(keys)) == len(keys)
    changed = stock()
    assert changed.key == different[0].key
    moved = stock()
    moved.model.encoder.layers[1].final_layer_norm.bias.data[0] += 1
    assert moved.key != different[0].key


def recordings_of(*waveforms: np.ndarray, cache: FeatureCache | None = None, upstream: Upstream | None = None):
    """Features of recordings in WAV files, which hold the samples as they are."""
    contents = [encoded(waveform, RATE, format="WAV", subtype="FLOAT") for waveform in waveforms]
    audio = undecoded([{"audio": {"bytes": content, "path": None}} for content in contents])
    return FeatureDataset(audio, cache.upstream if cache else upstream or stock(), cache)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 64
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda file: file.write_bytes(file.read_bytes()[:-100]), id="cut short"),
        pytest.param(flip_a_bit, id="a bit flipped"),
        pytest.param(lambda file: file.write_bytes(b""), id="empty"),
        pytest.param(lambda file: file.unlink(), id="gone"),
    ],
)
def test_a_damaged_file_is_computed_and_written_anew(tmp_path, damage: Callable[[Path], None]):
    cache = FeatureCache(stock(), tmp_path)
    features = recordings_of(noise_of(8000), cache=cache)
    expected, (file,) = features[0], cache.folder.glob("*/*.safetensors")
    damage(file)
    assert cache.read(features.keys[0]) is None
    assert torch.equal(features[0], expected)
    assert torch.equal(load_file(file)["hidden_states"], expected.cpu())


def test_kept_features_have_the_permissions_of_the_umask_and_are_not_read_without(tmp_path):
    cache = FeatureCache(stock(), tmp_path)
    features = recordings_of(noise_of(8000), cache=cache)
    before = os.umask(0o027)
    try:
        features[0]
        (file,) = cache.folder.glob("*/*.safetensors")
        assert file.stat().st_mode & 0o777 == 0o640
        file.chmod(0)
        os.seteuid(65534)  # root reads everything
        with pytest.raises(UserError, match="kept features may not be read .*choose another --cache_dir"):
            features[0]
    finally:
        os.seteuid(os.getuid())
        os.umask(before)


def test_a_cache_that_a_colleague_has_closed_is_an_error_that_names_it(tmp_path):
    cache = FeatureCache(stock(), tmp_path / "cache")
    features, accelerator = recordings_of(noise_of(8000), cache=cache), new_accelerator()
    (tmp_path / "cache").mkdir(mode=0o700)
    try:
        os.seteuid(65534)  # root may do everything
        with pytest.raises(UserError, match="kept features may not be read .*choose another --cache_dir"):
            fill_cache([features], accelerator)
        with pytest.raises(UserError, match=f"features cannot be kept in {cache.folder} .*Permission denied.*: make"):
            cache.write(features.keys[0], torch.zeros(3, 24, 48))
    finally:
        os.seteuid(os.getuid())


def test_a_disk_without_room_for_features_is_an_error_that_names_the_cache(tmp_path):
    features = recordings_of(noise_of(8000), cache=FeatureCache(stock(), tmp_path))
    with small_disk(1000), pytest.raises(UserError, match="features cannot be kept in .*File too large.*: make room"):
        features[0]
    assert not list(tmp_path.glob("**/*safetensors"))


def test_half_precision_takes_half_the_room_and_differs_by_its_rounding(tmp_path):
    single, half = (FeatureCache(stock(), tmp_path, dtype) for dtype in (torch.float32, torch.float16))
    exact, rounded = (recordings_of(noise_of(32_000), cache=cache)[0] for cache in (single, half))
    torch.testing.assert_close(rounded, exact, rtol=2**-11, atol=1e-6)
    sizes = [next(cache.folder.glob("*/*.safetensors")).stat().st_size for cache in (single, half)]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.02)
    assert single.bytes_for(2.0) == pytest.approx(sizes[0], rel=0.03)


def test_features_that_half_precision_cannot_hold_are_refused(tmp_path):
    upstream = stock()
    upstream.model.encoder.layers[1].final_layer_norm.bias.data[0] = 1e5
    single, half = (FeatureCache(upstream, tmp_path, dtype) for dtype in (torch.float32, torch.float16))
    assert recordings_of(noise_of(8000), cache=single)[0].max() > 9e4
    with pytest.raises(UserError, match=r"hubert has features of 1e\+05, more than torch.float16 can hold"):
        recordings_of(noise_of(8000), cache=half)[0]
    assert not list(half.folder.glob("*/*"))


def test_features_that_do_not_fit_on_the_disk_are_not_begun(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    features = recordings_of(noise_of(80_000), cache=FeatureCache(stock(), tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**16))
    with pytest.raises(UserError, match="do not fit in the 0.0 GiB that are free"):
        fill_cache([features], new_accelerator())
    assert not list(tmp_path.glob("**/*.safetensors"))
    monkeypatch.undo()
    fill_cache([features], new_accelerator())
    assert len(list(tmp_path.glob("**/*.safetensors"))) == 1


def test_processes_fill_one_cache_at_the_same_time(tmp_path):
    waveforms = [noise_of(4000 + 400 * number) for number in range(12)]
    features = recordings_of(*waveforms, cache=FeatureCache(stock(device="cpu"), tmp_path, torch.float32))
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=lambda: [features[at] for at in range(12)]) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 3
    files = [file for file in tmp_path.glob("**/*") if file.is_file()]
    assert len(files) == 12 and {file.suffix for file in files} == {".safetensors"}
    computed = recordings_of(*waveforms, upstream=features.upstream)
    for at in range(12):
        assert torch.equal(features.cache.read(features.keys[at]), computed[at])


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no audio", r"1 of 2 recordings cannot be read, .*the last was .*broken.wav"),
        (
            encoded(noise_of(300), RATE, format="WAV"),
            r"broken.wav \(0.019 s\) gives no features: .*Mend it, or leave it out",
        ),
        (None, r"1 of 2 recordings cannot be read, .*the last was .*broken.wav"),
    ],
    ids=["broken", "shorter than a frame", "missing"],
)
def test_a_recording_without_features_ends_the_run_by_name(tmp_path, content, message, kept):
    if content is not None:
        (tmp_path / "broken.wav").write_bytes(content)
    (tmp_path / "whole.wav").write_bytes(encoded(noise_of(8000), RATE, format="WAV"))
    audio = undecoded([{"audio": str(tmp_path / name)} for name in ("whole.wav", "broken.wav")])
    upstream = stock()
    with pytest.raises(UserError, match=message):
        features = FeatureDataset(audio, upstream, FeatureCache(upstream, tmp_path) if kept else None)
        assert features[0].shape == (3, 24, 48)
        features[1]


def test_a_file_is_known_by_its_size_and_time_and_not_read_for_it(tmp_path):
    file = tmp_path / "tone.wav"
    file.write_bytes(encoded(TONE, format="WAV"))
    rows = undecoded([{"audio": {"bytes": None, "path": str(file)}}])

    def key() -> str:
        return FeatureDataset(rows, upstream, FeatureCache(upstream, tmp_path / "cache")).keys[0]

    upstream = stock()
    first = key()
    file.chmod(0)
    assert key() == first
    file.chmod(0o600)
    os.utime(file, ns=(0, 0))
    assert key() != first


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_recordings_have_the_same_features_in_a_batch(norm):
    torch.manual_seed(0)
    model = HubertModel(HubertConfig(**SETTINGS | {"feat_extract_norm": norm}))
    upstream, calls = Upstream(model, EXTRACTOR, "hubert"), []
    model.register_forward_hook(lambda *_: calls.append(1))
    waveforms = [noise_of(8000), noise_of(4000), noise_of(6000)]
    found = upstream.batch(waveforms)
    assert len(calls) == (1 if norm == "layer" else 3)
    for states, waveform in zip(found, waveforms, strict=True):
        assert_close(states, upstream(waveform))


def test_batches_are_bounded_in_seconds(monkeypatch):
    monkeypatch.setattr(features_module, "BATCH_SECONDS", 1.0)
    assert stock()._batches([8000, 2000, 16_000, 3000, 40_000]) == [[1, 3], [0], [2], [4]]
