"""Weights of a fused linear layer: LayerNorm folded into them, in the memory layout of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from scatterbrain.errors import UserError
from src.models.ops.fused_linear.patches import Patches

# Segments are padded to a multiple of this many weights: the smallest step of the kernels' inner loop.
SEGMENT_MULTIPLE = 32


class FoldedLinear(nn.Module):
    """Weights of `act(LayerNorm(x) W^T + b)` with the LayerNorm's scale and shift folded into W and b.

    LayerNorm(x) W^T + b = r (x - m) (W diag(gamma))^T + (W beta + b), with mean m and reciprocal standard deviation r
    of the row. Subtracting its own mean from each row of W diag(gamma) eliminates m: only r depends on x (README.md in
    this folder). Everything is folded in float64 and rounded once, to the dtype of `weight`.

    The weights are copies in the dtype and on the device of `weight`; build them again when it changes.

    Args:
        weight: (N, K). For `patches` K is C * kernel^2, ordered (channel, row, column) as in `F.unfold`.
        bias: (N,), None for zeros.
        norm: LayerNorm over K before the product, None for none.
        gelu: apply the exact GELU after it.
        patches: how the feature map x is cut into patches; None for rows.

    Attributes:
        weight: (N, segments, length): a segment is contiguous in x: the whole row, or for patches one row of a patch,
            kernel * C values ordered (column, channel). Padded with zeros to `length`.
        bias: (N,), or None.
        sums: (N,) sums over the rows of `weight`, zero but for rounding; None without LayerNorm.
        eps: of the LayerNorm.
        tiles: settings of the Triton kernel for these weights; None takes those of its table.

    Raises:
        UserError: shapes that do not fit.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    sums: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        norm: nn.LayerNorm | None = None,
        *,
        gelu: bool = False,
        patches: Patches | None = None,
    ) -> None:
        super().__init__()
        if weight.dim() != 2 or not weight.is_floating_point():
            raise UserError(f"weight has to be floating-point (N, K), got {weight.dtype} {tuple(weight.shape)}.")
        self.out_features, self.in_features = weight.shape
        self.patches = patches
        self.gelu = gelu
        self.normalise = norm is not None
        self.eps = norm.eps if norm is not None else 0.0
        self.tiles = None
        self._packed: torch.Tensor | None = None
        self.num_segments = 1 if patches is None else patches.kernel
        self.channels = self.in_features if patches is None else self.in_features // patches.kernel**2
        self.segment = self.in_features // self.num_segments
        if patches is not None and self.channels * patches.kernel**2 != self.in_features:
            raise UserError(f"weight {tuple(weight.shape)} has to be (N, C * {patches.kernel}^2) for such patches.")
        if norm is not None and tuple(norm.normalized_shape) != (self.in_features,):
            raise UserError(
                f"norm is a LayerNorm over {tuple(norm.normalized_shape)}, and the linear map takes "
                f"{self.in_features} values; both have to be the same."
            )
        with torch.no_grad():
            self._fold(weight.detach(), bias, norm)

    def _fold(self, weight: torch.Tensor, bias: torch.Tensor | None, norm: nn.LayerNorm | None) -> None:
        folded = weight.double()
        shift = None if bias is None else bias.double()
        if norm is not None and norm.weight is not None:
            if norm.bias is not None:
                norm_shift = folded @ norm.bias.double()
                shift = norm_shift if shift is None else shift + norm_shift
            folded = folded * norm.weight.double()
        if norm is not None:
            folded = folded - folded.mean(1, keepdim=True)
        if self.patches is not None:
            kernel = self.patches.kernel
            folded = folded.view(self.out_features, self.channels, kernel, kernel).permute(0, 2, 3, 1)
        folded = folded.reshape(self.out_features, self.num_segments, self.segment)
        folded = F.pad(folded, (0, -self.segment % SEGMENT_MULTIPLE)).to(weight.dtype)
        self.register_buffer("weight", folded.contiguous())
        self.register_buffer("bias", None if shift is None else shift.to(weight.dtype))
        # (x - m) W^T = x W^T - m sums: only rounding of W makes them nonzero, which matters for large r (flat patches)
        sums = folded.double().sum((1, 2)).to(weight.dtype) if self.normalise else None
        self.register_buffer("sums", sums)

    def convolution_weight(self) -> torch.Tensor:
        """The weights for `F.conv2d`, (N, C, kernel, kernel), channels last; a view if segments need no padding."""
        kernel = self.patches.kernel
        weight = self.weight[..., : self.segment].unflatten(-1, (kernel, self.channels))
        return weight.permute(0, 3, 1, 2)

    def matrix(self) -> torch.Tensor:
        """The weights (N, K) in the order of the constructor's argument; a view for rows."""
        if self.patches is not None:
            return self.convolution_weight().flatten(1)
        return self.weight[:, 0, : self.segment]

    def packed_matrix(self, num_rows: int) -> torch.Tensor:
        """The weights in oneDNN's memory layout, for `torch.ops.mkldnn._linear_pointwise`; a cached copy.

        Without it every call reorders them, 4 to 5 % of the time for 200 to 3,000 rows of width 384.

        Args:
            num_rows: rows of the product, which the layout may depend on; that of the first call is used.
        """
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.matrix().contiguous(), num_rows)
        return self._packed

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FoldedLinear:
        self._packed = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        # oneDNN's tensors cannot be copied or pickled
        return {**self.__dict__, "_packed": None}

    def output_shape(self, x: torch.Tensor) -> tuple[int, ...]:
        """Shape of the output for an input (..., K) or (B, height, width, C).

        Raises:
            UserError: the input does not fit the weights.
        """
        if self.patches is None:
            if x.dim() < 2 or x.shape[-1] != self.in_features:
                raise UserError(f"x {tuple(x.shape)} has to be rows (..., {self.in_features}).")
            return (*x.shape[:-1], self.out_features)
        if x.dim() != 4 or x.shape[-1] != self.channels:
            raise UserError(f"x {tuple(x.shape)} has to be a feature map (B, height, width, {self.channels}).")
        rows, columns = self.patches.grid(x.shape[1], x.shape[2])
        return (x.shape[0], rows * columns, self.out_features)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        sizes = f"{self.in_features} -> {self.out_features}, norm={self.normalise}, gelu={self.gelu}"
        return sizes if self.patches is None else f"{sizes}, {self.patches}"
