"""Boolean masks of the keys, with padding anywhere: against renormalised weights and the specifications."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from scatterbrain.errors import UserError
from scatterbrain.ops.clusters import (
    assign_key_clusters,
    assign_query_clusters,
    landmark_attention,
    naive_landmark_attention,
    naive_landmark_lse,
    naive_paired_landmark_attention,
    paired_landmark_attention,
)
from scatterbrain.ops.clusters import triton as landmark_kernels
from scatterbrain.ops.scatterbrain import triton as fused
from tests.helpers import OPERATORS, TensorRecorder, assert_close, draw_inputs, operators_and_windows

# float64 against float64, and float32 against it: outputs and gradients, as in test_against_naive.py
DOUBLE, SINGLE = 1e-12, (2e-6, 1e-5)


def draw_mask(kind: str, num_keys: int) -> torch.Tensor:
    """Mask (2, S): two samples that differ."""
    mask = torch.ones(2, num_keys, dtype=torch.bool)
    if kind == "left":
        mask[0, : num_keys // 2 + 1] = False
        mask[1, :1] = False
    elif kind == "holes":
        mask[0] = torch.rand(num_keys) < 0.4
        mask[1, num_keys // 3 : num_keys // 3 * 2] = False
    elif kind == "none of a sample":
        mask[0] = False
        mask[1, ::2] = False
    return mask


KINDS = ["left", "holes", "none of a sample"]
SHAPES = [(50, 50), (37, 101), (101, 37), (1, 1), (130, 131)]


def results(function, tensors, cotangent) -> dict[str, torch.Tensor]:
    """Output and gradients by name; a gradient that does not exist is left out."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, cotangent.to(out.dtype), allow_unused=True)
    named = dict(zip(("query", "key", "value", "projection")[: len(leaves)], gradients, strict=True))
    return {"out": out.detach()} | {f"grad of {name}": x for name, x in named.items() if x is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("name", "window"), operators_and_windows(1, 8, 200))
def test_weights_are_those_without_a_mask_normalised_over_visible_keys(name, window, is_causal, kind):
    *tensors, projection = draw_inputs(length=41, num_keys=37, width=5, value_width=3)
    mask = draw_mask(kind, 37)
    _, weights = OPERATORS[name].naive(*tensors, projection, window, is_causal=is_causal)
    weights = weights * mask[:, None, None]
    total = weights.sum(-1, keepdim=True)
    expected = weights / total.masked_fill(total == 0, 1.0)
    poisoned = [tensors[0], *(x.masked_fill(~mask[:, None, :, None], torch.nan) for x in tensors[1:])]
    out, result = OPERATORS[name].naive(*poisoned, projection, window, is_causal=is_causal, attn_mask=mask)
    assert_close("weights", expected, result, DOUBLE)
    assert_close("out", expected @ tensors[2], out, DOUBLE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("length", "num_keys"), SHAPES)
@pytest.mark.parametrize(("name", "window"), operators_and_windows(7, 66))
def test_torch_is_the_specification_and_hidden_keys_have_no_influence(name, window, length, num_keys, is_causal, kind):
    operator, mask = OPERATORS[name], draw_mask(kind, num_keys)
    tensors = draw_inputs(2, 2, length, num_keys, 5, 3, rows=4, dtype=torch.float32)
    cotangent = torch.randn(2, 2, length, 3)
    options = {"is_causal": is_causal, "attn_mask": mask}
    expected = results(lambda *x: operator.naive(*x, window, **options)[0], [x.double() for x in tensors], cotangent)
    hidden = ~mask[:, None, :, None]
    for fill in (0.0, torch.nan, torch.inf):
        query, key, value, projection = tensors
        tensors = query, key.masked_fill(hidden, fill), value.masked_fill(hidden, fill), projection
        for dtype in (torch.float64, torch.float32):
            got = results(lambda *x: operator(*x, window, **options), [x.to(dtype) for x in tensors], cotangent)
            assert got.keys() == expected.keys()
            for which, reference in expected.items():
                bound = DOUBLE if dtype == torch.float64 else SINGLE[which != "out"]
                assert_close(f"{which} ({dtype}, {fill})", reference, got[which], bound)
                if which in ("grad of key", "grad of value"):
                    assert (got[which].masked_select(hidden) == 0).all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_wide_heads(is_causal):
    # above a width of 128, one maximum over all keys is not safe
    operator, mask = OPERATORS["scatterbrain"], draw_mask("left", 170)
    tensors = draw_inputs(2, 2, 150, 170, width=144)
    options = {"is_causal": is_causal, "attn_mask": mask}
    expected, _ = operator.naive(*tensors, 40, **options)
    assert_close("out", expected, operator(*tensors, 40, **options), DOUBLE)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_mask_of_leading_keys_is_key_lengths_and_both_hide(name, is_causal):
    operator, tensors = OPERATORS[name], draw_inputs(length=33, num_keys=40)
    lengths, mask = torch.tensor([17, 0]), draw_mask("holes", 40)
    leading = torch.arange(40) < lengths[:, None]
    expected = operator(*tensors, 7, is_causal=is_causal, key_lengths=lengths)
    torch.testing.assert_close(operator(*tensors, 7, is_causal=is_causal, attn_mask=leading), expected)
    both = operator(*tensors, 7, is_causal=is_causal, attn_mask=mask, key_lengths=lengths)
    torch.testing.assert_close(both, operator(*tensors, 7, is_causal=is_causal, attn_mask=mask & leading))
    assert (both - expected).abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["torch", "naive"])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_shape_that_broadcasts_over_heads_and_queries(name, backend):
    operator, tensors, mask = OPERATORS[name], draw_inputs(length=20), draw_mask("holes", 20)
    expected = operator(*tensors, 7, attn_mask=mask, backend=backend)
    assert torch.equal(operator(*tensors, 7, attn_mask=mask[:, None, None], backend=backend), expected)


def test_full_attention_is_scaled_dot_product_attention():
    query, key, value, _ = draw_inputs(length=20)
    mask = draw_mask("left", 20)[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert_close("out", expected, OPERATORS["full"](query, key, value, None, 0, attn_mask=mask), DOUBLE)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("name", "window"), operators_and_windows(4))
def test_gradcheck(name, window, is_causal):
    operator, mask = OPERATORS[name], torch.tensor([[0, 1, 0, 1, 1, 0, 1], [0, 0, 0, 1, 1, 1, 1]]).bool()
    tensors = [x.requires_grad_() for x in draw_inputs(2, 1, 5, 7, 3, 2, rows=2)]
    tensors[3].requires_grad_("projection" in operator.takes)
    assert torch.autograd.gradcheck(lambda *x: operator(*x, window, is_causal=is_causal, attn_mask=mask), tensors)


@pytest.mark.parametrize("name", ["performer", "scatterbrain"])
def test_eps_and_dropout(name):
    operator, mask = OPERATORS[name], draw_mask("none of a sample", 30)
    tensors = draw_inputs(length=30)
    if name == "performer":
        expected, _ = operator.naive(*tensors, 0, eps=0.3, attn_mask=mask)
        assert_close("out", expected, operator(*tensors, 0, eps=0.3, attn_mask=mask), DOUBLE)
    out = operator(*tensors, 3, attn_mask=mask, dropout_p=0.5)
    assert torch.isfinite(out).all()
    assert (out[0] == 0).all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["local", "performer", "scatterbrain"])
def test_no_dense_mask(name, is_causal):
    tensors = draw_inputs(1, 1, 1024, width=64, rows=12, dtype=torch.float32)
    mask = draw_mask("left", 1024)[:1]
    with TensorRecorder() as recorder:
        OPERATORS[name](*tensors, 49, is_causal=is_causal, attn_mask=mask)
    assert 1024 * 64 <= recorder.largest < 4 * 1024 * 64


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(2, 7),
        torch.ones(2, 7, dtype=torch.int64),
        torch.ones(6, 7, dtype=torch.bool),
        torch.ones(2, 6, dtype=torch.bool),
        torch.ones(2, 1, 6, 7, dtype=torch.bool),
        torch.ones(2, 2, 1, 7, dtype=torch.bool),
    ],
    ids=lambda mask: f"{mask.dtype}-{tuple(mask.shape)}",
)
def test_refuses_other_masks(name, mask):
    tensors = draw_inputs(2, 2, 6, 7)
    with pytest.raises(UserError, match=r"attn_mask has to be boolean of shape \(2, 7\) or \(2, 1, 1, 7\).* mask == 0"):
        OPERATORS[name](*tensors, 3, attn_mask=mask)
    with pytest.raises(UserError, match="attn_mask has to be a tensor"):
        OPERATORS[name](*tensors, 3, attn_mask=mask.tolist())


@pytest.mark.parametrize("name", ["local", "performer", "scatterbrain"])
def test_the_kernels_take_no_mask(name, monkeypatch):
    pytest.importorskip("triton")
    operator, tensors = OPERATORS[name], draw_inputs(length=16, dtype=torch.float32)
    mask = draw_mask("left", 16)
    if torch.cuda.is_available():
        tensors, mask = [x.cuda() for x in tensors], mask.cuda()
    with pytest.raises(UserError, match=r"backend='triton' cannot run this: .* no attn_mask\. Choose 'torch'"):
        operator(*tensors, 3, attn_mask=mask, backend="triton")
    expected = operator(*tensors, 3, attn_mask=mask, backend="torch")
    monkeypatch.setattr(fused, "is_fast", lambda *_, **__: True)
    assert torch.equal(operator(*tensors, 3, attn_mask=mask), expected)


# Operators with clusters -------------------------------------------------------------------------------------------

M, Q = 6, 4
LANDMARKS = {
    "landmarks": partial(landmark_attention, num_landmarks=M, num_steps=2),
    "window": partial(landmark_attention, num_landmarks=M, window=8),
    "wide window": partial(landmark_attention, num_landmarks=M, window=66, value_weight=0.5),
    "paired": partial(paired_landmark_attention, num_landmarks=M, num_query_landmarks=Q),
    "exact keys": partial(paired_landmark_attention, num_landmarks=M, num_query_landmarks=Q, num_exact=3),
}


def clusters_of_visible(assign, mask, *tensors):
    """Clusters (B, H, N), -1 for hidden points, from the visible points of each sample as a sequence."""
    labels = torch.full(tensors[0].shape[:3], -1)
    for b, visible in enumerate(mask):
        if visible.any():
            labels[b, :, visible] = assign(*(x[b : b + 1, :, visible] for x in tensors))[0]
    return labels


def naive_landmarks(name, tensors, mask):
    """The specification of an entry of `LANDMARKS`, whose clusters come from the visible keys as sequences."""
    query, key, value = tensors
    options = LANDMARKS[name].keywords
    steps = options.get("num_steps", 2 if "num_query_landmarks" in options else 1)
    weight = options.get("value_weight", 0.5 if "num_query_landmarks" in options else 0.0)
    with torch.no_grad():
        labels = clusters_of_visible(
            lambda *x: assign_key_clusters(*x, M, steps, value_weight=weight), mask, key.detach(), value.detach()
        )
    scale = query.shape[-1] ** -0.5
    if "num_query_landmarks" not in options:
        return naive_landmark_attention(*tensors, labels, options.get("window", 0), scale, attn_mask=mask)[0]
    groups = assign_query_clusters(query, Q, steps)
    num_exact = options.get("num_exact", 0)
    return naive_paired_landmark_attention(*tensors, labels, groups, num_exact, scale, attn_mask=mask)[0]


@pytest.mark.parametrize("value_weight", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_clusters_are_those_of_the_visible_keys_as_a_sequence(kind, value_weight):
    query, key, value, _ = draw_inputs(2, 3, 40, 53, dtype=torch.float32)
    for mask, lengths in ((draw_mask(kind, 53), None), (draw_mask(kind, 53), torch.tensor([53, 31]))):
        visible = mask if lengths is None else mask & (torch.arange(53) < lengths[:, None])
        hidden = ~visible[:, None, :, None]
        expected = clusters_of_visible(
            lambda *x: assign_key_clusters(*x, 9, 2, value_weight=value_weight), visible, key, value
        )
        for fill in (0.0, torch.nan, torch.inf):
            poisoned = key.masked_fill(hidden, fill), value.masked_fill(hidden, fill)
            labels = assign_key_clusters(*poisoned, 9, 2, lengths, value_weight, mask)
            assert torch.equal(labels, expected)
    mask = draw_mask(kind, 40)
    expected = clusters_of_visible(lambda x: assign_query_clusters(x, 5, 2), mask, query)
    labels = assign_query_clusters(query.masked_fill(~mask[:, None, :, None], torch.nan), 5, 2, query_mask=mask)
    assert torch.equal(labels.masked_fill(~mask[:, None], -1), expected)
    assert ((labels >= 0) & (labels < 5)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "num_keys"), SHAPES)
@pytest.mark.parametrize("name", LANDMARKS)
def test_landmarks_are_the_specification_and_hidden_keys_have_no_influence(name, length, num_keys, kind):
    operator, mask = LANDMARKS[name], draw_mask(kind, num_keys)
    *tensors, _ = draw_inputs(2, 2, length, num_keys, 5, 3, dtype=torch.float32)
    cotangent = torch.randn(2, 2, length, 3)
    expected = results(lambda *x: naive_landmarks(name, x, mask), [x.double() for x in tensors], cotangent)
    hidden = ~mask[:, None, :, None]
    for fill in (0.0, torch.nan, torch.inf):
        tensors = [tensors[0], *(x.masked_fill(hidden, fill) for x in tensors[1:])]
        for dtype, backend in ((torch.float64, "torch"), (torch.float64, "naive"), (torch.float32, "torch")):
            function = partial(operator, attn_mask=mask, backend=backend)
            got = results(function, [x.to(dtype) for x in tensors], cotangent)
            for which, reference in expected.items():
                bound = 1e-11 if dtype == torch.float64 else SINGLE[which != "out"]
                assert_close(f"{which} ({dtype}, {fill}, {backend})", reference, got[which], bound)
                if which in ("grad of key", "grad of value"):
                    assert (got[which].masked_select(hidden) == 0).all()


@pytest.mark.parametrize("name", LANDMARKS)
def test_padding_on_the_left_changes_nothing(name):
    *tensors, _ = draw_inputs(2, 2, 40)
    operator, paired = LANDMARKS[name], "num_query_landmarks" in LANDMARKS[name].keywords
    mask = torch.arange(40) >= torch.tensor([17, 3])[:, None]
    tensors = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in tensors]
    out = operator(*tensors, attn_mask=mask, **({"query_mask": mask} if paired else {}))
    for b in range(2):
        expected = operator(*(x[b : b + 1, :, mask[b]] for x in tensors))
        assert_close("out", expected, out[b : b + 1, :, mask[b]], 1e-12)


@pytest.mark.parametrize("name", LANDMARKS)
def test_landmarks_with_lengths_and_the_other_shape_of_a_mask(name):
    operator, (*tensors, _) = LANDMARKS[name], draw_inputs(length=33, num_keys=40)
    lengths, mask = torch.tensor([17, 0]), draw_mask("holes", 40)
    leading = torch.arange(40) < lengths[:, None]
    expected = operator(*tensors, key_lengths=lengths)
    assert_close("lengths", expected, operator(*tensors, attn_mask=leading), 1e-12)
    both = operator(*tensors, attn_mask=mask, key_lengths=lengths)
    assert_close("both", operator(*tensors, attn_mask=(mask & leading)[:, None, None]), both, 1e-12)
    assert (both - expected).abs().max() > 1e-3
    out = operator(*(x[:0] for x in tensors), attn_mask=mask[:0])
    assert out.shape == (0, 2, 33, 16)
    for wrong in (mask.float(), mask[:, 1:], mask[:, None].expand(2, 33, 40)):
        with pytest.raises(UserError, match=r"attn_mask has to be boolean of shape \(2, 40\)"):
            operator(*tensors, attn_mask=wrong)
    if "num_query_landmarks" in operator.keywords:
        for wrong in (mask, torch.ones(2, 33), mask[:, :33].tolist()):
            with pytest.raises(UserError, match="query_mask has to be"):
                operator(*tensors, query_mask=wrong)


def test_given_clusters_and_log_sum_exp_of_landmarks():
    query, key, value, _ = draw_inputs(length=33, num_keys=40)
    mask = draw_mask("none of a sample", 40)
    labels = assign_key_clusters(key, value, M, 1, value_weight=0.0, attn_mask=mask)
    options = {"attn_mask": mask, "return_lse": True}
    out, lse = landmark_attention(query, key, value, M, 8, **options)
    assert (lse[0] == -torch.inf).all()
    assert_close("lse", naive_landmark_lse(query, key, labels, 8, 0.25, attn_mask=mask)[1], lse[1], 1e-12)
    naive_lse = landmark_attention(query, key, value, M, 8, backend="naive", **options)[1]
    assert_close("lse", naive_lse[1], lse[1], 1e-12)
    # what is hidden is in no cluster
    labels = labels.masked_fill(labels < 0, 10**6)
    assert torch.equal(out, landmark_attention(query, key, value, M, 8, assignment=labels, attn_mask=mask))
    with pytest.raises(UserError, match=r"assignment has the cluster 1000000.* attn_mask"):
        landmark_attention(query, key, value, M, 8, assignment=labels)


def test_the_kernels_of_landmarks_take_no_mask(monkeypatch):
    pytest.importorskip("triton")
    *tensors, _ = draw_inputs(length=16, dtype=torch.float32)
    mask = draw_mask("left", 16)
    if torch.cuda.is_available():
        tensors, mask = [x.cuda() for x in tensors], mask.cuda()
    monkeypatch.setattr(landmark_kernels, "no_kernels", lambda *_: None)
    with pytest.raises(UserError, match=r"backend='triton' cannot run this: .* no attn_mask\. Choose 'torch'"):
        landmark_attention(*tensors, 3, attn_mask=mask, backend="triton")
    expected = landmark_attention(*tensors, 3, attn_mask=mask, value_weight=0.5, backend="torch")
    monkeypatch.setattr(landmark_kernels, "is_fast", lambda _: True)
    assert torch.equal(landmark_attention(*tensors, 3, attn_mask=mask, value_weight=0.5), expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_two_dimensions_are_ambiguous_where_the_batch_is_as_large_as_the_number_of_queries(name):
    # (T, S) for scaled_dot_product_attention
    operator, mask = OPERATORS[name], torch.tensor([[0, 1, 0, 1, 1, 0, 1], [0, 0, 0, 1, 1, 1, 1]]).bool()
    tensors = draw_inputs(2, 2, 2, 7)
    with pytest.raises(UserError, match=r"attn_mask of shape \(2, 7\) is ambiguous.* Give .* as \(B, 1, 1, S\)"):
        operator(*tensors, 3, attn_mask=mask)
    clear, _ = operator.naive(*tensors, 3, attn_mask=mask)
    assert_close("out", clear, operator(*tensors, 3, attn_mask=mask[:, None, None]), DOUBLE)
    # one of each, and one query more
    operator(*draw_inputs(1, 2, 1, 7), 3, attn_mask=mask[:1])
    operator(*draw_inputs(2, 2, 3, 7), 3, attn_mask=mask)
