"""Dropout of attention weights: unbiased, seeded, off where it is zero."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import OPERATORS, draw_inputs, operators_and_windows


@pytest.mark.parametrize(("name", "window"), operators_and_windows(3, 20))
@pytest.mark.parametrize("is_causal", [False, True])
def test_mean_over_samples_is_the_result_without_dropout(name, window, is_causal):
    num_samples = 4000
    # one batch entry for each sample; 150 positions make several blocks, so that sums over blocks are dropped, too
    query, key, value, projection = draw_inputs(1, 1, 150 if name == "scatterbrain" else 24, width=4, rows=3)
    options = {"is_causal": is_causal}
    expected = OPERATORS[name](query, key, value, projection, window, **options)
    many = [x.expand(100, -1, -1, -1) for x in (query, key, value)]
    total = squares = 0.0
    for _ in range(num_samples // 100):
        outs = OPERATORS[name](*many, projection, window, dropout_p=0.3, **options)
        total, squares = total + outs.sum(0), squares + outs.square().sum(0)
    mean = total / num_samples
    standard_error = ((squares / num_samples - mean.square()).clamp_min(0) / num_samples).sqrt()
    assert standard_error.min() > 0
    # five and a half standard errors for the largest of 96 to 600 elements
    assert ((mean - expected[0]).abs() / standard_error).max() < 5.5


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_changes_the_result_and_follows_the_seed(name, is_causal):
    tensors = draw_inputs(length=150, dtype=torch.float32)

    def out(seed: int, dropout_p: float) -> torch.Tensor:
        torch.manual_seed(seed)
        return OPERATORS[name](*tensors, 7, is_causal=is_causal, dropout_p=dropout_p)

    assert torch.equal(out(0, 0.5), out(0, 0.5))
    assert not torch.equal(out(0, 0.5), out(1, 0.5))
    assert not torch.equal(out(0, 0.5), out(0, 0.1))
    assert torch.equal(out(0, 0.0), out(1, 0.0))


@pytest.mark.parametrize("name", ["performer", "scatterbrain"])
def test_drops_what_lies_outside_of_the_window(name):
    # values that are nonzero at the first key only, seen by the last query through the features alone
    query, key, value, projection = draw_inputs(1, 1, 300, dtype=torch.float32)
    value[:, :, 1:] = 0
    outs = [OPERATORS[name](query, key, value, projection, 7, dropout_p=0.5)[0, 0, -1] for _ in range(8)]
    assert len({tuple(out.tolist()) for out in outs}) > 1
