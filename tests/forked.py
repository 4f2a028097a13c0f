"""What a forked process does: of its own, because each imports this module anew."""

import gc
import os
import runpy
import sys
from pathlib import Path

import torch


def run_forked(words: list[str], variables: dict[str, str], output: dict[int, str]) -> None:
    """Runs a script in this process, which was forked for it.

    Args:
        output: the files that take what the process writes, by file descriptor.
    """
    for descriptor, file in output.items():
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    gc.freeze()  # what was imported stays
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    # threads of a group that is still there may abort the interpreter at its end: pytorch/pytorch#179291
    assert not torch.distributed.is_initialized(), "the process group was not destroyed"
