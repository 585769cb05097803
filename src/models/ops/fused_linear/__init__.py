"""A linear layer fused with LayerNorm before it, GELU and a residual after it, over rows or overlapping patches."""

from __future__ import annotations

import torch

from scatterbrain.errors import UserError
from scatterbrain.ops.common.backends import PYTORCH_AND_TRITON, check_inference_only, choose_backend, no_kernels
from src.models.ops.fused_linear.folded import FoldedLinear
from src.models.ops.fused_linear.naive import naive_fused_linear
from src.models.ops.fused_linear.patches import Patches
from src.models.ops.fused_linear.plain import plain_fused_linear

__all__ = ["FoldedLinear", "Patches", "fused_linear", "fused_linear_with_statistics", "naive_fused_linear"]


def fused_linear(
    x: torch.Tensor,
    folded: FoldedLinear,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    statistics: torch.Tensor | None = None,
) -> torch.Tensor:
    """`act(LayerNorm(x) W^T + b) + residual`, for inference only. See README.md in this folder.

    Args:
        x: rows (..., K), or for weights over patches a feature map (B, height, width, C), in the dtype of the weights.
            No backend copies rows with a contiguous last dimension and one stride, nor a feature map that is contiguous
            in (height, width, C) order.
        folded: the weights.
        residual: broadcastable to (..., N), such as a position table (patches, N) for all samples; added last, after
            GELU.
        out: tensor of the output's shape to write to, with a contiguous last dimension, such as `tokens[:, 1:]`; None
            allocates one. It may be `residual` itself; it must not overlap x.
        backend: `naive` (float64), `torch`, `triton` (CUDA) or `auto`.
        statistics: of the rows of x, as `fused_linear_with_statistics` returned them with x; None to compute them.

    Returns:
        (..., N) for rows, (B, patches, N) for patches; `out` if it was given.

    Raises:
        UserError: shapes, dtypes or devices that do not fit; gradients are required.
    """
    return _fused_linear(x, folded, residual, out, backend, statistics, with_statistics=False)[0]


def fused_linear_with_statistics(
    x: torch.Tensor,
    folded: FoldedLinear,
    residual: torch.Tensor | None = None,
    backend: str = "auto",
    statistics: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`fused_linear`, and the statistics of the output's rows for the LayerNorm of the next map.

    The kernel that computes the output also computes these, which saves the next map a pass over it.

    Returns:
        The output, and means and sums of squares of its rows for the `statistics` of a map of that very output; None
        where the backend of the next map computes them itself.
    """
    return _fused_linear(x, folded, residual, None, backend, statistics, with_statistics=True)


def _fused_linear(
    x: torch.Tensor,
    folded: FoldedLinear,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
    backend: str,
    statistics: torch.Tensor | None,
    with_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    shape = folded.output_shape(x)
    check_inference_only("fused_linear", x, folded.weight, residual)
    for name, tensor in (("x", x), ("residual", residual), ("out", out)):
        if tensor is not None and (tensor.dtype != folded.weight.dtype or tensor.device != folded.weight.device):
            raise UserError(
                f"{name} is {tensor.dtype} on {tensor.device} and the weights are {folded.weight.dtype} on "
                f"{folded.weight.device}; convert the input, or fold the weights again after moving the model."
            )
    if residual is not None and residual.shape != shape:
        last = shape[max(0, len(shape) - residual.dim()) :]
        if len(last) < residual.dim() or any(
            have not in (1, want) for have, want in zip(residual.shape, last, strict=True)
        ):
            raise UserError(f"residual {tuple(residual.shape)} does not expand to the output, {shape}.")
        residual = residual.expand(shape)
    if out is not None and out.shape != shape:
        raise UserError(f"out {tuple(out.shape)} has to be of the shape of the output, {shape}.")
    if statistics is not None and (
        statistics.dim() != 3 or statistics.shape[1:] != (2, x.numel() // folded.in_features) or folded.patches
    ):
        raise UserError(
            f"statistics {tuple(statistics.shape)} are not those of x {tuple(x.shape)}. Give what "
            "fused_linear_with_statistics returned with x, or None."
        )

    chosen = choose_backend(backend, PYTORCH_AND_TRITON, unsupported=no_kernels(x), prefer_kernels=x.is_cuda)
    if chosen == "triton" and backend == "auto" and x.dtype == torch.float32 and folded.patches is None:
        chosen = "torch"  # cuBLAS is faster than Triton without tensor cores, but would have to materialise patches
    if chosen == "triton":
        from src.models.ops.fused_linear.triton import triton_fused_linear

        return triton_fused_linear(x, folded, residual, out, statistics, with_statistics)
    if chosen == "torch":
        return plain_fused_linear(x, folded, residual, out), None
    y = naive_fused_linear(
        x,
        folded.matrix(),
        folded.bias,
        normalise=folded.normalise,
        eps=folded.eps,
        gelu=folded.gelu,
        patches=folded.patches,
        residual=residual,
    ).to(x.dtype)
    return (y if out is None else out.copy_(y)), None
