"""Every benchmark can be imported and lists its options; what they share beside measures works."""

import sys

import pytest
from speech import TONE
from tiny_bench import NAMES, benchmarks_on_the_path, load  # noqa: F401
from transformers import Wav2Vec2FeatureExtractor

from lighthubert_training.data.collators import DistillationCollator
from lighthubert_training.data.recordings import Recording
from lighthubert_training.distillation.arguments import ObjectiveArguments
from modeling_lighthubert import LightHubertConfig
from modeling_lighthubert.errors import UserError


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
