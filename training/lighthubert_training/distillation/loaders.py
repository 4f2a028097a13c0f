"""Batches of a distillation: of training without end, from any step on, and of held-out speech."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from lighthubert_training.data.batches import BatchSampler, RandomAccessSampler, StreamSampler
from lighthubert_training.data.collators import DistillationCollator
from lighthubert_training.data.recordings import CroppedRecordings, Item, SpeechDataset, Unreadable, durations
from lighthubert_training.data.sources import DataArguments
from lighthubert_training.distillation.arguments import DistillationArguments
from modeling_lighthubert.errors import UserError


class SpeechLoader(DataLoader):
    """This process's batches: of training `gradient_accumulation_steps` for each step, without end; of held-out speech
    every recording once, the same batches every time, with the same bounds.

    Args:
        start: the `step` to begin with, the states of the `sampler` there, of each process, and what was `unreadable`
            before; `None` for held-out speech.

    Attributes:
        sampling_rate: of the audio in batches, in Hz.
        unreadable: the recordings that are left out. Those at hand without a header are there from the beginning.
    """

    def __init__(
        self,
        arguments: DistillationArguments,
        data_arguments: DataArguments,
        data: Dataset | IterableDataset,
        collator: DistillationCollator,
        accelerator: Accelerator,
        start: Mapping[str, Any] | None,
    ):
        self.accelerator, self.unreadable = accelerator, Unreadable(data_arguments.max_unreadable_share)
        self.sampling_rate = rate = collator.student_feature_extractor.sampling_rate
        column = data_arguments.audio_column_name
        speech = SpeechDataset(data, column, rate) if isinstance(data, Dataset) else None
        seconds = [] if speech is None else durations(speech, self.unreadable)
        if start is not None and start.get("unreadable"):
            self.unreadable.load_state_dict(start["unreadable"])
        accumulated = arguments.gradient_accumulation_steps
        process, num_processes = accelerator.process_index, accelerator.num_processes
        options = {
            "batch_size": arguments.per_device_train_batch_size,
            "max_batch_seconds": arguments.per_device_train_batch_seconds,
            "crop_seconds": arguments.crop_seconds,
            "seed": arguments.seed,
            "slices": range(process * accumulated, (process + 1) * accumulated),
            "num_slices": num_processes * accumulated,
        }
        sampler: Iterable[list[Item]]
        if start is None:
            bounds = RandomAccessSampler(seconds, **options | {"slices": [process], "num_slices": num_processes})
            readable = {Item(0, index): length for index, length in enumerate(seconds) if length}
            steps = bounds.group(list(readable), list(readable.values()))
            sampler = [batch for step in steps for batch in bounds.own_batches(step) if batch]
        elif isinstance(data, IterableDataset):
            options |= {"slices": range(accumulated), "num_slices": accumulated}
            options |= {"process_index": process, "num_processes": num_processes}
            state = own_state(start["sampler"], process, num_processes)
            sampler = StreamSampler(data, column, self.unreadable, state, start=start["step"], **options)
        else:
            sampler = RandomAccessSampler(seconds, start=start["step"], **options)
        super().__init__(
            CroppedRecordings(speech, rate, arguments.crop_seconds, 0 if start is None else arguments.seed),
            batch_sampler=sampler,
            collate_fn=collator,
            num_workers=arguments.dataloader_num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )

    def states(self, step: int) -> list[dict[str, Any]]:
        """Of the samplers of all processes, with which loaders that start with `step` begin. All processes call it."""
        sampler = self.batch_sampler
        assert isinstance(sampler, BatchSampler)
        return gather_object([sampler.state_dict(step)])

    def readable(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Of `batches` of this loader, those that have a recording, on the device. What any process cannot read is
        counted at the end, to which all have to come."""
        unreadable: list[tuple[str, str]] = []
        for batch in batches:
            unreadable += batch["unreadable"]
            if "input_values" in batch:
                yield send_to_device(batch, self.accelerator.device, non_blocking=True)
        self.unreadable.add_together(unreadable, self.accelerator)


def own_state(
    states: Sequence[dict[str, Any]] | None, process_index: int, num_processes: int
) -> dict[str, Any] | None:
    """The state of the sampler of this process, of those that a checkpoint of a stream has.

    Raises:
        UserError: it was read by another number of processes.
    """
    if states is None:
        return None
    if len(states) != num_processes:
        raise UserError(
            f"the checkpoint is of {len(states)} processes, each with its part of the stream, not of {num_processes}:"
            " go on with as many, or with data that are not streamed"
        )
    return states[process_index]
