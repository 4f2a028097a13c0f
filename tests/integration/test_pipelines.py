"""Claims about pipelines: a saved model transcribes and classifies, also from a folder with remote code."""

import difflib
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from conftest import TWO_DEEP, assert_close, noise, run_without_package, tiny_config, tiny_model
from transformers import (
    AutoFeatureExtractor,
    AutoModelForCTC,
    AutoProcessor,
    AutoTokenizer,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    pipeline,
)
from transformers.utils import is_torchaudio_available

from modeling_lighthubert import LightHubertForCTC, LightHubertForSequenceClassification


LETTERS = ["<pad>", "|", "<unk>", *"abcdefghi"]
FORMS = ["supernet", "cut"]


def speech(seconds: float, sampling_rate: int = 16000, seed: int = 0) -> np.ndarray:
    """Half-second stretches of different noise: the model gives each another letter."""
    rng, samples = np.random.default_rng(seed), int(seconds * sampling_rate)
    parts = [rng.normal(size=sampling_rate // 2) * rng.uniform(0.01, 1) for _ in range(int(seconds * 2) + 1)]
    smooth = [np.convolve(part, np.ones(width) / width, "same") for width, part in enumerate(parts, start=1)]
    return np.concatenate(smooth)[:samples].astype(np.float32)


def make_local(model):
    """Cuts what ties a frame to distant ones, so that a recording and its chunks have the same answers."""
    with torch.no_grad():
        model.hubert.encoder.pos_conv_embed.conv.parametrizations.weight.original0.fill_(1e-6)
        for layer in model.hubert.encoder.layers:
            layer.attention.out_proj.weight.zero_()
    return model


def save_processor(folder):
    (folder / "vocab.json").write_text(
        json.dumps({letter: index for index, letter in enumerate(LETTERS)}), encoding="utf-8"
    )
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    extractor = Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a recogniser and a classifier, each as a supernet and cut."""
    root = tmp_path_factory.mktemp("pipelines")
    recogniser = make_local(tiny_model(LightHubertForCTC, pad_token_id=0))
    labels = {"id2label": {0: "yes", 1: "no", 2: "maybe"}, "label2id": {"yes": 0, "no": 1, "maybe": 2}}
    classifier = tiny_model(LightHubertForSequenceClassification, **labels)
    for name, model in (("recogniser", recogniser), ("classifier", classifier)):
        model.set_subnet(TWO_DEEP.sample(4))
        for form in FORMS:
            folder = root / f"{name}-{form}"
            (model if form == "supernet" else model.extract_subnet()).save_pretrained(folder)
            if name == "recogniser":
                save_processor(folder)
            else:
                Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    return root


@pytest.mark.parametrize("auto_class", [AutoFeatureExtractor, AutoTokenizer, AutoProcessor])
def test_a_processor_that_does_not_name_its_classes_is_found_by_the_type_of_the_model(folders, tmp_path, auto_class):
    """As older tools write it."""
    folder = shutil.copytree(folders / "recogniser-cut", tmp_path / "older")
    expected = type(auto_class.from_pretrained(folder))
    (folder / "processor_config.json").unlink()
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        values = json.loads((folder / name).read_text())
        for key in ("feature_extractor_type", "tokenizer_class", "processor_class"):
            values.pop(key, None)
        (folder / name).write_text(json.dumps(values))
    assert type(auto_class.from_pretrained(folder)) is expected


@pytest.fixture(scope="module", params=FORMS)
def recogniser(folders, request):
    return pipeline("automatic-speech-recognition", model=str(folders / f"recogniser-{request.param}"), device="cpu")


@pytest.fixture(scope="module", params=FORMS)
def classifier(folders, request):
    return pipeline("audio-classification", model=str(folders / f"classifier-{request.param}"), device="cpu")


def transcribed(recogniser, audio):
    """The text of a recording, without the pipeline."""
    with torch.no_grad():
        ids = recogniser.model(torch.from_numpy(audio)[None]).logits.argmax(-1)
    return recogniser.tokenizer.decode(ids[0])


# Speech recognition


def test_an_array_is_transcribed(recogniser):
    text = recogniser(speech(4))["text"]
    assert len(set(text)) > 2
    assert text == transcribed(recogniser, speech(4))


@pytest.mark.parametrize("key", ["array", "raw"])
def test_a_dictionary_is_transcribed_like_its_array(recogniser, key):
    assert recogniser({key: speech(2), "sampling_rate": 16000}) == recogniser(speech(2))


def test_another_sampling_rate_is_resampled_or_refused(recogniser):
    recording = {"array": speech(2, sampling_rate=8000), "sampling_rate": 8000}
    if is_torchaudio_available():
        assert recogniser(recording)["text"]
    else:
        with pytest.raises(ImportError, match="torchaudio is required to resample"):
            recogniser(recording)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_batch_is_transcribed_like_its_recordings(recogniser, batch_size):
    recordings = [speech(seconds, seed=seconds) for seconds in (1, 3, 2)]
    together = recogniser([recording.copy() for recording in recordings], batch_size=batch_size)
    for answer, recording in zip(together, recordings, strict=True):
        alone = transcribed(recogniser, recording)
        assert answer["text"].startswith(alone)  # transformers also decodes the frames of padding behind it
        assert batch_size > 1 or answer["text"] == alone


def test_a_long_recording_is_transcribed_in_chunks(recogniser):
    whole = transcribed(recogniser, speech(12))
    chunked = recogniser(speech(12), chunk_length_s=4, stride_length_s=(1, 1))["text"]
    assert len(whole) > 6
    assert difflib.SequenceMatcher(None, chunked, whole).ratio() > 0.9


def test_chunks_in_batches_change_nothing(recogniser):
    one = recogniser(speech(12), chunk_length_s=4, stride_length_s=(1, 1), batch_size=1)
    assert recogniser(speech(12), chunk_length_s=4, stride_length_s=(1, 1), batch_size=4) == one


def test_a_clip_that_is_shorter_than_a_frame_is_silent_in_a_batch(recogniser):
    long, short = speech(2), speech(1)[:200]
    found = recogniser([long.copy(), short.copy()], batch_size=2)
    assert [each["text"] for each in found] == [transcribed(recogniser, long), ""]


def test_a_last_chunk_that_is_shorter_than_a_frame_is_silent(recogniser):
    audio = speech(3)[: 2 * 16_000 + 300]
    found = recogniser(audio.copy(), chunk_length_s=1, stride_length_s=0, batch_size=3)["text"]
    parts = [transcribed(recogniser, audio[start : start + 16_000]) for start in (0, 16_000)]
    assert found.replace(" ", "") == "".join(parts).replace(" ", "")


@pytest.mark.parametrize("chunking", [{}, {"chunk_length_s": 4, "stride_length_s": (1, 1)}], ids=["whole", "chunks"])
def test_words_have_timestamps(recogniser, chunking):
    answer = recogniser(speech(12), return_timestamps="word", **chunking)
    words = answer["chunks"]
    assert [word["text"] for word in words] == answer["text"].split()
    times = [time for word in words for time in word["timestamp"]]
    assert times == sorted(times)
    assert 0 <= times[0] < times[-1] <= 12
    assert times[-1] > 8


def test_letters_have_timestamps(recogniser):
    answer = recogniser(speech(4), return_timestamps="char")
    assert "".join(letter["text"] for letter in answer["chunks"]) == answer["text"]


@pytest.mark.parametrize(
    ("audio", "message"),
    [(np.zeros(300, dtype=np.float32), "300 samples"), (np.full(4000, np.nan, dtype=np.float32), "NaN or infinite")],
    ids=["short", "NaN"],
)
def test_bad_audio_is_refused_through_the_pipeline(recogniser, audio, message):
    with pytest.raises(ValueError, match=message):
        recogniser(audio)


def test_the_subnet_of_a_pipeline_can_be_changed(folders):
    recogniser = pipeline("automatic-speech-recognition", model=str(folders / "recogniser-supernet"), device="cpu")
    for subnet in ("largest", "smallest"):
        recogniser.model.set_subnet(subnet)
        assert recogniser(speech(3))["text"] == transcribed(recogniser, speech(3))


@pytest.mark.parametrize("task", ["automatic-speech-recognition", "audio-classification"])
@pytest.mark.parametrize("form", FORMS)
def test_a_pipeline_knows_the_model(folders, task, form, caplog):
    """Transformers logs an error for a model that is not registered for the task."""
    logger, name = logging.getLogger("transformers"), "recogniser" if task.startswith("auto") else "classifier"
    logger.addHandler(caplog.handler)
    try:
        pipeline(task, model=str(folders / f"{name}-{form}"), device="cpu")
    finally:
        logger.removeHandler(caplog.handler)
    assert "not supported" not in caplog.text


# Classification


def test_a_recording_is_classified(classifier):
    answer = classifier(speech(2))
    assert {entry["label"] for entry in answer} == {"yes", "no", "maybe"}
    assert sum(entry["score"] for entry in answer) == pytest.approx(1)
    assert [entry["score"] for entry in answer] == sorted((entry["score"] for entry in answer), reverse=True)


def test_a_classified_batch_is_classified_like_its_recordings(classifier):
    recordings = [speech(seconds, seed=seconds) for seconds in (1, 3, 2)]
    together = classifier([recording.copy() for recording in recordings], batch_size=3)
    for answer, recording in zip(together, recordings, strict=True):
        alone = classifier(recording)
        assert [entry["label"] for entry in answer] == [entry["label"] for entry in alone]
        assert_close([entry["score"] for entry in answer], [entry["score"] for entry in alone])


def test_another_sampling_rate_is_resampled_or_refused_by_the_classifier(classifier):
    recording = {"array": speech(2, sampling_rate=8000), "sampling_rate": 8000}
    if is_torchaudio_available():
        assert classifier(recording)
    else:
        with pytest.raises(ImportError, match="torchaudio is required to resample"):
            classifier(recording)


# Remote code

SCRIPT = """
import json, sys
import numpy as np
from transformers import pipeline

audio, facts = np.load("audio.npy"), {}
for form in ("supernet", "cut"):
    remote = {"trust_remote_code": True, "device": "cpu"}
    recogniser = pipeline("automatic-speech-recognition", model="recogniser-" + form, **remote)
    assert type(recogniser.model).__module__.startswith("transformers_modules."), type(recogniser.model)
    classifier = pipeline("audio-classification", model="classifier-" + form, **remote)
    chunks = {"chunk_length_s": 4, "stride_length_s": (1, 1)}
    facts[form] = {
        "text": recogniser(audio)["text"],
        "batch": [answer["text"] for answer in recogniser([audio, audio[:16000]], batch_size=2)],
        "dictionary": recogniser({"array": audio, "sampling_rate": 16000})["text"],
        "chunks": recogniser(audio, **chunks)["text"],
        "words": recogniser(audio, return_timestamps="word", **chunks),
        "labels": classifier(audio),
    }
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def remote(folders):
    """What the pipelines of a process without the package answer."""
    np.save(folders / "audio.npy", speech(12))
    return run_without_package(SCRIPT, folders)


@pytest.mark.parametrize("form", FORMS)
def test_pipelines_answer_alike_without_the_package(folders, remote, form):
    recogniser = pipeline("automatic-speech-recognition", model=str(folders / f"recogniser-{form}"), device="cpu")
    chunks = {"chunk_length_s": 4, "stride_length_s": (1, 1)}
    text = transcribed(recogniser, speech(12))
    assert remote[form]["text"] == remote[form]["dictionary"] == text
    assert remote[form]["batch"][0] == text
    assert remote[form]["batch"][1].startswith(transcribed(recogniser, speech(12)[:16000]))
    assert remote[form]["chunks"] == recogniser(speech(12), **chunks)["text"]
    words = recogniser(speech(12), return_timestamps="word", **chunks)
    assert remote[form]["words"] == json.loads(json.dumps(words))
    classifier = pipeline("audio-classification", model=str(folders / f"classifier-{form}"), device="cpu")
    for ours, theirs in zip(classifier(speech(12)), remote[form]["labels"], strict=True):
        assert ours["label"] == theirs["label"]
        assert_close(theirs["score"], ours["score"])


def test_a_cut_recogniser_transcribes_like_the_selected_subnet(remote):
    assert remote["cut"]["text"] == remote["supernet"]["text"]


def test_the_frames_of_a_model_are_twenty_milliseconds(folders):
    model = AutoModelForCTC.from_pretrained(folders / "recogniser-cut")
    assert model.config.inputs_to_logits_ratio == 320


def test_frames_of_padding_are_blanks_because_a_pipeline_reads_them_too():
    torch.manual_seed(0)
    model = LightHubertForCTC(tiny_config(None, num_hidden_layers=2)).eval()
    model.lm_head.bias.data[3:] = 5.0  # letters everywhere, in the padding too
    waveforms = [noise(1, size, seed=size)[0].cpu().numpy() for size in (3000, 12_000, 7000)]
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    inputs = extractor(waveforms, sampling_rate=16_000, padding=True, return_tensors="pt")
    together = model(**inputs).logits
    for row, waveform in enumerate(waveforms):
        alone = model(**extractor(waveform, sampling_rate=16_000, return_tensors="pt")).logits[0]
        assert_close(together[row, : len(alone)], alone)
        assert (together[row, len(alone) :].argmax(dim=-1) == model.config.pad_token_id).all()
        assert (alone.argmax(dim=-1) != model.config.pad_token_id).any()
