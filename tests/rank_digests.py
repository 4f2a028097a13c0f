"""Runs `run_distillation.py`, and prints a digest of the weights that this process ends training with."""

import hashlib
import runpy
import sys
from pathlib import Path

from lighthubert_training.distillation.loop import Distiller


def train(self: Distiller, start: int) -> bool:
    finished, digest = TRAIN(self, start), hashlib.sha256()
    for weight in self.student.state_dict().values():
        digest.update(weight.numpy().tobytes())
    line = f"weights of rank {self.accelerator.process_index}: {digest.hexdigest()}\n"
    sys.stdout.write(line)  # in one piece, which print does not promise: processes share the pipe
    sys.stdout.flush()
    return finished


TRAIN = Distiller.train

if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    Distiller.train = train
    runpy.run_path(sys.argv[0], run_name="__main__")
