"""The window's interval, counted by hand."""

from __future__ import annotations

import pytest
import torch

from scatterbrain.errors import UserError
from scatterbrain.ops.common.windows import window_bounds, window_mask


@pytest.mark.parametrize(
    ("window", "bounds"), [(0, (0, 0)), (1, (0, 1)), (2, (1, 1)), (3, (1, 2)), (7, (3, 4)), (8, (4, 4))]
)
def test_bounds(window, bounds):
    assert window_bounds(window) == bounds


@pytest.mark.parametrize("window", [-1, 2.0, "7", True, None])
def test_refuses_what_is_no_number_of_keys(window):
    with pytest.raises(UserError, match="number of keys"):
        window_bounds(window)


def test_mask_of_an_odd_window():
    expected = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(window_mask(4, 5, 3), expected)


def test_an_even_window_has_one_key_more_on_the_left():
    expected = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(window_mask(4, 4, 2), expected)


@pytest.mark.parametrize("window", [0, 1, 2, 5, 6, 11])
def test_mask_has_window_keys_away_from_the_edges(window):
    assert window_mask(40, 40, window)[15:25].sum(1).tolist() == [window] * 10


def test_a_window_larger_than_the_sequence_sees_everything():
    assert window_mask(5, 9, 18).all()
    assert not window_mask(5, 9, 16).all()


def test_more_queries_than_keys_leaves_the_last_queries_blind():
    assert window_mask(10, 4, 3).any(1).tolist() == [True] * 5 + [False] * 5
