"""Sizes from a memory budget: the published numbers, and the rule behind them."""

from __future__ import annotations

import pytest

from scatterbrain.attention import ATTENTIONS, attention_memory, create_attention
from scatterbrain.errors import UserError
from scatterbrain.ops.common.budget import block_for, budget_columns, features_for, keys_for

STAGES = (3136, 784)
# Options of both stages at 1/32 of the memory, as the published configurations have them; our own below.
PUBLISHED = {
    "full": ({}, {}),
    "local": ({"local_context": 98}, {"local_context": 24}),
    "performer": ({"nb_features": 49}, {"nb_features": 12}),
    "sblocal": ({"local_context": 49, "nb_features": 24}, {"local_context": 12, "nb_features": 6}),
    "smyrf": ({"cluster_size": 49, "num_hashes": 2}, {"cluster_size": 12, "num_hashes": 2}),
    "sbsmyrf": (
        {"cluster_size": 24, "num_hashes": 2, "nb_features": 24},
        {"cluster_size": 6, "num_hashes": 2, "nb_features": 6},
    ),
    "reformer": ({"bucket_size": 49, "num_hashes": 2}, {"bucket_size": 12, "num_hashes": 2}),
    "linear-attention-performer": ({"nb_features": 49}, {"nb_features": 12}),
    "combination-local-performer": (
        {"local_context": 49, "nb_features": 24},
        {"local_context": 12, "nb_features": 6},
    ),
    "combination-smyrf-performer": (
        {"cluster_size": 24, "num_hashes": 2, "nb_features": 24},
        {"cluster_size": 6, "num_hashes": 2, "nb_features": 6},
    ),
    **{f"bs-{name}": ({"block": 32}, {"block": 16}) for name in ("bigbird", "longformer", "openai")},
    **{
        f"sbbs-{name}": ({"block": 32, "nb_features": 32}, {"block": 16, "nb_features": 16})
        for name in ("bigbird", "longformer", "openai")
    },
}
# Blocks cost what their global rows and columns add; Reformer sees the chunk before a query's own too.
MORE_THAN_THE_BUDGET = ("bs-", "sbbs-", "reformer")
WITHOUT_BUDGET = ("full", "zero", "uniform")
BUDGETED = [name for name in ATTENTIONS if not name.startswith((*MORE_THAN_THE_BUDGET, *WITHOUT_BUDGET))]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_at_one_thirty_second(name):
    assert tuple(create_attention(name, length).sizes() for length in STAGES) == PUBLISHED[name]


@pytest.mark.parametrize("length", [100, 784, 3136])
@pytest.mark.parametrize("fraction", [1 / 32, 1 / 8, 1.0])
@pytest.mark.parametrize("name", BUDGETED)
def test_spends_no_more_than_it_may_and_not_much_less(name, length, fraction):
    columns = length * fraction
    spent = create_attention(name, length, memory_fraction=fraction).memory_columns(length)
    # what is rounded down: a key, or two features of two columns each, in each of two parts; neighbourhoods are
    # rectangles
    least = columns - 6 if "2d" not in name else 0.7 * columns - 6
    assert least <= spent <= max(columns, 6)


def test_blocks_and_buckets_cost_what_they_see():
    reformer, longformer = (create_attention(name, 3136) for name in ("reformer", "bs-longformer"))
    assert attention_memory(reformer, 3136) == 4 * 49 / 3136
    # 98 blocks: the first sees all, the second and the last three, the others three and the first
    assert attention_memory(longformer, 3136) == pytest.approx((98 + 3 + 3 + 95 * 4) / 98**2)
    scatterbrain = create_attention("sbbs-longformer", 3136)
    assert attention_memory(scatterbrain, 3136) == pytest.approx(attention_memory(longformer, 3136) + 64 / 3136)


def test_options_override_the_budget_and_what_depends_on_them_follows():
    assert create_attention("smyrf", 3136, num_hashes=4).sizes() == {"cluster_size": 24, "num_hashes": 4}
    assert create_attention("sbbs-openai", 3136, block=64).sizes() == {"block": 64, "nb_features": 64}
    assert create_attention("reformer", 3136, bucket_size=98).source.num_buckets == 32
    with pytest.raises(UserError, match=r"num_hashes=2\.5 of attention 'smyrf' has to be an integer"):
        create_attention("smyrf", 3136, num_hashes=2.5)


def test_every_kind_gets_at_least_one():
    columns = budget_columns(4, 1 / 32)
    assert (keys_for(columns), features_for(columns), features_for(columns, 2)) == (1, 1, 2)
    assert block_for(columns, 3) == 16


def test_memory_is_never_more_than_that_of_full_attention():
    assert attention_memory(create_attention("local", 60, local_context=80), 60) == 1.0
    assert attention_memory(create_attention("full", 60), 60) == 1.0


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_fraction_out_of_range(fraction):
    with pytest.raises(UserError, match="memory_fraction"):
        budget_columns(3136, fraction)


def test_empty_sequence():
    with pytest.raises(UserError, match="sequence_length"):
        budget_columns(0, 1 / 32)
