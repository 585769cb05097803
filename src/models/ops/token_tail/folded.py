"""The weights of a token stage's tail, its LayerNorm folded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from scatterbrain.errors import UserError


class FoldedTail(nn.Module):
    """Weights of `x = value + proj(attended)`, then `x + fc2(gelu(fc1(norm(x))))`, with the norm folded into fc1.

    Folded in float64 and rounded once, to the dtype of the weights; copies, to be built again when the layers change.

    Args:
        projection: linear layer of width D.
        norm: LayerNorm over D.
        first: linear layer from D to F.
        second: linear layer from F to D.

    Attributes:
        projection: (D, D).
        first: (F, D).
        second: (D, F).
        biases: (3, max(D, F)): of the projection, the first and the second layer, padded with zeros.
        width: D.
        hidden: F.
        eps: of the LayerNorm.
        tiles: settings of the Triton kernel for these weights; None for the default ones.

    Raises:
        UserError: widths that do not match.
    """

    projection: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    biases: torch.Tensor

    def __init__(self, projection: nn.Linear, norm: nn.LayerNorm, first: nn.Linear, second: nn.Linear) -> None:
        super().__init__()
        self.width, self.hidden, self.eps = projection.out_features, first.out_features, norm.eps
        self.tiles = None
        shapes = [tuple(layer.weight.shape) for layer in (projection, norm, first, second)]
        width, hidden = self.width, self.hidden
        if shapes != [(width, width), (width,), (hidden, width), (width, hidden)]:
            raise UserError(
                f"projection, norm, first and second have weights {shapes}; they have to be (D, D), (D,), (F, D) and "
                "(D, F)."
            )
        dtype = projection.weight.dtype
        with torch.no_grad():
            shifts = [
                layer.weight.new_zeros(layer.out_features).double() if layer.bias is None else layer.bias.double()
                for layer in (projection, first, second)
            ]
            if norm.bias is not None:
                shifts[1] = shifts[1] + first.weight.double() @ norm.bias.double()
            widest = max(width, hidden)
            biases = torch.stack([F.pad(shift, (0, widest - len(shift))) for shift in shifts]).to(dtype)
            folded = (first.weight.double() * norm.weight.double()).to(dtype)
            self.register_buffer("projection", projection.weight.detach().clone())
            self.register_buffer("first", folded)
            self.register_buffer("second", second.weight.detach().clone())
            self.register_buffer("biases", biases)

    def bias(self, which: int) -> torch.Tensor:
        """Bias of the projection (0), the first (1) or the second layer (2), a view."""
        return self.biases[which, : self.hidden if which == 1 else self.width]
