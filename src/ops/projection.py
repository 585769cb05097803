"""Rows of the random features: orthogonal blocks, drawn from an explicit seed."""

from __future__ import annotations

import math

import torch

from src.utils.errors import UserError


def draw_projection(num_rows: int, dim: int, seed: int, *, row_norm: str = "chi") -> torch.Tensor:
    """Draw the rows of a random feature map.

    Rows come in blocks of `dim` that are orthogonal within a block (Choromanski et al., ICLR 2021, section 2.3):
    the marginal distribution of each row stays isotropic, so the estimate stays unbiased, and its variance falls.

    Args:
        num_rows: number of rows R.
        dim: width E of queries and keys.
        seed: any integer; the rows are a function of the arguments alone, on every machine.
        row_norm: length of the rows. `chi`: that of a standard normal vector (chi-distributed), for which the
            estimate is unbiased. `sqrt_dim`: sqrt(E) for every row, with less variance and a small bias.

    Returns:
        (num_rows, dim) float32, on the CPU.

    Raises:
        UserError: a size below 1 or an unknown `row_norm`.
    """
    if num_rows < 1 or dim < 1:
        raise UserError(f"A projection of {num_rows} rows of width {dim} is empty; both have to be at least 1.")
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for start in range(0, num_rows, dim):
        # float64: the sign fix and the orthogonality to 1e-15 make the rounded float32 rows the same everywhere
        normal = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(normal)
        # the sign of R's diagonal is LAPACK's choice; fixing it makes Q Haar-distributed (Mezzadri, 2007)
        q = q * torch.sign(torch.diagonal(r))
        blocks.append(q.T[: num_rows - start])
    rows = torch.cat(blocks)
    if row_norm == "chi":
        norms = torch.randn(num_rows, dim, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    elif row_norm == "sqrt_dim":
        norms = torch.full((num_rows, 1), math.sqrt(dim), dtype=torch.float64)
    else:
        raise UserError(f"row_norm='{row_norm}' is unknown. Choose 'chi' (unbiased) or 'sqrt_dim'.")
    return (rows * norms).float()
