r"""Positive random features of the softmax kernel, in log space.

For rows w ~ N(0, I), `E[exp(w.x - |x|^2 / 2) exp(w.y - |y|^2 / 2)] = exp(x.y)` (Choromanski et al., "Rethinking
Attention with Performers", ICLR 2021, lemma 1). With x = sqrt(s) q and y = sqrt(s) k, M features estimate the
softmax kernel exp(s q.k) without bias:

    phi(x)_m = exp(sqrt(s) w_m.x - s |x|^2 / 2) / sqrt(M)

The cosh form (ibid., lemma 1, "hyperbolic") takes each row with both signs, so R rows give M = 2 R features and
less variance. The features are returned as logarithms: they span hundreds of orders of magnitude, and whoever
sums them has to subtract a maximum first.
"""

from __future__ import annotations

import math

import torch


def num_features(projection: torch.Tensor, cosh: bool) -> int:
    """Number of features M that the rows of `projection` (R, E) give."""
    return projection.shape[0] * (2 if cosh else 1)


def log_softmax_features(x: torch.Tensor, projection: torch.Tensor, scale: float, cosh: bool) -> torch.Tensor:
    """Logarithm of the positive random features of queries or keys.

    Args:
        x: queries or keys (..., N, E).
        projection: rows (R, E).
        scale: softmax scale s.
        cosh: take each row with both signs.

    Returns:
        (..., N, M) with M = R, or 2 R with `cosh`, in the dtype of `x`. `1 / sqrt(M)` is included.
    """
    rows = projection.to(x.dtype) * math.sqrt(scale)
    if cosh:
        rows = torch.cat([rows, -rows])
    # log(1 / sqrt(M)) joins the norm so that no further pass over the features is needed
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() * (scale / 2)
    return (x @ rows.transpose(-2, -1)).sub_(norm + math.log(len(rows)) / 2)
