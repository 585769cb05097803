"""Packed sequences: against the specification of each sequence by itself."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from scatterbrain import (
    UserError,
    full_attention,
    landmark_attention,
    local_attention,
    packed_attention,
    paired_landmark_attention,
    performer_attention,
    scatterbrain_attention,
)
from scatterbrain.ops.common.backends import is_interpreted
from tests.helpers import assert_close

PROJECTION = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
# operator, its positional arguments and its options
CASES = {
    "full": (full_attention, (), {}),
    "full, causal": (full_attention, (), {"is_causal": True}),
    "local": (local_attention, (5,), {}),
    "local, causal": (local_attention, (5,), {"is_causal": True}),
    "performer": (performer_attention, (PROJECTION,), {}),
    "scatterbrain": (scatterbrain_attention, (PROJECTION, 5), {}),
    "scatterbrain, causal": (scatterbrain_attention, (PROJECTION, 5), {"is_causal": True}),
    "landmarks": (landmark_attention, (7,), {"num_steps": 2}),
    "landmarks, window": (landmark_attention, (7, 5), {"scale": 0.3}),
    "landmarks, values": (landmark_attention, (7,), {"value_weight": 0.5}),
    "paired": (paired_landmark_attention, (7, 4, 2), {}),
}
# among them sequences of no token, of one, and of fewer tokens than landmarks
LENGTHS = (19, 0, 1, 4, 33, 0)
CU_SEQLENS = [0, 19, 19, 20, 24, 57, 57]
case = pytest.mark.parametrize(("operator", "sizes", "options"), CASES.values(), ids=CASES)


def draw(num_tokens: int = sum(LENGTHS), heads: int = 2, key_heads: int = 2) -> list[torch.Tensor]:
    """Query, key and value (N, heads, 6, 6 and 3), float64."""
    shapes = (heads, 6), (key_heads, 6), (key_heads, 3)
    return [torch.randn(num_tokens, *shape, dtype=torch.float64) for shape in shapes]


def one_by_one(operator, query, key, value, *sizes, **options):
    """What `packed_attention` gives, from a call for each sequence."""
    parts = zip(*(x.split(LENGTHS) for x in (query, key, value)), strict=True)
    padded = ([x.transpose(0, 1).unsqueeze(0) for x in part] for part in parts if len(part[0]))
    return torch.cat([operator(*part, *sizes, **options)[0].transpose(0, 1) for part in padded])


def differentiate(function, tensors, cotangent):
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, cotangent)
    return dict(zip(("out", "query", "key", "value"), (out, *gradients), strict=True))


@case
@pytest.mark.parametrize("max_seqlen", [None, 33, 40])
def test_is_the_specification_of_each_sequence(operator, sizes, options, max_seqlen):
    tensors, cotangent = draw(), torch.randn(57, 2, 3, dtype=torch.float64)
    naive = partial(one_by_one, operator, backend="naive", **options)
    expected = differentiate(lambda *x: naive(*x, *sizes), tensors, cotangent)
    cu_seqlens = torch.tensor(CU_SEQLENS, dtype=torch.int32)
    for backend in ("torch", "naive"):
        packed = partial(packed_attention, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, backend=backend, **options)
        result = differentiate(lambda *x, packed=packed: packed(operator, *x, *sizes), tensors, cotangent)
        for name, reference in expected.items():
            assert_close(name, reference, result[name], 1e-11)


@case
def test_sequences_do_not_see_each_other(operator, sizes, options):
    tensors = draw()
    packed = partial(packed_attention, operator, cu_seqlens=CU_SEQLENS, **options)
    expected = packed(*tensors, *sizes)
    for start, end in ((0, 19), (24, 57)):
        rest = torch.ones(57, dtype=torch.bool)
        rest[start:end] = False
        for fill in (torch.nan, torch.inf, 1e30):
            out = packed(*(x.masked_fill(~rest[:, None, None], fill) for x in tensors), *sizes)
            assert torch.equal(out[rest], expected[rest])


@case
def test_grouped_queries(operator, sizes, options):
    query, key, value = draw(heads=4)
    repeated = [x.repeat_interleave(2, 1) for x in (key, value)]
    expected = packed_attention(operator, query, *repeated, *sizes, cu_seqlens=CU_SEQLENS, **options)
    options = options | {"enable_gqa": True}
    out = packed_attention(operator, query, key, value, *sizes, cu_seqlens=CU_SEQLENS, **options)
    assert torch.equal(out, expected)


def test_log_sum_exp():
    tensors = draw()
    out, lse = packed_attention(landmark_attention, *tensors, 7, 5, cu_seqlens=CU_SEQLENS, return_lse=True)
    assert torch.equal(out, packed_attention(landmark_attention, *tensors, 7, 5, cu_seqlens=CU_SEQLENS))
    query, key, value = (x[24:].transpose(0, 1).unsqueeze(0) for x in tensors)
    expected = landmark_attention(query, key, value, 7, 5, return_lse=True)[1]
    assert_close("lse", expected[0].transpose(0, 1), lse[24:], 1e-11)


@case
def test_no_token(operator, sizes, options):
    for cu_seqlens in ([0], [0, 0, 0]):
        leaves = [x.requires_grad_() for x in draw(0)]
        out = packed_attention(operator, *leaves, *sizes, cu_seqlens=cu_seqlens, **options)
        assert out.shape == (0, 2, 3)
        out.sum().backward()


@pytest.mark.parametrize(
    ("cu_seqlens", "match"),
    [
        ([0, 20, 56], "from 0 to the number of tokens, 57; it goes from 0 to 56"),
        ([1, 57], "goes from 1 to 57"),
        ([0, 30, 20, 57], "in steps of at least -10"),
        ([], r"cu_seqlens has to be integers .* of shape \(0,\)"),
        ([0], r"cu_seqlens has to be integers .* of shape \(1,\)"),
        ([0.0, 57.0], "cu_seqlens has to be integers .* got torch.float32"),
        ([[0, 57]], r"cu_seqlens has to be integers .* of shape \(1, 2\)"),
        ("0, 57", "cu_seqlens='0, 57' has to be integers"),
        (None, "cu_seqlens=None has to be integers"),
    ],
)
@pytest.mark.parametrize("max_seqlen", [None, 57])
def test_bounds_that_do_not_fit_are_refused(cu_seqlens, match, max_seqlen):
    with pytest.raises(UserError, match=match):
        packed_attention(local_attention, *draw(), 5, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)


def test_other_arguments_that_do_not_fit_are_refused():
    query, key, value = draw()
    packed = partial(packed_attention, cu_seqlens=CU_SEQLENS)
    with pytest.raises(UserError, match="max_seqlen=32 is less than the longest sequence of cu_seqlens, 33 tokens"):
        packed(local_attention, query, key, value, 5, max_seqlen=32)
    with pytest.raises(UserError, match="max_seqlen=0 is not valid"):
        packed(local_attention, query, key, value, 5, max_seqlen=0)
    with pytest.raises(UserError, match=r"key has to be .* as many tokens as query \(57, 2, 6\), got \(50, 2, 6\)"):
        packed(local_attention, query, key[:50], value[:50], 5)
    with pytest.raises(UserError, match=r"query has to be .* got \(1, 57, 2, 6\)"):
        packed(local_attention, query[None], key, value, 5)
    with pytest.raises(UserError, match="key has to be a tensor"):
        packed(local_attention, query, key.tolist(), value, 5)
    for operator in (partial(local_attention, window=5), torch.nn.functional.scaled_dot_product_attention):
        with pytest.raises(UserError, match="has to be one of full_attention, landmark_attention, local_attention"):
            packed(operator, query, key, value)
    for name in ("key_lengths", "query_lengths", "attn_mask", "assignment"):
        with pytest.raises(UserError, match=f"packed_attention takes no {name}: cu_seqlens"):
            packed(landmark_attention, query, key, value, 5, **{name: None})


def test_compiled_without_values_and_nan_where_they_do_not_fit():
    tensors = draw()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(query, key, value, cu_seqlens):
        return packed_attention(local_attention, query, key, value, 5, cu_seqlens=cu_seqlens, max_seqlen=20)

    cu_seqlens = torch.tensor([0, 19, 19, 39, 57], dtype=torch.int32)
    expected = packed_attention(local_attention, *tensors, 5, cu_seqlens=cu_seqlens)
    assert_close("out", expected, compiled(*tensors, cu_seqlens), 1e-12)
    # a sequence of 21 tokens, and tokens before the first sequence and behind the last
    cu_seqlens = torch.tensor([3, 18, 18, 39, 55], dtype=torch.int32)
    out = compiled(*tensors, cu_seqlens)
    for start, end in ((3, 18), (39, 55)):
        alone = [x[start:end].transpose(0, 1).unsqueeze(0) for x in tensors]
        assert_close("out", local_attention(*alone, 5)[0].transpose(0, 1), out[start:end], 1e-12)
    for start, end in ((0, 3), (18, 39), (55, 57)):
        assert out[start:end].isnan().all()


@pytest.mark.parametrize("name", ["local", "scatterbrain", "landmarks", "landmarks, window"])
def test_the_kernels_take_packed_sequences(name):
    triton = pytest.importorskip("triton")
    if not is_interpreted() or triton.__version__.startswith("3.2."):
        pytest.skip("the kernels are compiled for the GPU here, or Triton's interpreter is too old for them")
    operator, sizes, options = CASES[name]
    tensors = [torch.randn(27, 2, 16) for _ in range(3)]
    sizes = [torch.randn(4, 16) if isinstance(x, torch.Tensor) else x for x in sizes]
    packed = partial(packed_attention, operator, cu_seqlens=[0, 9, 9, 10, 27], max_seqlen=17, **options)
    cotangent = torch.randn(27, 2, 16)
    expected, result = (
        differentiate(lambda *x, backend=backend: packed(*x, *sizes, backend=backend), tensors, cotangent)
        for backend in ("torch", "triton")
    )
    for which, reference in expected.items():
        assert_close(which, reference, result[which], 1e-5)
