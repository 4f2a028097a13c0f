"""What an evaluation measures, and which class of subnet a loss belongs to."""

from conftest import SIX_DEEP

from lighthubert_training.distillation.loop import evaluation_subnets, subnet_class


def test_evaluations_measure_the_named_subnets_and_the_same_random_ones_every_time():
    subnets = evaluation_subnets(SIX_DEEP, num_random=3)
    assert list(subnets) == [*SIX_DEEP.named, "random_0", "random_1", "random_2"]
    assert len(set(subnets.values())) == len(subnets)
    assert subnets == evaluation_subnets(SIX_DEEP, num_random=3)
    assert evaluation_subnets(None, num_random=3) == {"model": None}


def test_the_ends_of_the_space_are_classes_of_their_own():
    classes = [subnet_class(SIX_DEEP, subnet) for subnet in (SIX_DEEP.largest, SIX_DEEP.smallest, SIX_DEEP.sample(0))]
    assert classes == ["largest", "smallest", "random"]
