"""`lighthubert`, the console command: one verb for each thing that a user does, which runs the script of that job.

The scripts import heavy packages, and are loaded when their verb runs.
"""

import runpy
import sys
from importlib.machinery import SourceFileLoader
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import NamedTuple


class Verb(NamedTuple):
    """A verb of the command.

    Attributes:
        target: name of a script, or of a module of the library.
        extras: what has to be installed for it.
    """

    target: str
    help: str
    extras: str = ""


VERBS = {
    "convert": Verb(
        "modeling_lighthubert.convert_lighthubert_original_checkpoint_to_pytorch",
        "Convert a checkpoint of LightHuBERT's authors.",
    ),
    "profile": Verb("modeling_lighthubert.profiling", "Show parameters, MACs and latency of a subnet."),
    "distill": Verb("run_distillation.py", "Distil a HuBERT-like teacher into a supernet.", "train"),
    "order": Verb("order_channels.py", "Put the most important channels, heads and FFN units first.", "train"),
    "search": Verb("run_subnet_search.py", "Find the best subnet of a supernet for a budget.", "train,search"),
    "superb": Verb("run_superb.py", "Score frozen models on the ten tasks of SUPERB.", "train,superb"),
    "finetune": Verb("run_speech_recognition_ctc.py", "Fine-tune a subnet, or all of them, with CTC.", "train"),
    "transcribe": Verb("transcribe.py", "Transcribe recordings, or a live stream.", "train"),
    "export": Verb("modeling_lighthubert.export", "Export a subnet: cut model, stock HuBERT or ONNX file."),
    "push": Verb("push_subnet.py", "Publish a subnet on the Hub, with its card.", "train"),
}
"""In the order in which a user meets them."""


def usage() -> str:
    """What `lighthubert --help` prints."""
    verbs = "\n".join(f"  {name:<12}{verb.help}" for name, verb in VERBS.items())
    return (
        f"usage: lighthubert [--help] [--version] VERB ...\n\n{verbs}\n\n`lighthubert VERB --help` lists its options."
    )


def find_script(name: str) -> Path:
    """A script as it is installed, in `scripts/` of this package, or as it lies beside the package in a checkout."""
    installed = Path(__file__).parent / "scripts" / name
    return installed if installed.exists() else Path(__file__).parents[1] / name


def run_script(file: Path) -> None:
    """Runs a script as `__main__`, as `runpy.run_path` does, which would call it by its file in `sys.argv`."""
    loader = SourceFileLoader("__main__", str(file))
    spec = spec_from_loader("__main__", loader)
    assert spec is not None
    module, command = module_from_spec(spec), sys.modules["__main__"]
    module.__spec__ = None  # a script has none
    sys.modules["__main__"] = module
    try:
        loader.exec_module(module)
    finally:
        sys.modules["__main__"] = command


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Runs the verb that the command line names, as if its script had been called."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(usage())
    elif name == "--version":
        print(f"lighthubert {version('lighthubert-transformers')}")
    elif name not in VERBS:
        fail(f"lighthubert has no verb {name!r}: choose from {', '.join(VERBS)}")
    else:
        verb, sys.argv = VERBS[name], [f"lighthubert {name}", *words]
        try:
            if verb.target.endswith(".py"):
                run_script(find_script(verb.target))
            else:
                runpy.run_module(verb.target, run_name="__main__")
        except ModuleNotFoundError as error:
            if not verb.extras:
                raise
            extras = f"pip install 'lighthubert-transformers[{verb.extras}]'"
            fail(f"lighthubert {name} needs {error.name}, which is not installed: {extras}")
