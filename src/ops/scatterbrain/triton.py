"""Scatterbrain attention by the fused Triton kernels."""

from __future__ import annotations

import torch

from src.ops.fused import attention


def triton_scatterbrain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection: torch.Tensor,
    window: int,
    scale: float,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Arguments as in `scatterbrain_attention`; what the kernels do is in `src/ops/fused/README.md`."""
    return attention(
        query,
        key,
        value,
        window,
        scale=scale,
        projection=projection,
        cosh=True,
        is_causal=is_causal,
        key_lengths=key_lengths,
    )
