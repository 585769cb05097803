"""MSE(Scatterbrain) = (1 - P_LSH) MSE(Performer), by simulation: `scripts/experiment_theory.py`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from scatterbrain.errors import check_whole_number
from scatterbrain.ops.common.dense import dense_logits
from scatterbrain.ops.sparse.lsh import draw_reformer_rotations, draw_smyrf_projection, smyrf_support
from src.analysis.experiments.regimes import draw_tokens
from src.analysis.tools import provenance, say, shown, without_paths, write_results
from src.evaluation.figure_style import COLOURS, LEGEND, new_figure, style
from src.tasks.options import MAX_SEED

# Unit vectors, as in the theorem. The scale keeps the fourth moments of the features within reach of a simulation.
WIDTH, SCALE, LENGTH = 16, 0.5, 32
COSINES = (-0.5, 0.0, 0.5, 0.7, 0.8, 0.9, 0.95)
HASHES = ("cross-polytope", "shared", "smyrf")


def collisions(name: str, query: torch.Tensor, key: torch.Tensor, projection: torch.Tensor, seed: int) -> torch.Tensor:
    """Boolean (K, T, S): pairs that each of K hashes finds; `shared` hashes by the features' projections (K, E, E)."""
    if name == "smyrf":
        hashes = draw_smyrf_projection(len(projection), WIDTH, seed)
        found = (smyrf_support(query[None, None], key[None, None], each[None], 4) for each in hashes)
        return torch.cat([each.dense(len(query), len(key)) for each in found])
    rotations = draw_reformer_rotations(len(projection), WIDTH, 2 * WIDTH, seed).to(query.dtype)
    rotations = projection.transpose(1, 2) if name == "shared" else rotations
    buckets = [torch.cat([x @ rotations, -x @ rotations], -1).argmax(-1) for x in (query, key)]
    return buckets[0][:, :, None] == buckets[1][:, None]


def compare(found: torch.Tensor, performer: torch.Tensor, scatterbrain: torch.Tensor) -> dict[str, float]:
    """Sums over pairs of the mean squared errors (K, T, S), beside sum (1 - P) MSE(Performer), P the mean of `found`.

    `std_error` is that of `scatterbrain` less `predicted`, to first order in the errors of the means.
    """
    share, mean = found.double().mean(0), performer.mean(0)
    terms = (scatterbrain - (1 - share) * performer + (found.double() - share) * mean).sum((1, 2))
    result = {"share": share.mean(), "performer": mean.sum(), "scatterbrain": scatterbrain.mean(0).sum()}
    result |= {"predicted": ((1 - share) * mean).sum(), "std_error": terms.std() / len(terms) ** 0.5}
    return {name: value.item() for name, value in result.items()}


def measure(name: str, query: torch.Tensor, key: torch.Tensor, num_samples: int, seed: int) -> list[dict[str, Any]]:
    """Rows of `compare` with a hash: of the entries exp(s q.k), with Scatterbrain's relative `bias`, and of weights."""
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(num_samples, WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    features = [(x @ projection.transpose(1, 2) * SCALE**0.5 - SCALE / 2).exp() / WIDTH**0.5 for x in (query, key)]
    exact, low_rank = dense_logits(query, key, SCALE).exp(), features[0] @ features[1].transpose(1, 2)
    found = collisions(name, query, key, projection, seed + 1)
    matrices = {"entries": (exact, low_rank, torch.where(found, exact, low_rank))}
    matrices["weights"] = tuple(F.normalize(x, p=1, dim=-1) for x in matrices["entries"])
    rows = []
    for kind, (truth, *others) in matrices.items() if len(key) > 1 else [("entries", matrices["entries"])]:
        row = {"hash": name, "of": kind, "bias": ((others[1] - truth).mean(0).sum() / truth.sum()).item()}
        rows.append(row | compare(found, *((x - truth).square() for x in others)))
    return rows


def measure_theory(num_samples: int, seed: int) -> list[dict[str, Any]]:
    """Rows of `measure`, of pairs of unit vectors by their `cosine`, and of 32 clustered tokens, `cosine` None."""
    rows = []
    for cosine in shown(COSINES, "Pairs"):
        pair = torch.zeros(2, WIDTH, dtype=torch.float64)
        pair[0, 0], pair[1, 0], pair[1, 1] = 1, cosine, math.sqrt(1 - cosine**2)
        for name in ("cross-polytope", "shared"):
            rows += [{"cosine": cosine} | row for row in measure(name, pair[:1], pair[1:], num_samples, seed)]
    tokens = draw_tokens("clustered", LENGTH, WIDTH, 8, seed)
    query, key = (F.normalize(x[0, :, 0].double(), dim=-1) for x in (tokens.query, tokens.key))
    of_tokens = (row for name in HASHES for row in measure(name, query, key, max(2, num_samples // 20), seed))
    return rows + [{"cosine": None} | row for row in of_tokens]


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Errors of pairs against their cosine: simulated (points), and by the formula (line)."""
    figure = new_figure(4.8, 3.4)
    axes = figure.add_subplot()
    for name, kind, look, colour, label in (
        ("cross-polytope", "performer", "o", "performer", "Performer"),
        ("cross-polytope", "predicted", "-", "sblocal", "(1 \N{MINUS SIGN} P) MSE(Performer)"),
        ("cross-polytope", "scatterbrain", "s", "sblocal", "Scatterbrain, independent hash"),
        ("shared", "scatterbrain", "^", "smyrf", "Scatterbrain, hash of the features"),
    ):
        chosen = [row for row in rows if row["hash"] == name and row["cosine"] is not None]
        values = [row[kind] / math.exp(2 * SCALE * row["cosine"]) for row in chosen]
        axes.plot([row["cosine"] for row in chosen], values, look, color=COLOURS[colour], markersize=4, label=label)
    axes.set(xlabel="cosine of query and key", ylabel="MSE of exp(s q·k), over exp(2 s q·k)")
    style(axes)
    axes.legend(**LEGEND)
    return figure


def run(arguments: argparse.Namespace) -> None:
    """Simulate, print, write and draw what the options of `scripts/experiment_theory.py` name."""
    check_whole_number("--seed", arguments.seed, 0, MAX_SEED)
    rows = measure_theory(arguments.num_samples, arguments.seed)
    for row in rows:
        ratio, error = (row[name] / row["predicted"] for name in ("scatterbrain", "std_error"))
        pairs = "32 tokens" if row["cosine"] is None else f"cosine {row['cosine']:g}"
        say(f"{pairs}, {row['hash']}, {row['of']}: {ratio:.3f} ± {error:.3f} of the formula, bias {row['bias']:.3f}")
    content = {**provenance(torch.device("cpu")), "settings": without_paths(arguments), "width": WIDTH, "scale": SCALE}
    write_results(arguments, content | {"num_features": WIDTH, "results": rows}, lambda: draw(rows))
