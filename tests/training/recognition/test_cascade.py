"""A cascade transcribes with the cheapest subnet that is sure of what it says, and tells what that costs."""

import numpy as np
import pytest
import torch
from conftest import DEVICE, NARROW, SearchSpace, assert_close, tiny_model
from recognizers import TOKENS, babble, save_processor

from lighthubert_training.error_rates import word_error_rate
from lighthubert_training.recognition import cascade as cascades
from lighthubert_training.recognition.cascade import THRESHOLDS, Calibration, CascadeRecognizer, confidence_of
from lighthubert_training.recognition.recognizer import Recognizer
from modeling_lighthubert import LightHubertForCTC, Subnet
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.loading import load_model
from modeling_lighthubert.profiling import profile_subnet


SPACE = SearchSpace((16, 32), (4, 8), (2, 4), (1, 2), head_dim=4)
SUBNETS = ["smallest", "largest"]
RECORDINGS = [babble(seconds, seed=seed) for seed, seconds in enumerate((1.0, 2.3, 1.7, 0.9, 3.1, 0.01))]


def save(folder, space: SearchSpace, **settings):
    settings = {"feat_extract_norm": "layer", "pad_token_id": 0, "vocab_size": len(TOKENS)} | settings
    model = tiny_model(LightHubertForCTC, space, **settings)
    with torch.no_grad():
        model.lm_head.weight *= 3  # so that it is sure of some letters
    model.save_pretrained(folder)
    save_processor(folder)
    return folder


@pytest.fixture(scope="module", params=["layer norm", "group norm", "elastic convolutions"])
def supernet(request, tmp_path_factory):
    space = NARROW if request.param == "elastic convolutions" else SPACE
    norm = "group" if request.param == "group norm" else "layer"
    return save(tmp_path_factory.mktemp("supernet") / "asr", space, feat_extract_norm=norm)


def load(folder, min_confidence: float = 0.5, **options) -> CascadeRecognizer:
    return CascadeRecognizer.from_pretrained(folder, SUBNETS, str(DEVICE), min_confidence=min_confidence, **options)


def alone(folder, subnet: str, **options) -> list[np.ndarray]:
    return Recognizer.from_pretrained(folder, subnet, str(DEVICE), **options).log_probs(RECORDINGS)


def confidences(folder) -> list[float]:
    """Of the first stage."""
    alphabet = load(folder).alphabet
    return [confidence_of(each, alphabet) for each in alone(folder, SUBNETS[0])]


def test_each_recording_is_transcribed_by_the_first_stage_that_is_sure(supernet):
    first, last = (alone(supernet, name) for name in SUBNETS)
    sure = confidences(supernet)
    threshold = sum(sorted(sure)[2:4]) / 2
    assert sum(each < threshold for each in sure) == 3
    for found, one, other, confidence in zip(load(supernet, threshold).log_probs(RECORDINGS), first, last, sure):
        assert_close(found, one if confidence >= threshold else other)


@pytest.mark.parametrize(("min_confidence", "stage"), [(0.0, 0), (1.0, 1)])
def test_a_threshold_at_an_end_is_one_subnet_alone(supernet, min_confidence, stage):
    for found, expected in zip(load(supernet, min_confidence).log_probs(RECORDINGS), alone(supernet, SUBNETS[stage])):
        assert_close(found, expected)


def test_a_long_recording_goes_on_chunk_by_chunk(supernet):
    options = {"chunk_length_s": 1.0, "stride_length_s": 0.2}
    cascade = load(supernet, 0.0, **options)
    cascade.log_probs(RECORDINGS)
    cascade.stages[1].seconds = 0.0
    cascade.min_confidence = 1.0
    for found, expected in zip(cascade.log_probs(RECORDINGS), alone(supernet, SUBNETS[1], **options)):
        assert_close(found, expected)
    assert cascade.stages[1].seconds > sum(map(len, RECORDINGS)) / 16_000  # chunks overlap


def test_convolutions_that_all_subnets_share_are_computed_once(supernet):
    cascade = load(supernet, 1.0)
    if cascade.encoder is None:
        pytest.skip("each subnet has convolutions of its own")
    calls, encoder = [], cascade.encoder.encoder
    cascade.encoder.encoder = lambda audio: calls.append(len(audio)) or encoder(audio)
    cascade.log_probs(RECORDINGS)
    assert sum(calls) == sum(cascade.num_frames(len(each)) > 0 for each in RECORDINGS)
    assert not cascade.encoder.kept


def test_macs_are_those_of_the_stages_that_ran(supernet):
    model, cascade = load_model(supernet), load(supernet, 1.0)
    first, last = (profile_subnet(model, name) for name in SUBNETS)
    cascade.log_probs(RECORDINGS)
    shared = 0 if cascade.encoder is None else last.feature_encoder.macs
    assert cascade.macs_per_second == pytest.approx(first.macs + last.macs - shared)
    assert str(cascade).startswith("audio that each stage got: smallest 100%, largest 100%; ")
    only_first = load(supernet, 0.0)
    only_first.log_probs(RECORDINGS)
    assert only_first.macs_per_second == pytest.approx(first.macs)


# Calibration


REFERENCES = ["a b", "c", "d e f", "g", "a b c", ""]


def test_calibration_gives_the_errors_and_macs_of_the_cascade_at_each_threshold(supernet):
    calibration = Calibration(load(supernet))
    calibration.add(RECORDINGS[:3], REFERENCES[:3])
    calibration.add(RECORDINGS[3:], REFERENCES[3:])
    curve = calibration.curve()
    assert [point.min_confidence for point in curve] == list(THRESHOLDS)
    for point in curve[::9]:
        cascade = load(supernet, point.min_confidence)
        texts = [transcript.text for transcript in cascade.transcribe(RECORDINGS)]
        assert point.wer == pytest.approx(word_error_rate(REFERENCES[:5], texts[:5]))
        assert point.macs == pytest.approx(cascade.macs_per_second)


@pytest.fixture
def calibration(monkeypatch, supernet):
    """With a curve of four points, the third no better than the second."""
    made = Calibration(load(supernet))
    points = [(0.0, 0.4, 1e6), (0.5, 0.2, 2e6), (0.9, 0.2, 3e6), (1.0, 0.1, 4e6)]
    monkeypatch.setattr(made, "curve", lambda: [cascades.Point(*point) for point in points])
    return made


@pytest.mark.parametrize(
    ("limits", "threshold"),
    [({"max_wer": 0.25}, 0.5), ({"max_wer": 0.1}, 1), ({"max_macs": 3.5e6}, 0.5), ({"max_macs": 1e9}, 1), ({}, 1)],
)
def test_the_threshold_for_a_wanted_error_or_cost_is_the_best_that_has_it(calibration, limits, threshold):
    assert calibration.choose(**limits).min_confidence == threshold


def test_a_wish_that_no_threshold_meets_names_the_nearest(calibration):
    with pytest.raises(UserError, match="no threshold costs at most 0 MMAC/s: the least is 1"):
        calibration.choose(max_macs=1e5)
    with pytest.raises(UserError, match="no threshold has a word error rate of at most 5.00%: the least is 10.00%"):
        calibration.choose(max_wer=0.05)


# What is refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("refused") / "asr", SPACE)


@pytest.mark.parametrize(
    ("subnets", "reason"),
    [
        (["largest", "smallest"], "a cascade goes from cheap to costly, .*, not: largest .* MMAC/s, smallest "),
        (["smallest", "smallest"], "a cascade goes from cheap to costly"),
        (["largest"], "over two subnets or more, not: largest"),
        (["smallest", "a_small"], "cascade smallest,a_small: subnet 'a_small' is not known in this search space"),
        (["smallest", "nowhere.json"], "subnet nowhere.json: .*No such file"),
    ],
)
def test_subnets_that_make_no_cascade_are_refused(folder, subnets, reason):
    with pytest.raises(UserError, match=reason):
        CascadeRecognizer.from_pretrained(folder, subnets)


def test_a_subnet_of_another_supernet_is_refused(folder, tmp_path):
    Subnet(8, (2,), (8,), 4).to_json_file(tmp_path / "foreign.json")
    with pytest.raises(UserError, match="hidden_size"):
        CascadeRecognizer.from_pretrained(folder, ["smallest", str(tmp_path / "foreign.json")])


def test_a_model_without_subnets_is_refused(folder, tmp_path):
    load_model(folder).extract_subnet("smallest").save_pretrained(tmp_path)
    save_processor(tmp_path)
    with pytest.raises(UserError, match="is one model, no supernet"):
        CascadeRecognizer.from_pretrained(tmp_path, SUBNETS)


@pytest.mark.parametrize("min_confidence", [-0.1, 1.1, float("nan")])
def test_a_confidence_that_is_none_is_refused(folder, min_confidence):
    with pytest.raises(UserError, match="has to be from 0 to 1"):
        load(folder, min_confidence)
