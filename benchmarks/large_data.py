"""Does data of a real size go through: memory, time to the first batch, and which process reads what.

    python benchmarks/large_data.py
    python benchmarks/large_data.py --num_recordings 2000 --num_processes 2

A stream of so many recordings, a few encoded files of LibriSpeech's lengths under ever new names, goes through the
loader of the recipe `stage2_small`, as each of several processes would read it, one after another, an epoch each. Then
the same recordings, as files, are transcribed by a tiny model: one run is killed halfway, another goes on.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context, set_start_method
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import psutil
import soundfile
import torch
from datasets import Features, IterableDataset, Value
from processes import ROOT, parse, prepare_process, process_memory
from recordings import librispeech_like
from tqdm.auto import tqdm
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

from lighthubert_training.data.collators import DistillationCollator
from lighthubert_training.data.sources import DataArguments
from lighthubert_training.distillation.arguments import DistillationArguments, ObjectiveArguments
from lighthubert_training.distillation.loaders import SpeechLoader
from lighthubert_training.runs.options import OptionParser, option, parse_options
from lighthubert_training.runs.tables import markdown_table
from modeling_lighthubert import LightHubertConfig, LightHubertForCTC
from modeling_lighthubert.errors import run
from modeling_lighthubert.files import write_json


SAMPLING_RATE, NUM_FILES, NUM_SHARDS = 16_000, 32, 128
EXTRACTOR = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)


@dataclass
class LargeDataArguments:
    """How much data, and how many processes."""

    num_recordings: int = option(100_000, "Recordings of the stream, and files to transcribe.")
    num_processes: int = option(8, "Processes that share the stream.")


@dataclass
class Reading:
    """What one process did in its epoch.

    Attributes:
        first: seconds until the first batch was there.
        before, most, last: mebibytes held before the loader was built, at most, and at the end of the epoch.
        worker: mebibytes that the largest worker held.
    """

    names: list[str]
    seconds_of_audio: float
    seconds: float
    first: float
    before: float
    most: float
    last: float
    worker: float


def write_files(folder: Path) -> None:
    for number, audio in enumerate(librispeech_like(NUM_FILES)):
        soundfile.write(folder / f"{number}.flac", audio, SAMPLING_RATE)


def rows(shards: Sequence[Sequence[int]], folder: str) -> Iterator[dict[str, Any]]:
    for number in itertools.chain(*shards):
        audio = Path(folder, f"{number % NUM_FILES}.flac").read_bytes()
        yield {"audio": {"bytes": audio, "path": f"{number}.flac"}}


def read_epoch(process: int, num_processes: int, num_recordings: int, folder: str) -> Reading:
    """An epoch of one of several processes, through the loader of the recipe."""
    prepare_process()
    set_start_method("fork", force=True)  # of the workers, as in a script
    kinds = (DistillationArguments, ObjectiveArguments, DataArguments)
    words = ["--config=stage2_small", "--output_dir=none"]
    arguments, objective, data = parse_options(OptionParser(kinds), "distillation", words)
    collator = DistillationCollator(EXTRACTOR, EXTRACTOR, LightHubertConfig(), objective.mask_time_prob)
    shards = [list(range(shard, num_recordings, NUM_SHARDS)) for shard in range(min(NUM_SHARDS, num_recordings))]
    features = Features({"audio": {"bytes": Value("binary"), "path": Value("string")}})
    kept = {"shards": shards, "folder": folder}
    stream = IterableDataset.from_generator(rows, gen_kwargs=kept, features=features)
    accelerator = SimpleNamespace(device=torch.device("cpu"), process_index=process, num_processes=num_processes)
    before, begin, first = process_memory("VmRSS"), time.monotonic(), 0.0
    most = worker = samples = 0.0
    names: dict[str, None] = {}
    loader = SpeechLoader(arguments, data, stream, collator, accelerator, {"step": 0, "sampler": None})
    for batch in loader:
        first = first or time.monotonic() - begin
        most = max(most, process_memory("VmRSS"))
        if names.keys() & batch["names"]:  # the next epoch
            break
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                worker = max(worker, child.memory_info().rss / 2**20)
        names |= dict.fromkeys(batch["names"])
        samples += batch["num_samples"]
    took = time.monotonic() - begin
    return Reading(list(names), samples / SAMPLING_RATE, took, first, before, most, process_memory("VmRSS"), worker)


def save_quick_model(folder: Path) -> None:
    """A model with next to no layers, and its processor."""
    config = LightHubertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, conv_dim=(8,) * 7,
        vocab_size=5, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=1, feat_extract_norm="layer",
    )  # fmt: skip
    LightHubertForCTC(config).save_pretrained(folder)
    write_json(folder / "vocab.json", {"<pad>": 0, "<unk>": 1, "|": 2, "a": 3, "b": 4})
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), bos_token=None, eos_token=None)
    Wav2Vec2Processor(EXTRACTOR, tokenizer).save_pretrained(folder)


def transcribe(folder: Path, until: int) -> tuple[float, float]:
    """Transcribes files until so many are in the journal, then kills the run, if it goes on.

    Returns:
        Mebibytes held at the first line, and at most.
    """
    words = [f"--model_name_or_path={folder / 'model'}", f"--inputs={folder / 'files'}", "--device=cpu"]
    journal, first, most = folder / "transcripts.jsonl", 0.0, 0.0
    command = [sys.executable, ROOT / "training/transcribe.py", *words, f"--output_file={journal}"]
    begun = num_lines(journal)
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and num_lines(journal) < until:
            with contextlib.suppress(psutil.Error):
                held = psutil.Process(process.pid).memory_info().rss / 2**20
                first, most = first or (num_lines(journal) > begun) * held, max(most, held)
            time.sleep(0.5)
        process.kill()
    return first, most


def transcribe_twice(folder: Path, num_recordings: int) -> str:
    """A run that is killed halfway, and one that goes on: what both held, and what there is."""
    (folder / "files").mkdir()
    for number in range(num_recordings):
        os.link(folder / f"{number % NUM_FILES}.flac", folder / "files" / f"{number}.flac")
    save_quick_model(folder / "model")
    journal, found = folder / "transcripts.jsonl", []
    for until in (num_recordings // 2, num_recordings):
        memory = transcribe(folder, until)
        found.append(f"{num_lines(journal)} lines, {memory[0]:.0f} MiB at the first of them, {memory[1]:.0f} at most")
    names = {json.loads(line)["name"] for line in journal.read_text(encoding="utf-8").splitlines()}
    return f"killed after {found[0]}; went on to {found[1]}; {len(names)} recordings"


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main() -> None:
    arguments = parse(LargeDataArguments, __doc__)
    table, names = [], Counter[str]()
    with TemporaryDirectory() as folder:
        write_files(Path(folder))
        for process in tqdm(range(arguments.num_processes), desc="processes"):
            options = (process, arguments.num_processes, arguments.num_recordings, folder)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found = pool.submit(read_epoch, *options).result()
            names.update(found.names)
            memory = (found.before, found.most - found.before, found.last - found.before, found.worker)
            speed = found.seconds_of_audio / found.seconds
            cells = [f"{found.first:.1f}", *(f"{each:.0f}" for each in (*memory, speed))]
            table.append([str(process), str(len(found.names)), *cells])
        titles = ["process", "recordings", "seconds to the first batch", "MiB before", "most above it", "at the end"]
        print(markdown_table([*titles, "largest worker", "s of audio per s"], table))
        missing = arguments.num_recordings - len(names)
        twice = sum(count > 1 for count in names.values())
        print(f"\n{len(names)} recordings read, {missing} by no process, {twice} by more than one\n")
        print("transcribing:", transcribe_twice(Path(folder), arguments.num_recordings))


if __name__ == "__main__":
    run(main)
