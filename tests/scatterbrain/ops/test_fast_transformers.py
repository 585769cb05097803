"""Local and causal Performer attention against the kernels of pytorch-fast-transformers."""

from __future__ import annotations

import pytest
import torch

from scatterbrain.ops.common.features import log_softmax_features
from scatterbrain.ops.local import local_attention
from scatterbrain.ops.performer import performer_attention
from tests.helpers import assert_close, draw_inputs

WHY = "pytorch-fast-transformers is not installed (an oracle only, nothing here needs it)"
local_product = pytest.importorskip("fast_transformers.local_product", reason=WHY, exc_type=ImportError)
causal_product = pytest.importorskip("fast_transformers.causal_product", reason=WHY, exc_type=ImportError)

# float32 on both sides, sums of up to 100 terms
ROUNDING = 5e-6


def published_local_attention(query, key, value, window, scale, is_causal, lengths):
    mask = torch.zeros(query.shape[2], key.shape[2])
    if is_causal:
        mask = mask.masked_fill(torch.ones_like(mask, dtype=torch.bool).triu(1), -1e24)
    logits = local_product.local_dot_product(query, key, mask, lengths, window)
    return local_product.local_weighted_average(torch.softmax(scale * logits, dim=-1), value)


@pytest.mark.parametrize("window", [1, 2, 5, 6, 24, 49, 98])
@pytest.mark.parametrize("is_causal", [False, True])
def test_local(window, is_causal):
    query, key, value, _ = draw_inputs(2, 2, 100, width=16, dtype=torch.float32)
    # every query sees a key: the published kernel averages hidden keys where there is none
    lengths = torch.tensor([100, 100])
    expected = published_local_attention(query, key, value, window, 0.25, is_causal, lengths)
    result = local_attention(query, key, value, window, scale=0.25, is_causal=is_causal)
    assert_close("out", expected, result, ROUNDING)


@pytest.mark.parametrize("window", [5, 6, 24])
def test_local_with_padding(window):
    query, key, value, _ = draw_inputs(2, 2, 100, width=16, dtype=torch.float32)
    lengths = torch.tensor([100, 63])
    expected = published_local_attention(query, key, value, window, 0.25, False, lengths)
    result = local_attention(query, key, value, window, scale=0.25, key_lengths=lengths)
    seen = 63  # queries up to here see themselves
    assert_close("full sample", expected[0], result[0], ROUNDING)
    assert_close("padded sample", expected[1, :, :seen], result[1, :, :seen], ROUNDING)


@pytest.mark.parametrize("window", [5, 24])
def test_local_gradients(window):
    tensors = draw_inputs(2, 2, 100, width=16, dtype=torch.float32)[:3]
    cotangent = torch.randn(2, 2, 100, 16)
    grads = []
    for function in (
        lambda *leaves: published_local_attention(*leaves, window, 0.25, False, torch.tensor([100, 100])),
        lambda *leaves: local_attention(*leaves, window, scale=0.25),
    ):
        leaves = [x.clone().requires_grad_() for x in tensors]
        grads.append(torch.autograd.grad(function(*leaves), leaves, cotangent))
    for name, expected, got in zip(("query", "key", "value"), *grads, strict=True):
        assert_close(f"grad of {name}", expected, got, ROUNDING)


def published_causal_performer(query, key, value, projection, scale):
    query, key = (log_softmax_features(x, projection, scale, cosh=False).exp() for x in (query, key))
    ones = torch.ones_like(value[..., :1]).contiguous()
    product = causal_product.causal_dot_product(query, key, torch.cat([value, ones], dim=-1))
    return product[..., :-1] / product[..., -1:]


@pytest.mark.parametrize("length", [2, 64, 100, 257])
@pytest.mark.parametrize("rows", [3, 12])
def test_causal_performer(length, rows):
    *tensors, projection = draw_inputs(2, 2, length, width=16, rows=rows, dtype=torch.float32)
    cotangent = torch.randn(2, 2, length, 16)
    outs, grads = [], []
    for function in (
        lambda *leaves: published_causal_performer(*leaves, projection, 0.25),
        lambda *leaves: performer_attention(*leaves, projection, scale=0.25, is_causal=True),
    ):
        leaves = [x.clone().requires_grad_() for x in tensors]
        outs.append(function(*leaves))
        grads.append(torch.autograd.grad(outs[-1], leaves, cotangent))
    assert_close("out", *outs, ROUNDING)
    for name, expected, got in zip(("query", "key", "value"), *grads, strict=True):
        assert_close(f"grad of {name}", expected, got, 4 * ROUNDING)  # features once more, and their differences
