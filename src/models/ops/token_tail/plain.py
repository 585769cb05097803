"""The tail of a token stage in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from src.models.ops.fused_linear.plain import linear_pointwise
from src.models.ops.token_tail.folded import FoldedTail


def plain_token_tail(attended: torch.Tensor, value: torch.Tensor, folded: FoldedTail) -> torch.Tensor:
    """Arguments as in `token_tail`."""
    x = linear_pointwise(attended, folded.projection, folded.bias(0)).add_(value)
    hidden = F.layer_norm(x, (folded.width,), eps=folded.eps)
    hidden = linear_pointwise(hidden, folded.first, folded.bias(1), gelu=True)
    return linear_pointwise(hidden, folded.second, folded.bias(2), residual=x)
