"""Sizes of every attention: refused where they are none, and without cost where they exceed the sequence."""

from __future__ import annotations

import pytest
import torch

from scatterbrain.attention import ATTENTIONS, attention_memory, create_attention, option_parameters
from scatterbrain.errors import UserError
from tests.helpers import TensorRecorder

LENGTH, WIDTH = 16, 8
NOT_SIZES = ("seed",)
FROM_ZERO = ("num_exact", "num_steps")
SIZES = [
    (name, option)
    for name, kind in ATTENTIONS.items()
    for option, parameter in option_parameters(kind.module).items()
    if parameter.annotation in ("int", "int | None") and option not in NOT_SIZES
]
# what a sequence bounds; the number of keys of a query that has them all
BOUNDED = {
    "local_context": 2 * LENGTH,
    "num_neighbours": 4 * LENGTH,
    "cluster_size": LENGTH,
    "bucket_size": LENGTH,
    "block": LENGTH,
    "num_window_blocks": 2 * LENGTH + 1,
    "num_landmarks": LENGTH,
    "num_query_landmarks": LENGTH,
    "num_keys": LENGTH,
    "num_exact": LENGTH,
}
HUGE = 40_001


@pytest.mark.parametrize(("name", "option"), SIZES)
def test_refuses_what_is_no_size(name, option):
    for value in (-1, 2.5, "8", True) if option in FROM_ZERO else (0, -1, 2.5, "8", True):
        with pytest.raises(UserError, match=option):
            create_attention(name, LENGTH, **{"dim_heads": WIDTH, option: value})


@pytest.mark.parametrize(("name", "option"), [size for size in SIZES if size[1] != "dim_heads"])
def test_modules_refuse_it_as_well(name, option):
    kind = ATTENTIONS[name]
    attention = create_attention(name, LENGTH, WIDTH)
    sizes = {"dim_heads": WIDTH, "num_buckets": 4, "layout": "longformer", **attention.sizes(), **kind.fixed}
    known = option_parameters(kind.module)
    sizes = {key: size for key, size in sizes.items() if key in known}
    for value in (-1, 2.5, "8", True) if option in FROM_ZERO else (0, -1, 2.5, "8", True):
        with pytest.raises(UserError):
            kind.module(**sizes | {option: value})


@pytest.mark.parametrize(("name", "option"), [size for size in SIZES if size[1] in BOUNDED])
def test_sizes_beyond_the_sequence_cost_nothing(name, option):
    query, key, value = (torch.randn(1, LENGTH, 2, WIDTH) for _ in range(3))
    recorded, outputs = [], []
    # the number of buckets follows from their size
    options = {"num_buckets": 4} if option == "bucket_size" else {}
    for size in (BOUNDED[option], HUGE):
        # features of its own, whose number would follow the block
        options |= {"nb_features": 4} if name.startswith("sbbs-") else {}
        attention = create_attention(name, LENGTH, WIDTH, **{option: size}, **options)
        with TensorRecorder() as recorder:
            outputs.append(attention(query, key, value, need_weights=True))
        recorded.append(recorder.total)
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other)
    assert recorded[1] <= 1.5 * recorded[0]


@pytest.mark.parametrize("option", ["sequence_length", "memory_fraction"])
@pytest.mark.parametrize("value", ["64", None, [3], float("nan"), float("inf"), 0, True])
def test_refuses_budgets_that_are_none(option, value):
    with pytest.raises(UserError, match=option):
        create_attention("local", **{"sequence_length": 64, option: value})


def test_memory_of_no_sequence():
    with pytest.raises(UserError, match="sequence_length=0"):
        attention_memory(create_attention("local", 64), 0)
