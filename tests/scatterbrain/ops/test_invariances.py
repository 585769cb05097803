"""Results do not depend on strides, autocast, the rest of the batch, or the sizes of slices."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import OPERATORS, assert_close, draw_inputs, operators_and_windows

# Another order of the same float32 sums.
REORDERED = 1e-6


@pytest.mark.parametrize(("name", "window"), operators_and_windows(7, 100))
@pytest.mark.parametrize("is_causal", [False, True])
def test_strided_inputs(name, window, is_causal):
    fused = torch.randn(2, 90, 3, 2, 16)
    query, key, value = (x.transpose(1, 2) for x in fused.unbind(2))
    # every second row of a wider matrix, transposed
    projection = torch.randn(16, 10)[:, ::2].T
    tensors = (query, key, value, projection)
    assert not any(x.is_contiguous() for x in tensors)
    operator, options = OPERATORS[name], {"is_causal": is_causal, "key_lengths": torch.tensor([90, 40])}
    result = operator(*tensors, window, **options)
    assert_close("out", operator(*(x.contiguous() for x in tensors), window, **options), result, REORDERED)
    assert_close("out", operator.naive(*tensors, window, **options)[0], result, 1e-5)  # float32 rounding


@pytest.mark.parametrize("name", OPERATORS)
def test_inputs_are_left_alone(name):
    tensors = draw_inputs(length=90, dtype=torch.float32)
    copies = [x.clone() for x in tensors]
    OPERATORS[name](*tensors, 7, is_causal=True, key_lengths=torch.tensor([90, 40]))
    assert all(torch.equal(x, copy) for x, copy in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("backend", ["naive", "torch"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_autocast_changes_nothing(name, backend, is_causal):
    tensors = draw_inputs(length=90, dtype=torch.float32)
    options = {"is_causal": is_causal, "backend": backend}
    expected = OPERATORS[name](*tensors, 7, **options)
    with torch.autocast("cpu", torch.bfloat16):
        result = OPERATORS[name](*tensors, 7, **options)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


@pytest.mark.parametrize("name", ["local", "performer", "scatterbrain"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_autocast_changes_no_gradient(name, is_causal):
    grads = []
    tensors = draw_inputs(length=90, dtype=torch.float32)
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_() for x in tensors[:3]]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = OPERATORS[name](*leaves, tensors[3], 7, is_causal=is_causal)
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(("name", "window"), operators_and_windows(7, 49, 150))
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_sample_does_not_depend_on_the_rest_of_the_batch(name, window, is_causal):
    operator = OPERATORS[name]
    query, key, value, projection = draw_inputs(5, 3, 140, 170, dtype=torch.float32)
    key[1] *= 10  # a neighbour that is much louder
    value[1] *= 100
    lengths = torch.tensor([170, 170, 3, 0, 100])
    together = operator(query, key, value, projection, window, is_causal=is_causal, key_lengths=lengths)
    for b in range(5):
        one = slice(b, b + 1)
        alone = operator(
            query[one], key[one], value[one], projection, window, is_causal=is_causal, key_lengths=lengths[one]
        )
        assert_close(f"sample {b}", alone, together[one], REORDERED)


@pytest.mark.parametrize("name", ["local", "scatterbrain"])
@pytest.mark.parametrize("window", [1, 49, 130])
@pytest.mark.parametrize("is_causal", [False, True])
def test_result_does_not_depend_on_how_the_work_is_sliced(name, window, is_causal):
    # 96 heads together are several slices of tiles that do not end where a head ends; one head is a single slice
    operator = OPERATORS[name]
    query, key, value, projection = draw_inputs(1, 96, 130, dtype=torch.float32)
    together = operator(query, key, value, projection, window, is_causal=is_causal)
    each = [
        operator(*(x[:, h : h + 1] for x in (query, key, value)), projection, window, is_causal=is_causal)
        for h in range(96)
    ]
    assert_close("out", torch.cat(each, dim=1), together, REORDERED)


@pytest.mark.parametrize("name", OPERATORS)
def test_full_lengths_are_no_lengths(name):
    tensors = draw_inputs(length=90, dtype=torch.float32)
    result = OPERATORS[name](*tensors, 7, key_lengths=torch.tensor([90, 90]))
    assert_close("out", OPERATORS[name](*tensors, 7), result, REORDERED)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
@pytest.mark.parametrize("name", OPERATORS)
def test_lengths_of_any_integer_type(name, dtype):
    tensors = draw_inputs(length=90, dtype=torch.float32)
    expected = OPERATORS[name](*tensors, 7, key_lengths=torch.tensor([90, 40]))
    assert torch.equal(OPERATORS[name](*tensors, 7, key_lengths=torch.tensor([90, 40], dtype=dtype)), expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_lengths_past_the_end_hide_nothing(name):
    tensors = draw_inputs(length=90, dtype=torch.float32)
    result = OPERATORS[name](*tensors, 7, key_lengths=torch.tensor([95, 1000]))
    assert_close("out", OPERATORS[name](*tensors, 7), result, REORDERED)


def test_a_window_over_everything_is_full_attention():
    tensors = draw_inputs(length=90)
    full = OPERATORS["full"](*tensors, 0)
    for name in ("local", "scatterbrain"):
        assert_close(name, full, OPERATORS[name](*tensors, 180), 1e-12)  # float64
