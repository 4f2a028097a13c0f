"""Every benchmark can be imported and lists its options; what they share and the tables compute is right.
One benchmark is run, on a tiny teacher and little speech."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import answer, assert_close, noise
from scripts import fails, finish_as_a_user, run
from speech import RATE, TONE, encoded, undecoded
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from lighthubert_training.data.collators import DistillationCollator
from lighthubert_training.data.recordings import Recording
from lighthubert_training.data.strings import read_parquet
from lighthubert_training.distillation.arguments import ObjectiveArguments
from modeling_lighthubert import LightHubertConfig, LightHubertModel, SearchSpace
from modeling_lighthubert.errors import UserError
from modeling_lighthubert.loading import load_model
from modeling_lighthubert.profiling import macs_per_second


FOLDER = Path(__file__).parents[2] / "benchmarks"
SHARED = ("common", "comparisons", "ctc", "measures", "processes", "recordings", "runner")
NAMES = sorted({file.stem for file in FOLDER.glob("*.py")} - set(SHARED))


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """Scripts find modules beside them; here their folder is on the path, last, while this module is tested."""
    sys.path.append(str(FOLDER))
    threads = torch.get_num_threads()
    yield
    sys.path.remove(str(FOLDER))
    for name in [name for name in sys.modules if name in SHARED or name.startswith("benchmark_")]:
        del sys.modules[name]
    torch.set_num_threads(threads)


def load(name: str) -> ModuleType:
    """A benchmark as a module, by its path: some are called like modules of others."""
    if name in SHARED:
        return importlib.import_module(name)
    module = f"benchmark_{name}"
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, FOLDER / f"{name}.py")
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    return sys.modules[module]


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_lists_its_options(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        load(name).main()
    assert ended.value.code == 0
    assert f"usage: {name}.py" in capsys.readouterr().out


def test_scripts_get_their_options_and_leave_a_log(tmp_path):
    (tmp_path / "script.py").write_text("import sys\n\nprint(sys.argv[1:])\n")
    options = {"seed": 3, "subnet": None, "train_file": ["a.parquet", "b.parquet"], "output_dir": tmp_path}
    load("processes").run_script(tmp_path / "script.py", **options)
    words = ["--seed=3", "--train_file", "a.parquet", "b.parquet", f"--output_dir={tmp_path}"]
    assert (tmp_path / "run.log").read_text() == f"{words}\n"


def test_a_script_that_fails_says_why(tmp_path):
    run_script = load("processes").run_script
    (tmp_path / "refuses.py").write_text(
        "import sys\n\nprint('error: --seed 3 is odd', file=sys.stderr)\nsys.exit(2)\n"
    )
    (tmp_path / "breaks.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match="^--seed 3 is odd$"):
        run_script(tmp_path / "refuses.py", seed=3, output_dir=tmp_path)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run_script(tmp_path / "breaks.py", output_dir=tmp_path)


def test_batches_for_a_distillation_loss_are_those_of_the_collator():
    extractor, objective = Wav2Vec2FeatureExtractor(return_attention_mask=True), ObjectiveArguments()
    masking = {"mask_time_prob": objective.mask_time_prob, "mask_time_length": objective.mask_time_length}
    collated = DistillationCollator(extractor, extractor, LightHubertConfig(), **masking)(
        [Recording(str(length), TONE[:length]) for length in (8000, 4000)]
    )
    (batch,) = load("recordings").to_distil(
        [{name: collated[name] for name in ("input_values", "attention_mask")}], LightHubertConfig(), objective
    )
    assert set(batch) == set(collated) - {"names", "unreadable"}
    assert batch["teacher_input_values"] is batch["input_values"]
    assert batch["mask"].shape == collated["mask"].shape
    assert all(batch[name] == collated[name] for name in ("num_samples", "num_frames"))


def test_noise_is_the_same_and_of_unit_variance():
    recordings = load("recordings")
    audio = recordings.noise(2, 0.5)
    assert audio.shape == (2, 8000)
    assert (audio == recordings.noise(2, 0.5)).all()
    assert audio.std() == pytest.approx(1, abs=0.05)


def test_the_most_memory_is_no_less_than_what_is_held():
    process_memory = load("processes").process_memory
    assert 10 < process_memory("VmRSS") <= process_memory("VmHWM")


def test_a_summary_is_mean_and_deviation():
    summary = load("comparisons").summary
    assert summary([0.25, 0.75], percent=True) == "50.0 ± 35.4"
    assert summary([0.25], percent=False) == "0.250"
    assert summary([], percent=False) == ""


def test_runs_of_the_demonstration_are_summed_up_as_mean_and_range():
    demo_seeds = load("demo_seeds")
    assert demo_seeds.summary([0.324, 0.331, 0.318], percent=False) == "0.324 (0.318-0.331)"
    assert demo_seeds.summary([0.88, 0.88], percent=True) == "88.0%"
    runs = [
        {
            "models": [{"model": "teacher", "parameters": 1234, "macs": 5e6, "r2": r2}],
            "ctc": [{"model": "middle", "wer": wer, "cer": 0.1}],
        }
        for r2, wer in ((0.4, 0.2), (0.5, 0.4))
    ]
    models, ctc = (part.splitlines()[-1] for part in demo_seeds.tables(runs).split("\n\n"))
    assert models == "| teacher | 1,234 | 5.0 | 0.450 (0.400-0.500) |"
    assert ctc == "| middle | 30.0% (20.0-40.0) | 10.0% |"


def test_a_margin_says_whether_all_seeds_agree():
    margin = load("comparisons").margin
    better = margin({"0": 0.3, "1": 0.25}, {"0": 0.2, "1": 0.2, "2": 0.9}, "r2")
    assert better.gains == pytest.approx([0.1, 0.05])
    assert better.relative == pytest.approx(0.375)
    assert better.verdict == 1
    assert margin({"0": 0.3, "1": 0.2}, {"0": 0.2, "1": 0.3}, "wer, 1 min").verdict == 0
    assert margin({"0": 0.3}, {"0": 0.2}, "wer, 1 min").verdict == -1, "more errors are worse"
    assert margin({"0": 0.3}, {"1": 0.2}, "r2") is None
    assert margin({"0": 0.1}, {"0": -0.1}, "r2").relative == pytest.approx(2), "R2 below 0 is worse"


def test_the_table_of_gains_has_every_seed_and_the_findings_say_in_how_many_measures_it_is_better():
    gains = load("gains")

    def made(row: str, **measures: float) -> dict:
        return {row: measures}

    results = {
        "teacher": {"0": made("teacher", r2=0.5)},
        "distilled once for all": {
            "0": made("smallest", r2=0.4, per=0.3, wer=0.5),
            "1": made("smallest", r2=0.5, per=0.4, wer=0.7),
        },
        "smallest, slice of the teacher": {
            "0": made("smallest", r2=0.3, per=0.35, wer=0.4),
            "1": made("smallest", r2=0.3, per=0.45, wer=0.6),
        },
    }
    of_means = gains.overview(results, ["r2", "per"]).splitlines()
    assert of_means[0] == "|  | r2 | per |"
    assert of_means[2:4] == ["| teacher | 0.500 |  |", "| smallest, distilled once for all | 0.450 | 35.0 |"]
    assert gains.table(results, "smallest", ["r2", "per", "wer"]).splitlines() == [
        "|  | teacher | distilled once for all | slice of the teacher |",
        "| --- | --- | --- | --- |",
        "| r2 | 0.500 (0.500) | 0.450 (0.400 0.500) | 0.300 |",
        "| per |  | 35.0 (30.0 40.0) | 40.0 (35.0 45.0) |",
        "| wer |  | 60.0 (50.0 70.0) | 50.0 (40.0 60.0) |",
    ]
    (finding,) = gains.findings(results, ["r2", "per", "wer"])
    assert "against slice of the teacher: better in the mean in 2 of 3 measures, and in every seed in 2" in finding
    assert finding.endswith("worse in every seed in wer; errors in the mean: 12% fewer per, 20% more wer")


def test_the_table_of_recipes_has_what_was_run():
    def made(r2: float) -> dict:
        return {name: {"r2": r2} for name in ("largest", "middle", "smallest")}

    results = {"recipe": {"0": made(0.2), "1": made(0.4)}, "no masks": {"0": made(0.5)}}
    assert load("learning").table(results).splitlines()[2:] == [
        "| recipe | 0.300 ± 0.141 | 0.300 ± 0.141 | 0.300 ± 0.141 |",
        "| no masks | 0.500 | 0.500 | 0.500 |",
    ]


def test_the_table_of_narrow_feature_encoders_has_cost_and_quality_of_each_subnet():
    row = {"r2": 0.27, "digit": 0.86, "macs": 5e6, "steps": 3}
    better = row | {"r2": 0.29}
    results = {
        "controls": {"0": {"smallest, slice": {"r2": 0.2, "digit": 0.9, "macs": 9e6}}},
        "from a half, ordered": {"0": {"within 40 %": row}, "1": {"within 40 %": better}},
    }
    header, _, control, subnet = load("narrow_feature_encoder").table(results).splitlines()
    assert header == "|  | subnet | steps | MMAC/s | r2 | digit |"
    assert control == "| controls | smallest, slice |  | 9.0 | 0.200 | 90.0 |"
    assert subnet == "| from a half, ordered | within 40 % | 3 | 5.0 | 0.280 ± 0.014 | 86.0 ± 0.0 |"


def test_once_for_all_is_compared_with_each_subnet_alone():
    asr = load("asr")

    def made(seconds: float, **wer: float) -> dict:
        row = {"training_seconds": seconds}
        return {name: row | {"wer": rate, "cer": rate / 2} for name, rate in wer.items()}

    results = {
        "once for all": {"0": made(40, smallest=0.3, middle=0.2, random_0=0.22)},
        "smallest alone": {"0": made(10, smallest=0.25)},
        "middle alone": {"0": made(10, middle=0.21)},
    }
    lines = asr.table(results, ["smallest", "middle", "random_0"]).splitlines()
    assert lines[2] == "| smallest | 25.0 | 30.0 |  | 12.5 | 15.0 |"
    assert lines[4] == "| random, mean |  | 22.0 |  |  | 11.0 |"
    of_all, _ = asr.margins(results, ["smallest", "middle", "random_0"])
    assert "+2.0 points of WER against 2 subnets alone in the mean, +5.0 at most (smallest); 2.00 of" in of_all
    assert of_all.endswith("4.0 times that of one")


def test_a_task_is_won_in_every_seed_or_in_the_mean():
    benchmark = load("superb")
    first = {"PR": 50.0, "ASR": 50.0, "KS": 50.0, "QbE": 50.0, "SID": 50.0, "ASV": 50.0, "SD": 50.0, "IC": 50.0}
    control = {title: [value, value] for title, value in (first | {"SF F1": 50.0, "ER": 50.0}).items()}
    model = control | {"PR": [40.0, 45.0], "KS": [49.0, 60.0], "ER": [40.0, 59.0]}
    scores = {"random weights": control, "supernet": model}
    assert benchmark.tasks_won(scores, "supernet") == (["PR"], ["PR", "KS"])


def test_a_search_sums_up_what_it_found():
    search = load("search")
    results = {
        "fronts": [{"random": 0.7, "nsga2": 0.8}, {"random": 0.8, "nsga2": 0.7}],
        "sized": [{"found": 0.4, "uniform": 0.5, "parameters": 0.99, "macs": 1.0}],
        "timed": {"minutes": 2.0, "evaluation over forward passes": 1.01, "search over evaluations": 1.02},
        "num_timed": 100,
    }
    assert search.table(results).splitlines()[-1] == "| found |  | 0.400 |"
    fronts, sized, _ = search.findings(results)
    assert "in 1 of 2 seeds" in fronts
    assert "in 1 of 1 seeds" in sized


WORDS = ("due sei", "press one", "press two")


@pytest.fixture
def speech(tmp_path) -> Path:
    """A folder of little speech, tones whose pitch is the word: known and held-out speakers and languages."""
    folder, rng = tmp_path / "speech", np.random.default_rng(0)
    folder.mkdir()

    def row(number: int, **labels: object) -> dict:
        tone = np.sin(2 * np.pi * 300 * (1 + number % 3) * np.arange(9600) / RATE) + 0.1 * rng.standard_normal(9600)
        return {"audio": {"bytes": encoded(0.1 * tone, format="FLAC"), "path": None}, **labels}

    for part in ("train", "test"):
        digits = [row(n, digit=n % 3, speaker=speaker) for n in range(9) for speaker in ("ann", "theo", "zoe")]
        prompts = [row(n, text=WORDS[n % 3], language="it" if n % 3 == 0 else "en") for n in range(12)]
        slots = [row(n, slots=json.dumps({"size": f"size {n % 3}"})) for n in range(6)]
        for corpus, rows in {"digits": digits, "prompts": prompts, "commands": slots}.items():
            undecoded(rows).to_parquet(folder / f"{corpus}-{part}.parquet")
    undecoded([row(n, speaker="zoe") for n in range(3)]).to_parquet(folder / "prompts-unlabelled.parquet")
    return folder


@pytest.fixture
def bench_arguments(tmp_path, speech):
    """Of a benchmark on a teacher with random weights."""
    config = HubertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, conv_dim=(16,) * 7,
        feat_extract_norm="layer", num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=8,
    )  # fmt: skip
    space = SearchSpace((16, 24, 32), (2, 4), (1, 2, 3), (2, 3), head_dim=8)
    HubertModel(config).save_pretrained(tmp_path / "teacher")
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(tmp_path / "teacher")
    space.to_json_file(tmp_path / "space.json")
    return load("common").BenchArguments(
        speech_dir=str(speech), teacher_name_or_path=str(tmp_path / "teacher"), held_out_speaker="theo",
        search_space=str(tmp_path / "space.json"), output_dir=str(tmp_path / "output"), held_out_language="it",
        results_file=str(tmp_path / "results/gains.json"), passes=2, seeds=[0], label_minutes=[0.05],
        steps_of_minutes=[2], phone_steps=2, measures=["r2", "probes", "phones", "recognition"],
    )  # fmt: skip


def test_what_is_held_out_is_not_distilled_on(bench_arguments, tmp_path):
    files = load("recordings").distillation_files(bench_arguments, tmp_path / "kept")
    rows = {file.stem: read_parquet(file, ["audio"]) for file in files}
    assert set(rows) == {"digits-train", "prompts-train", "commands-train", "prompts-unlabelled"}
    assert set(rows["digits-train"]["speaker"]) == {"ann", "zoe"}
    assert set(rows["prompts-train"]["language"]) == {"en"}


def test_the_measures_of_a_model_are_of_known_and_of_held_out_speech(bench_arguments):
    bench = load("gains").Gains(bench_arguments)
    row = bench.measures(bench.control("slice of the teacher", bench.subnets["middle"], 0), seed=0)
    assert {"r2", "r2, held-out speaker", "r2, held-out language", "r2 of masked frames"} <= set(row)
    assert {"digit", "digit, held-out speaker", "speaker", "language", "slots"} <= set(row)
    assert {"per", "per, held-out language", "wer, 0.05 min", "wer, 0.05 min, held-out language"} <= set(row)
    assert "wer, en, 0.05 min" in row
    assert row["digit"] > 0.9, "tones of three pitches"
    again = bench.measures(bench.control("slice of the teacher", bench.subnets["middle"], 0), seed=0)
    assert row == again


def test_data_of_keyword_spotting_and_slot_filling_are_made_of_the_labels(bench_arguments, tmp_path):
    speech = load("recordings")
    labels = [{"slots": json.dumps({"size": "small", "roast": "dark", "milk": "some"})}, {"keyword": "alexa"}]
    recordings = [
        speech.Recording("", part, TONE, each, "") for part in ("train", "test") for each in labels for _ in range(20)
    ]
    speech.write_superb_data(recordings, tmp_path)
    for task, column, expected in (
        ("sf", "text", "B-size small E-size B-roast dark E-roast B-milk some E-milk"),
        ("ks", "label", "alexa"),
    ):
        parts = {
            part: read_parquet(tmp_path / task / f"{part}.parquet", ["audio"]) for part in ("train", "dev", "test")
        }
        assert {part: len(rows) for part, rows in parts.items()} == {"train": 17, "dev": 3, "test": 20}
        assert {text for rows in parts.values() for text in rows[column]} == {expected}


def test_a_model_is_scored_on_the_tasks_of_superb_that_the_speech_has_labels_for(bench_arguments):
    bench = load("gains").Gains(replace(bench_arguments, measures=["superb"]))
    row = bench.measure(bench.control("slice of the teacher", bench.subnets["smallest"], 0), seed=0)
    assert set(row) == {"sf f1, people", "sf cer, people"}


def test_error_rates_are_known_by_their_names():
    is_error = load("comparisons").is_error
    assert all(map(is_error, ("wer, 1 min", "per, held-out language", "sf cer, people")))
    assert not any(map(is_error, ("r2", "ks accuracy, people", "sf f1, people", "digit")))


@pytest.mark.parametrize("name", ["teacher", "the demonstration's teacher", "MFCC", "random weights"])
def test_a_teacher_is_compared_with_what_one_may_start_from(bench_arguments, name):
    arguments = replace(bench_arguments, measures=["probes", "phones", "recognition"])
    (row,) = load("teachers").Teachers(arguments).run(name, 0).values()
    assert {"digit", "slots", "per", "wer, 0.05 min", "wer, en, 0.05 min"} <= set(row)
    assert row["digit"] > 0.6, "tones of three pitches"


def test_features_that_are_computed_once_are_those_of_the_model(bench_arguments):
    measures, bench = load("measures"), load("gains").Gains(bench_arguments)
    model = bench.control("slice of the teacher", bench.subnets["middle"], 0)
    frozen, batch = measures.ModelFeatures(model, bench.measures.speech), [0, 1, 40]
    assert frozen.shares_encoder
    states, _ = frozen(batch)
    audio = bench.measures.speech.audio(batch)
    with torch.no_grad():
        own = model(audio["input_values"], audio["attention_mask"]).last_hidden_state
    torch.testing.assert_close(states, own, rtol=0, atol=2e-2)  # they are kept in half precision
    assert not measures.ModelFeatures(
        bench.control("random weights", bench.subnets["middle"], 0), frozen.speech
    ).shares_encoder


def test_controls_are_what_their_names_say(bench_arguments):
    bench, common = load("gains").Gains(bench_arguments), load("common")
    subnet = bench.subnets["smallest"]

    def is_slice_of(whole: torch.nn.Module, model: torch.nn.Module, name: str) -> bool:
        own = model.state_dict()[name]
        return torch.equal(own, whole.state_dict()[name][tuple(slice(size) for size in own.shape)])

    encoder, layer = "feature_extractor.conv_layers.3.conv.weight", "encoder.layers.0.attention.q_proj.weight"
    for kind, expected in {
        common.RANDOM: (False, False),
        common.SLICE: (True, True),
        common.ORDERED: (True, False),
        common.ENCODER: (True, False),
    }.items():
        model = bench.control(kind, subnet, 0)
        assert model.subnet == subnet
        assert tuple(is_slice_of(bench.untrained, model, name) for name in (encoder, layer)) == expected
        assert is_slice_of(bench.ordered, model, layer) == (kind == common.ORDERED)
    first = bench.first_layers(bench.subnets["middle"])
    assert first.config.hidden_size == 32
    assert first.config.num_hidden_layers < 3
    assert is_slice_of(bench.ordered, first, layer)
    assert macs_per_second(first) <= macs_per_second(bench.untrained, bench.subnets["middle"])


def test_the_ordered_teacher_has_other_slices_and_the_same_features(bench_arguments):
    bench = load("gains").Gains(bench_arguments)
    folder = bench.order(bench_arguments.search_space)
    models = bench.untrained, load_model(folder, head=LightHubertModel)
    full, small = (
        [answer(model.extract_subnet(name), noise(1, 4000)).sort(dim=-1).values for model in models]
        for name in ("largest", "smallest")
    )
    assert_close(*full)
    assert not torch.allclose(*small, atol=0.01)
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert (bench.order(bench_arguments.search_space) / "model.safetensors").stat().st_mtime_ns == made, "once"


def test_runs_are_made_once_and_kept_with_their_options(bench_arguments):
    options = {name: value for name, value in asdict(bench_arguments).items() if value is not None}
    options |= {"only": "smallest, DistilHuBERT's way", "measures": "r2"}
    words = [f"--{name}={value[0] if isinstance(value, list) else value}" for name, value in options.items()]
    assert "1 runs" in run(FOLDER / "gains.py", *words, finish=finish_as_a_user)
    kept = Path(bench_arguments.results_file).read_text()
    name = "smallest, DistilHuBERT's way"
    made = json.loads(kept)["results"][name]["0"]["smallest"]
    assert {"r2", "r2 of masked frames"} <= set(made)
    runner = load("runner").Runner(load("gains").Gains, replace(bench_arguments, only=None, measures=["r2"]))
    assert runner.hours([runner.job(name, 1)]) == runner.seconds[name]["0"]["r2"] / 7200
    assert "runs, about" not in run(FOLDER / "gains.py", *words)
    assert Path(bench_arguments.results_file).read_text() == kept
    run(FOLDER / "gains.py", *words, "--measures", "r2", "probes", finish=finish_as_a_user)
    with_probes = json.loads(Path(bench_arguments.results_file).read_text())["results"][name]["0"]["smallest"]
    assert made.items() < with_probes.items(), "what was measured before is kept"
    assert "digit" in with_probes
    assert "has results with another passes" in fails(FOLDER / "gains.py", *words, "--passes=3")


@pytest.mark.parametrize(
    ("module", "table", "options"),
    [
        ("gains", "Gains", "BenchArguments"),
        ("learning", "Learning", "LearningArguments"),
        ("passes", "Passes", "PassesArguments"),
        ("teachers", "Teachers", "TeachersArguments"),
        ("narrow_feature_encoder", "NarrowFeatureEncoders", "NarrowArguments"),
        ("asr", "Recognition", "RecognitionArguments"),
    ],
)
def test_the_hours_of_all_runs_are_told_beforehand(bench_arguments, module, table, options):
    bench = load(module)
    arguments = getattr(bench, options)(**asdict(bench_arguments) | {"measures": ["r2"], "passes": 1200})
    runner = load("runner").Runner(getattr(bench, table), arguments)
    jobs = [runner.job(name, 0) for name in runner.kind.names(arguments)]
    assert all(runner.hours([job]) > 0 for job in jobs)
    assert 0.01 < runner.hours(jobs) < 48


def test_runs_of_another_teacher_in_the_same_folder_are_others(bench_arguments):
    runner, gains = load("runner"), load("gains").Gains(bench_arguments)
    runner.Runner(load("gains").Gains, bench_arguments).keep(runner.Job("teacher", 0, ("r2",)), 1.0, {})
    first = gains.distil(0)
    teacher = HubertModel.from_pretrained(bench_arguments.teacher_name_or_path)
    teacher.encoder.layer_norm.bias.data += 1.0
    teacher.save_pretrained(bench_arguments.teacher_name_or_path)
    assert load("gains").Gains(bench_arguments).distil(0) != first
    with pytest.raises(UserError, match="has results with another teacher_weights"):
        runner.Runner(load("gains").Gains, bench_arguments)


def test_runs_of_another_search_space_under_the_same_name_are_others(bench_arguments):
    module = load("gains")
    runner = load("runner").Runner(module.Gains, bench_arguments)
    runner.keep(load("runner").Job("teacher", 0, ("r2",)), 1.0, {})
    first = module.Gains(bench_arguments).distil(0, student_name_or_path=None)
    SearchSpace((24, 32), (2, 4), (1, 2), (2, 3), head_dim=8).to_json_file(bench_arguments.search_space)
    assert module.Gains(bench_arguments).distil(0, student_name_or_path=None) != first
    with pytest.raises(UserError, match="has results with another search_space"):
        load("runner").Runner(module.Gains, bench_arguments)


def test_a_run_that_fails_ends_the_benchmark_and_the_others_are_kept(bench_arguments):
    options = {name: value for name, value in asdict(bench_arguments).items() if value not in (None, [])}
    words = [f"--{name}={value[0] if isinstance(value, list) else value}" for name, value in options.items()]
    Path(bench_arguments.output_dir).mkdir()
    Path(bench_arguments.output_dir, "distilled").write_text("a file where a folder has to be made")
    runs = ("smallest, distilled alone", "smallest, random weights")
    done = subprocess.run(
        [sys.executable, FOLDER / "gains.py", *words, "--measures=r2", "--only", *runs], capture_output=True, text=True
    )
    assert done.returncode and "distilled" in done.stderr
    assert list(json.loads(Path(bench_arguments.results_file).read_text())["results"]) == [runs[1]]


def test_an_unknown_run_is_named(bench_arguments):
    bench_arguments.only = ["largest, by magic"]
    with pytest.raises(UserError, match="--only largest, by magic: choose from 'distilled once for all'"):
        load("runner").Runner(load("gains").Gains, bench_arguments)()


def test_phones_are_those_of_the_language():
    phones = load("ctc").phonemize(["press 1", "due"], ["en", "it"])
    assert phones[0][:3] == ["p", "ɹ", "ɛ"]
    assert phones[0][-1] == "n", "a figure is read out"
    assert phones[1] == ["d", "u", "e"]


def test_whitened_features_are_uncorrelated_and_of_variance_one():
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    mixed = torch.randn(4000, 8, generator=generator) @ torch.diag(torch.logspace(0, 1.5, 8)) @ rotation + 3
    mean, whitening = load("ctc").whiten(mixed)
    torch.testing.assert_close(((mixed - mean) @ whitening).T.cov(), torch.eye(8), rtol=0, atol=1e-3)
    constant = torch.cat([mixed, torch.ones(4000, 1)], dim=1)
    mean, whitening = load("ctc").whiten(constant)
    assert ((constant - mean) @ whitening).abs().max() < 10, "what never changes is no feature"


def test_the_phone_probe_finds_phones_in_features_that_are_all_but_constant(bench_arguments):
    """What tells phones apart is a hundredth of the rest, as in the features of a transformer."""
    measures, bench = load("measures"), load("gains").Gains(replace(bench_arguments, phone_steps=200))
    phones = bench.measures.phones
    units = sorted({phone for of_recording in phones.values() for phone in of_recording})
    mixed = torch.randn(len(units) + 1, len(units) + 1, generator=torch.Generator().manual_seed(0)) / 100

    class Correlated(measures.Features):
        def __call__(self, batch, mask=None):
            spoken = [[each for unit in phones[number] for each in (units.index(unit), -1)] for number in batch]
            frames = [torch.eye(len(units) + 1)[numbers] @ mixed + 10 for numbers in spoken]
            return torch.nn.utils.rnn.pad_sequence(frames, batch_first=True), torch.tensor(list(map(len, frames)))

    assert bench.measures.phone_probe(Correlated(bench.measures.speech), 0)["per"] < 0.1


def test_ctc_learns_units_from_features():
    ctc = load("ctc")
    texts = {number: ["ab", "ba", "aab"][number % 3] for number in range(6)}
    alphabet = ctc.Alphabet(texts.values())
    codes = torch.nn.functional.one_hot(torch.arange(3), 3).float()

    def frames(number: int) -> torch.Tensor:
        return torch.cat([codes[[0, alphabet.numbers[unit]]] for unit in texts[number]])

    layer = torch.nn.Linear(3, len(alphabet))

    def logits(batch):
        states = [frames(number) for number in batch]
        return layer(torch.nn.utils.rnn.pad_sequence(states, batch_first=True)), torch.tensor(list(map(len, states)))

    batches = [[0, 1, 2], [3, 4, 5]]
    ctc.train_ctc(logits, layer, batches, texts, alphabet, 200, 0.1, seed=0)
    assert {number: "".join(units) for number, units in ctc.transcribe(logits, batches, alphabet).items()} == texts
