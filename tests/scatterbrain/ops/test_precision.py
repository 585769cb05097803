"""Numerics: extreme logits, half precision, and hidden keys without influence."""

from __future__ import annotations

import math

import pytest
import torch

from scatterbrain.ops.common.features import log_softmax_features
from tests.helpers import OPERATORS, assert_close, draw_inputs, operators_and_windows

MASKS = [(False, None), (True, None), (False, (150, 33)), (True, (0, 101))]


def as_lengths(lengths: tuple[int, ...] | None) -> torch.Tensor | None:
    return None if lengths is None else torch.tensor(lengths)


@pytest.mark.parametrize(("name", "window"), operators_and_windows(7, 1, 70))
@pytest.mark.parametrize(("is_causal", "lengths"), MASKS)
@pytest.mark.parametrize("width", [16, 64])
def test_float32_with_logits_to_50(name, window, is_causal, lengths, width):
    operator = OPERATORS[name]
    tensors = draw_inputs(length=150, width=width, rows=12, dtype=torch.float32, max_logit=50)
    cotangent = torch.randn(2, 2, 150, width)
    grads, outs = [], []
    for function, dtype in ((operator.naive, torch.float64), (operator, torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in tensors[:3]]
        out = function(*leaves, tensors[3].to(dtype), window, is_causal=is_causal, key_lengths=as_lengths(lengths))
        out = out[0] if isinstance(out, tuple) else out
        outs.append(out)
        grads.append(torch.autograd.grad(out, leaves, cotangent.to(dtype)))
    # a logit of 50, a sum of a few such terms, is rounded by 50 * 6e-8 = 3e-6, and so is its weight; measured 2e-6
    assert_close("out", *outs, 1e-5)
    for what, expected, got in zip(("query", "key", "value"), *grads, strict=True):
        assert_close(f"grad of {what}", expected, got, 5e-5)  # differences of such weights


@pytest.mark.parametrize(("name", "window"), operators_and_windows(7, 1, 70))
@pytest.mark.parametrize(("is_causal", "lengths"), MASKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_logits_to_50(name, window, is_causal, lengths, dtype):
    operator = OPERATORS[name]
    tensors = draw_inputs(length=150, rows=12, dtype=dtype, max_logit=50)
    options = {"is_causal": is_causal, "key_lengths": as_lengths(lengths)}
    result = operator(*tensors, window, **options)
    expected, _ = operator.naive(*tensors, window, **options)
    assert result.dtype == dtype
    # rounding the output to nearest is off by at most eps / 2 of each element, and by about half of that on average.
    # PyTorch's own full attention also rounds its weights.
    assert_close("out", expected, result, torch.finfo(dtype).eps / 2)
    if name != "full":
        assert_close("out", expected, result, 0.35 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_half_precision_gradients(name, dtype, is_causal):
    operator = OPERATORS[name]
    tensors = draw_inputs(length=150, rows=12, dtype=dtype, max_logit=20)
    cotangent = torch.randn(2, 2, 150, 16).to(dtype)
    grads = []
    for function, as_dtype in ((operator.naive, torch.float64), (operator, dtype)):
        leaves = [x.to(as_dtype).requires_grad_() for x in tensors[:3]]
        out = function(*leaves, tensors[3].to(as_dtype), 7, is_causal=is_causal)
        out = out[0] if isinstance(out, tuple) else out
        grads.append(torch.autograd.grad(out, leaves, cotangent.to(as_dtype)))
    for what, expected, got in zip(("query", "key", "value"), *grads, strict=True):
        # rounded inputs, output, and gradients of it; PyTorch's full attention rounds in between, too
        assert_close(f"grad of {what}", expected, got, 4 * torch.finfo(dtype).eps)


def lengthen_first_row(projection: torch.Tensor) -> None:
    """Features of a row of length 20 can be e^200."""
    projection[0] *= 20 / projection[0].norm()


def outshining_key(tensors: tuple[torch.Tensor, ...], position: int) -> None:
    """Put in place a key, at `position`, whose feature of the first row is over 150 nats larger than all others."""
    _, key, _, projection = tensors
    scale = key.shape[-1] ** -0.5
    features = log_softmax_features(key, projection, scale, cosh=False)[..., 0]
    key[:, :, position] = projection[0] / math.sqrt(scale)
    hidden = log_softmax_features(key, projection, scale, cosh=False)[:, :, position, 0]
    assert (hidden - features.amax(-1) > 150).all()


@pytest.mark.parametrize(("name", "window"), operators_and_windows(7, 1, 8, 100))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("position", [17, 63, 100, 149])
def test_a_future_key_changes_nothing(name, window, dtype, position):
    operator = OPERATORS[name]
    tensors = draw_inputs(length=150, dtype=dtype)
    value = tensors[2]
    lengthen_first_row(tensors[3])
    before = operator(*tensors, window, is_causal=True)
    outshining_key(tensors, position)
    value[:, :, position] = 1e4
    after = operator(*tensors, window, is_causal=True)
    assert torch.equal(after[:, :, :position], before[:, :, :position])
    if name in ("performer", "scatterbrain"):
        # everything after it is right
        expected, _ = operator.naive(*tensors, window, is_causal=True)
        assert_close("out", expected, after, 1e-4 if dtype == torch.float32 else 1e-12)  # features of e^180
    if name == "performer":
        # and the key is felt as soon as it is visible
        assert (after[:, :, position:] - before[:, :, position:]).abs().min() > 1


@pytest.mark.parametrize(("name", "window"), operators_and_windows(7, 1, 8, 100))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("garbage", [1e4, -1e4, "outshining"])
def test_padding_changes_nothing(name, window, dtype, is_causal, garbage):
    operator = OPERATORS[name]
    tensors = draw_inputs(length=150, dtype=torch.float64)
    query, key, value, projection = tensors
    lengthen_first_row(projection)
    options = {"is_causal": is_causal, "key_lengths": torch.tensor([90, 0])}
    before = operator(*(x.to(dtype) for x in tensors), window, **options)
    if garbage == "outshining":
        outshining_key((query, key[:1], value, projection), 120)
        key[1] = key[0, :, 120][:, None]
    else:
        key[0, :, 90:] = garbage
        key[1] = garbage
    value[0, :, 90:] = 1e4
    value[1] = -1e4
    leaves = [x.to(dtype).requires_grad_() for x in tensors[:3]]
    after = operator(*leaves, projection.to(dtype), window, **options)
    assert torch.equal(after, before)
    assert (after[1] == 0).all()
    for what, grad in zip(("query", "key", "value"), torch.autograd.grad(after.sum(), leaves), strict=True):
        assert torch.isfinite(grad).all().item(), f"grad of {what} is nan or infinite"
        if what != "query":
            assert (grad[0, :, 90:] == 0).all().item(), f"grad of {what} at the padding"
        assert (grad[1] == 0).all().item(), f"grad of {what} of the sample without keys"


@pytest.mark.parametrize("name", ["performer", "scatterbrain"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_key_in_the_window_whose_features_outshine_its_weight(name, is_causal):
    # The exact weight of the window replaces features whose product may be e^(|w|^2 / 2) times larger, here e^112,
    # and it has to survive next to them in float32, whose smallest number is e^-103. |w|^2 = 225 is far out for E = 64.
    tensors = draw_inputs(length=300, width=64, rows=6, dtype=torch.float32)
    query, key, _, projection = tensors
    projection *= 15 / projection.norm(dim=1, keepdim=True)
    # no other key has much of that feature
    key -= projection[0] * 64**0.25 / 4
    query[:, :, 150] = key[:, :, 150] = projection[0] * 64**0.25 / 2
    operator = OPERATORS[name]
    expected, _ = operator.naive(*tensors, 7, is_causal=is_causal)
    # the logarithms of such features are around 100, rounded by 1e-5
    assert_close("out", expected, operator(*tensors, 7, is_causal=is_causal), 2e-5)


def test_causal_features_that_point_apart():
    # Queries that favour one feature and keys that favour another: the products that remain are e^-100 of the
    # largest feature of either, and still make up all the weight there is.
    query, key, value, projection = draw_inputs(1, 1, 20, width=2, rows=2, dtype=torch.float32)
    projection.copy_(torch.eye(2) * 10)
    query.copy_(torch.tensor([7.0, -7.0]) + 0.3 * query)
    key.copy_(torch.tensor([-7.0, 7.0]) + 0.3 * key)
    operator = OPERATORS["performer"]
    expected, _ = operator.naive(query, key, value, projection, 0, is_causal=True)
    got = operator(query, key, value, projection, 0, is_causal=True)
    assert_close("out", expected, got, 1e-4)  # logarithms around 100, rounded by 1e-5
