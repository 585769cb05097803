"""Numbers and small routines that the PyTorch implementations share."""

from __future__ import annotations

import contextlib

import torch

# Stand-in for the maximum over no key: finite, so that (-inf) - FLOOR is -inf and not nan.
FLOOR = -1e30

# How far the maximum that a query's exponents are taken relative to may lie below the largest bound of its features.
# Why it is needed: the bound of the low-rank part also covers keys inside the window, where exp(s q.k) replaces
# phi(q).phi(k). A feature exceeds the exact weight by at most exp(|w|^2 / 2), w its random projection: exp(32) is
# typical at E = 64. With 60 of slack and the 87 down to float32's smallest number, the weights of a window survive
# |w|^2 up to 294.
MAXIMUM_SLACK = 60.0


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of statistics and sums: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def at_most(size: int, length: int) -> int:
    """`size`, or `length` if that is less; unlike `min`, an integer also where export has a symbol for the length."""
    return length if size > length else size


def tile_budget(x: torch.Tensor) -> int:
    """Number of elements of the tiles that are computed at a time: a CPU's cache; on a GPU, few kernel launches."""
    return 1 << 18 if x.device.type == "cpu" else 1 << 26


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of (G, N, ...) at (G, n) positions: (G, n, ...), many times faster than `gather` with expanded indices."""
    offset = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (index + offset).flatten()).unflatten(0, index.shape)


def is_exporting() -> bool:
    """Whether the call is recorded for other inputs: by `torch.export`, `torch.jit.trace` or the ONNX exporter."""
    if torch.jit.is_tracing():
        return True
    # torch 2.6 cannot tell export from compilation
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()


def split_rows(x: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """Slices of at most `size` along the first dimension; under export `x` as a whole.

    A recorded loop would fix the number of slices, and with it the batch size.
    """
    return (x,) if is_exporting() else x.split(size)


def no_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Context without autocast on the device of `x`; the meta device has none."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def stable_argsort(x: torch.Tensor) -> torch.Tensor:
    """Positions that sort the last dimension in ascending order; equal entries keep their order."""
    if torch.onnx.is_in_onnx_export():
        # ONNX has no stable sort, but its TopK returns the lower position of equal entries first
        return x.topk(x.shape[-1], largest=False).indices
    return x.argsort(dim=-1, stable=True)
