"""The draw of subnets is reproducible, and each strategy draws what it is named for."""

import random

import pytest
from conftest import NARROW, SIX_DEEP, TWO_DEEP, WINDOWED

from lighthubert_training.sampling import draw_subnets, evaluation_subnets
from modeling_lighthubert import SearchSpace


@pytest.mark.parametrize("sampling", ["uniform", "uniform_size", "sandwich"])
def test_the_draw_depends_on_seed_and_step_only(sampling):
    drawn = [draw_subnets(SIX_DEEP, sampling, 0, step) for step in range(20)]
    assert drawn == [draw_subnets(SIX_DEEP, sampling, 0, step) for step in range(20)]
    assert len({tuple(subnets) for subnets in drawn}) > 15
    assert drawn != [draw_subnets(SIX_DEEP, sampling, 1, step) for step in range(20)]


def test_processes_draw_alike_unless_told_otherwise():
    shared, first, second = (
        [draw_subnets(SIX_DEEP, "uniform", 0, step, process_index=process) for step in range(5)]
        for process in (None, 0, 1)
    )
    assert shared == [draw_subnets(SIX_DEEP, "uniform", 0, step) for step in range(5)]
    assert first != second
    assert shared not in (first, second)


def test_sampling_strategies_draw_what_they_are_named_for():
    assert draw_subnets(SIX_DEEP, "largest", 0, 3) == [SIX_DEEP.largest]
    smallest, *drawn, largest = draw_subnets(SIX_DEEP, "sandwich", 0, 3, num_random=2)
    assert (smallest, largest) == (SIX_DEEP.smallest, SIX_DEEP.largest)
    assert len(drawn) == 2
    assert all(subnet in SIX_DEEP for subnet in drawn)
    assert draw_subnets(None, "uniform", 0, 0) == [None]
    with pytest.raises(ValueError, match="sampling='best' is not known"):
        draw_subnets(SIX_DEEP, "best", 0, 0)


def test_evaluations_measure_the_named_subnets_and_the_same_random_ones_every_time():
    subnets = evaluation_subnets(SIX_DEEP, num_random=3)
    assert list(subnets) == ["largest", "smallest", "middle", "random_0", "random_1", "random_2"]
    assert len(set(subnets.values())) == len(subnets)
    assert subnets == evaluation_subnets(SIX_DEEP, num_random=3)
    assert evaluation_subnets(None, num_random=3) == {"model": None}


@pytest.mark.parametrize("space", [SearchSpace.small(), SearchSpace.base(), SIX_DEEP, TWO_DEEP], ids=str)
def test_sizes_are_uniform_between_the_ends(space):
    """Each fifth of the range gets a fifth of 1000 draws, up to chance; independent choices leave the ends empty."""
    rng = random.Random(0)
    least, most = space.smallest.num_matrix_weights, space.largest.num_matrix_weights
    fifths = [0] * 5
    for _ in range(1000):
        subnet = space.sample_by_size(rng)
        assert subnet in space
        fifths[min(4, int(5 * (subnet.num_matrix_weights - least) / (most - least)))] += 1
    assert all(100 < count < 300 for count in fifths), fifths


@pytest.mark.parametrize(("space", "part"), [(NARROW, "conv_dim"), (WINDOWED, "attention_window")])
def test_sizes_leave_convolutions_and_windows_to_chance(space, part):
    rng = random.Random(0)
    drawn = [space.sample_by_size(rng) for _ in range(100)]
    assert all(subnet in space for subnet in drawn)
    assert len({getattr(subnet, part) for subnet in drawn}) > 10


def test_a_size_counts_the_matrices_of_the_layers():
    subnet = SearchSpace.small().named["a_small"]
    assert subnet.num_matrix_weights == 12 * (4 * 384 * 384 + 2 * 384 * 1536)
