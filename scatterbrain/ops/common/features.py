r"""Positive random features of the softmax kernel, in log space.

For random projections w ~ N(0, I), `E[exp(w.x - |x|^2 / 2) exp(w.y - |y|^2 / 2)] = exp(x.y)` (Choromanski et al.,
"Rethinking Attention with Performers", ICLR 2021, lemma 1). With x = sqrt(s) q and y = sqrt(s) k, M features estimate
the softmax kernel exp(s q.k) without bias:

    phi(x)_m = exp(sqrt(s) w_m.x - s |x|^2 / 2) / sqrt(M)

The hyperbolic (cosh) features (ibid., lemma 1) take each random projection with both signs: R projections give M = 2 R
features, with less variance. Features are returned as logarithms: they span hundreds of orders of magnitude, so a
maximum is subtracted before they are summed.

The variance of the estimate grows as exp(s |q + k|^2): for one w ~ N(0, I), relative to the square of the kernel,

    E[(phi(q).phi(k))^2] / exp(2 s q.k) = exp(s |q + k|^2)

and |q + k| can be made small without changing softmax attention (`centre_and_balance`): the attention is the same for
keys k - c, since exp(-s q.c) is a factor of the query that cancels in the normalised result, and for M q and M^-T k.
"""

from __future__ import annotations

import math

import torch

from scatterbrain.errors import UserError, did_you_mean
from scatterbrain.ops.common.inputs import query_lengths, visible_keys
from scatterbrain.ops.common.numerics import accumulation_dtype, no_autocast

CENTRES = ("none", "keys", "both")


def num_features(projection: torch.Tensor, cosh: bool) -> int:
    """Number of features M of the random projections (R, E): R, or 2 R with `cosh`."""
    return projection.shape[0] * (2 if cosh else 1)


def log_softmax_features(x: torch.Tensor, projection: torch.Tensor, scale: float, cosh: bool) -> torch.Tensor:
    """Logarithms of the positive random features of queries or keys.

    Args:
        x: queries or keys (..., N, E).
        projection: random projections (R, E).
        scale: softmax scale s.
        cosh: take each random projection with both signs.

    Returns:
        (..., N, M) with M = R, or 2 R with `cosh`, in the dtype of `x`. `1 / sqrt(M)` is included.
    """
    rows = projection.to(x.dtype) * math.sqrt(scale)
    if cosh:
        rows = torch.cat([rows, -rows])
    # log(1 / sqrt(M)) is added to the norm: one pass less over the features
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() * (scale / 2)
    return (x @ rows.transpose(-2, -1)).sub_(norm + math.log(len(rows)) / 2)


def check_centre(centre: str) -> None:
    """Check that `centre` is one of `CENTRES`.

    Raises:
        UserError: it is not.
    """
    if centre not in CENTRES:
        raise UserError(f"centre='{centre}' is unknown. {did_you_mean(centre, CENTRES)}")


def centre_and_balance(
    query: torch.Tensor,
    key: torch.Tensor,
    centre: str = "none",
    balance: bool = False,
    key_lengths: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of the same softmax attention whose random features have less variance.

    With means over the tokens of a sequence,

        q' = M^T q        k' = M^-1 k - c        c = M^-1 mean(k) + M^T mean(q), or the first term, or 0
        q'.k' = q.k - q'.c

    The last term is the same for all keys of a query, so softmax attention does not change; the estimate of exp(s q.k)
    stays unbiased up to that factor of the query, which the exact weights share.

    Centring: the c of `both` minimises the mean of |q' + k'|^2 over all pairs. Centring the queries shifts the keys:
    in exp(s q.k) = exp(s (q - m).k) exp(s m.k), m = mean(q), the last factor is a weight of the key; features and
    weight together are the features of the keys k - m, up to a factor of the query and a constant.

    Balancing: M M^T is the matrix P with P C_q P = C_k, C the second moments after centring, which minimises that mean
    among all matrices. It belongs to the dense exponential features (Likhosherstov et al.,
    "FAVOR#: Sharp Attention Kernel Approximations via New Classes of Positive Random Features", 2023), without their
    further parameters. M is P's Cholesky factor, and a constant for autograd: the estimate is unbiased for any M.
    Gradients flow through the means.

    Statistics are taken over the visible keys, and, where there are as many queries as keys, over the queries at their
    positions, else over all queries.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E).
        centre: `none`, `keys` or `both`.
        balance: compute M; without it, M is the identity.
        key_lengths: (B,) integers; the keys j >= key_lengths[b] are hidden. None hides none.
        attn_mask: boolean (B, S), false for hidden keys. None hides none.

    Returns:
        Queries and keys of the same shapes and dtypes.

    Raises:
        UserError: unknown `centre`.
    """
    check_centre(centre)
    if centre == "none" and not balance:
        return query, key
    dtype = query.dtype
    key_mask = visible_keys(key_lengths, attn_mask, key.shape[2])
    query_mask = query_lengths(query, key, key_mask)
    with no_autocast(query):
        q, k = (x.to(accumulation_dtype(dtype)) for x in (query, key))
        key_mean = torch.zeros_like(k[:, :, :1]) if centre == "none" else _visible_mean(k, key_mask)
        query_mean = _visible_mean(q, query_mask) if centre == "both" else torch.zeros_like(q[:, :, :1])
        k = k - key_mean
        if balance:
            moments = _second_moment(q - query_mean, query_mask), _second_moment(k, key_mask)
            matrix, inverse = (x.to(q.dtype) for x in balancing(*moments))
            q, k, query_mean = q @ matrix, k @ inverse, query_mean @ matrix
        k = k - query_mean
        return q.to(dtype) if balance else query, k.to(dtype)


# Added to second moments, relative to the mean of their diagonals, for directions in which few tokens vary, or none.
RIDGE = 1e-3


@torch.no_grad()
def balancing(query_moment: torch.Tensor, key_moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices that give queries and keys the same second moment and preserve their products.

    With C_q = L L^T and L^T C_k L = U D U^T, the solution of P C_q P = C_k is P = L^-T U D^(1/2) U^T L^-1; it minimises
    tr(P C_q) + tr(P^-1 C_k).

    Args:
        query_moment: C_q (..., E, E), mean of q q^T.
        key_moment: C_k (..., E, E), mean of k k^T.

    Returns:
        M and M^-T, (..., E, E) float64, for row vectors: q M and k M^-T. `RIDGE` makes them finite for any moments;
        they are the identity where a moment is zero or not finite.
    """
    moments = [query_moment.double(), key_moment.double()]
    identity = torch.eye(query_moment.shape[-1], dtype=torch.float64, device=query_moment.device)
    sizes = [x.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] for x in moments]
    usable = (sizes[0] > 0) & (sizes[1] > 0) & torch.isfinite(sizes[0] + sizes[1])
    sizes = [torch.where(usable, size, 1.0) for size in sizes]
    query_moment, key_moment = (
        torch.where(usable, x / size + RIDGE * identity, identity) for x, size in zip(moments, sizes, strict=True)
    )
    lower = torch.linalg.cholesky(query_moment)
    values, vectors = torch.linalg.eigh(lower.transpose(-2, -1) @ key_moment @ lower)
    half = torch.linalg.solve_triangular(lower.transpose(-2, -1), vectors, upper=True)
    product = (half * values.clamp_min(RIDGE**2).sqrt().unsqueeze(-2)) @ half.transpose(-2, -1)
    # the Cholesky factor is unique, unlike U: the same features on every machine
    matrix = torch.linalg.cholesky(product)
    inverse = torch.linalg.solve_triangular(matrix, identity.expand_as(matrix), upper=False).transpose(-2, -1)
    size = (sizes[1] / sizes[0]) ** 0.25
    return matrix * size, inverse / size


def _second_moment(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of x x^T over the tokens of x (B, H, N, E) that `mask` (B, N) shows: (B, H, E, E)."""
    x = x.detach()
    if mask is None:
        return x.transpose(-2, -1) @ x / x.shape[2]
    x = x.masked_fill(~mask[:, None, :, None], 0.0)
    return x.transpose(-2, -1) @ x / _count(x, mask)


def _visible_mean(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of x (B, H, N, E) over the tokens that `mask` (B, N) shows: (B, H, 1, E), zero over none."""
    if mask is None:
        return x.mean(2, keepdim=True)
    return x.masked_fill(~mask[:, None, :, None], 0.0).sum(2, keepdim=True) / _count(x, mask)


def _count(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return mask.sum(1).clamp_min(1).to(x.dtype)[:, None, None, None]
