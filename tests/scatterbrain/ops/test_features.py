"""Random features against the kernel they estimate."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from scatterbrain.errors import UserError
from scatterbrain.ops.common.features import balancing, centre_and_balance, log_softmax_features, num_features
from scatterbrain.ops.common.projection import draw_projection
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


def relative_errors(num_rows: int, cosh: bool, num_seeds: int, **options: str) -> torch.Tensor:
    """Relative errors of the kernel estimate, (num_seeds, N, N)."""
    x, y = draw_points(), draw_points()
    exact = (SCALE * x @ y.T).exp()
    estimates = torch.stack(
        [estimate(x, y, draw_projection(num_rows, WIDTH, seed, **options), cosh) for seed in range(num_seeds)]
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
@pytest.mark.parametrize("coupling", ["orthogonal", "simplex", "independent"])
def test_unbiased(num_rows, cosh, coupling):
    num_seeds = 2000
    errors = relative_errors(num_rows, cosh, num_seeds, coupling=coupling)
    standard_error = errors.std(0) / math.sqrt(num_seeds)
    # five standard errors for the largest of 36 pairs
    assert (errors.mean(0).abs() / standard_error).max() < 5


def test_sqrt_dim_projections_are_biased():
    # the documented bias of projections of one length, which the test above would detect
    num_seeds = 2000
    errors = relative_errors(8, False, num_seeds, row_norm="sqrt_dim")
    standard_error = errors.std(0) / math.sqrt(num_seeds)
    assert (errors.mean(0).abs() / standard_error).max() > 5


def test_error_falls_with_the_number_of_features():
    # projections in whole orthogonal blocks: the mean square error falls in proportion to their number
    errors = [relative_errors(num_rows, False, 500).square().mean().item() for num_rows in (8, 32, 128)]
    for more, less in itertools.pairwise(errors):
        # a quarter, and a half more for the spread of 500 heavy-tailed samples
        assert less < 1.5 * more / 4


@pytest.mark.parametrize("num_rows", [2, 8])
def test_cosh_has_less_variance_at_the_same_number_of_projections_and_features(num_rows):
    plain = relative_errors(num_rows, False, 500).square().mean()
    plain_as_many_features = relative_errors(2 * num_rows, False, 500).square().mean()
    cosh = relative_errors(num_rows, True, 500).square().mean()
    assert cosh < plain
    assert cosh < plain_as_many_features


def test_larger_angles_between_projections_give_less_variance():
    errors = [
        relative_errors(WIDTH, False, 1000, coupling=coupling).square().mean()
        for coupling in ("simplex", "orthogonal", "independent")
    ]
    assert errors == sorted(errors)


def test_logarithms_survive_where_features_overflow():
    x = 100 * draw_points()
    result = log_softmax_features(x.float(), draw_projection(4, WIDTH, 0), SCALE, True)
    reference = log_softmax_features(x, draw_projection(4, WIDTH, 0), SCALE, True)
    assert reference.min() < -700  # exp of it is zero even in float64
    assert_close("log features", reference, result, 1e-6)  # a few roundings of float32


def test_takes_the_dtype_of_its_input():
    x = draw_points().bfloat16()
    assert log_softmax_features(x, draw_projection(4, WIDTH, 0), SCALE, False).dtype == torch.bfloat16


def test_variance_grows_with_the_length_of_the_sum():
    # second moment of one feature's product over the square of the kernel: exp(s |q + k|^2), what centring makes small
    x, y = draw_points(), draw_points()
    rows = torch.randn(400_000, WIDTH, dtype=torch.float64)
    log_x, log_y = (log_softmax_features(points, rows, SCALE, False) for points in (x, y))
    for i, j in itertools.product(range(3), range(3)):
        products = (log_x[i] + log_y[j] + math.log(len(rows)) - SCALE * float(x[i] @ y[j])).exp().square()
        expected = math.exp(SCALE * float((x[i] + y[j]).square().sum()))
        # five standard errors
        assert abs(products.mean().item() - expected) < 5 * products.std().item() / math.sqrt(len(rows))


def draw_off_centre(length: int = 30, num_keys: int = 40, dtype: torch.dtype = torch.float64):
    """Query (2, 3, length, 8) and key (2, 3, num_keys, 8) off centre, channels mixed and of all sizes."""
    generator = torch.Generator().manual_seed(0)

    def points(count: int) -> torch.Tensor:
        mix = torch.randn(2, 3, WIDTH, WIDTH, generator=generator, dtype=torch.float64)
        x = torch.randn(2, 3, count, WIDTH, generator=generator, dtype=torch.float64) @ mix
        return (x + 3 * torch.randn(2, 3, 1, WIDTH, generator=generator, dtype=torch.float64)).to(dtype)

    return points(length), points(num_keys)


OPTIONS = [(centre, balance) for centre in ("none", "keys", "both") for balance in (False, True)][1:]


@pytest.mark.parametrize(("centre", "balance"), OPTIONS)
@pytest.mark.parametrize("lengths", [None, [40, 11]])
def test_softmax_does_not_change(centre, balance, lengths):
    query, key = draw_off_centre()
    key_lengths = None if lengths is None else torch.tensor(lengths)
    q, k = centre_and_balance(query, key, centre, balance, key_lengths)
    expected, result = (SCALE * x @ y.transpose(-2, -1) for x, y in ((query, key), (q, k)))
    # logits up to 1e3: roundings of float64 times the condition of M
    assert_close("logits", expected - expected[..., :1], result - result[..., :1], 1e-12)
    assert not torch.allclose(k, key)


def length_of_sums(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Mean of |q + k|^2 over all pairs, for each sequence."""
    return (query[:, :, :, None] + key[:, :, None]).square().sum(-1).mean((-2, -1))


def test_centring_both_makes_the_sums_shortest_of_all_shifts():
    query, key = draw_off_centre()
    best = length_of_sums(*centre_and_balance(query, key, "both"))
    assert (best < length_of_sums(*centre_and_balance(query, key, "keys"))).all()
    k = centre_and_balance(query, key, "both")[1]
    for _ in range(5):
        step = 0.1 * torch.randn(WIDTH, dtype=torch.float64)
        # the excess is the square of the step: the shift is the minimum, not merely near it
        excess = length_of_sums(query, k + step) - best
        assert_close("excess", step.square().sum().expand_as(excess), excess, 1e-10)


def test_centring_both_is_centring_queries_with_a_weight_for_each_key():
    query, key = draw_off_centre()
    rows = torch.randn(5, WIDTH, dtype=torch.float64)
    q, k = centre_and_balance(query, key, "both")
    product = torch.logsumexp(
        (log_softmax_features(q, rows, SCALE, True)[..., None, :])
        + log_softmax_features(k, rows, SCALE, True)[..., None, :, :],
        -1,
    )
    mean = query.mean(2, keepdim=True)
    log_weight = SCALE * (key * mean).sum(-1)
    explicit = torch.logsumexp(
        log_softmax_features(query - mean, rows, SCALE, True)[..., None, :]
        + log_softmax_features(key - key.mean(2, keepdim=True), rows, SCALE, True)[..., None, :, :],
        -1,
    )
    expected = (explicit + log_weight[..., None, :]).softmax(-1)
    assert_close("weights", expected, product.softmax(-1), 1e-11)  # float64, through exponents of a few hundred


@pytest.mark.parametrize("centre", ["none", "keys", "both"])
def test_balancing_brings_both_to_one_second_moment(centre):
    query, key = draw_off_centre(400, 400)
    q, k = centre_and_balance(query, key, centre, True)
    left = q - q.mean(2, keepdim=True) if centre == "both" else q
    k = k + (q.mean(2, keepdim=True) if centre == "both" else 0)
    moments = [x.transpose(-2, -1) @ x / 400 for x in (left, k)]
    # up to the ridge: it counts for more where a moment has directions as small as it
    assert_close("moments", moments[0], moments[1], 0.05)


def test_balancing_makes_the_sums_shortest_of_all_matrices():
    query, key = draw_off_centre(200, 200)
    plain = length_of_sums(*centre_and_balance(query, key, "both"))
    q, k = centre_and_balance(query, key, "both", True)
    best = length_of_sums(q, k)
    assert (best < plain).all()
    for _ in range(5):
        matrix = torch.eye(WIDTH, dtype=torch.float64) + 0.2 * torch.randn(WIDTH, WIDTH, dtype=torch.float64)
        other = centre_and_balance(q @ matrix, k @ torch.linalg.inv(matrix).T, "both")
        assert (best < length_of_sums(*other)).all()


def test_balanced_moments_stay_as_they_are():
    moment = torch.diag(torch.arange(1.0, 1.0 + WIDTH))
    matrix, inverse = balancing(moment, moment)
    identity = torch.eye(WIDTH, dtype=torch.float64)
    assert_close("M", identity, matrix, 1e-12)
    assert_close("M^-T", identity, inverse, 1e-12)


@pytest.mark.parametrize("factor", [1e-12, 1e-3, 1e9])
def test_balancing_undoes_a_factor(factor):
    query, key = draw_off_centre(dtype=torch.float32)
    expected = centre_and_balance(query, key, "both", True)
    result = centre_and_balance(query * factor, key / factor, "both", True)
    for name, one, other in zip("qk", expected, result, strict=True):
        assert_close(name, one, other, 1e-4)  # float32 moments, and M's condition of up to 1 / RIDGE


@pytest.mark.parametrize(("centre", "balance"), OPTIONS)
def test_statistics_leave_padding_out(centre, balance):
    query, key = draw_off_centre(40, 40)
    lengths = torch.tensor([40, 23])
    cut = centre_and_balance(query[1:, :, :23], key[1:, :, :23], centre, balance)
    query[1, :, 23:], key[1, :, 23:] = 1e3, torch.nan
    result = centre_and_balance(query, key, centre, balance, lengths)
    for name, expected, x in zip("qk", cut, result, strict=True):
        assert_close(name, expected, x[1:, :, :23], 1e-12)


@pytest.mark.parametrize(("centre", "balance"), OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_there_is_too_little_of_stays_finite(centre, balance, dtype):
    query, key = draw_off_centre(3, 3, dtype=dtype)
    cases = [
        (query, key, torch.tensor([0, 3])),
        (query[:, :, :1], key[:, :, :1], None),
        (torch.zeros_like(query), key, None),
        (query, torch.zeros_like(key), None),
        (query, key[:, :, :1].expand(-1, -1, 3, -1), None),
    ]
    for q, k, lengths in cases:
        q.requires_grad_()
        result = centre_and_balance(q, k, centre, balance, lengths)
        assert all(x.dtype == dtype and torch.isfinite(x).all() for x in result)


@pytest.mark.parametrize("centre", ["keys", "both"])
@pytest.mark.parametrize("lengths", [None, [5, 3]])
def test_means_are_differentiated_through(centre, lengths):
    tensors = [x[:, :1, :5, :3].clone().requires_grad_() for x in draw_off_centre()]
    key_lengths = None if lengths is None else torch.tensor(lengths)
    assert torch.autograd.gradcheck(lambda q, k: centre_and_balance(q, k, centre, key_lengths=key_lengths)[1], tensors)


def test_the_matrix_is_a_constant():
    query, key = (x.requires_grad_() for x in draw_off_centre())
    q, k = centre_and_balance(query, key, "none", True)
    moments = [x.transpose(-2, -1) @ x / x.shape[2] for x in (query.detach(), key.detach())]
    matrix, inverse = balancing(*moments)
    pull_q, pull_k = torch.randn_like(q), torch.randn_like(k)
    gradients = torch.autograd.grad((q * pull_q).sum() + (k * pull_k).sum(), (query, key))
    for pull, factor, gradient in zip((pull_q, pull_k), (matrix, inverse), gradients, strict=True):
        assert_close("gradient", pull @ factor.transpose(-2, -1), gradient, 1e-12)


def test_without_options_queries_and_keys_are_unchanged():
    query, key = draw_off_centre()
    assert all(x is y for x, y in zip(centre_and_balance(query, key), (query, key), strict=True))
    assert centre_and_balance(query, key, "both")[0] is query


def test_unknown_centres_are_refused():
    with pytest.raises(UserError, match="Did you mean 'keys'"):
        centre_and_balance(*draw_off_centre(), "key")
