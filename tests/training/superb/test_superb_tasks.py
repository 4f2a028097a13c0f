"""What tasks make of labels, and that their heads learn what features hold."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DEVICE, new_accelerator, noise
from superb_toys import Kept, stock, write_data, write_lines

from lighthubert_training.superb.data import Part, TaskData
from lighthubert_training.superb.recipes import TaskSettings
from lighthubert_training.superb.tasks import TASKS, Diarization, SpeechRecognition
from lighthubert_training.superb.tasks.diarization import turns_of
from lighthubert_training.superb.training import HeadTraining


LAYERS, SIZE = 3, 12
SHAPE = SimpleNamespace(
    num_layers=LAYERS, hidden_size=SIZE, sampling_rate=16_000, samples_per_frame=320, seconds_per_frame=0.02
)
"""As much of a frozen model as tasks ask for."""


# Heads learn


def label(rng: torch.Generator, *choices: str) -> str:
    return choices[int(torch.randint(len(choices), (), generator=rng))]


def classes(rng: torch.Generator) -> tuple[dict, list[int]]:
    """One of four labels, the same feature in all frames."""
    word = label(rng, "a", "b", "c", "d")
    return {"label": word}, [ord(word) - ord("a")] * 12


def speakers(rng: torch.Generator) -> tuple[dict, list[int]]:
    row, frames = classes(rng)
    return {"speaker": row["label"]}, frames * 2


def phones(rng: torch.Generator) -> tuple[dict, list[int]]:
    """Three words of one phone each, two frames long, with silence behind each."""
    words = [label(rng, "a", "b", "c") for _ in range(3)]
    return {"text": " ".join(words)}, [frame for word in words for frame in [ord(word) - ord("a")] * 2 + [4] * 2]


def letters(rng: torch.Generator) -> tuple[dict, list[int]]:
    """The same, and the silence is a space."""
    row, frames = phones(rng)
    return row, frames[:-2]


def turns(rng: torch.Generator) -> tuple[dict, list[int]]:
    """Two speakers, one after the other, each for 30 frames; which is first says nothing."""
    first, second = label(rng, "ab", "ba")
    segments = [{"speaker": first, "start": 0.0, "end": 0.6}, {"speaker": second, "start": 0.6, "end": 1.2}]
    return {"segments": segments}, [0] * 30 + [1] * 30


TOYS = {"ks": classes, "pr": phones, "asr": letters, "asv": speakers, "sd": turns}
SETTINGS = {"max_steps": 100, "learning_rate": 2e-2, "projector_size": 16, "lstm_size": 16, "embedding_size": 16}


def features_of(frames: list[int], number: int, informed: bool) -> torch.Tensor:
    """Noise in three layers; the one in the middle has one high feature in each frame, if it is `informed`."""
    states = noise(LAYERS, len(frames), SIZE, seed=number)
    if informed:
        states[1] += 8 * torch.nn.functional.one_hot(torch.tensor(frames, device=DEVICE), SIZE)
    return states


def train(task: str, folder, informed: bool = True) -> tuple[dict[str, float], HeadTraining]:
    """Test scores of a head that is trained on separable features, or on noise."""
    rng, parts, features, numbers = torch.Generator().manual_seed(0), {}, {}, itertools.count()
    for name, size in (("train", 48), ("dev", 16), ("test", 24)):
        rows, frames = zip(*(TOYS[task](rng) for _ in range(size)))
        ids = [{"id": number} for number in range(size)]
        parts[name] = Part(name, [row | each for row, each in zip(rows, ids)], audio=None)
        features[name] = Kept(features_of(each, next(numbers), informed) for each in frames)
        trials = [
            f"{one},{other},{int(rows[one] == rows[other])}" for one, other in itertools.combinations(range(size), 2)
        ]
        write_lines(folder / f"{task}/{name}_trials.csv", "enrolment,trial,same", *trials)
    write_lines(folder / f"{task}/lexicon.txt", "a A", "b B", "c C")
    settings = TaskSettings(task, "", batch_size=16, eval_steps=50, pooled_size=16, dropout=0.0, **SETTINGS)
    training = HeadTraining(
        TASKS[task](TaskData(settings, folder), parts, SHAPE), features, folder, new_accelerator(), {"seed": 0}
    )
    return training.run()["test"], training


@pytest.mark.parametrize(
    ("task", "metric"), [("ks", "accuracy"), ("pr", "per"), ("asr", "wer"), ("asv", "eer"), ("sd", "der")]
)
def test_a_head_learns_what_one_layer_holds(tmp_path, task, metric):
    scores, training = train(task, tmp_path)
    right = scores[metric] if training.task.higher_is_better[metric] else 1 - scores[metric]
    assert right > 0.9
    assert training.downstream.weighted_sum.weights.argmax() == 1


def test_a_head_learns_nothing_from_noise(tmp_path):
    scores, _ = train("ks", tmp_path, informed=False)
    assert scores["accuracy"] < 0.6  # of four labels


# Labels


def diarization() -> Diarization:
    segments = [{"speaker": name, "start": 0.0, "end": 1.0} for name in "ab"]
    return Diarization(
        TaskData(TaskSettings("sd", "")), {"train": Part("train", [{"segments": segments}], None)}, SHAPE
    )


SEGMENTS = [{"speaker": "b", "start": 0.1, "end": 0.2}, {"speaker": "a", "start": 0.16, "end": 0.26}]


def test_who_speaks_in_a_frame_is_counted_from_the_beginning_of_the_crop():
    task, speaking = diarization(), torch.zeros(15, 2)
    speaking[8:13, 0] = speaking[5:10, 1] = 1.0
    assert torch.equal(task.targets({"segments": SEGMENTS}, 15), speaking)
    for first in (3, 6, 11):
        row = {"segments": SEGMENTS, "first_frame": first}
        assert torch.equal(task.targets(row, 4), speaking[first : first + 4])


def test_speakers_may_be_found_in_any_order_but_in_one():
    task = diarization()
    logits = 20 * (task.targets({"segments": SEGMENTS}, 15) - 0.5)[None]
    lengths, rows = torch.tensor([15]), [{"segments": SEGMENTS}]
    loss = task.loss(None, logits, lengths, rows)
    assert loss < 1e-3
    torch.testing.assert_close(task.loss(None, logits.flip(2), lengths, rows), loss)
    changing = torch.cat([logits[:, :8], logits[:, 8:].flip(2)], dim=1)
    assert task.loss(None, changing, lengths, rows) > 1


def test_turns_begin_and_end_with_their_frames():
    speaking = np.array([[1, 0], [1, 0], [0, 1], [1, 1]])
    assert turns_of(speaking, 0.5) == [("0", 0.0, 1.0), ("0", 1.5, 2.0), ("1", 1.0, 2.0)]


def test_every_fold_is_tested_once_by_a_head_that_was_not_trained_on_it(tmp_path):
    data = TaskData(TaskSettings("er", ""), write_data(tmp_path))
    folds = TASKS["er"].load_folds(data, stock())
    tested = [{row["fold"] for row in fold.parts["test"].rows} for fold in folds]
    assert tested == [{1}, {2}, {3}]
    for fold, of_test in zip(folds, tested, strict=True):
        assert {name: part.name for name, part in fold.parts.items()} == {name: name for name in fold.parts}
        assert {name: len(part) for name, part in fold.parts.items()} == {"train": 5, "dev": 1, "test": 3}
        assert not of_test & {row["fold"] for name in ("train", "dev") for row in fold.parts[name].rows}


ARPA = """\\data\\
ngram 1=5
ngram 2=1

\\1-grams:
-99\t<s>\t0
-99\t<unk>\t0
-1\t</s>
-0.1\tbad\t0
-3\tdab\t0

\\2-grams:
-0.1\t<s> bad

\\end\\
"""


def test_beam_search_spells_with_the_units_of_the_task_and_prefers_likely_words(tmp_path):
    (tmp_path / "asr").mkdir()
    (tmp_path / "asr/lm.arpa").write_text(ARPA)
    rows = [{"text": "bad dab"}, {"text": "' z"}]  # an apostrophe comes before all letters
    parts = {name: Part(name, rows, None) for name in ("train", "test")}
    task = SpeechRecognition(TaskData(TaskSettings("asr", ""), tmp_path), parts, SHAPE)
    assert task.units == ["<pad>", "<unk>", "|", "'", "a", "b", "d", "z"]

    def logits(*frames: str) -> torch.Tensor:
        """Of each frame one unit, or two units that are equally likely."""
        return torch.stack([sum(20 * torch.eye(8)[task.units.index(unit)] for unit in frame) for frame in frames])

    said = logits("d", "a", "b", "|", "b", "a", "d")
    assert task.greedy(said) == task.with_language_model(said) == "dab bad"
    assert task.with_language_model(logits("bd", "a", "bd")) == "bad"
    assert task.scores([said, said], parts["test"]) == {"wer": 1.0, "wer_lm": 1.0}
    assert task.scores([logits("b", "a", "d", "|", "d", "a", "b")] * 2, Part("dev", rows, None)) == {"wer": 0.5}


def test_phones_are_those_of_the_first_pronunciation_in_any_case(tmp_path):
    (task,) = TASKS["pr"].load_folds(TaskData(TaskSettings("pr", ""), write_data(tmp_path)), stock())
    assert task.units_of({"text": "One TWO"}) == ["W", "AH", "N", "T", "UW"]


def test_slots_begin_and_end_with_units_of_their_own(tmp_path):
    text = "play B-artist abba E-artist"
    parts = dict.fromkeys(("train", "dev", "test"), Part("train", [{"text": text}], None))
    task = TASKS["sf"](TaskData(TaskSettings("sf", "")), parts, SHAPE)
    units = task.units_of({"text": text})
    assert units == [*"play|", "B-artist", *"|abba|", "E-artist"]
    assert task.text_of(units) == text
