"""Runs a script whose process gets a signal at the beginning of the n-th call of a function or method:

python signalled.py SIGKILL lighthubert_training.runs.checkpoints:write_manifest 2 run_distillation.py ...
"""

import os
import runpy
import signal
import sys
from functools import reduce
from importlib import import_module
from itertools import count
from pathlib import Path


if __name__ == "__main__":
    kind, function, number = sys.argv[1:4]
    del sys.argv[:4]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    module, _, path = function.partition(":")
    *outer, name = path.split(".")
    owner = reduce(getattr, outer, import_module(module))
    original, calls = getattr(owner, name), count(1)

    def signalled(*args, **kwargs):
        if next(calls) == int(number):
            os.kill(os.getpid(), signal.Signals[kind])
        return original(*args, **kwargs)

    setattr(owner, name, signalled)
    runpy.run_path(sys.argv[0], run_name="__main__")
