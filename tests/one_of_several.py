"""Runs a script as one process of several, and fails if it ends without leaving their group.

Threads of a group that is still there may abort the interpreter at its end, now and then:
https://github.com/pytorch/pytorch/pull/179291.
"""

import runpy
import sys
from pathlib import Path

import torch


if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    assert not torch.distributed.is_initialized(), "the process group was not destroyed"
