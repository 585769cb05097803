"""Errors of sparse, low-rank and both together, from uniform to one-hot weights: `scripts/experiment_regimes.py`."""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.table import Table

from scatterbrain.attention import attention_memory, create_attention
from scatterbrain.errors import check_whole_number
from scatterbrain.ops.common.budget import budget_columns, features_for, keys_for
from scatterbrain.ops.common.dense import dense_logits
from scatterbrain.ops.common.features import log_softmax_features
from scatterbrain.ops.common.projection import draw_projection
from scatterbrain.ops.sparse.naive import naive_support_attention
from src.analysis.approximation import effective_keys, mean_and_std, relative_error
from src.analysis.tools import new_table, print_report, provenance, save_figure, shown, without_paths, write_results
from src.evaluation.colours import ATTENTION_MARKERS
from src.evaluation.figure_style import COLOURS, DOTTED, FAINT, LEGEND, new_figure, style
from src.models.attention_inputs import ONE_HOT, StageInputs
from src.tasks.options import MAX_SEED

DATA = {"normal": "independent tokens", "clustered": "tokens around shared centres"}
ATTENTIONS = ("local", "smyrf", "performer", "sblocal", "sbsmyrf", "cluster", "sbcluster", "pairedcluster")
# sparse alone, low-rank alone, both: what the claim compares
FAMILIES = {
    "oracles": ("largest", "svd", "largest+svd"),
    "top-k": ("topk", "performer", "sbtopk"),
    "local": ("local", "performer", "sblocal"),
    "smyrf": ("smyrf", "performer", "sbsmyrf"),
}
NAMES = {
    "largest": "k largest weights",
    "svd": "nearest of rank r",
    "largest+svd": "both",
    "topk": "softmax over top-k",
    "sbtopk": "top-k + performer",
    "uniform": "equal weights",
}
PANELS = {
    "Oracles": ("largest", "svd", "largest+svd"),
    "Sparse, random features, both": ("topk", "local", "smyrf", "performer", "sbtopk", "sblocal", "sbsmyrf"),
    "Landmarks": ("performer", "sblocal", "cluster", "sbcluster", "pairedcluster"),
}
LONGEST = 4096  # dense matrices of weights in float64
# from equal weights to a single key, for both kinds of data
TEMPERATURES = (0.05, 0.1, 0.2, 0.35, 0.6, 1.0, 1.7, 3.0, 5.0, 9.0, 16.0)
SHARES = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)  # ticks
VARIANCE_COLOURS = {"independent": COLOURS["performer"], "cosh": COLOURS["smyrf"]}
VARIANCE_COLOURS |= {"orthogonal": COLOURS["local"], "orthogonal cosh": COLOURS["sblocal"]}
SQUARED_NORMS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Approximation:
    """An approximation of full attention."""

    weights: torch.Tensor  # (T, S)
    out: torch.Tensor  # (T, D)
    sizes: dict[str, int]  # that its memory is spent on
    memory: float  # over that of the full matrix


def draw_tokens(data: str, length: int, width: int, num_centres: int, seed: int) -> StageInputs:
    """Queries, keys and values of one head, and the scale E ** -0.5; every coordinate has variance 1.

    `normal`: all of them are independent. `clustered`: token i of N belongs to centre i C // N, so that neighbours are
    alike as in an image, and is `sqrt(3/4) centre + sqrt(1/4) normal`; queries and keys share the centres, values have
    their own.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = torch.randn(3, length, width, generator=generator)
    if data == "clustered":
        centres = torch.randn(2, num_centres, width, generator=generator)[[0, 0, 1]]
        own = torch.arange(length) * num_centres // length
        tensors = 0.75**0.5 * centres[:, own] + 0.5 * tensors
    return StageInputs(*tensors[:, None, :, None], scale=width**-0.5)


def low_rank_logits(query: torch.Tensor, key: torch.Tensor, projection: torch.Tensor, scale: float) -> torch.Tensor:
    """What `dense_low_rank_logits` gives with cosh features, (B, H, T, S) float64, in one product and much faster.

    Terms below 1e-300 of the largest feature of their query times that of their key count as 1e-300.
    """
    logs = [log_softmax_features(x.double(), projection.double(), scale, cosh=True) for x in (query, key)]
    tops = [x.amax(-1, keepdim=True) for x in logs]
    query_features, key_features = ((x - top).exp() for x, top in zip(logs, tops, strict=True))
    products = query_features @ key_features.transpose(-2, -1)
    return products.clamp_min_(1e-300).log_() + tops[0] + tops[1].transpose(-2, -1)


def top_key_attentions(inputs: StageInputs, memory: float, seed: int) -> dict[str, Approximation]:
    """Attention to the k keys of largest q.k of each query, alone and with the features of `sblocal` outside them.

    Finding the keys takes the whole matrix: it is the sparse support at its best.
    """
    query, key, value = (x.transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))
    columns, length = budget_columns(key.shape[2], memory), key.shape[2]
    options = {"softmax_temp": inputs.scale, "memory_fraction": memory, "seed": seed}
    half = create_attention("sblocal", length, key.shape[3], **options)
    features = half.sizes()["nb_features"]
    low_rank = low_rank_logits(query, key, half.projection_matrix, inputs.scale)
    order = dense_logits(query, key, inputs.scale)[0]
    result = {}
    for name, keys, logits, sizes in (
        ("topk", keys_for(columns), None, {}),
        ("sbtopk", keys_for(columns / 2), low_rank, {"nb_features": features}),
    ):
        support = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order.topk(keys, dim=-1).indices, True)
        out, weights = naive_support_attention(query, key, value, support, inputs.scale, logits)
        sizes = {"num_keys": keys} | sizes
        spent = (keys + 2 * sizes.get("nb_features", 0)) / length
        result[name] = Approximation(weights[0, 0], out[0, 0], sizes, spent)
    return result


def full_weights(inputs: StageInputs) -> torch.Tensor:
    """Matrix of weights (T, S) of full attention in float64, of a batch of one with one head."""
    query, key = (x.transpose(1, 2) for x in (inputs.query, inputs.key))
    return dense_logits(query, key, inputs.scale).softmax(-1)[0, 0]


def keep_largest(weights: torch.Tensor, num_keys: int) -> torch.Tensor:
    """The `num_keys` entries of each row of largest magnitude, zero elsewhere: the nearest such matrix."""
    chosen = weights.abs().topk(min(num_keys, weights.shape[-1]), dim=-1).indices
    return torch.zeros_like(weights).scatter(-1, chosen, weights.gather(-1, chosen))


def nearest_of_rank(matrix: torch.Tensor, rank: int, num_steps: int = 4) -> torch.Tensor:
    """The nearest matrix (T, S) of a rank, by subspace iteration (Halko et al., SIAM Review 2011, algorithm 4.4).

    It starts from a fixed seed. Exact where `rank` and 20 more are all there is, else its error is within 1 % of the
    least.
    """
    least = min(matrix.shape)
    if rank >= least:
        return matrix
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], min(least, rank + 20), generator=generator, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ start)[0]
    for _ in range(num_steps):
        basis = torch.linalg.qr(matrix @ (matrix.T @ basis))[0]
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ (left[:, :rank] * values[:rank]) @ right[:rank]


def largest_and_nearest(weights: torch.Tensor, num_keys: int, rank: int, num_steps: int = 3) -> torch.Tensor:
    """Exact on `num_keys` entries of each row, of rank r elsewhere; good, but not the best there is.

    Entries and low-rank part are chosen in turns, each as what the other leaves (alternating projections, as in robust
    PCA), starting with the largest entries. The error falls with each turn.
    """
    rest = torch.zeros_like(weights)
    for _ in range(num_steps):
        sparse = keep_largest(weights - rest, num_keys)
        rest = nearest_of_rank(weights - sparse, rank)
    return keep_largest(weights - rest, num_keys) + rest


def oracles(weights: torch.Tensor, value: torch.Tensor, memory: float) -> dict[str, Approximation]:
    """Matrices near full attention's (T, S) at equal columns, and equal weights; rows need not sum to 1."""
    length = weights.shape[-1]
    columns = budget_columns(length, memory)
    (keys, rank), (half_keys, half_rank) = ((keys_for(c), features_for(c)) for c in (columns, columns / 2))
    weights = weights.float()  # half the time, and the errors are far above its rounding
    both = largest_and_nearest(weights, half_keys, half_rank)
    found = {
        "uniform": (torch.full_like(weights, 1 / length), {}),
        "largest": (keep_largest(weights, keys), {"num_keys": keys}),
        "svd": (nearest_of_rank(weights, rank), {"rank": rank}),
        "largest+svd": (both, {"num_keys": half_keys, "rank": half_rank}),
    }
    result = {}
    for name, (matrix, sizes) in found.items():
        columns = sizes.get("num_keys", 0) + 2 * sizes.get("rank", 0)
        result[name] = Approximation(matrix.double(), matrix.double() @ value, sizes, columns / length)
    return result


def attentions(inputs: StageInputs, memory: float, seed: int) -> dict[str, Approximation]:
    """The attentions that are compared, by name, fitted to the same columns."""
    length, width = inputs.key.shape[1], inputs.key.shape[3]
    # one-hot values along with the true ones: output and matrix of one call
    value = inputs.with_identity_values().value
    result = {}
    for name in ATTENTIONS:
        options = {"softmax_temp": inputs.scale, "memory_fraction": memory, "seed": seed}
        module = create_attention(name, length, width, **options).eval()
        both = module(inputs.query, inputs.key, value)[0][0, :, 0].double()
        out, weights = both.split([inputs.value.shape[3], length], dim=-1)
        result[name] = Approximation(weights / ONE_HOT, out, module.sizes(), attention_memory(module, length))
    return result


@torch.no_grad()
def approximate(inputs: StageInputs, memory: float, seed: int) -> dict[str, Approximation]:
    """Every approximation of full attention on these inputs (a batch of one with one head), by name."""
    weights, value = full_weights(inputs), inputs.value[0, :, 0].double()
    found = oracles(weights, value, memory)
    return found | top_key_attentions(inputs, memory, seed) | attentions(inputs, memory, seed)


def measure_regimes(
    data: Sequence[str] = tuple(DATA),
    length: int = 1024,
    width: int = 64,
    centres: int = 32,
    temperatures: Sequence[float] = TEMPERATURES,
    memory_fractions: Sequence[float] = (1 / 32, 1 / 8),
    num_seeds: int = 3,
    seed: int = 1111,
    progress: Callable[[Sequence], Any] = lambda cases: cases,
) -> list[dict[str, Any]]:
    """Errors of all approximations in all regimes, a row for each data, beta and memory.

    Rows have `effective_keys` and, in `results`, by name, `matrix_error` and `output_error`, each with `mean` and `std`
    over seeds, which are `seed`, `seed + 1`, ...; `progress` wraps the list of cases.
    """
    check_whole_number("length", length, 2, LONGEST)
    check_whole_number("seed", seed, 0, MAX_SEED - num_seeds)
    for memory in memory_fractions:
        budget_columns(length, memory)  # refuses what is out of range, before anything is measured
    cases = [(kind, beta, memory) for kind in data for beta in temperatures for memory in memory_fractions]
    rows = []
    for kind, beta, memory in progress(cases):
        keys, errors = [], defaultdict(list)
        for each in range(seed, seed + num_seeds):
            tokens = draw_tokens(kind, length, width, centres, each)
            inputs = replace(tokens, scale=beta * tokens.scale)
            weights = full_weights(inputs)
            keys.append(effective_keys(weights).mean().item())
            out = weights @ inputs.value[0, :, 0].double()
            for name, item in approximate(inputs, memory, each).items():
                pairs = ((item.weights, weights), (item.out, out))
                errors[name].append([relative_error(x[None], y[None]).item() for x, y in pairs])
        results = {
            name: dict(zip(("matrix_error", "output_error"), map(mean_and_std, zip(*pairs, strict=True)), strict=True))
            for name, pairs in errors.items()
        }
        row = {"data": kind, "num_tokens": length, "temperature": beta, "memory_fraction": memory}
        rows.append(row | {"effective_keys": mean_and_std(keys), "results": results})
    return rows


def compare_families(rows: Sequence[Mapping[str, Any]], error: str = "matrix_error") -> list[dict[str, Any]]:
    """Number of regimes in which each of a family has the least error, for each data, memory and family.

    Rows have `regimes`, of which sparse is the best in `sparse`, low-rank in `low_rank`, both in `both`, and the
    `worst` error over the regimes, of each of the three.
    """
    summary = []
    for kind, memory in dict.fromkeys((row["data"], row["memory_fraction"]) for row in rows):
        chosen = [row for row in rows if (row["data"], row["memory_fraction"]) == (kind, memory)]
        for family, names in FAMILIES.items():
            errors = [[row["results"][name][error]["mean"] for name in names] for row in chosen]
            best = [each.index(min(each)) for each in errors]
            counts = {which: best.count(number) for number, which in enumerate(("sparse", "low_rank", "both"))}
            worst = dict(zip(counts, (max(column) for column in zip(*errors, strict=True)), strict=True))
            row = {"data": kind, "memory_fraction": memory, "family": family, "regimes": len(chosen)}
            summary.append(row | counts | {"worst": worst})
    return summary


def predicted_variance(squared_norm: float, num_features: int, cosh: bool = False) -> float:
    """Variance of the estimate of exp(q.k) by M positive features, over exp(2 q.k).

    `(exp(|q + k|^2) - 1) / M` with independent rows (Chen et al., NeurIPS 2021, section 4; Choromanski et al., ICLR
    2021, lemma 2). With `cosh`, each of M / 2 rows has both signs, which multiplies it by `1 - exp(-|q + k|^2)`.
    """
    variance = math.expm1(squared_norm) / num_features
    return variance * -math.expm1(-squared_norm) if cosh else variance


def measure_variance(
    squared_norms: Sequence[float] = SQUARED_NORMS, num_features: int = 16, num_samples: int = 20_000, seed: int = 0
) -> list[dict[str, Any]]:
    """Variance over `num_samples` of the random features' estimate of exp(q.k), over exp(2 q.k), beside its formula.

    Queries and keys have scale 1, equal length, an angle of 60 degrees and an even width M, for which M rows can be
    orthogonal. `squared_norms` are |q + k|^2; beyond 2 the tails are so heavy that no affordable number of samples will
    do. For each and for each kind of `rows` (`independent`, `cosh`, `orthogonal`, and `orthogonal cosh` as Scatterbrain
    has them) the result has `measured`, its `std_error` and `predicted` (None for orthogonal rows).
    """
    generator = torch.Generator().manual_seed(seed)
    independent = torch.randn(num_samples * num_features, num_features, generator=generator, dtype=torch.float64)
    orthogonal = draw_projection(len(independent), num_features, seed)
    # M / 2 rows of each block of M orthogonal ones: samples share no block
    halves = orthogonal.view(num_samples, num_features, num_features)[:, : num_features // 2].flatten(0, 1)
    kinds = {
        "independent": (independent, False),
        "cosh": (independent[: len(independent) // 2], True),
        "orthogonal": (orthogonal, False),
        "orthogonal cosh": (halves, True),
    }
    rows = []
    for squared_norm in squared_norms:
        # |q| = |k| and 60 degrees between them: |q + k|^2 = 3 |q|^2
        pair = torch.zeros(2, num_features, dtype=torch.float64)
        pair[0, 0], pair[1, 0], pair[1, 1] = 1, 0.5, 0.75**0.5
        pair *= (squared_norm / 3) ** 0.5
        for kind, (projection, cosh) in kinds.items():
            products = log_softmax_features(pair, projection, 1.0, cosh).sum(0).exp()
            products = products.view(2, num_samples, -1).transpose(0, 1) if cosh else products.view(num_samples, -1)
            # the features were normalised for the rows of all samples
            ratio = num_samples * products.flatten(1).sum(1) / math.exp(squared_norm / 6)
            squares = (ratio - 1).square()  # unbiased: the mean is known
            row = {"squared_norm": squared_norm, "rows": kind, "measured": squares.mean().item()}
            row["std_error"] = squares.std().item() / num_samples**0.5
            row["predicted"] = None if "orthogonal" in kind else predicted_variance(squared_norm, num_features, cosh)
            rows.append(row)
    return rows


def draw(rows: Sequence[Mapping[str, Any]], memory: float, error: str = "matrix_error") -> Figure:
    """Error (`matrix_error` or `output_error`) against entropy at one memory: a row of panels for each kind of data."""
    rows = [row for row in rows if row["memory_fraction"] == memory]
    kinds = list(dict.fromkeys(row["data"] for row in rows))
    figure = new_figure(11, 1.6 + 2.6 * len(kinds))
    grid = figure.subplots(len(kinds), len(PANELS), sharex=True, sharey=True, squeeze=False)
    for kind, line in zip(kinds, grid, strict=True):
        chosen = [row for row in rows if row["data"] == kind]
        for (title, names), axes in zip(PANELS.items(), line, strict=True):
            for name in ("uniform", *names):
                draw_curve(axes, chosen, name, error)
            axes.axhline(1, color=FAINT, linewidth=0.8, linestyle=DOTTED)
            # the axis has room at both ends, where one key is as far from two as all keys are from all but a few
            axes.set(xscale="logit", yscale="log", ylim=(0.008, 8))
            axes.set_xticks(SHARES, labels=[f"{100 * share:g} %" for share in SHARES])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_title(title)
            style(axes)
    for axes in grid[-1]:
        axes.set_xlabel("effective keys of full attention, of all N")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), handlelength=1.6, ncols=2, **LEGEND)
    for kind, axes in zip(kinds, grid[:, 0], strict=True):
        axes.set_ylabel(f"{DATA[kind]}\nrelative error of the {error.partition('_')[0]}")
    text = f"{100 * memory:.3g} % of the attention columns. Dotted: as far off as zero; bars: std over seeds."
    figure.suptitle(text, fontsize=9, color=FAINT)
    return figure


def draw_curve(axes: Axes, rows: Sequence[Mapping[str, Any]], name: str, error: str) -> None:
    """Draw one approximation over the regimes."""
    # weights that are equal but for rounding have all N keys, which is at infinity
    keys = [min(row["effective_keys"]["mean"] / row["num_tokens"], 1 - 1e-4) for row in rows]
    errors = [row["results"][name][error] for row in rows]
    means, stds = [each["mean"] for each in errors], [each["std"] or 0.0 for each in errors]
    # a bar below zero has no place on a logarithmic axis
    bars = [min(std, 0.9 * mean) for mean, std in zip(means, stds, strict=True)], stds
    combined = "sb" in name or "+" in name
    look = {"linestyle": "-", "linewidth": 2 if combined else 1.2, "marker": ATTENTION_MARKERS.get(name, "o")}
    look |= {"linestyle": "--", "linewidth": 0.9, "marker": ""} if name == "uniform" else {}
    look |= {"color": COLOURS[name], "markersize": 3, "elinewidth": 0.8, "capsize": 1.5}
    axes.errorbar(keys, means, yerr=bars, label=NAMES.get(name, name), **look)


def draw_variance(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The variance as measured (points) and by its formula (lines)."""
    figure = new_figure(4.4, 3.2)
    axes = figure.add_subplot()
    for kind, colour in VARIANCE_COLOURS.items():
        chosen = [row for row in rows if row["rows"] == kind]
        norms = [row["squared_norm"] for row in chosen]
        options = {"fmt": "o", "color": colour, "markersize": 4, "label": f"{kind} rows, measured"}
        axes.errorbar(norms, [row["measured"] for row in chosen], [row["std_error"] for row in chosen], **options)
        if chosen and chosen[0]["predicted"] is not None:
            axes.plot(norms, [row["predicted"] for row in chosen], color=colour, label=f"{kind} rows, formula")
    axes.set(yscale="log", xlabel="|q + k|², scale 1", ylabel="variance of the estimate / exp(2 q·k)")
    style(axes)
    axes.legend(**LEGEND)
    return figure


def summary_table(summary: Sequence[Mapping[str, Any]]) -> Table:
    """Table of `compare_families`: regimes with the least error, and the largest error of each."""
    headers = ("data", "columns", "family", "sparse", "low-rank", "both")
    table = new_table("Regimes in which each has the least error of the matrix (its largest error)", headers, headers)
    for row in summary:
        cells = (f"{row[name]} ({row['worst'][name]:.2f})" for name in ("sparse", "low_rank", "both"))
        table.add_row(row["data"], f"{row['memory_fraction']:.4g}", row["family"], *cells)
    return table


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, write and draw what the options of `scripts/experiment_regimes.py` name."""
    names = ("data", "length", "width", "centres", "temperatures", "memory_fractions", "num_seeds", "seed")
    options = {name: getattr(arguments, name) for name in names}
    rows = measure_regimes(**options, progress=lambda cases: shown(cases, "Regimes"))
    variance = measure_variance(num_samples=arguments.variance_samples, seed=arguments.seed)
    summary = compare_families(rows)
    print_report([summary_table(summary)])
    content = {**provenance(torch.device("cpu")), "settings": without_paths(arguments, "variance_figure")}
    content |= {"summary": summary, "regimes": rows, "variance": variance}
    write_results(arguments, content, lambda: draw(rows, max(arguments.memory_fractions)))
    if arguments.variance_figure is not None:
        save_figure(draw_variance(variance), arguments.variance_figure)
