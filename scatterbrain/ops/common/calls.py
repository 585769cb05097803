"""Calls of the fused operators that have been checked: those that are alike launch at once. Needs no triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from scatterbrain.ops.common.backends import is_interpreted

# Types of tensors that dispatch nothing themselves.
PLAIN_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
# Types of options that are compared by value, and whose values do not change.
PLAIN_OPTIONS = frozenset((bool, int, float, str, type(None)))


class Cache(dict):
    """Results by key, at most `size` of them: lengths of sequences may differ from call to call.

    Args:
        size: number of results past which all are dropped.
    """

    def __init__(self, size: int = 1024) -> None:
        super().__init__()
        self.size = size

    def __setitem__(self, key: Any, value: Any) -> None:
        if len(self) >= self.size:
            self.clear()
        super().__setitem__(key, value)


# What runs a call again, by all that its checks and kernels depend on, see `key_of_call`; None where it no longer can.
CALLS: Cache = Cache()


def needs_dispatcher(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether a call has to go by its `torch.library` operator: `torch.compile`, or a tensor subclass."""
    return torch.compiler.is_compiling() or any([x is not None and type(x) not in PLAIN_TENSORS for x in tensors])


def call_key(*tensors: torch.Tensor | None, tokens_first: bool = False) -> tuple:
    """What a `LaunchSequence` depends on of these tensors: shapes, strides, dtypes, device, and alignment.

    Args:
        *tensors: arguments of a call.
        tokens_first: those of four dimensions are (B, N, H, E); the key is that of (B, H, N, E).
    """
    if tokens_first:
        return tuple([None if x is None else (*_heads_first(x), x.dtype, x.device, x.data_ptr() & 15) for x in tensors])
    return tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15) for x in tensors])


def _heads_first(x: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of the transpose (B, H, N, E) of (B, N, H, E); of another number of dimensions those of `x`."""
    shape, strides = x.shape, x.stride()
    if len(shape) != 4:
        return shape, strides
    return (shape[0], shape[2], shape[1], shape[3]), (strides[0], strides[2], strides[1], strides[3])


def key_of_call(
    operator: Callable, tensors: tuple[torch.Tensor, ...], options: tuple, tiles: Any, tokens_first: bool = False
) -> tuple | None:
    """What checks and kernels of a call depend on; None for calls that are checked each time.

    These are calls under `torch.compile`, of tensor subclasses, where no kernels run, or on a device that is not the
    current one, and those with an option that is not of a plain type.

    Args:
        operator: that is called.
        tensors: query, key and value, and others, which take part in no gradient.
        options: all other arguments. Their types belong to the key: 1, 1.0 and True are equal.
        tiles: tile settings that replace those of the table, or None.
        tokens_first: query, key and value are (B, N, H, E); the key is that of (B, H, N, E).
    """
    if torch.compiler.is_compiling() or not PLAIN_TENSORS.issuperset(map(type, tensors)):
        return None
    query = tensors[0]
    if query.is_cuda:
        if query.get_device() != torch.cuda.current_device():
            return None
    elif not is_interpreted():
        return None
    types = tuple(map(type, options))
    if not PLAIN_OPTIONS.issuperset(types):
        return None
    records = False
    if torch.is_grad_enabled():
        for x in tensors[3:]:
            if x.requires_grad:
                return None
        records = query.requires_grad or tensors[1].requires_grad or tensors[2].requires_grad
    rounds = query.dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32
    try:
        layouts = call_key(*tensors, tokens_first=tokens_first)
    except RuntimeError:  # under a transform such as vmap, tensors have no memory
        return None
    return operator, layouts, options, types, records, rounds, tiles


def run_again(
    operator: Callable, tensors: tuple[torch.Tensor, ...], options: tuple, tiles: Any, tokens_first: bool = False
) -> tuple[torch.Tensor | None, tuple | None]:
    """Output of a call that is like one that has been checked, or None; and its key in `CALLS`.

    Arguments as in `key_of_call`; with `tokens_first` the output is (B, T, H, D).
    """
    key = key_of_call(operator, tensors, options, tiles, tokens_first)
    call = None if key is None else CALLS.get(key)
    return (None if call is None else call(*tensors, tokens_first=tokens_first)), key
