"""Memory of the fast implementations: no (N, N) or (N, W, E) tensor, forward or backward, and linear growth in N."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import OPERATORS, TensorRecorder, draw_inputs

LENGTH, WINDOW, WIDTH, ROWS = 1024, 49, 64, 12
MASKS = [(False, False), (True, False), (False, True), (True, True)]


def record(name: str, length: int, is_causal: bool, padded: bool) -> tuple[TensorRecorder, TensorRecorder]:
    """Recorders of a forward and a backward pass with one head."""
    *tensors, projection = draw_inputs(1, 1, length, width=WIDTH, rows=ROWS, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in tensors]
    lengths = torch.tensor([length - 5]) if padded else None
    forward, backward = TensorRecorder(), TensorRecorder()
    with forward:
        out = OPERATORS[name](*leaves, projection, WINDOW, is_causal=is_causal, key_lengths=lengths)
    cotangent = torch.ones_like(out)
    with backward:
        out.backward(cotangent)
    return forward, backward


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("is_causal", "padded"), MASKS)
def test_no_dense_matrix_and_no_gather_of_windows(name, is_causal, padded):
    # The tiles of a slice have two columns for each key of the window, or the features of a token: a few rows of
    # width E. The (N, N) matrix has 2^20 elements, the gather (N, W, E) has 3 * 2^20.
    for which, recorder in zip(("forward", "backward"), record(name, LENGTH, is_causal, padded), strict=True):
        assert recorder.largest >= LENGTH * WIDTH, f"{which}: the recorder missed the result itself"
        assert recorder.largest < 4 * LENGTH * WIDTH, f"{which}: {recorder.largest} elements in one tensor"


def test_the_specification_is_what_the_recorder_is_for():
    *tensors, projection = draw_inputs(1, 1, LENGTH, width=4, rows=1)
    with TensorRecorder() as recorder:
        OPERATORS["local"].naive(*tensors, projection, WINDOW)
    assert recorder.largest == LENGTH**2


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("is_causal", "padded"), MASKS)
def test_work_grows_linearly(name, is_causal, padded):
    # both past the number of blocks from which on the sums outside a tile are computed in groups
    shorter, longer = (record(name, length, is_causal, padded) for length in (6 * LENGTH, 12 * LENGTH))
    for which, short, long in zip(("forward", "backward"), shorter, longer, strict=True):
        # twice, and a margin for what is not proportional: quadratic terms would show as more than two
        assert long.total < 2.1 * short.total, which
        assert long.largest < 2.1 * short.largest, which
