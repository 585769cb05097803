"""Specification of the fused linear layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from src.models.ops.fused_linear.patches import Patches


def naive_fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    normalise: bool = False,
    gamma: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    eps: float = 1e-5,
    gelu: bool = False,
    patches: Patches | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`act(LayerNorm(x) W^T + b) + residual` in float64, with materialised patches.

    Args:
        x: rows (..., K), or for `patches` a feature map (B, height, width, C).
        weight: (N, K); for `patches` K is C * kernel^2, ordered (channel, row, column) as in `F.unfold`.
        bias: (N,).
        normalise: normalise each row of length K before the product. Padding counts as zeros.
        gamma: (K,) scale of the LayerNorm, None for ones.
        beta: (K,) shift of the LayerNorm, None for zeros.
        eps: added to the variance.
        gelu: apply the exact GELU x (1 + erf(x / sqrt 2)) / 2.
        patches: how the feature map is cut; None for rows.
        residual: broadcastable to (..., N); added last.

    Returns:
        (..., N) for rows, (B, number of patches, N) for patches, float64.
    """
    x, weight = x.double(), weight.double()
    bias, gamma, beta, residual = (
        None if tensor is None else tensor.double() for tensor in (bias, gamma, beta, residual)
    )
    if patches is not None:
        x = F.unfold(x.permute(0, 3, 1, 2), patches.kernel, stride=patches.stride, padding=patches.padding)
        x = x.transpose(1, 2)
    if normalise:
        x = F.layer_norm(x, x.shape[-1:], gamma, beta, eps)
    y = F.linear(x, weight, bias)
    if gelu:
        y = F.gelu(y)
    return y if residual is None else y + residual
