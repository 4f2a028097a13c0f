"""Claims about subnets and search spaces: what they count, draw, refuse, and how they travel."""

import dataclasses
import itertools
import json
import random
from collections import Counter

import hypothesis
import pytest
from conftest import GOLDEN, NARROW, SMALL, WINDOWED
from hypothesis import strategies as st

from modeling_lighthubert import SearchSpace, Subnet
from modeling_lighthubert.search_space import kept_layers, search_space_from, subnet_from


GOLDEN_CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
LARGE = SearchSpace((512, 768, 1024), (8, 12, 16), (3, 3.5, 4), (20, 22, 24))
PRESETS = [pytest.param(SearchSpace.small(), id="small"), pytest.param(SearchSpace.base(), id="base")]


# Which layers stay


@pytest.mark.parametrize(
    ("depth", "dropped"),
    [
        (12, []),
        (11, [11]),
        (10, [7, 11]),
        (9, [3, 7, 11]),
        (8, [3, 7, 10, 11]),
        (7, [3, 6, 7, 10, 11]),
        (6, [2, 3, 6, 7, 10, 11]),
    ],
)
def test_twelve_layers_are_dropped_as_in_the_released_code(depth, dropped):
    assert kept_layers(12, depth) == tuple(layer for layer in range(12) if layer not in dropped)


@pytest.mark.parametrize("num_hidden_layers", [1, 2, 6, 12, 24])
def test_kept_layers_of_a_shallower_subnet_are_among_those_of_a_deeper_one(num_hidden_layers):
    kept = [set(kept_layers(num_hidden_layers, depth)) for depth in range(1, num_hidden_layers + 1)]
    assert [len(layers) for layers in kept] == list(range(1, num_hidden_layers + 1))
    assert all(shallow < deep for shallow, deep in itertools.pairwise(kept))


@pytest.mark.parametrize("num_hidden_layers", [1, 6, 24])
def test_kept_layers_run_from_bottom_to_top(num_hidden_layers):
    for depth in range(1, num_hidden_layers + 1):
        assert list(kept_layers(num_hidden_layers, depth)) == sorted(kept_layers(num_hidden_layers, depth))


@pytest.mark.parametrize("depth", [0, 13, -1])
def test_a_depth_that_the_supernet_lacks_is_refused(depth):
    with pytest.raises(ValueError, match=f"1 to 12 layers, not {depth}"):
        kept_layers(12, depth)


# Counts and names


@pytest.mark.parametrize(
    ("space", "count"), [(SearchSpace.small(), 951_892_141_473), (SearchSpace.base(), 6_530_347_008)]
)
def test_the_papers_spaces_are_counted_exactly(space, count):
    assert space.num_subnets == count


def test_the_golden_space_is_counted_as_by_the_authors():
    assert SearchSpace.from_dict(GOLDEN_CASES["search_space"]).num_subnets == GOLDEN_CASES["num_subnets"]


def test_the_count_is_the_number_of_different_subnets():
    space = SearchSpace((16, 32), (1, 2), (2, 3), (1, 2), head_dim=8)
    rng = random.Random(0)
    assert len({space.sample(rng) for _ in range(2000)}) == space.num_subnets == 2 * (4 + 16)


def test_a_space_with_more_subnets_than_a_machine_integer_is_counted():
    assert LARGE.num_subnets == 3 * (9**20 + 9**22 + 9**24) > 2**63


@pytest.mark.parametrize(
    ("space", "largest", "smallest"),
    [
        (SearchSpace.small(), (512, 12, 8, 2048), (256, 10, 4, 768)),
        (SearchSpace.base(), (768, 12, 12, 3072), (512, 12, 8, 1792)),
    ],
)
def test_largest_and_smallest_take_the_extreme_of_every_choice(space, largest, smallest):
    assert space.largest == Subnet.uniform(*largest)
    assert space.smallest == Subnet.uniform(*smallest)


def test_the_middle_subnet_takes_the_middle_of_every_choice():
    assert SearchSpace.small().middle == Subnet.uniform(384, 11, 6, 1344)
    assert SearchSpace((16, 32), (4, 8), (2, 4), (1, 2, 3, 4), 4).middle == Subnet.uniform(32, 3, 8, 128, 4)
    assert NARROW.middle.conv_dim == (8,) * 7
    assert WINDOWED.middle.attention_window == (70, 70)


def test_no_convolution_of_the_middle_subnet_is_narrower_than_the_one_before_it():
    space = dataclasses.replace(NARROW, conv_dim=((4, 8, 16), (4, 12, 16), (4, 8, 10, 20), (10, 15, 20, 30)))
    assert [choices[len(choices) // 2] for choices in space.conv_dim] == [8, 12, 10, 20]
    assert space.middle.conv_dim == (8, 12, 20, 20)
    assert space.middle in space
    assert space.largest.conv_dim == (16, 16, 20, 30)
    assert space.smallest.conv_dim == (4, 4, 4, 10)


def test_named_subnets_are_those_of_the_paper_that_are_inside():
    assert list(SearchSpace.small().named) == ["largest", "smallest", "middle", "a_small"]
    assert list(SearchSpace.base().named) == ["largest", "smallest", "middle", "a_base"]
    assert SearchSpace.small().named["a_small"] == Subnet.uniform(384, 12, 6, 1536)
    assert SearchSpace.base().named["a_base"] == Subnet.uniform(640, 12, 10, 2560)


# Feature encoders


def test_convolutions_never_narrow_and_all_such_encoders_are_counted():
    without = dataclasses.replace(NARROW, conv_dim=None)
    assert NARROW.num_subnets == 36 * without.num_subnets  # 7 convolutions of 3 widths: 9 over 2
    rng = random.Random(0)
    encoders = Counter(NARROW.sample(rng).conv_dim for _ in range(3600))
    assert len(encoders) == 36
    assert all(list(channels) == sorted(channels) for channels in encoders)
    assert max(encoders.values()) < 2 * min(encoders.values())


def test_a_subnet_that_names_no_channels_has_the_widest():
    unnamed = dataclasses.replace(NARROW.smallest, conv_dim=None)
    assert unnamed in NARROW
    assert NARROW.resolve(unnamed).conv_dim == (16,) * 7
    assert NARROW.smallest.conv_dim == (4,) * 7


def test_mutated_and_crossed_subnets_stay_inside_and_move_every_convolution():
    rng, subnet, other = random.Random(0), NARROW.smallest, NARROW.largest
    mutants = [subnet := NARROW.mutate(subnet, rng, probability=0.5) for _ in range(200)]
    assert all(mutant in NARROW for mutant in mutants)
    assert all({mutant.conv_dim[layer] for mutant in mutants} == {4, 8, 16} for layer in range(7))
    children = [NARROW.crossover(NARROW.smallest, other, rng) for _ in range(50)]
    assert {child.conv_dim for child in children} == {(4,) * 7, (16,) * 7}


def test_channels_travel_as_json_and_full_ones_leave_no_trace():
    assert SearchSpace.from_json_string(NARROW.to_json_string()) == NARROW
    subnet = NARROW.sample(3)
    assert Subnet.from_json_string(subnet.to_json_string()) == subnet
    assert "conv_dim=4" in str(NARROW.smallest)
    assert "conv_dim" not in SMALL.to_json_string() + SMALL.largest.to_json_string() + str(SMALL.largest)


@pytest.mark.parametrize(
    ("conv_dim", "message"),
    [
        ([4, 4, 4, 4, 4, 4, 5], r"conv_dim\[6\]=5 is not in this search space: choose from \[4, 8, 16\]"),
        ([4, 8, 4, 4, 4, 4, 4], "no convolution has fewer channels than the one before it"),
        ([4, 8], "is not for 7 convolutions"),
    ],
)
def test_channels_outside_the_space_are_refused(conv_dim, message):
    with pytest.raises(ValueError, match=message):
        NARROW.resolve({**NARROW.smallest.to_dict(), "conv_dim": conv_dim})


def test_channels_are_refused_where_there_is_no_choice():
    with pytest.raises(ValueError, match="all subnets have the full feature encoder: leave conv_dim out"):
        SMALL.resolve(dataclasses.replace(SMALL.smallest, conv_dim=(16,) * 7))


@pytest.mark.parametrize("choices", [[4, 8], [[8, 16], [4, 16]], [[4], []], []])
def test_choices_of_channels_that_make_no_sense_are_refused(choices):
    with pytest.raises(ValueError, match="search space conv_dim"):
        dataclasses.replace(NARROW, conv_dim=choices)


# Drawing


@pytest.mark.parametrize("space", PRESETS)
def test_a_seed_draws_the_same_subnets(space):
    first, second, other = random.Random(3), random.Random(3), random.Random(4)
    drawn = [space.sample(first) for _ in range(5)]
    assert drawn == [space.sample(second) for _ in range(5)]
    assert drawn != [space.sample(other) for _ in range(5)]
    assert space.sample(3) == drawn[0]


@pytest.mark.parametrize("space", PRESETS)
def test_every_drawn_subnet_is_inside(space):
    rng = random.Random(0)
    assert all(space.sample(rng) in space for _ in range(100))


def test_every_choice_is_drawn_about_equally_often():
    rng = random.Random(0)
    subnets = [SMALL.sample(rng) for _ in range(3000)]
    for drawn, choices in (
        ([subnet.hidden_size for subnet in subnets], SMALL.hidden_size),
        ([subnet.num_hidden_layers for subnet in subnets], SMALL.num_hidden_layers),
        ([subnet.num_attention_heads[3] for subnet in subnets], SMALL.num_attention_heads),
        ([subnet.intermediate_size[9] / subnet.hidden_size for subnet in subnets], SMALL.ffn_ratio),
    ):
        counts = Counter(drawn)
        assert set(counts) == set(choices)
        assert all(900 < count < 1100 for count in counts.values())


def test_heads_and_ffn_are_drawn_for_each_layer_on_its_own():
    subnet = SMALL.sample(0)
    assert len(set(subnet.num_attention_heads)) > 1
    assert len(set(subnet.intermediate_size)) > 1


def test_mutations_stay_inside_and_reach_every_gene():
    rng, parent = random.Random(0), SMALL.largest
    children = [SMALL.mutate(parent, rng, probability=0.5) for _ in range(300)]
    assert all(child in SMALL for child in children)
    assert {child.hidden_size for child in children} == set(SMALL.hidden_size)
    assert {child.num_hidden_layers for child in children} == set(SMALL.num_hidden_layers)
    assert {child.num_attention_heads[0] for child in children} == set(SMALL.num_attention_heads)
    assert {child.intermediate_size[0] / child.hidden_size for child in children} == set(SMALL.ffn_ratio)


def test_a_mutation_with_probability_zero_is_the_parent():
    parent = SMALL.sample(0)
    assert SMALL.mutate(parent, 1, probability=0) == parent


def test_a_rare_mutation_keeps_most_genes():
    rng, parent = random.Random(0), SMALL.largest
    kept = [SMALL.mutate(parent, rng, probability=0.05).num_attention_heads[0] == 8 for _ in range(300)]
    assert 0.9 < sum(kept) / 300 < 1


def test_a_mutation_that_narrows_keeps_the_ffn_ratios():
    rng, narrow = random.Random(0), SearchSpace((16, 32), (8,), (3, 4), (2,), head_dim=4)
    parent = Subnet(32, (8, 8), (96, 128), head_dim=4)
    children = {narrow.mutate(parent, rng, probability=0.2) for _ in range(100)}
    assert Subnet(16, (8, 8), (48, 64), head_dim=4) in children


def test_children_take_every_gene_from_a_parent():
    rng, one, other = random.Random(0), SMALL.largest, SMALL.smallest
    children = [SMALL.crossover(one, other, rng) for _ in range(100)]
    assert all(child in SMALL for child in children)
    assert {child.hidden_size for child in children} == {16, 32}
    assert {child.num_hidden_layers for child in children} == {10, 12}
    assert {heads for child in children for heads in child.num_attention_heads} == {4, 8}
    assert {size / child.hidden_size for child in children for size in child.intermediate_size} == {3, 4}


def test_layers_that_only_the_deeper_parent_has_come_from_it():
    rng, one, other = random.Random(0), SMALL.largest, SMALL.smallest
    deep = [child for child in (SMALL.crossover(other, one, rng) for _ in range(50)) if child.num_hidden_layers == 12]
    assert deep
    assert {child.num_attention_heads[10:] for child in deep} == {(8, 8)}


def test_crossover_of_a_subnet_with_itself_is_that_subnet():
    parent = SMALL.sample(5)
    assert SMALL.crossover(parent, parent, 0) == parent


@pytest.mark.parametrize("method", ["mutate", "crossover"])
def test_a_foreign_parent_is_refused(method):
    foreign = SearchSpace.base().largest
    parents = (foreign,) if method == "mutate" else (SMALL.largest, foreign)
    with pytest.raises(ValueError, match="not in this search space"):
        getattr(SMALL, method)(*parents, 0)


# Values: equality, hashing, JSON


def test_subnets_with_the_same_content_are_one_key():
    assert {Subnet(16, [4, 4], [32, 48], 4): "here"}[Subnet(16.0, (4, 4), (32, 48), 4)] == "here"
    assert Subnet(16, (4, 4), (32, 48), 4) != Subnet(16, (4, 4), (48, 32), 4)


def test_subnets_and_spaces_cannot_be_changed():
    with pytest.raises(AttributeError):
        SMALL.largest.hidden_size = 3
    with pytest.raises(AttributeError):
        SMALL.head_dim = 3


@pytest.mark.parametrize("value", [SMALL, SearchSpace.small(), SMALL.sample(0), SearchSpace.base().named["a_base"]])
def test_json_and_dict_give_back_the_same_value(value, tmp_path):
    kind = type(value)
    value.to_json_file(tmp_path / "value.json")
    assert kind.from_json_file(tmp_path / "value.json") == value
    assert kind.from_json_string(value.to_json_string()) == value
    assert kind.from_dict(json.loads(json.dumps(value.to_dict()))) == value


def test_json_that_is_no_object_is_refused():
    with pytest.raises(ValueError, match="a Subnet is a JSON object"):
        Subnet.from_json_string("[1, 2]")


@pytest.mark.parametrize("case", GOLDEN_CASES["cases"], ids=lambda case: f"case{case['index']}")
def test_the_authors_subnet_dict_is_read(case):
    theirs, space = case["subnet"], SearchSpace.from_dict(GOLDEN_CASES["search_space"])
    subnet = Subnet.from_dict(theirs)
    assert subnet == Subnet(theirs["embed_dim"], theirs["heads_num"], theirs["ffn_embed"], head_dim=64)
    assert subnet in space


def test_the_authors_search_space_dict_is_read():
    space = SearchSpace.from_dict(GOLDEN_CASES["search_space"])
    assert space == SearchSpace((64, 96, 128), (1, 2), (3, 3.5, 4), (10, 11, 12), head_dim=64)


def test_repeated_and_unordered_choices_make_the_same_space():
    assert SearchSpace((32, 16, 32), (4,), (4, 3.0, 4.0), (2, 1), 4) == SearchSpace((16, 32), (4,), (3, 4), (1, 2), 4)


@pytest.mark.parametrize("value", ["small", SearchSpace.small(), SearchSpace.small().to_dict()])
def test_a_search_space_is_given_by_name_value_or_dict(value):
    assert search_space_from(value) == SearchSpace.small()


def test_a_subnet_says_its_sizes_in_one_line():
    assert str(Subnet.uniform(384, 12, 6, 1536)) == (
        "hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536"
    )
    assert "num_attention_heads=4-8, intermediate_size=32-48" in str(Subnet(16, (4, 8), (32, 48), 4))


# What a stock HuBERT can hold


def test_a_subnet_of_whole_heads_no_wider_than_its_hidden_states_is_exportable():
    assert SearchSpace.small().named["a_small"].is_hubert_exportable
    assert SearchSpace.small().named["a_small"].hubert_obstacle is None


def test_the_layer_whose_attention_is_too_wide_for_hubert_is_named():
    subnet = Subnet(256, (4, 4, 6), (768, 768, 768))
    assert not subnet.is_hubert_exportable
    assert "layer 2 has 6 heads" in subnet.hubert_obstacle


def test_a_width_of_broken_heads_is_not_exportable():
    assert "hidden_size=96 is not a multiple of the head size 64" in Subnet(96, (1,), (192,)).hubert_obstacle


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 300}, r"hidden_size=300 is not in this search space: choose from \[16, 24, 32\]"),
        ({"head_dim": 8}, r"head_dim=8 is not in this search space: choose from \[4\]"),
        ({"num_attention_heads": [4] * 9 + [5]}, r"num_attention_heads\[9\]=5 .* choose from \[4, 6, 8\]"),
        ({"intermediate_size": [49] + [48] * 9}, r"intermediate_size\[0\]=49 .* choose from \[48, 56, 64\]"),
        ({"num_attention_heads": [4] * 9}, "one value for each layer, but have 9 and 10"),
        ({"num_attention_heads": [4] * 9, "intermediate_size": [48] * 9}, "num_hidden_layers=9 is not in this search"),
        ({"num_hidden_layers": 11}, "lists have 10 layers, but num_hidden_layers=11"),
        ({"num_attention_heads": []}, "one value for each layer, but have 0 and 10"),
        ({"num_attention_heads": 4}, "num_attention_heads is a list with one value for each layer, not 4"),
        ({"hidden_size": 16.5}, "hidden_size must be whole positive numbers, not 16.5"),
        ({"hidden_size": True}, "hidden_size must be whole positive numbers|hidden_size must be positive numbers"),
        ({"intermediate_size": [-48] * 10}, "intermediate_size must be positive numbers, not -48"),
        ({"window": 3}, r"Subnet does not know \['window'\].*newer version"),
    ],
)
def test_a_bad_subnet_is_refused_by_its_own_message(changes, message):
    with pytest.raises(ValueError, match=message):
        SMALL.resolve(SMALL.smallest.to_dict() | changes)


def test_a_subnet_that_lacks_a_field_is_refused():
    with pytest.raises(ValueError, match=r"Subnet needs \['intermediate_size'\]"):
        Subnet.from_dict({"hidden_size": 16, "num_attention_heads": [4]})


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'a_base' is not known .*\['largest', 'smallest', 'middle', 'a_small'\]"):
        SearchSpace.small().resolve("a_base")


@pytest.mark.parametrize("value", [3, None, [16]])
def test_what_is_no_subnet_is_refused(value):
    with pytest.raises(ValueError, match="a subnet is a name, a Subnet or a dict"):
        subnet_from(value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slide_wsz": ["global", "16"]}, "only 'global' attention"),
        ({"atten_dim": [64]}, "atten_dim and heads_num have 1 and 2 values"),
        ({"atten_dim": [64, 64]}, "is not one head size times heads_num"),
        ({"heads_num": None}, "needs heads_num"),
        ({"layer_num": 3}, "lists have 2 layers, but num_hidden_layers=3"),
    ],
)
def test_an_authors_dict_that_contradicts_itself_is_refused(changes, message):
    theirs = {"embed_dim": 64, "heads_num": [1, 2], "atten_dim": [64, 128], "ffn_embed": [192, 256], "layer_num": 2}
    with pytest.raises(ValueError, match=message):
        Subnet.from_dict(theirs | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": []}, "hidden_size is a list of at least one choice"),
        ({"num_attention_heads": 4}, "num_attention_heads is a list of at least one choice, not 4"),
        ({"hidden_size": "16"}, "hidden_size is a list of at least one choice, not '16'"),
        ({"num_hidden_layers": [0, 2]}, "num_hidden_layers must be positive numbers, not 0"),
        ({"hidden_size": [24.5]}, "hidden_size must be whole positive numbers, not 24.5"),
        ({"ffn_ratio": [3.1]}, "ffn_ratio=3.1 x hidden_size=16 is no whole number of units"),
        ({"ffn_ratio": [float("nan")]}, "ffn_ratio must be positive numbers"),
        ({"conv_width": [16]}, r"SearchSpace does not know \['conv_width'\].*newer version"),
    ],
)
def test_an_impossible_space_is_refused_by_its_own_message(changes, message):
    with pytest.raises(ValueError, match=message):
        SearchSpace.from_dict(SMALL.to_dict() | changes)


def test_a_space_that_lacks_a_field_is_refused():
    with pytest.raises(ValueError, match=r"SearchSpace needs \['ffn_ratio'\]"):
        SearchSpace.from_dict({name: value for name, value in SMALL.to_dict().items() if name != "ffn_ratio"})


@pytest.mark.parametrize(("value", "message"), [("huge", "'huge' is not known: choose from"), (3, "not int")])
def test_what_is_no_search_space_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        search_space_from(value)


def test_only_subnets_are_inside_a_space():
    assert SMALL.smallest in SMALL
    assert SMALL.smallest.to_dict() not in SMALL
    assert "smallest" not in SMALL
    assert SearchSpace.base().smallest not in SMALL


# Any JSON

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([1e308, 10**400]),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4),
    max_leaves=8,
)
VALID = [NARROW.smallest, WINDOWED.sample(0), SMALL, NARROW, WINDOWED]
VALID = [value.to_dict() for value in VALID] + [GOLDEN_CASES["search_space"], GOLDEN_CASES["cases"][0]["subnet"]]
KEYS = st.sampled_from(sorted({key for valid in VALID for key in valid}))
NEARLY_VALID = st.builds(
    lambda valid, changes, missing: {key: value for key, value in (valid | changes).items() if key != missing},
    st.sampled_from(VALID),
    st.dictionaries(KEYS, JSON, max_size=2),
    st.none() | KEYS,
)


@hypothesis.settings(max_examples=500)
@hypothesis.given(st.one_of(JSON, NEARLY_VALID))
@hypothesis.example("[" * 10_000)
@hypothesis.example(NARROW.to_dict() | {"num_hidden_layers": [10**9]})
@hypothesis.example(NARROW.to_dict() | {"conv_dim": [list(range(1, 50))] * 20})
@hypothesis.example(SMALL.to_dict() | {"hidden_size": list(range(1, 20_000)), "ffn_ratio": list(range(1, 20_000))})
def test_any_json_is_a_subnet_or_a_value_error_and_so_for_search_spaces(value):
    for kind, convert in ((Subnet, subnet_from), (SearchSpace, search_space_from)):
        for read, given in ((convert, value), (kind.from_json_string, json.dumps(value))):
            if isinstance(value, str) and value.startswith("["):
                read, given = kind.from_json_string, value
            try:
                result = read(given)
            except ValueError as error:
                assert len(str(error)) < 1000
                continue
            assert kind.from_dict(result.to_dict()) == result
            if kind is SearchSpace:
                assert result.num_subnets >= 1
                assert all(subnet in result for subnet in (*result.named.values(), result.sample(0)))
