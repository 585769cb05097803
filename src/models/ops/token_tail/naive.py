"""Specification of the tail of a token stage."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def naive_token_tail(
    attended: torch.Tensor,
    value: torch.Tensor,
    projection: tuple[torch.Tensor, torch.Tensor | None],
    norm: tuple[torch.Tensor, torch.Tensor, float],
    first: tuple[torch.Tensor, torch.Tensor | None],
    second: tuple[torch.Tensor, torch.Tensor | None],
) -> torch.Tensor:
    """`x = value + attended P^T + p`, then `x + W2 gelu(W1 LayerNorm(x) + b1) + b2`, in float64.

    Args:
        attended: (..., D).
        value: (..., D).
        projection: P (D, D) and p (D,) or None.
        norm: gamma (D,), beta (D,) and eps of the LayerNorm.
        first: W1 (F, D) and b1 (F,) or None.
        second: W2 (D, F) and b2 (D,) or None.

    Returns:
        (..., D) float64.
    """

    def linear(x: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        return F.linear(x, *(None if tensor is None else tensor.double() for tensor in weights))

    gamma, beta, eps = norm
    x = value.double() + linear(attended.double(), projection)
    hidden = F.layer_norm(x, x.shape[-1:], gamma.double(), beta.double(), eps)
    return x + linear(F.gelu(linear(hidden, first)), second)
