"""`lighthubert`, the console command: one verb for each thing that a user does, which runs the script of that job.

What the verbs import is heavy, and is imported when one of them runs.
"""

import runpy
import sys
from importlib.metadata import version
from pathlib import Path


VERBS = {
    "convert": ("modeling_lighthubert.convert_lighthubert_original_checkpoint_to_pytorch", "Convert a checkpoint of the authors."),
    "order": ("order_channels.py", "Make a supernet, its most important channels, heads and FFN units first."),
    "distill": ("run_distillation.py", "Distil a HuBERT-like teacher into a supernet."),
    "search": ("run_subnet_search.py", "Find the best subnet of a supernet for a budget."),
    "profile": ("modeling_lighthubert.profiling", "Show parameters, MACs and latency of a subnet."),
    "superb": ("run_superb.py", "Score frozen models on the ten tasks of SUPERB."),
    "finetune": ("run_speech_recognition_ctc.py", "Fine-tune a subnet, or a supernet once for all, with CTC."),
    "transcribe": ("transcribe.py", "Transcribe recordings, or a live stream."),
    "export": ("modeling_lighthubert.export", "Export a subnet: a cut model, a stock HuBERT, or an ONNX file."),
    "push": ("push_subnet.py", "Publish a subnet on the Hub, with its card."),
}  # fmt: skip
"""What each verb runs, a script or a module, and its help; in the order in which a user meets them."""


def usage() -> str:
    """What `lighthubert --help` prints."""
    lines = [f"  {verb:<12}{text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(
        [
            "usage: lighthubert [--help] [--version] VERB ...",
            "",
            *lines,
            "",
            "`lighthubert VERB --help` lists its options.",
        ]
    )


def find_script(name: str) -> Path:
    """A script as it is installed, in `scripts/` of this package, or as it lies beside the package in a checkout."""
    installed = Path(__file__).parent / "scripts" / name
    return installed if installed.exists() else Path(__file__).parents[1] / name


def main() -> None:
    """Runs the verb that the command line names, as if its script had been called."""
    words = sys.argv[1:]
    if not words or words[0] in ("--help", "-h"):
        print(usage())
    elif words[0] == "--version":
        print(f"lighthubert {version('lighthubert-transformers')}")
    elif words[0] not in VERBS:
        print(f"error: lighthubert has no verb {words[0]!r}: choose from {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(2)
    else:
        target, _ = VERBS[words[0]]
        sys.argv = [f"lighthubert {words[0]}", *words[1:]]
        if target.endswith(".py"):
            runpy.run_path(str(find_script(target)), run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=False)
