"""Causal landmark attention: levels, the implementation by blocks against the specification, and refused arguments."""

from __future__ import annotations

import math

import pytest
import torch

from scatterbrain.attention import create_attention
from scatterbrain.errors import UserError
from scatterbrain.ops.clusters import landmark_attention
from scatterbrain.ops.clusters.causal import (
    blocked,
    causal_clusters,
    causal_landmark_attention,
    levels,
    naive_causal_landmark_attention,
)
from scatterbrain.ops.clusters.causal.attention import CHUNK
from tests.helpers import TensorRecorder, assert_close, dense_attention, draw_inputs

# float64 against float64, and float32 against float64, as of landmark attention
DOUBLE = 1e-11
SINGLE_OUTPUT = 2e-6
SINGLE_GRADIENT = 1e-5

SHAPES = [  # T, S, E, D, M, W, C, key lengths
    (50, 50, 16, 16, 3, 0, 8, None),
    (1, 1, 1, 1, 1, 1, 64, None),
    (37, 37, 5, 3, 5, 7, 5, (37, 5)),
    (64, 64, 16, 8, 8, 16, 8, (64, 0)),
    (131, 131, 8, 8, 3, 41, 7, (131, 90)),
    (200, 30, 4, 4, 2, 5, 4, (30, 3)),
    (30, 200, 4, 4, 2, 9, 4, None),
    (90, 90, 4, 4, 1, 0, 1, None),
    (300, 300, 16, 4, 4, 33, 16, (299, 129)),
]


def pair(num_landmarks, window, chunk, lengths=None, **options):
    """`causal_landmark_attention` and its specification, as functions of query, key and value."""

    def fast(query, key, value):
        return causal_landmark_attention(
            query, key, value, num_landmarks, window, chunk=chunk, key_lengths=lengths, return_lse=True, **options
        )

    def naive(query, key, value):
        sizes, weight = (num_landmarks, window, chunk), options.get("value_weight", 0.0)
        found = {"num_queries": query.shape[2], "key_lengths": lengths, "value": value, "value_weight": weight}
        clusters = causal_clusters(key, *sizes, **found)
        scale = query.shape[-1] ** -0.5
        out, _, lse = naive_causal_landmark_attention(query, key, value, clusters, window, chunk, scale, lengths)
        return out, lse

    return fast, naive


def differentiate(function, tensors, cotangent):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out, lse = function(*leaves)
    assert torch.equal(lse == -math.inf, (out == 0).all(-1))
    lse = lse.masked_fill(lse == -math.inf, 0.0)
    ((out * cotangent.to(out.dtype)).sum() + lse.sum()).backward()
    names = ("out", "lse", "grad of query", "grad of key", "grad of value")
    return dict(zip(names, (out.detach(), lse.detach(), *(x.grad for x in leaves)), strict=True))


def compare(functions, tensors, ratio_out, ratio_grad, dtype):
    fast, naive = functions
    cotangent = torch.randn(*tensors[0].shape[:3], tensors[2].shape[3])
    expected = differentiate(naive, tensors, cotangent)
    result = differentiate(fast, [x.to(dtype) for x in tensors], cotangent)
    for name, reference in expected.items():
        assert_close(name, reference, result[name], ratio_out if name in ("out", "lse") else ratio_grad)


@pytest.mark.parametrize("num_chunks", [*range(1, 40), 255, 256, 257])
def test_every_earlier_chunk_is_in_one_node(num_chunks):
    seen, nodes = [], num_chunks
    for level, count in enumerate(levels.node_counts(num_chunks + 1, 0)):
        assert count == nodes
        taken = 2 - nodes % 2
        first = (nodes - taken) << level
        seen = [*range(first, nodes << level), *seen]
        nodes = (nodes - taken) // 2
    assert nodes == 0
    assert seen == list(range(num_chunks))
    assert levels.num_visible_nodes(num_chunks) <= 2 * math.log2(num_chunks + 1)


@pytest.mark.parametrize(
    ("shape", "value_weight"), [*((x, 0.0) for x in SHAPES), *((x, 3.0) for x in SHAPES[2:6])], ids=str
)
def test_blocks_match_the_specification(shape, value_weight):
    length, num_keys, width, value_width, num_landmarks, window, chunk, lengths = shape
    lengths = None if lengths is None else torch.tensor(lengths)
    # float32 numbers in every dtype, so that float32 and float64 find the same clusters
    *tensors, _ = draw_inputs(2, 2, length, num_keys, width, value_width, dtype=torch.float32)
    tensors = [x.double() for x in tensors]
    functions = pair(num_landmarks, window, chunk, lengths, value_weight=value_weight)
    compare(functions, tensors, DOUBLE, DOUBLE, torch.float64)
    compare(functions, tensors, SINGLE_OUTPUT, SINGLE_GRADIENT, torch.float32)


@pytest.mark.parametrize("max_logit", [50, 80, 400])
def test_extreme_logits(max_logit):
    *tensors, _ = draw_inputs(2, 2, 130, 130, dtype=torch.float32, max_logit=max_logit)
    tensors = [x.double() for x in tensors]
    functions = pair(4, 9, 8, torch.tensor([130, 70]))
    compare(functions, tensors, DOUBLE, 10 * DOUBLE, torch.float64)
    compare(functions, tensors, max_logit * 1e-6, max_logit * 1e-5, torch.float32)


@pytest.mark.parametrize("budget", [1 << 9, 1 << 13])
@pytest.mark.parametrize("sizes", [(2, 9, 4), (1, 0, 2), (3, 40, 8)], ids=str)
@pytest.mark.parametrize("length", [96, 157])
def test_slices_change_nothing(length, sizes, budget, monkeypatch):
    *tensors, _ = draw_inputs(2, 2, length, width=4, dtype=torch.float64)
    for module in (blocked, levels):
        monkeypatch.setattr(module, "tile_budget", lambda _: budget)
    compare(pair(*sizes, torch.tensor([length, 70])), tensors, DOUBLE, DOUBLE, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    tensors = [x.to(dtype) for x in draw_inputs(1, 2, 100, dtype=torch.float32)[:3]]
    out = causal_landmark_attention(*tensors, 4, 9, chunk=8)
    expected = causal_landmark_attention(*(x.float() for x in tensors), 4, 9, chunk=8)
    assert out.dtype == dtype
    assert torch.equal(out, expected.to(dtype))


@pytest.mark.parametrize(("backend", "value_weight"), [("torch", 0.0), ("naive", 0.0), ("torch", 2.0), ("naive", 2.0)])
@pytest.mark.parametrize("change", [3.0, math.nan, math.inf])
@pytest.mark.parametrize("start", [1, 16, 37, 63])
def test_the_future_has_no_influence(backend, value_weight, change, start):
    *tensors, _ = draw_inputs(2, 2, 64, dtype=torch.float32)
    results = []
    for factor in (1.0, change):
        leaves = [torch.cat([x[:, :, :start], factor * x[:, :, start:]], 2).requires_grad_() for x in tensors]
        out = causal_landmark_attention(*leaves, 3, 9, chunk=8, backend=backend, value_weight=value_weight)
        out[:, :, :start].square().sum().backward()
        results.append([out[:, :, :start], *(x.grad for x in leaves)])
        later = out[:, :, start:]
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)
    assert math.isfinite(change) or later.isnan().all()  # a query that sees a key that is not finite says so


def test_initial_centroids_are_the_lightest_of_their_stretch():
    key = draw_inputs(1, 1, 64, width=5, dtype=torch.float64)[1]
    mask = torch.ones(1, 64, dtype=torch.bool)
    mask[0, 4:7] = False
    found = causal_clusters(key, 4, 0, 16, num_steps=0, attn_mask=mask)
    k = key[0, 0]
    for chunk, first in ((0, [0, 7, 8, 12]), (1, [16, 20, 24, 28])):
        rows = mask[0].nonzero().squeeze(-1)
        rows = rows[rows // 16 == chunk]
        assert torch.equal(found[0, 0, 0, rows], torch.cdist(k[rows], k[first]).argmin(-1))
    # the landmarks of both chunks, two and two
    labels = found[0, 0, 0, :32] + 4 * (torch.arange(32) // 16)
    counts = [(labels == b).sum().item() for b in range(8)]
    means = torch.stack([k[:32][labels == b].mean(0) for b in range(8)])
    first = [b if counts[b] <= counts[b + 1] else b + 1 for b in range(0, 8, 2)]
    joined = torch.cdist(means, means[first]).argmin(-1)
    shown = mask[0, :32]
    assert torch.equal(found[1, 0, 0, :32][shown], joined[labels[shown]])


def test_clusters_of_keys_and_values():
    """They are those of longer keys: values times the ratio of standard deviations in the node, and a weight."""
    _, key, value, _ = draw_inputs(2, 2, 64, width=5, value_width=3, dtype=torch.float64)
    value = 40 + 7 * value
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, 3:20] = False
    mask[1, 38:44] = False  # a whole stretch
    sizes = 3, 0, 16
    expected = []
    for k, v, visible in zip(key.flatten(0, 1), value.flatten(0, 1), mask.repeat_interleave(2, 0), strict=True):
        joint = torch.zeros(64, 8, dtype=key.dtype)
        for chunk in range(4):
            rows = visible.nonzero().squeeze(-1)
            rows = rows[rows // 16 == chunk]
            # of each stretch of 6 the first one: the initial centroids
            first = [min(stretch) for part in range(3) if (stretch := rows[rows % 16 // 6 == part].tolist())]
            factor = (k[first].var(0, correction=0).sum() / v[first].var(0, correction=0).sum()).sqrt()
            joint[rows] = torch.cat([k[rows], 2.5 * factor * v[rows]], -1)
        expected.append(causal_clusters(joint[None, None], *sizes, attn_mask=visible[None])[0])
    options = {"attn_mask": mask, "value_weight": 2.5}
    found = causal_clusters(key, *sizes, value=value, **options)
    assert torch.equal(found[0].flatten(0, 1), torch.cat(expected)[:, 0])
    assert not torch.equal(found, causal_clusters(key, *sizes, attn_mask=mask))
    assert torch.equal(found, causal_clusters(64 * key, *sizes, value=value / 16, **options))


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e4])
def test_equal_values_change_no_cluster(constant):
    query, key, _, _ = draw_inputs(1, 2, 90, dtype=torch.float32)
    value = torch.full_like(key, constant)
    found = causal_clusters(key, 3, 0, 8, value=value, value_weight=4.0)
    assert torch.equal(found, causal_clusters(key, 3, 0, 8))
    out = causal_landmark_attention(query, key, value, 3, chunk=8, value_weight=4.0)
    assert torch.equal(out, causal_landmark_attention(query, key, value, 3, chunk=8))


def test_all_keys_equal():
    query, key, value, _ = draw_inputs(1, 1, 100, dtype=torch.float64)
    key = key[:, :, :1].expand_as(key).contiguous().requires_grad_()
    out = causal_landmark_attention(query, key, value, 4, 9, chunk=8)
    count = torch.arange(1, 101)[:, None]
    assert_close("means of the values so far", value.cumsum(2) / count, out, DOUBLE)
    out.sum().backward()
    assert torch.isfinite(key.grad).all()


def test_a_landmark_for_each_key_of_a_chunk_is_exact_at_the_first_level():
    query, key, value, _ = draw_inputs(1, 2, 48, dtype=torch.float64)
    visible = torch.ones(48, 48, dtype=torch.bool).tril()
    expected, _ = dense_attention(0.25 * query @ key.transpose(2, 3), visible, value)
    # three chunks: nodes of one chunk only
    out = causal_landmark_attention(query, key, value, 16, chunk=16, scale=0.25)
    assert_close("out", expected, out, DOUBLE)
    out = causal_landmark_attention(query, key, value, 1, 96, chunk=16, scale=0.25)
    assert_close("out", expected, out, DOUBLE)


def test_the_spread_of_a_cluster_counts():
    """Keys of a normal distribution about one mean: the mean of their weights is exp(s q.c + sigma^2 / 2)."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 1, 4097, 16, generator=generator, dtype=torch.float64)
    query = torch.zeros_like(key)
    query[..., 0] = 1.5
    _, lse = causal_landmark_attention(query, key, key, 1, chunk=4096, scale=1.0, return_lse=True)
    own = 1.5 * key[0, 0, -1, 0]
    far = torch.log(lse[0, 0, -1].exp() - own.exp()) - math.log(4096)
    assert far.item() == pytest.approx(1.5**2 / 2, abs=0.05)


@pytest.mark.parametrize(("backend", "value_weight"), [("torch", 0.0), ("naive", 0.0), ("torch", 2.0), ("naive", 2.0)])
def test_grouped_queries_and_masks(backend, value_weight):
    query, _, _, _ = draw_inputs(2, 6, 70, dtype=torch.float64)
    _, key, value, _ = draw_inputs(2, 2, 70, dtype=torch.float64)
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[0, :13], mask[1, 30:41] = False, False
    options = {"chunk": 8, "attn_mask": mask, "backend": backend, "value_weight": value_weight}
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out = causal_landmark_attention(*leaves, 3, 9, enable_gqa=True, **options)
    repeated = [query, *(x.repeat_interleave(3, 1) for x in (key, value))]
    expected = causal_landmark_attention(*repeated, 3, 9, **options)
    assert_close("out", expected, out, DOUBLE)
    assert (out[0, :, :13] == 0).all()
    cotangent = torch.randn_like(out)
    for one, other in zip(*(torch.autograd.grad(x, leaves, cotangent) for x in (expected, out)), strict=True):
        assert_close("gradient", one, other, DOUBLE)
    # what the mask hides has no influence
    hidden = ~mask[:, None, :, None]
    changed = causal_landmark_attention(
        query, key.masked_fill(hidden, math.nan), value.masked_fill(hidden, math.nan), 3, 9, enable_gqa=True, **options
    )
    assert torch.equal(changed, out)
    # leading padding of whole chunks, which is no different from a shorter sequence
    mask[:] = torch.arange(70) >= 16
    padded = causal_landmark_attention(*leaves, 3, 9, enable_gqa=True, **options)[:, :, 16:]
    options["attn_mask"] = None
    near = causal_landmark_attention(*(x[:, :, 16:] for x in leaves), 3, 200, enable_gqa=True, **options)
    padded_near = causal_landmark_attention(*leaves, 3, 200, enable_gqa=True, **options | {"attn_mask": mask})[
        :, :, 16:
    ]
    assert_close("out", near, padded_near, DOUBLE)
    assert torch.isfinite(padded).all()


def test_dropout():
    tensors = draw_inputs(1, 2, 4000, dtype=torch.float32)[:3]
    torch.manual_seed(0)
    out = causal_landmark_attention(*tensors, 4, 9, chunk=16, dropout_p=0.3)
    plain = causal_landmark_attention(*tensors, 4, 9, chunk=16)
    assert not torch.allclose(out, plain, atol=1e-3)
    means = [x[:, :, 400:].mean(2) for x in (out, plain)]
    assert (means[0] - means[1]).abs().max() < 0.02


def test_no_matrix_of_queries_and_keys():
    query, key, value, _ = draw_inputs(1, 1, 8192, dtype=torch.float32)
    with TensorRecorder() as recorder:
        causal_landmark_attention(query, key, value, 16, 64)
    columns = 2 * 64 + 2 * 16 * len(levels.node_counts(128, 1))
    assert recorder.largest <= 8192 * columns < 8192**2 / 16


def test_errors_name_what_is_wrong():
    query, key, value, _ = draw_inputs(length=20)
    for sizes, option, match in (
        ((0,), {}, "num_landmarks=0"),
        ((9,), {"chunk": 8}, "num_landmarks=9 is more than the 8 keys"),
        ((4, -1), {}, "window=-1"),
        ((4,), {"chunk": 0}, "chunk=0"),
        ((4,), {"num_steps": -1}, "num_steps=-1"),
        ((4,), {"scale": 0.0}, "scale=0"),
        ((4,), {"dropout_p": 1.0}, "dropout"),
        ((4,), {"backend": "toch"}, "torch"),
        ((4,), {"key_lengths": torch.tensor([1])}, "key_lengths"),
        ((4,), {"value_weight": -0.5}, r"value_weight=-0\.5 has to be a number of at least 0"),
        ((4,), {"value_weight": math.inf}, "value_weight=inf"),
        ((4,), {"value_weight": math.nan}, "value_weight=nan"),
        ((4,), {"value_weight": 1e20}, r"value_weight=1e\+20 has to be .* at most 1e6"),
    ):
        with pytest.raises(UserError, match=match):
            causal_landmark_attention(query, key, value, *sizes, **option)
    with pytest.raises(UserError, match=r"value_weight=1\.0 clusters keys and values\. Give value"):
        causal_clusters(key, 4, value_weight=1.0)


def test_modules_are_sized_by_the_budget():
    for length, fraction in ((1024, 1 / 8), (4096, 1 / 32), (4096, 1 / 8), (16384, 1 / 16), (65536, 1 / 8)):
        module = create_attention("sbcluster", length, causal=True, memory_fraction=fraction)
        assert length * fraction / 2 < module.memory_columns(length) <= length * fraction
        assert module.num_landmarks <= CHUNK
    with pytest.raises(UserError, match="num_landmarks=65 is more than the 64 keys"):
        create_attention("sbcluster", 4096, causal=True, num_landmarks=65)
    with pytest.raises(UserError, match="value_weight=-1"):
        create_attention("sbcluster", 4096, causal=True, value_weight=-1)


def test_columns_are_those_of_the_weights():
    """The mean number of different weights of a query is that of exact keys and landmarks, where all have keys."""
    query, key, value, _ = draw_inputs(1, 1, 96, dtype=torch.float64)
    clusters = causal_clusters(key, 2, 16, 8, num_steps=0)
    _, weights, _ = naive_causal_landmark_attention(query, key, value, clusters, 16, 8, 0.25)
    seen = [len(row.round(decimals=14).unique()) - (i < 95) for i, row in enumerate(weights[0, 0])]
    assert sum(seen) / 96 == pytest.approx(levels.visible_columns(96, 2, 16, 8))


@pytest.mark.parametrize(("length", "value_weight"), [(1, 0.0), (64, 0.0), (500, 0.0), (500, 2)])
def test_modules_equal_the_operator_and_its_weights(length, value_weight):
    tensors = [torch.randn(2, length, 2, 16) for _ in range(3)]
    module = create_attention(
        "sbcluster", 500, 16, causal=True, num_landmarks=8, local_context=130, value_weight=value_weight
    )
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, : length // 3] = False
    out, weights = module(*tensors, attn_mask=mask, need_weights=True)
    query, key, value = (x.transpose(1, 2) for x in tensors)
    options = {"is_causal": True, "attn_mask": mask[:, None, None], "value_weight": value_weight}
    expected = landmark_attention(query, key, value, 8, 130, **options)
    assert torch.equal(out, expected.transpose(1, 2))
    assert_close("weights", expected, weights @ value, 1e-5)


def test_is_compiled_and_exported():
    tensors = [torch.randn(2, 300, 2, 16) for _ in range(3)]
    module = create_attention("sbcluster", 300, 16, causal=True, num_landmarks=8)
    expected = module(*tensors)[0]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors)[0], expected)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {name: {0: batch} for name in ("query", "key", "value")}
    exported = torch.export.export(module, tuple(tensors), dynamic_shapes=shapes).module()
    others = [torch.cat([x, x.flip(1)]) for x in tensors]
    assert_close("exported", module(*others)[0], exported(*others)[0], SINGLE_OUTPUT)
