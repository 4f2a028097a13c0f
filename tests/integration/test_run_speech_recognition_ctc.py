"""Fine-tuning with CTC, by the script, on tones of a tiny teacher's supernet: a tone is called high or low."""

import io
import json
import stat
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import run_speech_recognition_ctc
import soundfile
import torch
from conftest import assert_close, stock_settings
from datasets import Dataset
from evaluate import evaluator
from hub_server import loopback_hub
from huggingface_hub import ModelCard
from run_speech_recognition_ctc import share_processor
from safetensors.torch import load_file
from scripts import (
    TRAINING,
    distil,
    finish_as_a_user,
    held,
    killed,
    make_workshop,
    newest,
    run,
    weights,
)
from speech import encoded, undecoded
from transformers import (
    AutoConfig,
    AutoModelForCTC,
    HubertConfig,
    HubertForCTC,
    HubertModel,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2Processor,
    pipeline,
)

from lighthubert_training.error_rates import CharacterErrorRate, WordErrorRate
from lighthubert_training.recognition.trainer import CTCTrainer
from lighthubert_training.sampling import draw_subnets
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.export import to_hubert
from modeling_lighthubert.modeling_lighthubert import LightHubertFeatureEncoder


SCRIPT = TRAINING / "run_speech_recognition_ctc.py"
SANDWICH = ("--sampling", "sandwich", "--num_random_subnets", 2)
LEARN = ("--max_steps", 250, "--learning_rate", 5e-3, "--warmup_steps", 5, "--mask_time_prob", 0.0)


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """A workshop of its own, with a supernet."""
    folder = tmp_path_factory.mktemp("ctc")
    make_workshop(folder)
    distil(folder, "supernet", "--sampling", "sandwich", "--max_steps", 4, "--learning_rate", 2e-3)
    return folder


def options(shop: Path, output: str | Path, *more: object) -> list[str]:
    """Of a run on the tones; later ones count."""
    given = (
        *("--model_name_or_path", shop / "supernet", "--train_file", shop / "speech.parquet"),
        *("--output_dir", shop / output, "--use_cpu", "--report_to", "none", "--save_strategy", "no"),
        *("--max_steps", 2, "--disable_tqdm", True, *more),
    )
    return [str(word) for word in given]


def fine_tune(shop: Path, output: str | Path, *more: object) -> Path:
    """The script in this process: a new one takes seconds to import what it needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), *options(shop, output, *more)])
        run_speech_recognition_ctc.main()
    return shop / output


def table(path: Path, *rows: tuple[np.ndarray | bytes, str]) -> Path:
    """A parquet file of waveforms at 16 kHz, or encoded files, and their transcripts."""
    made = []
    for number, (audio, text) in enumerate(rows):
        file = encoded(audio, format="FLAC") if isinstance(audio, np.ndarray) else audio
        made.append({"audio": {"bytes": file, "path": f"{number}.flac"}, "text": text})
    undecoded(made).to_parquet(path)
    return path


def tone(seconds: float = 0.5, frequency: int = 200) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * 16_000)) / 16_000)).astype(np.float32)


def losses(output: Path) -> list[tuple[float, float]]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [(entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]


def error_rates(output: Path, part: str = "eval") -> dict[str, float]:
    return json.loads((output / f"{part}_results.json").read_text())


@pytest.fixture(scope="module")
def cut(shop) -> Path:
    """The smallest subnet, cut and fine-tuned until it names the tones."""
    data = ("--validation_file", shop / "speech.parquet", "--do_predict", "--test_file", shop / "speech.parquet")
    return fine_tune(shop, "asr-cut", "--subnet", "smallest", *data, *LEARN)


@pytest.fixture(scope="module")
def supernet(shop) -> Path:
    """The supernet, fine-tuned once for all."""
    data = ("--validation_file", shop / "speech.parquet", "--num_eval_subnets", 1, *SANDWICH)
    learn = (*LEARN, "--max_steps", 350, "--learning_rate", 3e-3)
    return fine_tune(shop, "asr-supernet", "--once_for_all", *data, *learn)


# What comes out


def test_a_subnet_is_cut_and_learns_to_transcribe(cut):
    assert AutoModelForCTC.from_pretrained(cut).config.hidden_size == 16
    assert error_rates(cut)["eval_cer"] < 0.1
    assert error_rates(cut, "test")["test_wer"] == error_rates(cut)["eval_wer"]


def test_every_subnet_of_a_supernet_that_was_fine_tuned_once_transcribes(shop, supernet):
    model = AutoModelForCTC.from_pretrained(supernet)
    assert model.subnet == model.search_space.largest
    recordings = [np.array(row) for row in (tone(0.4), tone(0.5, 1200))]
    processor = Wav2Vec2Processor.from_pretrained(supernet)
    for seed in range(5):
        subnet = model.search_space.sample(seed)
        small = model.extract_subnet(subnet)
        for recording, text in zip(recordings, ("low", "high"), strict=True):
            inputs = processor(recording, sampling_rate=16_000, return_tensors="pt")
            with model.using_subnet(subnet), torch.no_grad():
                ids = [one(**inputs).logits.argmax(-1) for one in (model, small)]
            assert torch.equal(*ids)
            assert processor.batch_decode(ids[0]) == [text]


def test_an_evaluation_measures_every_subnet_in_question_and_their_mean(supernet):
    results = error_rates(supernet)
    each = [results[f"eval_wer_{name}"] for name in ("largest", "middle", "smallest", "random_0")]
    assert results["eval_wer"] == pytest.approx(np.mean(each))
    rows = [json.loads(line) for line in (supernet / "eval_transcripts.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 8
    assert {row["subnet"] for row in rows} == {"largest", "middle", "smallest", "random_0"}


def test_model_export_and_pipeline_transcribe_alike_alone_batched_and_padded(shop, cut, tmp_path):
    """The cut model, the stock HuBERT made of it, and the pipeline on either."""
    model, processor = AutoModelForCTC.from_pretrained(cut), Wav2Vec2Processor.from_pretrained(cut)
    stock = to_hubert(model)
    assert type(stock) is HubertForCTC
    for folder, saved in {"stock": stock, "own": model}.items():
        saved.save_pretrained(tmp_path / folder)
        processor.save_pretrained(tmp_path / folder)
    waveforms = [soundfile.read(file)[0].astype(np.float32) for file in sorted((shop / "recordings").iterdir())]

    def transcripts(model, waveforms, **padding) -> list[str]:
        inputs = processor(waveforms, sampling_rate=16_000, return_tensors="pt", padding=True, **padding)
        with torch.no_grad():
            logits = model(**inputs).logits
        lengths = model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(-1))
        return [processor.decode(row[:length].argmax(-1)) for row, length in zip(logits, lengths, strict=True)]

    expected = ["high" if number % 2 == 0 else "low" for number in range(len(waveforms))]
    for either in (model, stock):
        assert transcripts(either, waveforms) == expected
        assert transcripts(either, waveforms, pad_to_multiple_of=50_000) == expected
        assert [transcripts(either, [waveform])[0] for waveform in waveforms] == expected
    for folder in ("own", "stock"):
        recogniser = pipeline("automatic-speech-recognition", model=str(tmp_path / folder))
        assert [recogniser(waveform.copy())["text"] for waveform in waveforms] == expected
        assert [result["text"] for result in recogniser(waveforms, batch_size=3)] == expected


def test_evaluate_scores_a_model_with_the_metrics_of_the_script(shop, cut):
    """evaluate makes the pipeline of a folder. Of a pipeline, evaluate 0.4.6 asks whether it is a model of TensorFlow,
    which transformers 5 does not know."""
    waveforms = [soundfile.read(file, dtype="float32")[0] for file in sorted((shop / "recordings").iterdir())]
    data = Dataset.from_dict({"audio": waveforms, "text": ["high", "low"] * 4})
    for metric, measure in ((WordErrorRate(), "wer"), (CharacterErrorRate(), "cer")):
        score = evaluator("automatic-speech-recognition").compute(
            model_or_pipeline=str(cut),
            data=data.with_format("numpy"),
            metric=metric,
            input_column="audio",
            label_column="text",
        )
        assert score[measure] == pytest.approx(error_rates(cut)[f"eval_{measure}"])


def test_a_run_leaves_what_a_reader_looks_for(cut):
    rows = [json.loads(line) for line in (cut / "eval_transcripts.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert set(rows[0]) == {"name", "subnet", "reference", "hypothesis", "wer"}
    assert "REF: high" in (cut / "test_alignments.txt").read_text()
    assert (cut / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (cut / "README.md").read_text()
    assert "model-index" in card and "type: wer" in card
    assert f"| 8 of 8 | this model | {100 * error_rates(cut)['eval_wer']:.2f} % |" in card
    results = {result.metric_type: result.metric_value for result in ModelCard(card).data.eval_results}
    assert results["cer"] == round(error_rates(cut)["eval_cer"], 4)
    assert str(cut.parent) not in card


def test_a_figure_says_how_many_recordings_of_how_many_it_is_of(shop, tmp_path):
    output = fine_tune(shop, tmp_path, "--validation_file", shop / "speech.parquet", "--max_eval_samples", 3)
    results = error_rates(output)
    assert (results["eval_num_recordings"], results["eval_num_available"]) == (3, 8)
    card = ModelCard((output / "README.md").read_text())
    assert "| 3 of 8 | this model |" in card.text
    assert card.data.eval_results is None


def test_the_model_is_pushed_to_the_hub_with_its_card_and_without_its_checkpoints(shop, monkeypatch):
    with loopback_hub() as hub:
        for name, value in (hub.environment | {"HF_HUB_OFFLINE": "0"}).items():
            monkeypatch.setenv(name, value)
        data = ("--validation_file", shop / "speech.parquet", "--save_strategy", "steps", "--save_steps", 1)
        words = options(shop, "pushed-asr", *data, "--push_to_hub", "--hub_model_id", "me/asr")
        run(SCRIPT, *words, finish=finish_as_a_user)
    files = set(hub.repositories["me/asr"].files())
    assert {"model.safetensors", "config.json", "processor_config.json", "vocab.json", "README.md"} <= files
    assert not [name for name in files if "checkpoint" in name]


def test_the_process_that_saves_alone_writes_the_vocabulary(shop, cut):
    """Any other reads it: three would else write the same files at once, and read half of one."""
    before = {path.name: path.stat().st_mtime_ns for path in cut.iterdir()}
    other = SimpleNamespace(main_process_first=lambda local: nullcontext(), save_on_each_node=False, should_save=False)
    processor = share_processor(other, lambda: pytest.fail("another process has made it"), cut)
    assert processor.tokenizer.get_vocab() == Wav2Vec2Processor.from_pretrained(cut).tokenizer.get_vocab()
    assert {path.name: path.stat().st_mtime_ns for path in cut.iterdir()} == before


def test_what_a_run_leaves_can_be_read_by_colleagues(cut):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in cut.iterdir() if path.is_file()}
    assert modes["model.safetensors"] == modes["config.json"] == modes["README.md"]


# Exactness


@pytest.mark.parametrize(
    "kind",
    [("--subnet", "smallest"), ("--once_for_all", "--distillation_weight", 0.5, *SANDWICH)],
    ids=["cut", "supernet"],
)
def test_accumulated_batches_and_two_processes_train_what_one_batch_does(shop, kind):
    """Losses and norms of gradients, step by step."""
    shared = (*kind, "--max_steps", 4, "--mask_time_prob", 0.0, "--logging_steps", 1, "--learning_rate", 1e-3)
    name = kind[0].strip("-")
    plain = fine_tune(shop, f"plain-{name}", *shared, "--per_device_train_batch_size", 8)
    accumulated = ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4)
    accumulated = fine_tune(shop, f"accumulated-{name}", *shared, *accumulated)
    run(SCRIPT, *options(shop, f"two-{name}", *shared, "--per_device_train_batch_size", 4), processes=2)
    assert len(losses(plain)) == 4
    for output in (accumulated, shop / f"two-{name}"):
        assert len(losses(output)) == 4
        for ours, expected in zip(zip(*losses(output)), zip(*losses(plain)), strict=True):
            assert_close(ours, expected)


RUNS, TRAINER = "lighthubert_training.runs.checkpoints", "lighthubert_training.recognition.trainer"
WINDOWS = [
    (f"{RUNS}:give_permissions", 0),  # the first save: all is written, and not marked as whole
    (f"{RUNS}:_put_in_place", 0),
    (f"{TRAINER}:rotate_checkpoints", 1),  # it is there, and nothing is deleted yet
    (f"{TRAINER}:CTCTrainer.loss_of_batch", 1),  # in a step
    (f"{RUNS}:write_manifest", 1),  # the second save
    (f"{TRAINER}:rotate_checkpoints", 2),  # there are two, of which one is to go
    (f"{TRAINER}:rotate_checkpoints", 3),  # in the last step, in the middle of an epoch
    ("lighthubert_training.recognition.transcripts:write_evaluation", 3),
    ("lighthubert_training.cards.speech_recognition:write_recognition_card", 3),
]
"""Functions in whose first call a run is killed, and the newest checkpoint then."""


def test_a_run_killed_in_each_window_of_its_saves_ends_with_the_same_weights(shop):
    """Each run goes on from what the one before has left. One checkpoint is kept, and the rate is constant."""
    shared = ("--once_for_all", "--max_steps", 3, "--save_strategy", "steps", "--save_steps", 1)
    shared += ("--save_total_limit", 1, *SANDWICH)
    shared += ("--per_device_train_batch_size", 2, "--lr_scheduler_type", "constant", "--learning_rate", 1e-2)
    shared += ("--validation_file", shop / "speech.parquet", "--mask_time_prob", 0.3, "--logging_steps", 1)
    undisturbed = fine_tune(shop, "no-windows", *shared)
    more = (*shared, "--resume_from_checkpoint", "latest")
    for function, left in WINDOWS:
        killed(function, 1, SCRIPT, *options(shop, "windows", *more))
        assert newest(shop / "windows") == left, function
    output = fine_tune(shop, "windows", *more)
    assert all(torch.equal(weights(output)[name], weight) for name, weight in weights(undisturbed).items())
    assert losses(output) == losses(undisturbed)
    assert error_rates(output)["eval_loss"] == error_rates(undisturbed)["eval_loss"]
    assert not [*output.glob("unfinished-*"), *output.glob(".*")]


def test_a_damaged_checkpoint_is_passed_over(shop, caplog):
    shared = ("--max_steps", 6, "--save_strategy", "steps", "--save_steps", 2)
    output = fine_tune(shop, "damaged", *shared)
    first = weights(output)
    (output / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    fine_tune(shop, "damaged", *shared, "--resume_from_checkpoint", "latest")
    assert "checkpoint-6 is damaged" in caplog.text
    assert all(torch.equal(weights(output)[name], weight) for name, weight in first.items())


def test_the_output_layer_alone_is_trained_in_the_first_steps(shop):
    learns = ("--learning_rate", 1e-2, "--freeze_feature_encoder", False)
    frozen = fine_tune(shop, "frozen", "--freeze_encoder_steps", 2, *learns)
    thawed = fine_tune(shop, "thawed", "--freeze_encoder_steps", 1, *learns)
    before = load_file(shop / "supernet" / "model.safetensors")
    for name in ("encoder.layers.0.attention.v_proj.weight", "feature_extractor.conv_layers.0.conv.weight"):
        assert torch.equal(weights(frozen)[f"hubert.{name}"], before[f"hubert.{name}"])
        assert not torch.equal(weights(thawed)[f"hubert.{name}"], before[f"hubert.{name}"])


def test_in_place_distillation_adds_the_divergence_from_the_largest(shop):
    """A sum over true frames, for each of the 28 characters of the step, times its weight."""
    shared = ("--once_for_all", "--sampling", "uniform", "--num_random_subnets", 1, "--max_steps", 1)
    shared += ("--learning_rate", 0.0, "--mask_time_prob", 0.0, "--logging_steps", 1)
    outputs = [fine_tune(shop, f"weight-{weight}", *shared, "--distillation_weight", weight) for weight in (0.0, 2.0)]
    (without, _), (distilled, _) = (losses(output)[0] for output in outputs)
    model, processor = (one.from_pretrained(outputs[0]) for one in (AutoModelForCTC, Wav2Vec2Processor))
    waveforms = [soundfile.read(file, dtype="float32")[0] for file in sorted((shop / "recordings").iterdir())]
    expected = 0.0
    (subnet,) = draw_subnets(model.search_space, "uniform", 42, 0)
    for waveform in waveforms:
        inputs = processor(waveform, sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            largest = model(**inputs).logits.log_softmax(-1)
            with model.using_subnet(subnet):
                smaller = model(**inputs).logits.log_softmax(-1)
        expected += float((largest.exp() * (largest - smaller)).sum()) / 28
    assert expected > 0.01
    assert distilled - without == pytest.approx(2 * expected, rel=1e-3)


@pytest.mark.parametrize(("frozen", "passes"), [(True, 1), (False, 5)])
def test_a_frozen_feature_encoder_is_computed_once_for_all_subnets_of_a_step(shop, monkeypatch, frozen, passes):
    """Four subnets, and the largest as their teacher; gradients are those of a step in which it is computed anew."""
    calls = []
    forward = LightHubertFeatureEncoder.forward
    monkeypatch.setattr(LightHubertFeatureEncoder, "forward", lambda *given: calls.append(1) or forward(*given))
    shared = ("--once_for_all", "--max_steps", 1, "--distillation_weight", 1.0, "--mask_time_prob", 0.0, *SANDWICH)
    shared += ("--freeze_feature_encoder", frozen, "--logging_steps", 1)
    output = fine_tune(shop, f"counted-{frozen}", *shared)
    assert len(calls) == passes
    monkeypatch.setattr(CTCTrainer, "shared_feature_encoder", lambda *given: nullcontext())
    assert losses(fine_tune(shop, f"anew-{frozen}", *shared)) == losses(output)


def test_training_stops_when_evaluations_get_no_better(shop):
    data = ("--validation_file", shop / "speech.parquet", "--eval_strategy", "steps", "--eval_steps", 2)
    patience = ("--early_stopping_patience", 2, "--learning_rate", 0.0, "--max_steps", 50)
    output = fine_tune(shop, "patience", "--subnet", "smallest", *data, *patience)
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 6


def test_a_stock_hubert_is_taken_as_it_is_and_streamed_speech_with_a_tokenizer(shop, cut):
    torch.manual_seed(0)
    HubertModel(HubertConfig(**stock_settings(num_hidden_layers=2))).save_pretrained(shop / "stock-hubert")
    stream = ("--streaming", True, "--tokenizer_name_or_path", cut, "--mask_time_prob", 0.0, "--max_steps", 1)
    output = fine_tune(shop, "asr-stock", "--model_name_or_path", shop / "stock-hubert", *stream)
    assert type(AutoModelForCTC.from_pretrained(output)) is HubertForCTC
    assert Wav2Vec2Processor.from_pretrained(output).tokenizer.get_vocab() == (
        Wav2Vec2CTCTokenizer.from_pretrained(cut).get_vocab()
    )


def test_a_stock_hubert_learns_from_recordings_shorter_than_a_masked_span(shop, tmp_path):
    HubertModel(HubertConfig(**stock_settings(num_hidden_layers=2))).save_pretrained(tmp_path / "hubert")
    data = table(tmp_path / "short.parquet", (tone(0.1), "a"), (tone(0.12), "b"))
    output = fine_tune(shop, "short", "--model_name_or_path", tmp_path / "hubert", "--train_file", data)
    assert AutoModelForCTC.from_pretrained(output).config.mask_time_length == 4


def test_a_fine_tuned_model_goes_on_with_its_own_tokenizer_and_output_layer(shop, cut):
    output = fine_tune(shop, "further", "--model_name_or_path", cut, "--max_steps", 1, "--learning_rate", 0.0)
    assert torch.equal(weights(output)["lm_head.weight"], weights(cut)["lm_head.weight"])


# Bad input


def test_what_nothing_can_be_learnt_from_is_left_out_and_named(shop, tmp_path, caplog):
    long = "a transcript of far more letters than there are frames in so short a recording"
    data = table(
        tmp_path / "bad.parquet",
        *((tone(), "low"), (tone(), " "), (tone(0.2), long), (tone(0.0), "low"), (b"no audio", "low")),
        *((tone(0.01), "low"), (tone(), "low")),
    )
    fine_tune(shop, "left-out", "--train_file", data, "--validation_file", data, "--max_unreadable_share", 0.3)
    text = caplog.text
    assert "left out of train: 1 of 7 recordings, no transcript: 1.flac" in text
    assert "left out of train: 1 of 7 recordings, a transcript longer than the recording has frames" in text
    assert "left out of train: 1 of 7 recordings, shorter than one frame: 5.flac" in text
    assert all(f"left out, because it cannot be read: {number}.flac" in text for number in (3, 4))
    assert len((shop / "left-out" / "eval_transcripts.jsonl").read_text().splitlines()) == 3  # too long is an error


@pytest.mark.parametrize("processes", [1, 3])
def test_a_recording_that_breaks_off_is_left_out_and_named(shop, tmp_path, caplog, processes):
    """One of eight in training, alone in its batch where there are three processes; and one of eight in evaluation."""
    whole = encoded(tone(), format="FLAC")
    torn = whole[: len(whole) // 2]
    data = table(tmp_path / "torn.parquet", *[(torn if number == 3 else whole, "low") for number in range(8)])
    words = ("--train_file", data, "--validation_file", data, "--max_unreadable_share", 0.2, "--max_steps", 8)
    words += ("--per_device_train_batch_size", 1, "--per_device_eval_batch_size", 3)
    if processes == 1:
        output = fine_tune(shop, "torn", *words)
        said = caplog.text
    else:
        said = run(SCRIPT, *options(shop, "torn-3", *words), processes=processes)
        output = shop / "torn-3"
    assert said.count("left out, because it cannot be read: 3.flac") == 2 * processes  # in training, in evaluation
    assert all(torch.isfinite(weight).all() for weight in weights(output).values())
    rows = [json.loads(line) for line in (output / "eval_transcripts.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == [f"{number}.flac" for number in range(8) if number != 3]
    if processes == 1:
        with pytest.raises(UserError, match="1 of 8 recordings cannot be read, more than a share of 0.01"):
            fine_tune(shop, "torn-refused", *words, "--max_unreadable_share", 0.01)


def test_a_second_run_to_the_same_folder_is_refused(shop):
    with held(shop / "busy") as pid, pytest.raises(UserError, match=f"busy is being written by process {pid} on"):
        fine_tune(shop, "busy")
    assert [path.name for path in (shop / "busy").iterdir()] == [".lock"]


def test_a_used_folder_is_refused_before_anything_is_written(shop, cut):
    before = {path.name: path.read_bytes() for path in cut.iterdir()}
    with pytest.raises(UserError, match="has model.safetensors of an earlier run"):
        fine_tune(shop, cut.name, "--chars_to_ignore", "l")
    assert {path.name: path.read_bytes() for path in cut.iterdir()} == before


def test_audio_of_any_kind_is_read_and_any_script_is_written(shop, tmp_path):
    """Stereo MP3 at 44.1 kHz, WAV under the name of FLAC, and transcripts in Cyrillic, Devanagari and Han."""
    mp3, wav = io.BytesIO(), io.BytesIO()
    time_axis = np.arange(44_100) / 44_100
    soundfile.write(mp3, np.stack([np.sin(2 * np.pi * 200 * time_axis)] * 2, axis=1) * 0.5, 44_100, format="MP3")
    soundfile.write(wav, tone(), 16_000, format="WAV")
    texts = ("да нет", "हाँ", "是的")
    data = table(tmp_path / "odd.parquet", *zip((mp3.getvalue(), wav.getvalue(), tone()), texts, strict=True))
    output = fine_tune(shop, "odd", "--train_file", data, "--validation_file", data)
    vocabulary = set(Wav2Vec2CTCTokenizer.from_pretrained(output).get_vocab())
    assert vocabulary == {"<pad>", "<unk>", "|"} | set("".join(texts)) - {" "}
    rows = [json.loads(line) for line in (output / "eval_transcripts.jsonl").read_text().splitlines()]
    assert [row["reference"] for row in rows] == list(texts)


def test_only_blanks_are_reported_with_what_may_help(shop, caplog):
    data = ("--validation_file", shop / "speech.parquet")
    fine_tune(shop, "blanks", *data, "--max_steps", 2, "--learning_rate", 1e-6, "--subnet", "smallest")
    assert "only blanks were predicted after 2 steps" in caplog.text


def test_a_new_output_layer_begins_with_blanks_and_a_trained_one_stays(shop):
    first = fine_tune(shop, "begun", "--max_steps", 1, "--learning_rate", 0.0, "--once_for_all")
    bias = weights(first)["lm_head.bias"]
    blank = AutoConfig.from_pretrained(first).pad_token_id
    assert bias.softmax(dim=0)[blank] == pytest.approx(0.9)
    trained = fine_tune(shop, "trained", "--max_steps", 2, "--learning_rate", 0.1, "--once_for_all")
    again = fine_tune(shop, "again", "--model_name_or_path", trained, "--learning_rate", 0.0, "--once_for_all")
    assert not torch.equal(weights(trained)["lm_head.bias"], bias)
    assert torch.equal(weights(again)["lm_head.bias"], weights(trained)["lm_head.bias"])


def test_characters_that_the_vocabulary_lacks_are_reported(shop, cut, tmp_path, caplog):
    data = table(tmp_path / "unknown.parquet", (tone(), "low whigh"), (tone(), "high"))
    fine_tune(shop, "unknown", "--tokenizer_name_or_path", cut, "--train_file", data)
    assert "are not in the vocabulary" not in caplog.text
    data = table(tmp_path / "unknown.parquet", (tone(), "low zoo"), (tone(), "high"))
    fine_tune(shop, "more-unknown", "--tokenizer_name_or_path", cut, "--train_file", data)
    assert "1 of 11 characters of the train transcripts are not in the vocabulary: 'z' (1)" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--text_column_name", "words"), "no column 'words': choose --text_column_name from ['audio', 'text']"),
        (("--subnet", "huge"), "subnet 'huge' is not known"),
        (("--streaming", True), "give --tokenizer_name_or_path"),
        (("--model_name_or_path", "{}/asr-cut", "--subnet", "smallest"), "--subnet smallest: "),
        (("--model_name_or_path", "{}/asr-cut", "--once_for_all"), "is no supernet"),
        (("--once_for_all", "--subnet", "smallest"), "leave out --subnet smallest"),
        (("--distillation_weight", 1.0), "distillation_weight is for --once_for_all"),
        (("--early_stopping_patience", 1), "give --eval_strategy steps"),
        (("--text_case", "upper", "--tokenizer_name_or_path", "{}/asr-cut"), "are not in the vocabulary"),
        (("--learning_rate", 1e30, "--max_steps", 5), "the loss is nan at step"),
        (("--resume_from_checkpoint", "{}/recordings"), "cannot go on from"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_ends_with_its_reason(shop, cut, options, message):
    with pytest.raises((UserError, FloatingPointError)) as error:
        fine_tune(shop, "bad", *(str(option).format(shop) for option in options))
    assert message in str(error.value)


def test_a_checkpoint_for_other_tokens_is_refused_unless_its_output_layer_may_go(shop, cut, tmp_path):
    data = table(tmp_path / "other.parquet", (tone(), "abcdefghijk"), (tone(), "xyz"))
    run_of = ("--model_name_or_path", cut, "--train_file", data)
    fine_tune(shop, "other-tokens", *run_of, "--ignore_mismatched_sizes")
    with pytest.raises(UserError, match="writes 9 tokens, but the tokenizer has 17"):
        fine_tune(shop, "refused", *run_of, "--tokenizer_name_or_path", shop / "other-tokens")
