"""Layouts and their supports against the definitions, written as loops."""

from __future__ import annotations

import pytest
import torch

from scatterbrain.errors import UserError
from scatterbrain.ops.sparse.block_sparse import LAYOUTS, block_layout, keys_per_query, layout_support

# blocks of queries and keys: none but the global block, fewer than a window, groups that are cut off, T != S
SIZES = [(1, 1), (2, 2), (3, 3), (7, 7), (9, 9), (10, 10), (20, 20), (4, 11), (11, 4), (12, 1), (1, 12)]
# block, T, S: whole and partial last blocks, one block larger than the sequence
LENGTHS = [(4, 20, 20), (4, 23, 23), (4, 17, 30), (4, 30, 17), (5, 61, 61), (1, 9, 9), (16, 7, 5), (7, 1, 40)]
OPTIONS = [
    ("longformer", {}),
    ("longformer", {"num_sliding_blocks": 1}),
    ("longformer", {"num_sliding_blocks": 5}),
    ("bigbird", {}),
    ("bigbird", {"num_sliding_blocks": 5, "num_global_blocks": 2, "num_random_blocks": 3}),
    ("bigbird", {"num_global_blocks": 0, "num_random_blocks": 0}),
    ("openai", {}),
    ("openai", {"num_local_blocks": 1}),
    ("openai", {"num_local_blocks": 4}),
]


def in_window_or_global(i, j, num_sliding_blocks=3, num_global_blocks=1):
    reach = (num_sliding_blocks - 1) // 2
    return i - reach <= j <= i + reach or i < num_global_blocks or j < num_global_blocks


def in_group_or_last(i, j, columns, num_local_blocks=3):
    groups = [list(range(columns))[start : start + num_local_blocks] for start in range(0, columns, num_local_blocks)]
    mine = groups[i // num_local_blocks] if i // num_local_blocks < len(groups) else []
    return j in mine or any(j == group[-1] for group in groups)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize(("name", "options"), [case for case in OPTIONS if case[0] != "bigbird"])
def test_layout_is_the_definition(name, options, rows, columns):
    layout = block_layout(name, rows, columns, **options)
    assert layout.dtype == torch.bool
    for i in range(rows):
        for j in range(columns):
            if name == "longformer":
                expected = in_window_or_global(i, j, **options)
            else:
                expected = in_group_or_last(i, j, columns, **options)
            assert layout[i, j].item() == expected, (i, j)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize(("sliding", "num_global", "random"), [(3, 1, 1), (1, 2, 3), (5, 0, 2), (3, 1, 0), (3, 1, 50)])
def test_bigbird_adds_at_most_num_random_blocks_to_window_and_global(rows, columns, sliding, num_global, random):
    options = {"num_sliding_blocks": sliding, "num_global_blocks": num_global}
    layout = block_layout("bigbird", rows, columns, num_random_blocks=random, **options)
    for i in range(rows):
        fixed = [in_window_or_global(i, j, sliding, num_global) for j in range(columns)]
        assert all(layout[i, j] for j in range(columns) if fixed[j])
        added = sum(layout[i, j].item() for j in range(columns) if not fixed[j])
        assert added <= random
        if random >= columns:
            assert layout[i].all()


def test_random_blocks_are_different_and_uniform():
    # without window and global blocks nearby, the last row's random blocks are what it has beyond itself
    options = {"num_sliding_blocks": 1, "num_global_blocks": 0, "num_random_blocks": 3}
    layouts = torch.stack([block_layout("bigbird", 20, 20, seed, **options) for seed in range(100)])
    own = torch.eye(20, dtype=torch.bool)
    added = (layouts & ~own).sum(-1)
    # three different ones, one of which may be the block itself
    assert set(added.unique().tolist()) == {2, 3}
    # 2000 rows: the share of a block is 3 / 20 with a standard deviation of 0.008; 5 of these
    share = (layouts & ~own).sum((0, 1)) / (100 * 19)
    assert (share - 3 / 20).abs().max() < 0.041


def test_seeds():
    same, again, other = (block_layout("bigbird", 30, 30, seed) for seed in (7, 7, 8))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    state = torch.get_rng_state()
    block_layout("bigbird", 30, 30, 7)
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("longformer", "openai"):
        assert torch.equal(block_layout(name, 30, 30, 7), block_layout(name, 30, 30, 8))


def expand(layout, block, num_queries, num_keys):
    return torch.tensor([[bool(layout[i // block, j // block]) for j in range(num_keys)] for i in range(num_queries)])


def check_support(layout, block, num_queries, num_keys):
    support = layout_support(layout, block, num_queries, num_keys)
    multiplicity = support.multiplicity(num_queries, num_keys)
    expected = expand(layout, block, num_queries, num_keys).long()
    assert torch.equal(multiplicity, expected[None]) or (not expected.any() and not multiplicity.any())
    for each in support.rounds:
        assert each.query_index.max() < num_queries
        assert each.key_index.max() < num_keys
        queries = each.query_index[each.query_index >= 0]
        assert len(queries.unique()) == len(queries)
        for keys in each.key_index[0]:
            keys = keys[keys >= 0]
            assert len(keys.unique()) == len(keys)
    return support


@pytest.mark.parametrize(("block", "num_queries", "num_keys"), LENGTHS)
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_support_is_the_layout_once(name, options, block, num_queries, num_keys):
    rows, columns = -(-num_queries // block), -(-num_keys // block)
    check_support(block_layout(name, rows, columns, 3, **options), block, num_queries, num_keys)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.3, 0.8, 1.0])
def test_support_of_any_layout(density):
    # rows of all lengths, without any key among them
    generator = torch.Generator().manual_seed(1)
    layout = torch.rand(13, 9, generator=generator) < density * torch.linspace(0, 2, 13)[:, None]
    check_support(layout, 3, 38, 27)


def computed(support):
    return sum(each.query_index.numel() * each.key_index.shape[-1] for each in support.rounds)


@pytest.mark.parametrize(("name", "rounds"), [("longformer", 2), ("bigbird", 2), ("openai", 1)])
@pytest.mark.parametrize(("length", "block"), [(3136, 32), (784, 16), (1000, 16)])
def test_global_rows_are_a_round_of_their_own_and_padding_is_small(name, rounds, length, block):
    blocks = -(-length // block)
    layout = block_layout(name, blocks, blocks)
    support = layout_support(layout, block, length, length)
    assert len(support.rounds) == rounds
    # no split was left that saves a tenth; for these layouts little more than that is padding
    assert layout.sum() * block**2 <= computed(support) <= 1.12 * layout.sum() * block**2


def test_rows_of_equal_length_are_one_round():
    assert len(layout_support(torch.eye(40, dtype=torch.bool), 2, 80, 80).rounds) == 1


@pytest.mark.parametrize(("block", "num_queries", "num_keys"), [(4, 20, 23), (4, 20, 24), (5, 60, 61), (16, 16, 5)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_keys_per_query(name, block, num_queries, num_keys):
    # whole blocks of queries: each counts alike
    layout = block_layout(name, -(-num_queries // block), -(-num_keys // block), 3)
    expected = expand(layout, block, num_queries, num_keys).double().sum(1).mean().item()
    assert keys_per_query(layout, block, num_keys) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("longfromer", 4, 4), {}, "Unknown layout 'longfromer'. Did you mean 'longformer'?"),
        (("x", 4, 4), {}, "Unknown layout 'x'. Choose one of: bigbird, longformer, openai."),
        (("openai", 4, 4), {"num_locl_blocks": 3}, "no option 'num_locl_blocks'. Did you mean 'num_local_blocks'?"),
        (("longformer", 4, 4), {"num_random_blocks": 1}, "Layout 'longformer' has no option 'num_random_blocks'"),
        (("longformer", 4, 4), {"rows": 1}, "no option 'rows'"),
        (("longformer", 4, 4), {"num_sliding_blocks": 4}, "num_sliding_blocks=4 has to be odd"),
        (("bigbird", 4, 4), {"num_sliding_blocks": -1}, "num_sliding_blocks=-1 is not valid"),
        (("bigbird", 4, 4), {"num_random_blocks": 1.5}, "num_random_blocks=1.5 is not valid"),
        (("bigbird", 4, 4), {"num_global_blocks": -1}, "num_global_blocks=-1 is not valid"),
        (("openai", 4, 4), {"num_local_blocks": 0}, "num_local_blocks=0 is not valid"),
        (("openai", 0, 4), {}, "num_blocks_query=0 is not valid"),
        (("openai", 4, True), {}, "num_blocks_key=True is not valid"),
    ],
)
def test_refuses_what_is_no_layout(arguments, options, message):
    with pytest.raises(UserError) as error:
        block_layout(*arguments, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("layout", "block", "message"),
    [
        (torch.ones(3, 3, dtype=torch.bool), 4, r"has to be boolean \(3, 4\), got torch.bool \(3, 3\)"),
        (torch.ones(3, 4), 4, "got torch.float32"),
        (torch.ones(3, 4, dtype=torch.bool), 0, "block=0 is not valid"),
    ],
)
def test_refuses_layouts_that_do_not_fit(layout, block, message):
    with pytest.raises(UserError, match=message):
        layout_support(layout, block, 12, 13)
