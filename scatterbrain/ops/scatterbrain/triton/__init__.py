"""Fused attention for CUDA: window, random features, or both, forward and backward. See README.md."""

from __future__ import annotations

import torch

from scatterbrain.errors import UserError
from scatterbrain.ops.common.backends import (
    PYTORCH_AND_TRITON,
    choose_backend,
    no_kernels,
    too_large,
    with_near_rows,
)
from scatterbrain.ops.common.calls import CALLS
from scatterbrain.ops.common.inputs import VisibleRows, check_inputs, check_window, default_scale, visible_rows

# With wider heads or more features, tiles no longer fit the registers and shared memory of an SM.
MAX_WIDTH = 128
MAX_FEATURES = 256
# From this length on, full attention is faster than plain PyTorch with more features than that.
LONG_SEQUENCE = 16384
# Elements of the queries up to which the kernels round a float32 projection themselves, which saves a launch. With more
# a launch costs less than what each tile takes to round it.
MAX_UNCONVERTED = 1 << 22


def unsupported(
    query: torch.Tensor,
    value: torch.Tensor,
    projection: torch.Tensor | None = None,
    cosh: bool = False,
    dropout_p: float = 0.0,
    attn_mask: torch.Tensor | None = None,
) -> str | None:
    """Why the fused kernels cannot run a call; None where they can.

    Args:
        query: (B, H, T, E).
        value: (B, H, S, D).
        projection: random projection (R, E) or None.
        cosh: each row of the projection gives two features.
        dropout_p: probability of dropping a weight.
        attn_mask: mask of the keys or None.
    """
    reason = no_kernels(query) or too_large(query, value)
    if reason is not None:
        return reason
    width = max(query.shape[3], value.shape[3])
    if width > MAX_WIDTH:
        return f"it takes heads of a width up to {MAX_WIDTH}, and these have {width}"
    if projection is not None:
        features = projection.shape[0] * (2 if cosh else 1)
        if features > MAX_FEATURES:
            return f"it takes up to {MAX_FEATURES} random features, and these are {features}"
        if projection.requires_grad and torch.is_grad_enabled():
            return "it has no gradient for the projection"
    if dropout_p > 0:
        return "it has no dropout"
    if attn_mask is not None:
        return "it takes key_lengths and is_causal, and no attn_mask"
    return None


def check_speed(query: torch.Tensor, key: torch.Tensor, projection: torch.Tensor) -> None:
    """Check that the choice of a backend does not fall back to one that is slower than full attention.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        projection: random projections (R, E), each of which gives two features.

    Raises:
        UserError: a long sequence on CUDA, and more features than the kernels take.
    """
    features, length = 2 * projection.shape[0], max(query.shape[2], key.shape[2])
    if query.is_cuda and features > MAX_FEATURES and length >= LONG_SEQUENCE:
        raise UserError(
            f"{features} random features over {length} tokens are slower than full attention on a GPU: the kernels "
            f"take up to {MAX_FEATURES} features. Choose landmarks (landmark_attention, attention sbcluster), "
            "whose kernels take 1024 landmarks, or fewer features; backend='torch' runs this in plain PyTorch."
        )


def is_fast(
    query: torch.Tensor, value: torch.Tensor, projection: torch.Tensor | None = None, cosh: bool = False
) -> bool:
    """Whether `backend="auto"` should take the fused kernels, where they can run.

    Not in the interpreter, and not where the tiles exceed the registers by far: wide ones of float32 in full precision,
    without tensor cores.

    Args:
        query: (B, H, T, E).
        value: (B, H, S, D).
        projection: random projections (R, E) or None.
        cosh: each random projection gives two features.
    """
    if not query.is_cuda:
        return False
    if query.dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32:
        return True
    features = 0 if projection is None else projection.shape[0] * (2 if cosh else 1)
    return max(query.shape[3], value.shape[3], features) <= 64


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    *,
    scale: float,
    projection: torch.Tensor | None = None,
    cosh: bool = False,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Exact weights inside a window, random-feature weights outside it, by fused kernels.

    Args:
        query: (B, H, T, E); slices of a fused qkv are read without a copy.
        key: (B, H, S, E).
        value: (B, H, S, D).
        window: width W; 0 for no window.
        scale: softmax scale.
        projection: random projection (R, E), rounded to the dtype of query; None for no low-rank part.
        cosh: take each row of the projection with both signs.
        is_causal: hide the keys j > i.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].
        eps: added to the normaliser; without window and causality only.

    Returns:
        (B, H, T, D) in the dtype of `query`, contiguous as (B, T, H, D); zero for a query that sees no key.
    """
    from scatterbrain.ops.scatterbrain.triton.operator import attend

    statistics = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    # The kernels skip keys beyond the lengths. But a product with zeros does not hide nan: later keys of a tile would
    # reach its earlier queries, and padded queries the gradients of all keys.
    if is_causal or (statistics and key_lengths is not None):
        seen_in = window if projection is None else None
        rows = visible_rows(query, key, value, scale, is_causal, key_lengths, seen_in)
    else:
        rows = VisibleRows(query, key, value, None)
    tensors = _kernel_inputs(*rows.tensors(), projection, key_lengths)
    return rows.mark(attend(*tensors, window, scale, cosh, is_causal, eps, statistics))[0]


def remember(
    known_as: tuple,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection: torch.Tensor,
    window: int,
    scale: float,
    is_causal: bool,
) -> None:
    """Let calls that are like a checked one run the kernels at once, if these take its tensors as they are.

    Args:
        known_as: key of the call in `CALLS`.
        query: (B, H, T, E).
        key: (B, H, S, E).
        value: (B, H, S, D).
        projection: random projection (R, E), each row taken with both signs.
        window: width W.
        scale: softmax scale.
        is_causal: hide the keys j > i.
    """
    from scatterbrain.ops.common.passes import Call
    from scatterbrain.ops.scatterbrain.triton.operator import OPERATOR

    tensors = _kernel_inputs(query, key, value, projection, None)
    is_given = all(x is y for x, y in zip(tensors, (query, key, value), strict=False)) and projection.is_contiguous()
    if is_given and not is_causal:
        records = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        CALLS[known_as] = Call(OPERATOR, tensors, (window, scale, True, False, 0.0, records), records)


@torch.no_grad()
def count_fallback_tiles(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection: torch.Tensor,
    window: int,
    *,
    scale: float | None = None,
    key_lengths: torch.Tensor | None = None,
) -> int:
    """Number of tiles of queries that the fused kernels compute again from pairs, which takes longer, see README.md.

    Args:
        query: (B, H, T, E), where the kernels run.
        key: (B, H, S, E).
        value: (B, H, S, D).
        projection: random projection (R, E); each row is taken with both signs.
        window: width W >= 1.
        scale: softmax scale; None is E ** -0.5.
        key_lengths: (B,) integers; hide the keys j >= key_lengths[b].

    Raises:
        UserError: the kernels do not run here, or not for such inputs.
    """
    query, key, value, key_lengths = check_inputs(query, key, value, key_lengths, projection)
    check_window(window)
    choose_backend("triton", PYTORCH_AND_TRITON, unsupported=unsupported(query, value, projection, cosh=True))
    from scatterbrain.ops.common.triton_functions import device_of
    from scatterbrain.ops.scatterbrain.triton.operator import read_statistics, run_forward

    tensors = _kernel_inputs(query, key, value, projection, key_lengths)
    arguments = (*tensors, window, default_scale(query, scale), True, False)
    with device_of(query):
        _, statistics = run_forward(*arguments, 0.0, True)
    return int(read_statistics(statistics, *arguments)["fallback_flags"].sum())


def _kernel_inputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The tensors with a contiguous last dimension, the projection in float32 or the dtype of the queries."""
    query, key, value = (with_near_rows(x) for x in (query, key, value))
    if projection is not None:
        if projection.dtype != torch.float32 or query.numel() > MAX_UNCONVERTED:
            projection = projection.to(query.dtype)
        projection = projection.detach().contiguous()
    if key_lengths is not None:
        key_lengths = key_lengths.to(query.device).contiguous()
    return query, key, value, projection, key_lengths
