"""Random features against the kernel they estimate."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from src.ops.features import log_softmax_features, num_features
from src.ops.projection import draw_projection
from tests.helpers import assert_close

SCALE = 0.2
WIDTH = 8


def draw_points(count: int = 6) -> torch.Tensor:
    """Points of length 1.5: sqrt(s) x is short enough for the estimates to have a variance that one can measure."""
    return 1.5 * torch.nn.functional.normalize(torch.randn(count, WIDTH, dtype=torch.float64), dim=-1)


def estimate(x: torch.Tensor, y: torch.Tensor, projection: torch.Tensor, cosh: bool) -> torch.Tensor:
    """`phi(x).phi(y)` for all pairs."""
    log_x, log_y = (log_softmax_features(points, projection, SCALE, cosh) for points in (x, y))
    return log_x.exp() @ log_y.exp().T


def relative_errors(num_rows: int, cosh: bool, draws: int, row_norm: str = "chi") -> torch.Tensor:
    """Relative errors of the kernel estimate, (draws, N, N)."""
    x, y = draw_points(), draw_points()
    exact = (SCALE * x @ y.T).exp()
    estimates = torch.stack(
        [estimate(x, y, draw_projection(num_rows, WIDTH, seed, row_norm=row_norm), cosh) for seed in range(draws)]
    )
    return estimates / exact - 1


@pytest.mark.parametrize("cosh", [False, True])
def test_formula(cosh):
    x, projection = draw_points(3), torch.randn(4, WIDTH, dtype=torch.float64)
    signs = (1, -1) if cosh else (1,)
    expected = [
        [
            math.exp(sign * math.sqrt(SCALE) * float(row @ point) - SCALE * float(point @ point) / 2)
            / math.sqrt(len(signs) * 4)
            for sign in signs
            for row in projection
        ]
        for point in x
    ]
    result = log_softmax_features(x, projection, SCALE, cosh).exp()
    # two float64 evaluations of one formula
    assert_close("features", torch.tensor(expected, dtype=torch.float64), result, 1e-14)
    assert result.shape[-1] == num_features(projection, cosh)


@pytest.mark.parametrize("num_rows", [3, 8, 20])
@pytest.mark.parametrize("cosh", [False, True])
def test_unbiased(num_rows, cosh):
    draws = 2000
    errors = relative_errors(num_rows, cosh, draws)
    standard_error = errors.std(0) / math.sqrt(draws)
    # five standard errors for the largest of 36 pairs
    assert (errors.mean(0).abs() / standard_error).max() < 5


def test_sqrt_dim_rows_are_biased():
    # the documented price of rows of one length: the test above has the power to see a bias
    draws = 2000
    errors = relative_errors(8, False, draws, row_norm="sqrt_dim")
    standard_error = errors.std(0) / math.sqrt(draws)
    assert (errors.mean(0).abs() / standard_error).max() > 5


def test_error_falls_with_the_number_of_features():
    # rows of whole orthogonal blocks: the mean square error falls in proportion to their number
    errors = [relative_errors(num_rows, False, 500).square().mean().item() for num_rows in (8, 32, 128)]
    for more, less in itertools.pairwise(errors):
        # a quarter, and a half more for the spread of 500 heavy-tailed draws
        assert less < 1.5 * more / 4


@pytest.mark.parametrize("num_rows", [2, 8])
def test_cosh_has_less_variance_at_the_same_number_of_rows_and_features(num_rows):
    plain = relative_errors(num_rows, False, 500).square().mean()
    plain_as_many_features = relative_errors(2 * num_rows, False, 500).square().mean()
    cosh = relative_errors(num_rows, True, 500).square().mean()
    assert cosh < plain
    assert cosh < plain_as_many_features


def test_orthogonal_rows_have_less_variance_than_independent_ones():
    x, y = draw_points(), draw_points()
    exact = (SCALE * x @ y.T).exp()

    def error(draw) -> float:
        errors = [(estimate(x, y, draw(seed), False) / exact - 1).square().mean() for seed in range(1000)]
        return torch.stack(errors).mean().item()

    orthogonal = error(lambda seed: draw_projection(WIDTH, WIDTH, seed))
    independent = error(lambda seed: torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed)))
    assert orthogonal < independent


def test_logarithms_survive_where_features_overflow():
    x = 100 * draw_points()
    result = log_softmax_features(x.float(), draw_projection(4, WIDTH, 0), SCALE, True)
    reference = log_softmax_features(x, draw_projection(4, WIDTH, 0), SCALE, True)
    assert reference.min() < -700  # exp of it is zero even in float64
    assert_close("log features", reference, result, 1e-6)  # a few roundings of float32


def test_takes_the_dtype_of_its_input():
    x = draw_points().bfloat16()
    assert log_softmax_features(x, draw_projection(4, WIDTH, 0), SCALE, False).dtype == torch.bfloat16
