"""Two-dimensional windows against the definition, token by token."""

from __future__ import annotations

import pytest
import torch

from scatterbrain.errors import UserError
from scatterbrain.ops.common.windows import window_mask
from scatterbrain.ops.sparse.window2d import neighbourhood_mask, neighbourhood_shape, neighbourhood_support

# height, width: a token, a line, a column, prime sides, wider and higher than any patch
IMAGES = [(1, 1), (1, 17), (17, 1), (5, 5), (7, 11), (13, 6), (14, 14), (3, 40)]
SHAPES = [(1, 1), (1, 4), (3, 1), (3, 3), (2, 2), (3, 4), (4, 6), (5, 2), (7, 7), (13, 13), (40, 90)]


def brute_force(height, width, shape):
    """Offsets of the rectangle, around each token in turn."""
    mask = torch.zeros(height, width, height, width, dtype=torch.bool)
    for y in range(height):
        for x in range(width):
            for dy in range(-(shape[0] // 2), (shape[0] + 1) // 2):
                for dx in range(-(shape[1] // 2), (shape[1] + 1) // 2):
                    if 0 <= y + dy < height and 0 <= x + dx < width:
                        mask[y, x, y + dy, x + dx] = True
    return mask.reshape(height * width, height * width)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("height", "width"), IMAGES)
def test_mask_and_support_are_the_definition_once(height, width, shape):
    length = height * width
    expected = brute_force(height, width, shape)
    assert torch.equal(neighbourhood_mask(height, width, shape), expected)
    support = neighbourhood_support(height, width, shape)
    assert torch.equal(support.multiplicity(length, length), expected.long()[None])
    (only,) = support.rounds
    assert only.query_index.shape[:2] == only.key_index.shape[:2]
    assert torch.equal(only.query_index[only.query_index >= 0].sort().values, torch.arange(length))
    for keys in only.key_index[0]:
        keys = keys[keys >= 0]
        assert len(keys.unique()) == len(keys)


def test_borders_by_hand():
    # 3 x 4 tokens, a rectangle of 2 x 3: a line above, a token on either side
    mask = neighbourhood_mask(3, 4, (2, 3))
    seen = [row.nonzero().flatten().tolist() for row in mask]
    assert seen[0] == [0, 1]
    assert seen[3] == [2, 3]
    assert seen[5] == [0, 1, 2, 4, 5, 6]
    assert seen[8] == [4, 5, 8, 9]
    assert seen[11] == [6, 7, 10, 11]


@pytest.mark.parametrize("window", [1, 2, 5, 8])
def test_an_image_of_one_line_has_the_window_of_a_sequence(window):
    expected = window_mask(30, 30, window)
    for height, width, shape in ((1, 30, (3, window)), (30, 1, (window, 2))):
        assert torch.equal(neighbourhood_support(height, width, shape).dense(30, 30)[0], expected)


@pytest.mark.parametrize(("side", "num_keys"), [(56, 98), (56, 49), (28, 24), (28, 12)])
def test_tiles_hold_few_keys_and_the_mask_is_shared(side, num_keys):
    shape = neighbourhood_shape(num_keys)
    (only,) = neighbourhood_support(side, side, shape).rounds
    tiles, queries, keys = *only.query_index.shape[1:], only.key_index.shape[-1]
    assert only.mask.shape == (1, 1, queries, keys)
    # patches too large compute pairs in vain, patches too small gather a key many times
    assert tiles * queries * keys <= 4.5 * side**2 * shape[0] * shape[1]
    assert tiles * keys <= 5 * side**2


@pytest.mark.parametrize(
    ("num_keys", "shape"),
    [
        (1, (1, 1)),
        (2, (1, 2)),
        (3, (1, 3)),
        (5, (2, 2)),
        (7, (2, 3)),
        (8, (2, 4)),
        (12, (3, 4)),
        (13, (3, 4)),
        (23, (4, 5)),
        (24, (4, 6)),
        (49, (7, 7)),
        (97, (9, 10)),
        (98, (9, 10)),
    ],
)
def test_shapes(num_keys, shape):
    assert neighbourhood_shape(num_keys) == shape


def test_shapes_follow_their_rule():
    for num_keys in range(1, 200):
        sides = range(1, num_keys + 1)
        fit = [(h, w) for h in sides for w in range(h, h + 3) if h * w <= num_keys]
        best = max(fit, key=lambda shape: (shape[0] * shape[1], -shape[1] + shape[0]))
        assert neighbourhood_shape(num_keys) == best


@pytest.mark.parametrize("num_keys", [0, -3, 2.0, True])
def test_refuses_what_is_no_number_of_keys(num_keys):
    with pytest.raises(UserError, match="num_keys"):
        neighbourhood_shape(num_keys)


@pytest.mark.parametrize("function", [neighbourhood_mask, neighbourhood_support])
@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ((0, 4, (3, 3)), "height=0"),
        ((4, 2.5, (3, 3)), "width=2.5"),
        ((4, 4, (0, 3)), "shape=0"),
        ((4, 4, (3, "3")), "shape=3"),
        ((4, 4, 9), "shape=9"),
        ((4, 4, (1, 2, 3)), r"shape=\(1, 2, 3\)"),
    ],
)
def test_refuses_sizes(function, arguments, culprit):
    with pytest.raises(UserError, match=culprit):
        function(*arguments)
