"""Random projections of the random features, drawn from an explicit seed."""

from __future__ import annotations

import math

import torch

from scatterbrain.errors import UserError, did_you_mean

COUPLINGS = ("orthogonal", "simplex", "independent")


def check_coupling(coupling: str) -> None:
    """Check that `coupling` is one of `COUPLINGS`.

    Raises:
        UserError: it is not.
    """
    if coupling not in COUPLINGS:
        raise UserError(f"coupling='{coupling}' is unknown. {did_you_mean(coupling, COUPLINGS)}")


def draw_projection(
    num_rows: int, dim: int, seed: int, *, row_norm: str = "chi", coupling: str = "orthogonal"
) -> torch.Tensor:
    """Random projections (num_rows, dim) of a random feature map.

    The direction of each projection is uniform on the sphere, whatever the coupling, so the estimate is unbiased. Its
    variance falls with larger angles between the projections of a block of `dim`.

    Args:
        num_rows: number of random projections R.
        dim: width E of queries and keys.
        seed: any integer; the result is a function of the arguments alone, on every machine.
        row_norm: lengths of the projections. `chi`: that of a standard normal vector (chi-distributed), for which the
            estimate is unbiased. `sqrt_dim`: sqrt(E) for all, with less variance and a small bias.
        coupling: directions of the projections of a block of `dim`. `orthogonal`: at right angles (Choromanski et al.,
            ICLR 2021, section 2.3). `simplex`: from the centre to the corners of a regular simplex, the largest equal
            angles of n vectors, arccos(-1 / (n - 1)) (Reid et al., "Simplex random features", ICML 2023, section 3).
            `independent`: normal vectors. Blocks are independent of one another.

    Returns:
        (num_rows, dim) float32, on the CPU.

    Raises:
        UserError: a size below 1, or an unknown `row_norm` or `coupling`.
    """
    if not isinstance(num_rows, int) or not isinstance(dim, int) or num_rows < 1 or dim < 1:
        raise UserError(f"A projection of {num_rows} rows of width {dim} is empty; both have to be at least 1.")
    check_coupling(coupling)
    generator = torch.Generator().manual_seed(seed)
    if coupling == "independent":
        rows = torch.randn(num_rows, dim, generator=generator, dtype=torch.float64)
        rows = rows / rows.norm(dim=1, keepdim=True)
    else:
        blocks = [_orthonormal(min(dim, num_rows - start), dim, generator) for start in range(0, num_rows, dim)]
        rows = torch.cat([_simplex(len(block)) @ block for block in blocks] if coupling == "simplex" else blocks)
    if row_norm == "chi":
        norms = torch.randn(num_rows, dim, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    elif row_norm == "sqrt_dim":
        norms = torch.full((num_rows, 1), math.sqrt(dim), dtype=torch.float64)
    else:
        raise UserError(f"row_norm='{row_norm}' is unknown. Choose 'chi' (unbiased) or 'sqrt_dim'.")
    return (rows * norms).float()


def _orthonormal(num_rows: int, dim: int, generator: torch.Generator) -> torch.Tensor:
    """The first rows of a Haar-distributed orthogonal matrix, (num_rows, dim) float64."""
    # float64: the sign fix and the orthogonality to 1e-15 make the rounded float32 values the same everywhere
    normal = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    # the sign of R's diagonal is LAPACK's choice; fixing it makes Q Haar-distributed (Mezzadri, 2007)
    q = q * torch.sign(torch.diagonal(r))
    return q.T[:num_rows]


def _simplex(corners: int) -> torch.Tensor:
    """Corners of a regular simplex around the origin, of length 1: (corners, corners) float64."""
    if corners == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    # unit vectors less their mean have the length sqrt(1 - 1 / n)
    return (torch.eye(corners, dtype=torch.float64) - 1 / corners) / math.sqrt(1 - 1 / corners)
