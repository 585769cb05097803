"""The theorem on Scatterbrain's mean squared error against simulation: where it holds, and where it does not."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from scripts import experiment_theory
from src.analysis.experiments import theory
from src.analysis.experiments.regimes import predicted_variance

SAMPLES = 20_000


def pair(cosine: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors (1, 16) at an angle."""
    vectors = torch.zeros(2, theory.WIDTH, dtype=torch.float64)
    vectors[0, 0], vectors[1, 0], vectors[1, 1] = 1, cosine, math.sqrt(1 - cosine**2)
    return vectors[:1], vectors[1:]


def tokens(length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit queries and keys (12, 16) around three centres."""
    generator = torch.Generator().manual_seed(4)
    centres = torch.randn(3, theory.WIDTH, generator=generator, dtype=torch.float64).repeat(length // 3, 1)
    noise = torch.randn(2, length, theory.WIDTH, generator=generator, dtype=torch.float64)
    return tuple(F.normalize(centres + 0.5 * each, dim=-1) for each in noise)


def off(row) -> float:
    """Difference from the formula in standard errors."""
    return (row["scatterbrain"] - row["predicted"]) / row["std_error"]


@pytest.mark.parametrize("cosine", [0.0, 0.6, 0.9])
def test_holds_for_independent_hashes(cosine):
    (row,) = theory.measure("cross-polytope", *pair(cosine), SAMPLES, seed=3)
    # the expectation is the formula: within four standard errors, which are small enough to see a factor of 1 - P
    assert abs(off(row)) < 4
    assert row["std_error"] < 0.2 * (row["performer"] - row["predicted"])
    expected = predicted_variance(theory.SCALE * (2 + 2 * cosine), theory.WIDTH) * math.exp(2 * theory.SCALE * cosine)
    assert row["performer"] == pytest.approx(expected, rel=0.25)
    assert abs(row["bias"]) < 0.02


def test_fails_for_a_hash_of_the_features_own_projections():
    (row,) = theory.measure("shared", *pair(0.9), SAMPLES, seed=3)
    assert off(row) < -8
    assert row["bias"] < -0.02  # the estimate is not unbiased either


@pytest.mark.parametrize("name", ["cross-polytope", "smyrf"])
def test_holds_for_entries_of_a_matrix_and_fails_for_weights(name):
    entries, weights = theory.measure(name, *tokens(), 1000, seed=3)
    assert (entries["of"], weights["of"]) == ("entries", "weights")
    assert abs(off(entries)) < 4
    assert entries["share"] == weights["share"]
    assert off(weights) > 5


def test_comparison_is_exact_for_known_moments():
    """Found with probability 1/2 and errors of 1 or 3: the mean is that of the formula, the error that of its terms."""
    found = torch.tensor([True, False, True, False])[:, None, None]
    squares = torch.tensor([1.0, 1.0, 3.0, 3.0], dtype=torch.float64)[:, None, None]
    row = theory.compare(found, squares, torch.where(found, 0.0, squares))
    assert {name: row[name] for name in ("share", "performer", "scatterbrain", "predicted")} == {
        "share": 0.5,
        "performer": 2.0,
        "scatterbrain": 1.0,
        "predicted": 1.0,
    }
    # terms -(found - 1/2) (square - 2): 1/2, -1/2, -1/2, 1/2
    assert row["std_error"] == pytest.approx((1 / 3) ** 0.5 / 2)


def test_hashes():
    query, key = tokens()
    projection = torch.randn(50, theory.WIDTH, theory.WIDTH, dtype=torch.float64)
    for name in theory.HASHES:
        found = theory.collisions(name, query, key, projection, 0)
        assert found.shape == (50, 12, 12)
        assert found.dtype == torch.bool
        assert 0 < found.double().mean() < 1
    found = theory.collisions("shared", query, key, projection, 0)
    for sample, i, j in ((0, 0, 0), (7, 3, 9), (30, 5, 6)):
        buckets = []
        for x in (query[i], key[j]):
            values = projection[sample] @ x
            largest = values.abs().argmax()
            buckets.append((largest.item(), values[largest].item() > 0))
        assert found[sample, i, j] == (buckets[0] == buckets[1])


def test_end_to_end(tmp_path, capsys):
    output, figure = tmp_path / "r.json", tmp_path / "r.png"
    given = ["--num-samples=200", "--seed=2", "--threads=1", f"--output={output}", f"--figure={figure}"]
    assert experiment_theory.main(given) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(output.read_text())["results"]
    assert len(lines) == len(rows) == 2 * len(theory.COSINES) + 2 * len(theory.HASHES)
    assert lines[0].startswith("cosine -0.5, cross-polytope, entries: ")
    assert lines[-1].startswith("32 tokens, smyrf, weights: ")
    assert rows == theory.measure_theory(200, 2)
    with Image.open(figure) as image:
        assert image.format == "PNG"
    assert experiment_theory.main(["--seed=-1"]) == 1
