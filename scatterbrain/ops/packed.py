"""Packed sequences: attention over sequences of different lengths that are stored one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from scatterbrain.errors import UserError, check_whole_number
from scatterbrain.ops.clusters import landmark_attention, paired_landmark_attention
from scatterbrain.ops.common.inputs import check_tensors
from scatterbrain.ops.common.numerics import is_exporting
from scatterbrain.ops.full import full_attention
from scatterbrain.ops.local import local_attention
from scatterbrain.ops.performer import performer_attention
from scatterbrain.ops.scatterbrain import scatterbrain_attention

_OPERATORS = (
    full_attention,
    landmark_attention,
    local_attention,
    paired_landmark_attention,
    performer_attention,
    scatterbrain_attention,
)
# Options of the operators that describe padded sequences, which packed ones have no need of.
_OF_PADDED_SEQUENCES = ("key_lengths", "query_lengths", "attn_mask", "assignment")


def packed_attention(
    operator: Callable,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *sizes: torch.Tensor | int,
    cu_seqlens: torch.Tensor | Sequence[int],
    max_seqlen: int | None = None,
    **options: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Output (N, H, D) of self-attention within each of B packed sequences.

    The sequences are expanded to (B, H, L, E), L being `max_seqlen`, and the operator gets their lengths as
    `key_lengths`. So time and memory are those of B sequences of L tokens, and three copies of that size are made.
    Where lengths differ much, sort the sequences by length and call this once for each group.

    Args:
        operator: one of the operators, such as `scatterbrain.local_attention`.
        query: (N, H, E), the tokens of all sequences in their order.
        key: (N, H, E), or (N, Hkv, E) with `enable_gqa=True`.
        value: (N, H, D), or (N, Hkv, D).
        *sizes: further positional arguments of the operator: projection, window, numbers of landmarks.
        cu_seqlens: (B + 1,) integers, a tensor or a list: sequence b is the tokens from cu_seqlens[b] up to
            cu_seqlens[b + 1]. Sequences may be empty.
        max_seqlen: length L, at least that of the longest sequence. None takes it from `cu_seqlens`, which
            synchronises a GPU, and cannot be compiled or captured in a CUDA graph.
        **options: keyword arguments of the operator.

    Returns:
        (N, H, D) in the dtype of `query`. With `return_lse=True` of `landmark_attention` also log-sum-exp (N, H).
        On a GPU and compiled, where `max_seqlen` is not compared with `cu_seqlens`: nan for the tokens of a sequence
        that is longer, and for tokens of no sequence.

    Raises:
        UserError: another operator, shapes that do not fit, `cu_seqlens` that does not rise from 0 to N, `max_seqlen`
            that is too short, options of padded sequences, or what the operator raises.
    """
    if operator not in _OPERATORS:
        names = ", ".join(each.__name__ for each in _OPERATORS)
        raise UserError(f"operator={operator!r} has to be one of {names}.")
    refused = [name for name in _OF_PADDED_SEQUENCES if name in options]
    if refused:
        raise UserError(f"packed_attention takes no {refused[0]}: cu_seqlens says which tokens belong together.")
    check_tensors(query=query, key=key, value=value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3 or tensor.shape[0] != query.shape[0]:
            raise UserError(
                f"{name} has to be (tokens, H, width), with as many tokens as query {tuple(query.shape)}, got "
                f"{tuple(tensor.shape)}. Packed sequences are for self-attention."
            )
    bounds = _check_bounds(cu_seqlens, query)
    lengths = bounds.diff()
    is_checked = max_seqlen is None or not (query.is_cuda or torch.compiler.is_compiling() or is_exporting())
    if is_checked:
        longest = _check_values(bounds.tolist(), len(query))
        max_seqlen = max(1, longest) if max_seqlen is None else max_seqlen
    check_whole_number("max_seqlen", max_seqlen, 1)
    if is_checked and longest > max_seqlen:
        raise UserError(f"max_seqlen={max_seqlen} is less than the longest sequence of cu_seqlens, {longest} tokens.")

    token = torch.arange(len(query), device=query.device)
    sequence = torch.searchsorted(bounds[1:], token, right=True).clamp_max(len(lengths) - 1)
    position = token - bounds[sequence]
    place = sequence * max_seqlen + position.clamp(0, max_seqlen - 1)
    size = lengths[sequence]
    broken = None if is_checked else (size > max_seqlen) | (position < 0) | (position >= size)

    def expand(x: torch.Tensor) -> torch.Tensor:
        """Rows (B, H, L, width) of (N, H, width), zero beyond the lengths."""
        rows = x.new_zeros(len(lengths) * max_seqlen, *x.shape[1:]).index_copy(0, place, x)
        return rows.unflatten(0, (len(lengths), max_seqlen)).transpose(1, 2)

    def pack(x: torch.Tensor) -> torch.Tensor:
        """Rows (N, H, ...) of (B, H, L, ...)."""
        rows = x.transpose(1, 2).flatten(0, 1).index_select(0, place)
        return rows if broken is None else rows.masked_fill(broken.view(-1, *[1] * (rows.dim() - 1)), math.nan)

    options["key_lengths"] = lengths
    if operator is paired_landmark_attention:
        options["query_lengths"] = lengths
    out = operator(expand(query), expand(key), expand(value), *sizes, **options)
    return tuple(pack(x) for x in out) if isinstance(out, tuple) else pack(out)


def _check_bounds(cu_seqlens: torch.Tensor | Sequence[int], query: torch.Tensor) -> torch.Tensor:
    """`cu_seqlens` as int64 (B + 1,) on the device of the queries (N, H, E).

    Raises:
        UserError: it has another shape or dtype, or no sequence for the tokens.
    """
    try:
        bounds = torch.as_tensor(cu_seqlens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"cu_seqlens={cu_seqlens!r} has to be integers, as many as sequences and one.") from error
    is_integer = not (bounds.is_floating_point() or bounds.is_complex() or bounds.dtype == torch.bool)
    if bounds.dim() != 1 or not is_integer or len(bounds) < (2 if len(query) else 1):
        raise UserError(
            "cu_seqlens has to be integers of one dimension, as many as sequences and one, got "
            f"{bounds.dtype} of shape {tuple(bounds.shape)}."
        )
    return bounds.to(query.device, torch.int64)


def _check_values(bounds: list[int], num_tokens: int) -> int:
    """Length of the longest sequence, 0 for none.

    Raises:
        UserError: the bounds do not rise from 0 to the number of tokens.
    """
    lengths = [end - start for start, end in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != num_tokens or min(lengths, default=0) < 0:
        raise UserError(
            f"cu_seqlens has to rise from 0 to the number of tokens, {num_tokens}; it goes from {bounds[0]} to "
            f"{bounds[-1]}, in steps of at least {min(lengths, default=0)}."
        )
    return max(lengths, default=0)
