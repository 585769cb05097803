"""Supports of SMYRF and Reformer against definitions in plain loops, and invariants of every support."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from scatterbrain.errors import UserError
from scatterbrain.ops.sparse.lsh import (
    draw_reformer_rotations,
    draw_smyrf_projection,
    num_reformer_buckets,
    reformer_support,
    smyrf_support,
)
from tests.helpers import TensorRecorder, draw_inputs


@dataclass(frozen=True)
class Case:
    """Shapes of one support: 2 samples, 2 heads, with clusters of `size` keys."""

    length: int = 24
    num_keys: int = 24
    size: int = 6
    hashes: int = 3
    width: int = 5
    lengths: tuple[int, int] | None = None

    def __str__(self) -> str:
        name = f"T{self.length}-S{self.num_keys}-C{self.size}-h{self.hashes}"
        return name + ("" if self.lengths is None else f"-lengths{self.lengths[0]},{self.lengths[1]}")

    @property
    def key_lengths(self) -> torch.Tensor | None:
        return None if self.lengths is None else torch.tensor(self.lengths)

    @property
    def clusters(self) -> int:
        return math.ceil(self.num_keys / self.size)

    def visible(self, sample: int) -> int:
        return self.num_keys if self.lengths is None else self.lengths[sample]


CASES = [
    Case(),
    Case(hashes=1),
    Case(1, 1, 1),
    Case(23, 29, 6),
    Case(29, 23, 6),
    Case(40, 11, 3),
    Case(4, 40, 3),  # fewer queries than clusters
    Case(7, 25, 1),
    Case(20, 20, 10),  # two chunks: a look back around the end sees all
    Case(20, 20, 20),
    Case(20, 20, 50),
    Case(24, 24, 6, lengths=(24, 13)),
    Case(23, 29, 4, lengths=(20, 11)),
    Case(29, 23, 4, lengths=(6, 0)),
    Case(30, 30, 3, lengths=(4, 1)),  # fewer keys than clusters
    Case(30, 30, 2, hashes=5, lengths=(14, 2)),
]
KINDS = ["smyrf", "reformer"]


def draw_hash(kind: str, case: Case, seed: int = 0) -> torch.Tensor:
    if kind == "smyrf":
        return draw_smyrf_projection(case.hashes, case.width, seed)
    buckets = num_reformer_buckets(case.num_keys, case.size)
    return draw_reformer_rotations(case.hashes, case.width, buckets, seed)


def support_of(kind: str):
    return {"smyrf": smyrf_support, "reformer": reformer_support}[kind]


def build(kind: str, case: Case):
    """Inputs, hash and support of a case."""
    query, key, _, _ = draw_inputs(2, 2, case.length, case.num_keys, case.width, dtype=torch.float32)
    # not one scale for queries and keys
    key = 0.5 * key + 0.3
    drawn = draw_hash(kind, case)
    return query, key, drawn, support_of(kind)(query, key, drawn, case.size, case.key_lengths)


def cut(ordered: list[int], clusters: int) -> list[set[int]]:
    """Equal parts of a list; a part that would be empty takes the element it starts at."""
    parts = []
    for c in range(clusters):
        start, stop = c * len(ordered) // clusters, (c + 1) * len(ordered) // clusters
        parts.append(set(ordered[start : max(stop, start + 1)]))
    return parts


def smyrf_orders(query, key, rows, visible) -> list[tuple[list[int], list[int]]]:
    """Queries and visible keys of one sequence sorted by the projection, for each hash."""
    query, key = query.double().tolist(), key.double().tolist()[:visible]

    def squared(x):
        return sum(value * value for value in x)

    largest = max(map(squared, query)) + max(map(squared, key), default=0.0)
    query = [[*x, 0.0, math.sqrt(largest - squared(x))] for x in query]
    key = [[*x, math.sqrt(largest - squared(x)), 0.0] for x in key]
    orders = []
    for row in rows.double().tolist():
        both = []
        for vectors in (query, key):
            hashes = [sum(a * b for a, b in zip(x, row, strict=True)) for x in vectors]
            both.append(sorted(range(len(hashes)), key=hashes.__getitem__))
        orders.append((both[0], both[1]))
    return orders


def reformer_orders(query, key, rotations, visible) -> list[tuple[list[int], list[int]]]:
    """Queries and visible keys of one sequence sorted by bucket and position, for each hash."""
    orders = []
    for rotation in rotations.double():
        both = []
        for vectors in (query.double(), key.double()[:visible]):
            pairs = []
            for position, x in enumerate(vectors):
                rotated = (x @ rotation).tolist()
                rotated += [-value for value in rotated]
                pairs.append((rotated.index(max(rotated)), position))
            both.append([position for _, position in sorted(pairs)])
        orders.append((both[0], both[1]))
    return orders


def brute_force(kind: str, query, key, drawn, case: Case) -> torch.Tensor:
    """The definition: boolean (G, T, S)."""
    orders_of = {"smyrf": smyrf_orders, "reformer": reformer_orders}[kind]
    masks = []
    for sample in range(query.shape[0]):
        for head in range(query.shape[1]):
            mask = torch.zeros(case.length, case.num_keys, dtype=torch.bool)
            orders = orders_of(query[sample, head], key[sample, head], drawn, case.visible(sample))
            for query_order, key_order in orders:
                keys = cut(key_order, case.clusters)
                if kind == "reformer":
                    keys = [keys[c] | keys[c - 1] for c in range(case.clusters)]
                for c in range(case.clusters):
                    start, stop = (x * case.length // case.clusters for x in (c, c + 1))
                    for i in query_order[start:stop]:
                        for j in keys[c]:
                            mask[i, j] = True
            masks.append(mask)
    return torch.stack(masks)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_definition(kind, case):
    query, key, drawn, support = build(kind, case)
    assert len(support.rounds) == case.hashes
    multiplicity = support.multiplicity(case.length, case.num_keys)
    assert multiplicity.max() <= 1
    assert torch.equal(multiplicity > 0, brute_force(kind, query, key, drawn, case))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_tiles(kind, case):
    *_, support = build(kind, case)
    n = case.clusters
    num_tile_keys = math.ceil(case.num_keys / n)
    if kind == "reformer":
        num_tile_keys = min(case.num_keys, math.ceil(2 * case.num_keys / n))
    for each in support.rounds:
        assert each.query_index.shape == (4, n, math.ceil(case.length / n))
        assert each.key_index.shape == (4, n, num_tile_keys)
        assert each.query_index.dtype == each.key_index.dtype == torch.int64
        for group in range(4):
            queries = each.query_index[group].flatten()
            assert sorted(queries[queries >= 0].tolist()) == list(range(case.length))
            for tile in each.key_index[group].tolist():
                keys = [j for j in tile if j != -1]
                assert len(set(keys)) == len(keys)
                assert all(0 <= j < case.visible(group // 2) for j in keys)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_visible_keys_are_shared_by_all_clusters(kind, case):
    *_, support = build(kind, case)
    looks = 2 if kind == "reformer" and case.clusters > 1 else 1
    for each in support.rounds:
        for group in range(4):
            visible = case.visible(group // 2)
            tiles = [[j for j in tile if j >= 0] for tile in each.key_index[group].tolist()]
            assert {j for tile in tiles for j in tile} == set(range(visible))
            sizes = {len(tile) for tile in tiles}
            assert max(sizes) - min(sizes) <= 1
            if visible >= case.clusters:
                assert sum(map(len, tiles)) == looks * visible


@pytest.mark.parametrize("lengths", [(30, 1), (10, 9), (11, 0), (4, 29)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_query_has_a_key_unless_there_is_none(kind, lengths):
    case = Case(33, 30, 3, lengths=lengths)
    *_, support = build(kind, case)
    for each in support.rounds:
        # of each round before repeated pairs are left out
        queries = (each.query_index >= 0).any(-1)
        keys = (each.key_index >= 0).any(-1)
        for sample in range(2):
            groups = slice(2 * sample, 2 * sample + 2)
            assert bool((keys | ~queries)[groups].all()) == (lengths[sample] > 0)
            assert bool(keys[groups].any()) == (lengths[sample] > 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filler", [0.0, 1e30, math.nan, -math.inf])
def test_padding_does_not_matter(kind, filler):
    case = Case(20, 26, 4, lengths=(17, 9))
    query, key, drawn, support = build(kind, case)
    for sample, length in enumerate(case.lengths):
        key[sample, :, length:] = filler
    other = support_of(kind)(query, key, drawn, case.size, case.key_lengths)
    assert torch.equal(support.dense(20, 26), other.dense(20, 26))


@pytest.mark.parametrize("lengths", [None, (26, 9)])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_and_heads_are_independent(kind, lengths):
    case = Case(20, 26, 4, lengths=lengths)
    query, key, drawn, support = build(kind, case)
    dense = support.dense(20, 26).view(2, 2, 20, 26)
    for b in range(2):
        for h in range(2):
            one = (slice(b, b + 1), slice(h, h + 1))
            visible = None if lengths is None else case.key_lengths[b : b + 1]
            alone = support_of(kind)(query[one], key[one], drawn, case.size, visible)
            assert torch.equal(alone.dense(20, 26)[0], dense[b, h])
    assert not torch.equal(dense[0, 0], dense[0, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_full_lengths_are_no_lengths(kind):
    case = Case(20, 26, 4)
    query, key, drawn, support = build(kind, case)
    other = support_of(kind)(query, key, drawn, case.size, torch.tensor([26, 26]))
    assert torch.equal(support.dense(20, 26), other.dense(20, 26))


@pytest.mark.parametrize("kind", KINDS)
def test_ties_keep_the_order_of_positions(kind):
    case = Case(300, 300, 30, hashes=1, lengths=(300, 120))
    query = torch.ones(2, 1, 300, case.width)
    support = support_of(kind)(query, query, draw_hash(kind, case), case.size, case.key_lengths)
    for sample, visible in enumerate(case.lengths):
        assert torch.equal(support.rounds[0].query_index[sample].flatten(), torch.arange(300))
        keys = support.rounds[0].key_index[sample, 4]
        first = 3 if kind == "reformer" else 4
        expected = torch.arange(first * visible // 10, 5 * visible // 10)
        assert torch.equal(keys[keys >= 0], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_hashes_in_single_precision_without_gradient(kind, dtype):
    case = Case()
    query, key, drawn, _ = build(kind, case)
    query, key = (x.to(dtype).requires_grad_() for x in (query, key))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        support = support_of(kind)(query, key, drawn.requires_grad_(), case.size)
    assert not saved, "a tensor is kept for a gradient that does not exist"
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = support_of(kind)(query.float(), key.float(), drawn, case.size)
    for each, other in zip(support.rounds, under_autocast.rounds, strict=True):
        assert torch.equal(each.query_index, other.query_index)
        assert torch.equal(each.key_index, other.key_index)


@pytest.mark.parametrize("kind", KINDS)
def test_is_a_function_of_the_seed(kind):
    case = Case()
    query, key, drawn, support = build(kind, case)
    torch.randn(3)  # the global generator has no part in it
    assert torch.equal(drawn, draw_hash(kind, case))
    again = support_of(kind)(query, key, draw_hash(kind, case), case.size)
    assert torch.equal(support.dense(24, 24), again.dense(24, 24))
    other = support_of(kind)(query, key, draw_hash(kind, case, seed=1), case.size)
    assert not torch.equal(support.dense(24, 24), other.dense(24, 24))


def test_what_is_drawn_is_standard_normal():
    for drawn, shape in (
        (draw_smyrf_projection(40, 98, 3), (40, 100)),
        (draw_reformer_rotations(2, 100, 40, 3), (2, 100, 20)),
    ):
        assert drawn.shape == shape
        assert drawn.dtype == torch.float32
        # 4,000 samples: five standard deviations of mean and variance
        assert abs(drawn.mean()) < 5 / math.sqrt(4000)
        assert abs(drawn.var() - 1) < 5 * math.sqrt(2 / 4000)


@pytest.mark.parametrize("kind", KINDS)
def test_finds_large_products_more_often_than_chance(kind):
    # unit vectors and the same again as keys: the key of largest product is the query itself
    query = torch.nn.functional.normalize(torch.randn(2, 2, 256, 16), dim=-1)
    case = Case(256, 256, 16, hashes=2, width=16)
    support = support_of(kind)(query, query, draw_hash(kind, case), case.size)
    dense = support.dense(256, 256).float()
    found = dense.diagonal(dim1=1, dim2=2).mean()
    chance = dense.mean()
    assert found > 3 * chance


def test_reformer_does_not_depend_on_norms():
    case = Case(30, 30, 5)
    query, key, drawn, support = build("reformer", case)
    # powers of two: exact in every dtype
    factors = 2.0 ** torch.randint(-3, 4, (2, 2, 30, 1))
    other = reformer_support(query * factors, key * factors.flip(2), drawn, case.size)
    assert torch.equal(support.dense(30, 30), other.dense(30, 30))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_linear(kind):
    length, size = 2048, 8
    case = Case(length, length, size)
    query = torch.randn(1, 1, length, case.width)
    drawn = draw_hash(kind, case)
    with TensorRecorder() as recorder:
        support_of(kind)(query, query, drawn, size)
    # tiles of 2 * size keys at most and projections on as many directions as there are buckets: 2048 / 8
    assert recorder.largest <= length * (2 * size if kind == "smyrf" else length // size)


@pytest.mark.parametrize(
    ("num_keys", "bucket_size", "expected"),
    [(3136, 49, 64), (784, 12, 66), (24, 6, 4), (30, 6, 6), (29, 6, 4), (5, 10, 2), (1, 1, 2), (40, 1, 40)],
)
def test_number_of_buckets_is_the_nearest_even_one(num_keys, bucket_size, expected):
    assert num_reformer_buckets(num_keys, bucket_size) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_smyrf_projection(0, 4, 0), "num_hashes=0"),
        (lambda: draw_smyrf_projection(2, 0, 0), "dim=0"),
        (lambda: draw_reformer_rotations(0, 4, 4, 0), "num_hashes=0"),
        (lambda: draw_reformer_rotations(2, 0, 4, 0), "dim=0"),
        (lambda: draw_reformer_rotations(2, 4, 0, 0), "num_buckets=0"),
        (lambda: draw_reformer_rotations(2, 4, 5, 0), "even"),
        (lambda: num_reformer_buckets(0, 3), "num_keys=0"),
        (lambda: num_reformer_buckets(3, 0), "bucket_size=0"),
    ],
)
def test_refuses_sizes(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_what_does_not_fit(kind):
    case = Case()
    query, key, drawn, _ = build(kind, case)
    function = support_of(kind)
    for size in (0, -1, 2.0, True):
        with pytest.raises(UserError, match=r"(cluster|bucket)_size="):
            function(query, key, drawn, size)
    for wrong in (drawn[:, :-1] if kind == "smyrf" else drawn[:, :-1, :], drawn[0], drawn[:0]):
        with pytest.raises(UserError, match="draw it with dim=5"):
            function(query, key, wrong, case.size)
    with pytest.raises(UserError, match="key_lengths"):
        function(query, key, drawn, case.size, torch.tensor([3]))
    with pytest.raises(UserError, match="key"):
        function(query, key[..., :-1], drawn, case.size)


@pytest.mark.parametrize("cluster_size", [1, 5, 8, 100])
def test_padding_of_queries_is_in_one_tile_of_each_round_and_moves_no_other_query(cluster_size):
    query, key = torch.randn(2, 2, 37, 8), torch.randn(2, 2, 37, 8)
    lengths = torch.tensor([37, 12])
    projection, rotations = draw_smyrf_projection(2, 8, 0), draw_reformer_rotations(2, 8, 4, 0)
    other = query.clone()
    other[1, :, 12:] = 100 * torch.randn(2, 25, 8)
    for function, draws in ((smyrf_support, projection), (reformer_support, rotations)):
        support, moved = (function(x, key, draws, cluster_size, lengths, lengths) for x in (query, other))
        for each in support.rounds:
            positions = each.query_index.flatten(1).sort(-1).values
            assert torch.equal(positions[:, -37:], torch.arange(37).expand(4, -1))
            assert (positions[:, :-37] == -1).all()
        tokens = torch.arange(37) < lengths.repeat_interleave(2)[:, None]
        assert torch.equal(support.dense(37, 37)[tokens], moved.dense(37, 37)[tokens])
        assert support.dense(37, 37)[tokens].any(-1).all()
