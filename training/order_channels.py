"""Makes a supernet whose most important channels, attention heads and FFN units come first: narrow subnets keep them.

    python training/order_channels.py --model_name_or_path facebook/hubert-base-ls960 --search_space tiny_to_base \\
        --train_file speech.parquet --output_dir ordered
    python training/run_distillation.py --teacher_name_or_path facebook/hubert-base-ls960 \\
        --student_name_or_path ordered ...

It is done once, before stage 2. The full model computes what it has computed, with the channels of its hidden states
in another order; the outputs of its prediction heads stay as they are. Convolutions change only where subnets choose
their channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoFeatureExtractor, Wav2Vec2FeatureExtractor

from lighthubert_training.data.collators import pad
from lighthubert_training.data.recordings import SpeechDataset, Unreadable
from lighthubert_training.data.sources import DataArguments, load_speech
from lighthubert_training.distillation.channel_order import measure_importance, reorder
from lighthubert_training.runs.distributed import DEVICE_HELP, choose_device, locked
from lighthubert_training.runs.options import OptionParser, option, parse_options
from modeling_lighthubert import LightHubertForPreTraining, LightHubertModel, LightHubertPreTrainedModel
from modeling_lighthubert.errors import UserError, run
from modeling_lighthubert.files import require_unused, whole_folder
from modeling_lighthubert.loading import is_supernet, load_config, load_model, load_processor, parse_search_space


@dataclass
class OrderingArguments:
    """Which model is put in order, and on how much speech its activations are measured."""

    model_name_or_path: str = option(help="Supernet, or HuBERT or wav2vec 2.0 to make one of.")
    output_dir: str = option(help="Folder for the ordered supernet.")
    search_space: str | None = option(None, "Preset or JSON file, for a model that is no supernet yet.")
    num_recordings: int = option(64, "Number of recordings, drawn at random, to measure activations on.")
    device: str | None = option(None, DEVICE_HELP)


def load_supernet(arguments: OrderingArguments) -> LightHubertPreTrainedModel:
    """The supernet, with the distillation heads that it may have.

    Raises:
        UserError: neither the model nor an option says which subnets there are.
    """
    source, space = arguments.model_name_or_path, parse_search_space(arguments.search_space)
    config = load_config(source)
    if space is None and not is_supernet(config):
        raise UserError(f"{source} is no supernet: give --search_space to make one of it")
    has_heads = LightHubertForPreTraining.__name__ in (config.architectures or ())
    head = LightHubertForPreTraining if has_heads else LightHubertModel
    options = {} if space is None else {"search_space": space}
    return load_model(source, head=head, device=choose_device(arguments.device), **options)


def draw_waveforms(
    arguments: OrderingArguments, data_arguments: DataArguments, extractor: Wav2Vec2FeatureExtractor, min_samples: int
) -> Iterator[torch.Tensor]:
    """Recordings drawn at random, those of at least `min_samples`, each of shape (num_samples)."""
    data = load_speech(data_arguments, training=True)
    assert isinstance(data, Dataset)
    speech = SpeechDataset(data, data_arguments.audio_column_name, extractor.sampling_rate)
    chosen = torch.randperm(len(speech), generator=torch.Generator().manual_seed(0))[: arguments.num_recordings]
    unreadable = Unreadable(data_arguments.max_unreadable_share, len(chosen))
    progress = tqdm(chosen.tolist(), desc="measuring activations")
    for recording in unreadable.readable(speech[index] for index in progress):
        if len(recording.waveform) >= min_samples:
            yield pad(extractor, [recording.waveform])["input_values"][0]


def order(arguments: OrderingArguments, data_arguments: DataArguments) -> None:
    """Writes the ordered supernet, with its feature extractor, to a folder that is not in use."""
    folder = require_unused(arguments.output_dir)
    if data_arguments.streaming:
        raise UserError("--streaming: recordings are drawn at random, which a stream does not allow. Leave it out")
    model = load_supernet(arguments)
    extractor = load_processor(arguments.model_name_or_path, AutoFeatureExtractor)
    waveforms = draw_waveforms(arguments, data_arguments, extractor, model.config.samples_per_first_frame)
    importance = measure_importance(model, (waveform.to(model.device, model.dtype) for waveform in waveforms))
    if not importance:
        raise UserError("no recording is as long as a frame: give others, with --train_file or --dataset_name")
    reorder(model, importance)
    with whole_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        extractor.save_pretrained(unfinished)
    print(f"{len(importance)} groups of channels, heads and units in order: {folder.resolve()}")


def main() -> None:
    arguments, data_arguments = parse_options(OptionParser((OrderingArguments, DataArguments), description=__doc__))
    folder = Path(arguments.output_dir).resolve()
    with locked(folder.parent, folder.name):
        order(arguments, data_arguments)


if __name__ == "__main__":
    run(main)
