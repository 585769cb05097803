"""Tensors that an attention was not made for: another width is refused, a very different length warned of once."""

from __future__ import annotations

import warnings

import pytest
import torch

from scatterbrain.attention import ATTENTIONS, create_attention
from scatterbrain.errors import UserError

LENGTH, WIDTH = 256, 8
BUDGETED = [name for name, kind in ATTENTIONS.items() if kind.fit is not None]
ANY_WIDTH = ("local", "bs-", "cluster", "sbcluster", "pairedcluster", "sbpairedcluster", "querycluster")
FLOORS = ("strided", "random-keys")
WITH_WIDTH = [name for name in BUDGETED if not name.startswith((*ANY_WIDTH, *FLOORS))]


def create(name: str) -> torch.nn.Module:
    return create_attention(name, LENGTH, WIDTH, memory_fraction=1 / 8)


@pytest.mark.parametrize("name", WITH_WIDTH)
def test_refuses_another_width(name):
    with pytest.raises(UserError, match=r"made for heads of width 8, .*\(1, 256, 2, 12\).*dim_heads=12"):
        create(name)(*(torch.randn(1, LENGTH, 2, 12) for _ in range(3)))


@pytest.mark.parametrize("shape", [(1, 100, 2, WIDTH), (1, 4, LENGTH, WIDTH)])
@pytest.mark.parametrize("name", BUDGETED)
def test_warns_once_of_another_length(name, shape):
    attention = create(name)
    tensors = [torch.randn(shape) for _ in range(3)]
    with pytest.warns(UserWarning, match=rf"chosen for 256 keys, and it got {shape[1]}"):
        attention(*tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(*tensors)


@pytest.mark.parametrize("length", [144, 256, 484])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_does_not_warn_of_a_similar_length(name, length):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create(name)(*(torch.randn(1, length, 2, WIDTH) for _ in range(3)))
