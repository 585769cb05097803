"""Attention over a sparse support against its dense specification in float64."""

from __future__ import annotations

import pytest
import torch

import scatterbrain.ops.sparse.tiled as tiled
from scatterbrain.errors import UserError
from scatterbrain.ops.common.dense import dense_low_rank_logits
from scatterbrain.ops.common.features import log_softmax_features
from scatterbrain.ops.sparse.naive import naive_support_attention
from scatterbrain.ops.sparse.supports import Round, Support
from scatterbrain.ops.sparse.tiled import support_attention
from tests.helpers import assert_close

SCALE = 0.35
ROWS = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))


def draw_support(groups: int, length: int, num_keys: int, tiles: int = 4, columns: int = 7, rounds: int = 2) -> Support:
    """Tiles of random queries and keys: some queries in no tile, some places empty, no pair twice."""
    taken = torch.zeros(groups, length, num_keys, dtype=torch.bool)
    made = []
    for _ in range(rounds):
        rows = -(-length // tiles) + 1
        query_index = torch.full((groups, tiles, rows), -1)
        key_index = torch.full((groups, tiles, columns), -1)
        mask = torch.zeros(groups, tiles, rows, columns, dtype=torch.bool)
        for group in range(groups):
            queries = torch.randperm(length)[: length - 3]
            for tile in range(tiles):
                mine = queries[tile::tiles]
                query_index[group, tile, : len(mine)] = mine
                keys = torch.randperm(num_keys)[: columns - 2 + tile % 3]
                key_index[group, tile, : len(keys)] = keys
                block = taken[group][mine][:, keys]
                mask[group, tile, : len(mine), : len(keys)] = ~block
                taken[group][mine[:, None], keys] = True
        made.append(Round(query_index, key_index, mask))
    return Support(tuple(made))


def draw(length=23, num_keys=31, dtype=torch.float64, factor=1.0, value_width=5):
    sizes = ((length, 8, factor), (num_keys, 8, factor), (num_keys, value_width, 1.0))
    return [(torch.randn(2, 2, n, width) * by).to(dtype).requires_grad_() for n, width, by in sizes]


def features(query, key):
    return tuple(log_softmax_features(x, ROWS, SCALE, cosh=True) for x in (query, key))


def compare(tensors, support, low_rank, tolerance, gradient_tolerance=None, **options):
    query, key, value = tensors
    log_features = features(query, key) if low_rank else None
    out = support_attention(query, key, value, support, scale=SCALE, log_features=log_features, **options)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    dense = support.dense(query.shape[2], key.shape[2])
    low_rank_logits = dense_low_rank_logits(*exact[:2], ROWS, SCALE, cosh=True) if low_rank else None
    expected, weights = naive_support_attention(*exact, dense, SCALE, low_rank_logits, **options)
    assert out.dtype == query.dtype
    assert_close("out", expected, out, tolerance)
    cotangent = torch.randn_like(out)
    gradients = torch.autograd.grad(out, tensors, cotangent)
    references = torch.autograd.grad(expected, exact, cotangent.double())
    for name, reference, gradient in zip(("query", "key", "value"), references, gradients, strict=True):
        assert_close(f"gradient of {name}", reference, gradient, gradient_tolerance or 3 * tolerance)
    return out, weights


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("lengths", [None, (30, 0)])
@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_against_the_specification(low_rank, lengths, factor):
    options = {} if lengths is None else {"key_lengths": torch.tensor(lengths)}
    # products of 8 numbers, and logits to 50, which amplify their roundings
    compare(draw(factor=factor), draw_support(4, 23, 31), low_rank, 1e-14 * factor, 1e-13 * factor, **options)


@pytest.mark.parametrize("low_rank", [False, True])
def test_single_precision(low_rank):
    compare(draw(dtype=torch.float32), draw_support(4, 23, 31), low_rank, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("low_rank", [False, True])
def test_half_precision_with_large_logits_is_finite(dtype, low_rank):
    query, key, value = draw(dtype=dtype, factor=8.0)
    support = draw_support(4, 23, 31)
    # the specification sees the same rounded inputs; the output is rounded once
    log_features = features(query.float(), key.float()) if low_rank else None
    out = support_attention(query, key, value, support, scale=SCALE, log_features=log_features)
    logits = dense_low_rank_logits(query, key, ROWS, SCALE, cosh=True) if low_rank else None
    expected, _ = naive_support_attention(query, key, value, support.dense(23, 31), SCALE, logits)
    assert_close("out", expected, out, {torch.float16: 6e-4, torch.bfloat16: 5e-3}[dtype])
    for gradient in torch.autograd.grad(out.float().square().sum(), (query, key, value)):
        assert torch.isfinite(gradient).all()


def test_a_shared_support_is_that_of_every_sequence():
    one = draw_support(1, 23, 31)
    tensors = draw()
    all_four = Support(
        tuple(Round(*(x.expand(4, *x.shape[1:]) for x in (r.query_index, r.key_index, r.mask))) for r in one.rounds)
    )
    for low_rank in (False, True):
        log_features = features(*tensors[:2]) if low_rank else None
        out, same = (
            support_attention(*tensors, support, scale=SCALE, log_features=log_features) for support in (one, all_four)
        )
        assert torch.equal(out, same)
        compare(tensors, one, low_rank, 1e-14, 1e-13)


def test_causal():
    _, weights = compare(draw(25, 25), draw_support(4, 25, 25), False, 1e-14, 1e-13, is_causal=True)
    assert weights.triu(1).count_nonzero() == 0
    assert (weights.sum(-1) == 0).any()  # queries that see nothing give zero


def test_slices_make_no_difference(monkeypatch):
    tensors, support = draw(), draw_support(4, 23, 31)
    whole = support_attention(*tensors, support, scale=SCALE, log_features=features(*tensors[:2]))
    monkeypatch.setattr(tiled, "tile_budget", lambda x: 60)
    cut = support_attention(*tensors, support, scale=SCALE, log_features=features(*tensors[:2]))
    assert_close("out", whole, cut, 1e-14)


def adversarial():
    """Queries and keys along a row of the features: their estimate exceeds the exact weight by exp(|w|^2 / 2)."""
    rows = ROWS * (7 / ROWS.norm(dim=1, keepdim=True))
    query, key, value = (x.detach() for x in draw(24, 24, factor=0.3))
    along = rows[0] / 2 / SCALE**0.5
    query[:, :, 4:8] += along
    key[:, :, 4:8] += along
    index = torch.arange(24).view(1, 6, 4)
    return rows, [x.requires_grad_() for x in (query, key, value)], Support((Round(index, index),))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_queries_whose_subtraction_cancels_are_recomputed_without_it(dtype, monkeypatch):
    rows, tensors, support = adversarial()
    tensors = [x.detach().to(dtype).requires_grad_() for x in tensors]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    log_features = tuple(log_softmax_features(x, rows, SCALE, cosh=True) for x in tensors[:2])
    calls = []
    recompute = tiled._recompute
    monkeypatch.setattr(tiled, "_recompute", lambda *args: calls.append(args[-1]) or recompute(*args))
    out = support_attention(*tensors, support, scale=SCALE, log_features=log_features)
    (lost,) = calls
    assert 0 < lost.sum() < lost.numel()
    assert lost.view(2, 2, 24)[:, :, 4:8].all()
    low_rank = dense_low_rank_logits(*exact[:2], rows, SCALE, cosh=True)
    expected, _ = naive_support_attention(*exact, support.dense(24, 24), SCALE, low_rank)
    # up to the limit, roundings are amplified
    tolerance = tiled.CANCELLATION_LIMIT * torch.finfo(dtype).eps
    assert_close("out", expected, out, tolerance)
    cotangent = torch.randn_like(out)
    gradients = torch.autograd.grad(out, tensors, cotangent)
    references = torch.autograd.grad(expected, exact, cotangent.double())
    for name, reference, gradient in zip(("query", "key", "value"), references, gradients, strict=True):
        # one feature rules nearly every query here, and its gradient is what is left of two large terms
        factor = 300 if name == "query" else 10
        assert_close(f"gradient of {name}", reference, gradient, factor * tolerance)


@pytest.mark.parametrize("budget", [20, 100, 10**6])
def test_queries_are_recomputed_in_slices(budget, monkeypatch):
    rows, tensors, support = adversarial()
    tensors = [x.detach().clone() for x in tensors]
    for x in tensors[:2]:
        x[0, 1] = 0.1 * torch.randn_like(x[0, 1])  # nothing is lost in this sequence
    lengths = torch.tensor([24, 21])
    log_features = tuple(log_softmax_features(x, rows, SCALE, cosh=True) for x in tensors[:2])
    monkeypatch.setattr(tiled, "tile_budget", lambda x: budget)
    out = support_attention(*tensors, support, scale=SCALE, log_features=log_features, key_lengths=lengths)
    visible = support.dense(24, 24)
    low_rank = dense_low_rank_logits(*(x.double() for x in tensors[:2]), rows, SCALE, cosh=True)
    expected, _ = naive_support_attention(*(x.double() for x in tensors), visible, SCALE, low_rank, key_lengths=lengths)
    assert_close("out", expected, out, tiled.CANCELLATION_LIMIT * torch.finfo(out.dtype).eps)


def test_dropout_is_unbiased_and_of_the_exact_weights():
    tensors, support = [x.detach() for x in draw(dtype=torch.float32)], draw_support(4, 23, 31)
    out = support_attention(*tensors, support, scale=SCALE)
    dropped = torch.stack([support_attention(*tensors, support, scale=SCALE, dropout_p=0.5) for _ in range(4000)])
    assert not torch.equal(dropped[0], dropped[1])
    # the mean of 4000 samples, each with a standard deviation of about its size
    assert_close("mean", out, dropped.mean(0), 0.05)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"dropout_p": 0.1}])
def test_what_a_low_rank_part_cannot_have(options):
    tensors = draw(20, 20)
    with pytest.raises(UserError, match="Use sblocal"):
        support_attention(
            *tensors, draw_support(4, 20, 20), scale=SCALE, log_features=features(*tensors[:2]), **options
        )


def test_multiplicity_counts_pairs_that_are_there_twice():
    index = torch.tensor([[[0, 1, -1]]])
    once, twice = Round(index, index), Round(index, index, torch.tensor([[True, False, True]] * 3))
    expected = torch.tensor([[[2, 1, 0], [2, 1, 0], [0, 0, 0]]])
    assert torch.equal(Support((once, twice)).multiplicity(3, 3), expected)
    assert torch.equal(Support((once, twice)).dense(3, 3), expected > 0)
