"""The tail of a token stage: projection of the attention's output, residual of the values, and the MLP."""

from __future__ import annotations

import torch

from scatterbrain.errors import UserError
from scatterbrain.ops.common.backends import PYTORCH_AND_TRITON, check_inference_only, choose_backend, no_kernels
from src.models.ops.token_tail.folded import FoldedTail
from src.models.ops.token_tail.naive import naive_token_tail
from src.models.ops.token_tail.plain import plain_token_tail

__all__ = ["FoldedTail", "naive_token_tail", "token_tail"]


def token_tail(attended: torch.Tensor, value: torch.Tensor, folded: FoldedTail, backend: str = "auto") -> torch.Tensor:
    """`x = value + proj(attended)`, then `x + fc2(gelu(fc1(norm(x))))`, for inference only.

    Args:
        attended: (..., D), in the dtype of the weights.
        value: of the same shape; may be a slice of a wider tensor, such as the values in a fused (B, N, 3 D) tensor.
        folded: the weights.
        backend: `naive` (float64), `torch`, `triton` (CUDA) or `auto`.

    Returns:
        (..., D), contiguous.

    Raises:
        UserError: shapes, dtypes or devices that do not fit; gradients are required.
    """
    check_inference_only("token_tail", attended, value, folded.projection)
    for name, tensor in (("attended", attended), ("value", value)):
        if tensor.shape != attended.shape or tensor.dim() < 2 or tensor.shape[-1] != folded.width:
            raise UserError(
                f"attended {tuple(attended.shape)} and value {tuple(value.shape)} have to be (..., {folded.width}) of "
                "one shape."
            )
        if tensor.dtype != folded.projection.dtype or tensor.device != folded.projection.device:
            raise UserError(
                f"{name} is {tensor.dtype} on {tensor.device} and the weights are {folded.projection.dtype} on "
                f"{folded.projection.device}; convert the input, or fold the weights again after moving the model."
            )
    chosen = choose_backend(
        backend, PYTORCH_AND_TRITON, unsupported=no_kernels(attended), prefer_kernels=attended.is_cuda
    )
    if chosen == "triton":
        from src.models.ops.token_tail.triton import triton_token_tail

        return triton_token_tail(attended, value, folded)
    if chosen == "torch":
        return plain_token_tail(attended, value, folded)
    ones = torch.ones_like(folded.projection[0])
    return naive_token_tail(
        attended,
        value,
        (folded.projection, folded.bias(0)),
        (ones, torch.zeros_like(ones), folded.eps),
        (folded.first, folded.bias(1)),
        (folded.second, folded.bias(2)),
    ).to(attended.dtype)
