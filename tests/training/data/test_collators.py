"""Batches are padded as the feature extractor pads, and recordings that cannot be read are left out of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from speech import RATE, TONE, at_hand, broken_speech, encoded
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

from lighthubert_training.data.collators import CTCCollator, DistillationCollator, pad, padded_batches
from lighthubert_training.data.recordings import CroppedRecordings, Item, Recording
from modeling_lighthubert import LightHubertConfig
from modeling_lighthubert.errors import UserError


NORMALISED = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
RAW = Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
NO_MASK = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False)
WAVEFORMS = [TONE, TONE[:4000] + np.float32(0.25), TONE[:5000]]
BROKEN = Recording("broken.flac", None, "cut off", labels=[9])


def recordings() -> list[Recording]:
    labels = ([3, 4, 5], [6], [])
    return [
        Recording(f"{number}.wav", waveform, labels=labels[number], item=(2, number))
        for number, waveform in enumerate(WAVEFORMS)
    ]


@pytest.mark.parametrize("extractor", [NORMALISED, RAW, NO_MASK], ids=["normalised", "raw", "no-mask"])
def test_padding_is_that_of_each_waveform_alone_bit_by_bit(extractor):
    batch = pad(extractor, WAVEFORMS)
    assert batch["input_values"].dtype == torch.float32
    assert batch["attention_mask"].dtype in (torch.int32, torch.int64)
    assert batch["attention_mask"].tolist() == [[1] * len(wave) + [0] * (8000 - len(wave)) for wave in WAVEFORMS]
    for row, waveform in zip(batch["input_values"], WAVEFORMS, strict=True):
        alone = extractor(waveform, sampling_rate=RATE, return_tensors="pt")["input_values"][0]
        assert torch.equal(row[: len(waveform)], alone)
        assert not row[len(waveform) :].any()


def test_padding_on_the_left_is_refused():
    """Its mask says how many frames are true, and the first ones are taken: the end would be lost."""
    left = Wav2Vec2FeatureExtractor(do_normalize=True, padding_side="left")
    with pytest.raises(UserError, match='pads recordings on the left: set "padding_side": "right"'):
        pad(left, WAVEFORMS)
    with pytest.raises(UserError, match="pads recordings on the left"):
        DistillationCollator(NORMALISED, left, LightHubertConfig())(recordings())
    assert pad(left, [TONE])["attention_mask"].all()  # no padding, no harm


def test_padded_batches_keep_the_order():
    batches = padded_batches(RAW, WAVEFORMS, batch_size=2)
    assert [batch["attention_mask"].sum(-1).tolist() for batch in batches] == [[8000, 4000], [5000]]
    assert batches[1]["input_values"].shape == (1, 5000)


# Distillation


def test_student_and_teacher_get_what_their_feature_extractors_say():
    batch = DistillationCollator(NORMALISED, RAW, LightHubertConfig())([*recordings(), Recording("short", TONE[:100])])
    np.testing.assert_array_equal(batch["teacher_input_values"][0], TONE)
    assert batch["attention_mask"].sum(-1).tolist() == [8000, 4000, 5000, 400]
    for row, length in enumerate((8000, 4000, 5000, 400)):
        values = batch["input_values"][row, :length]
        assert abs(float(values.mean())) < 1e-3
        assert float(values.std()) == pytest.approx(1, abs=1e-2)


def test_a_teacher_whose_outputs_are_kept_gets_each_recording_without_padding():
    batch = DistillationCollator(RAW, NORMALISED, LightHubertConfig(), keep_waveforms=True)(recordings())
    for waveform, kept in zip(WAVEFORMS, batch["waveforms"], strict=True):
        (alone,) = NORMALISED(waveform, sampling_rate=RATE, return_tensors="np")["input_values"]
        assert np.array_equal(kept, alone)


def test_recordings_shorter_than_a_frame_are_repeated():
    batch = DistillationCollator(RAW, RAW, LightHubertConfig())([Recording("short", TONE[:150])])
    repeated = np.concatenate([TONE[:150], TONE[:150], TONE[:100]])
    np.testing.assert_array_equal(batch["input_values"], repeated[None])


def test_one_feature_extractor_pads_once_for_both():
    batch = DistillationCollator(NORMALISED, NORMALISED, LightHubertConfig())(recordings())
    assert batch["teacher_input_values"] is batch["input_values"]


def test_a_batch_of_distillation_names_its_recordings_and_leaves_out_what_cannot_be_read():
    items = CroppedRecordings(broken_speech(), RATE, 1.0, seed=0)
    collator = DistillationCollator(NORMALISED, NORMALISED, LightHubertConfig())
    batch = collator([items[Item(1, index)] for index in (2, 7, 5)])
    assert batch["names"] == ["tone-2.flac", "tone-5.flac"]
    assert [(name, reason[:15]) for name, reason in batch["unreadable"]] == [("tone-7.flac", "not in a format")]
    assert len(batch["input_values"]) == len(batch["attention_mask"]) == len(batch["mask"]) == 2


def test_what_a_step_counts_is_counted_with_the_batch():
    collator = DistillationCollator(NORMALISED, RAW, LightHubertConfig(), mask_time_prob=0.65, mask_time_length=5)
    batch = collator(recordings())
    assert batch["num_samples"] == 8000 + 4000 + 5000
    assert batch["mask"].shape == (3, 24)
    assert batch["num_frames"] == 24 + 12 + 15
    assert batch["num_masked"] == int(batch["mask"].sum()) > 0
    assert not batch["mask"][1, 12:].any(), "padding is not masked"


def test_the_mask_of_a_recording_follows_from_seed_epoch_and_index():
    collator = DistillationCollator(NORMALISED, RAW, LightHubertConfig(), mask_time_prob=0.3, mask_time_length=2)
    first, second = (Recording(name, TONE, item=(0, index)) for index, name in enumerate("ab"))
    mask = collator([first, second])["mask"]
    assert torch.equal(collator([second, first])["mask"], mask.flip(0))
    for other, recording in ((collator, first._replace(item=(1, 0))), (replace(collator, seed=1), first)):
        assert not torch.equal(other([recording])["mask"], mask[:1])


# CTC


@pytest.fixture
def processor(tmp_path) -> Wav2Vec2Processor:
    (tmp_path / "vocab.json").write_text('{"<pad>": 0, "|": 1, "<unk>": 2, "a": 3}')
    tokenizer = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), pad_token="<pad>", unk_token="<unk>")
    return Wav2Vec2Processor(feature_extractor=NORMALISED, tokenizer=tokenizer)


def test_a_batch_of_ctc_has_padded_audio_and_labels(processor):
    batch = CTCCollator(processor)([recordings()[0], BROKEN, recordings()[1]])
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [[3, 4, 5], [6, -100, -100]]
    assert batch["names"] == ["0.wav", "1.wav"]
    assert batch["unreadable"] == [("broken.flac", "cut off")]
    for name, tensor in pad(NORMALISED, WAVEFORMS[:2]).items():
        assert torch.equal(batch[name], tensor)


def test_a_recording_without_labels_fits_beside_others(processor):
    assert CTCCollator(processor)(recordings())["labels"].tolist() == [[3, 4, 5], [6, -100, -100], [-100] * 3]


def test_a_batch_that_cannot_be_read_has_nothing_but_the_reasons(processor):
    for collator in (CTCCollator(processor), DistillationCollator(NORMALISED, RAW, LightHubertConfig())):
        assert collator([BROKEN, BROKEN]) == {"unreadable": [("broken.flac", "cut off")] * 2}


def test_labels_of_a_dataset_reach_the_batch(processor):
    rows = [{"audio": {"bytes": encoded(waveform, format="WAV"), "path": None}} for waveform in WAVEFORMS]
    speech = at_hand(rows, labels=[[3], [3, 3], []])
    assert CTCCollator(processor)([speech[1], speech[0]])["labels"].tolist() == [[3, 3], [3, -100]]
