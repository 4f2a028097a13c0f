"""What the tests share: tiny supernets with the shape of the real ones, and a process that lacks the package."""

import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch


os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # else datasets calls the Hub for every file that is loaded
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # fp32 is exact on a GPU, also in the processes of scripts
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers.utils import logging

from lighthubert_training.runs.distributed import build_accelerator
from modeling_lighthubert import (
    LightHubertConfig,
    LightHubertForAudioFrameClassification,
    LightHubertForCTC,
    LightHubertForPreTraining,
    LightHubertForSequenceClassification,
    LightHubertForXVector,
    LightHubertModel,
    SearchSpace,
)


# the same examples on every machine, however slow it is
hypothesis.settings.register_profile("reproducible", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("reproducible")

DEVICE = torch.device(os.environ.get("LIGHTHUBERT_TEST_DEVICE", "cpu"))
"""Where tests run models, as transformers' `torch_device`: `cpu`, or `cuda` on a machine with a GPU."""

GOLDEN = Path(__file__).parent / "fixtures" / "golden"

# The paper's spaces at 1/16 of their size: a full width of 48, 12 heads of 4, 4 blocks of FFN units, 12 layers.
SMALL = SearchSpace((16, 24, 32), (4, 6, 8), (3, 3.5, 4), (10, 11, 12), head_dim=4)
BASE = SearchSpace((32, 40, 48), (8, 10, 12), (3.5, 4), (12,), head_dim=4)
SIX_DEEP = SearchSpace((16, 32, 48), (4, 8, 12), (2, 3, 4), (4, 5, 6), head_dim=4)
TWO_DEEP = SearchSpace((16, 24, 48), (4, 6, 12), (2, 3.5, 4), (1, 2), head_dim=4)
# The narrower feature encoders of ours
NARROW = SearchSpace((16, 32, 48), (4, 8, 12), (2, 3, 4), (4, 5, 6), head_dim=4, conv_dim=((4, 8, 16),) * 7)
# And attention to frames near by
WINDOWED = SearchSpace((16, 32, 48), (4, 8, 12), (2, 4), (2,), head_dim=4, attention_window=(2, 9, 70, None))

HEADS = {
    "AutoModel": LightHubertModel,
    "AutoModelForPreTraining": LightHubertForPreTraining,
    "AutoModelForCTC": LightHubertForCTC,
    "AutoModelForAudioClassification": LightHubertForSequenceClassification,
    "AutoModelForAudioFrameClassification": LightHubertForAudioFrameClassification,
    "AutoModelForAudioXVector": LightHubertForXVector,
}
HEAD_CLASSES = [pytest.param(head, id=head.__name__.removeprefix("LightHubert")) for head in HEADS.values()]

# The four forms of encoder that HuBERT and wav2vec 2.0 checkpoints have
FLAVOURS = [
    pytest.param(
        {"feat_extract_norm": norm, "do_stable_layer_norm": stable}, id=f"{norm}-{'pre' if stable else 'post'}"
    )
    for norm in ("layer", "group")
    for stable in (False, True)
]


def stock_settings(**changes) -> dict:
    """Settings of a tiny HuBERT, with the time scale of the real one and nothing random in it."""
    settings = {
        "hidden_size": 48,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 192,
        "conv_dim": (16,) * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "initializer_range": 0.2,
        "vocab_size": 12,
        "num_labels": 3,
        "classifier_proj_size": 16,
        **dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0),
        **dict.fromkeys(("final_dropout", "layerdrop"), 0.0),
    }
    return settings | changes


def tiny_config(search_space: SearchSpace | None = TWO_DEEP, **changes) -> LightHubertConfig:
    """Configuration of a tiny supernet as deep as its search space asks for."""
    extra = {
        "num_hidden_layers": max(search_space.num_hidden_layers) if search_space else 2,
        "tdnn_dim": (16, 16, 16),
        "tdnn_kernel": (5, 3, 1),
        "tdnn_dilation": (1, 2, 1),
        "xvector_output_dim": 8,
        "teacher_hidden_size": 20,
        "num_prediction_heads": 2,
    }
    return LightHubertConfig(search_space=search_space, **stock_settings(**(extra | changes)))


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Moves every weight off its initial value: ones and zeros do not tell one slice from another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.copy_(parameter * (1 + 0.2 * noise) + (0.2 * noise if parameter.ndim == 1 else 0))
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


def tiny_model(head: type = LightHubertModel, search_space: SearchSpace | None = TWO_DEEP, **changes):
    """A tiny model with randomised weights, in eval mode, on `DEVICE`."""
    torch.manual_seed(0)
    return randomise(head(tiny_config(search_space, **changes))).eval().to(DEVICE)


def answer(
    model: torch.nn.Module, *inputs: torch.Tensor, device: torch.device | str = DEVICE, **tensors: torch.Tensor | None
) -> torch.Tensor:
    """The tensor that a model is there for, computed on `device`: logits, the first prediction, or hidden states."""
    inputs = [each.to(device) for each in inputs]
    tensors = {name: None if each is None else each.to(device) for name, each in tensors.items()}
    with torch.no_grad():
        outputs = model.to(device)(*inputs, **tensors)
    if "logits" in outputs:
        return outputs.logits
    return outputs.predictions[0] if "predictions" in outputs else outputs.last_hidden_state


def assert_close(actual: Any, expected: Any, terms: int = 1000) -> None:
    """Asserts that `actual` is `expected` but for the order in which its sums were taken.

    A sum of n terms is rounded n times, each time by at most eps = 2 ** -23 of its magnitude (in fp32). In another
    order it is rounded otherwise, and differs by about eps * sqrt(n) * magnitude. The tolerance is ten times that,
    because CPUs and libraries add up in different blocks. The magnitude is the largest value that is expected: small
    values beside it are what large terms left. A wrong slice or mask makes a difference of a hundredth of it and more.

    Args:
        terms: how many are added up one after another on the way to a value. Default: that of a tiny model of twelve
            layers, with about ten products in each, whose sums of up to 192 terms are taken in blocks. The most that
            was seen, on a CPU with AVX-512, is a tenth of what that allows.
    """
    actual, expected = torch.as_tensor(actual).cpu(), torch.as_tensor(expected).cpu()
    magnitude = expected.detach().abs().max().item() if expected.numel() else 0.0
    tolerance = 10 * torch.finfo(expected.dtype).eps * terms**0.5 * magnitude
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """The same numbers on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def new_accelerator(device: torch.device | str = DEVICE) -> Accelerator:
    """On `device`, whatever an earlier test ran on: Accelerate keeps one state for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return build_accelerator(str(device))


def checkpoint_layers(model: torch.nn.Module) -> None:
    """Turns gradient checkpointing on, under the older of its two names where the newer is not there yet."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


@pytest.fixture
def waveform() -> torch.Tensor:
    """A quarter of a second of noise: 12 frames."""
    return noise(1, 4000)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Path:
    """A folder with a tiny teacher, a search space and speech; see `make_workshop`."""
    from scripts import make_workshop

    folder = tmp_path_factory.mktemp("workshop")
    make_workshop(folder)
    return folder


BLOCKED = """
import sys

sys.modules["modeling_lighthubert"] = None  # importing it fails, however it is installed
try:
    import modeling_lighthubert
except ImportError:
    pass
else:
    raise SystemExit("the package is importable")
import torch

torch.set_num_threads(1)
"""


def run_without_package(
    script: str, folder: Path, *arguments: object, environment: dict[str, str] | None = None
) -> Any:
    """What `script` prints as JSON on its last line, run by a Python that cannot import the package.

    Args:
        folder: working directory. Remote code is cached inside it.
        arguments: `sys.argv[1:]` of the script.
        environment: variables on top of those that keep the process offline.
    """
    variables = os.environ | {"HF_HOME": str(folder / "hf"), "HF_MODULES_CACHE": str(folder / "hf" / "modules")}
    variables |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "OMP_NUM_THREADS": "1", **(environment or {})}
    command = [sys.executable, "-c", BLOCKED + script, *map(str, arguments)]
    finished = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout.splitlines()[-1])


def pytest_collection_finish() -> None:
    """What was imported stays: looking through it for garbage, again and again, takes an eighth of the time."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Sums in the same order here and in a fresh process, so that answers can be compared bit by bit."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def exact_gpu():
    """The GPU computes fp32 in fp32, and a convolution always alike."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


@pytest.fixture(autouse=True)
def verbosity_of_transformers():
    """Scripts that run in this process may silence transformers: the next test sees its messages again."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)


@contextmanager
def small_disk(num_bytes: int) -> Iterator[None]:
    """Inside the block, files have no room for more; what the system then says is no stand-in."""
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, earlier[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)
