"""Ranks of what a sparse support leaves of a trained network's attention: `scripts/experiment_residual.py`."""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from rich.table import Table

from scatterbrain.errors import UserError, check_whole_number
from scatterbrain.ops.common.budget import budget_columns, features_for, keys_for
from scatterbrain.ops.common.windows import window_mask
from src.analysis.approximation import load_model, model_entries, open_split, pixels_of
from src.analysis.experiments.regimes import full_weights, keep_largest, nearest_of_rank
from src.analysis.tools import new_table, print_report, provenance, shown, write_results
from src.datamodules.sampling import spread
from src.evaluation import figure_style as style
from src.evaluation.figure_style import COLOURS, FAINT, INK, LEGEND
from src.models.attention_inputs import StageInputs, capture_stage_inputs, create_stage_attentions
from src.models.t2t_vit import T2TViT
from src.tasks.options import MAX_SEED

SUPPORTS = {"local": "window", "smyrf": "smyrf", "topk": "top-k"}
PARTS = ("full", "sparse", "residual")
ERRORS = {
    "sparse": "sparse alone",
    "low_rank": "low-rank alone",
    "both": "both, fit of residual",
    "both_free": "both, fit outside support",
}
ENERGIES = (0.9, 0.99)


@dataclass
class Maps:
    """The weights of one token in one stage, as grids of tokens in multiples of 1 / N."""

    token: tuple[int, int]  # row and column of the query
    grids: dict[str, np.ndarray]  # by title, (side, side)


def support_masks(
    inputs: StageInputs, weights: torch.Tensor, model: T2TViT, stage: int, memory: float, seed: int, whole: bool
) -> dict[str, tuple[torch.Tensor, dict[str, int]]]:
    """Boolean masks (T, S) of the supports and their sizes, by name, for one image with weights (T, S) in a stage.

    `whole` spends all of the memory fraction on the support, as sparse attention does, else half, as Scatterbrain does.
    """
    length = weights.shape[0]
    names = ("local", "smyrf") if whole else ("sblocal", "sbsmyrf")
    local, smyrf = (create_stage_attentions(name, model, memory, seed)[stage - 1] for name in names)
    window, cluster = local.sizes()["local_context"], smyrf.sizes()
    clusters = smyrf.source(inputs.query.transpose(1, 2), inputs.key.transpose(1, 2), None)
    keys = keys_for(budget_columns(length, memory) / (1 if whole else 2))
    return {
        "local": (window_mask(length, length, window), {"local_context": window}),
        "smyrf": (clusters.dense(length, length)[0], {name: cluster[name] for name in ("cluster_size", "num_hashes")}),
        "topk": (keep_largest(weights, keys) > 0, {"num_keys": keys}),
    }


def singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """Singular values in descending order, float64.

    They are the roots of the eigenvalues of the smaller Gram matrix: much faster than `svdvals`, and right to about
    1e-8 of the largest, where the energies here need 1e-3.
    """
    matrix = matrix.double()
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(matrix @ matrix.T).flip(0).clamp_min(0).sqrt()


def values_for_energy(values: torch.Tensor, energy: float) -> int:
    """Number of singular values that, from the largest on, hold a share `energy` of the sum of their squares."""
    cumulative = values.square().cumsum(0)
    return int((cumulative < energy * cumulative[-1]).sum().item()) + 1


def left_after(values: torch.Tensor, total: float) -> torch.Tensor:
    """Norm of what the nearest matrix of rank r = 0, 1, ... leaves, over the norm `total` (Eckart and Young)."""
    squares = torch.cat([values.square(), values.new_zeros(1)])
    return squares.flip(0).cumsum(0).flip(0).sqrt() / total


def fit_outside(weights: torch.Tensor, mask: torch.Tensor, rank: int, num_steps: int = 6) -> float:
    """Error of a fit of weights (T, S) by a rank outside the support `mask` (T, S), over the norm of the weights.

    On the support the fit may be anything, as exact weights replace it there: fitting the residual, which is zero
    there, is harder. What is on the support is taken from the last fit, and fitted again; the error falls with each
    step, to a local minimum. Of two starts, the fit of the residual and that of the whole matrix, the better counts.
    """
    errors = []
    for fit in (torch.zeros_like(weights), weights):
        for _ in range(num_steps):
            fit = nearest_of_rank(torch.where(mask, fit, weights), rank, num_steps=2)
        errors.append((((weights - fit) * ~mask).norm() / weights.norm()).item())
    return min(errors)


@torch.no_grad()
def measure_stage(
    inputs: StageInputs, model: T2TViT, stage: int, memory: float = 1 / 32, num_queries: int = 784, seed: int = 1111
) -> dict[str, dict[str, Any]]:
    """The split of one image's matrix in one stage, by support; `num_queries` of its rows are kept, spread evenly.

    For each support: `sizes`, `energy_on_support` (share of the sum of squares), `num_values` (by part and energy),
    `left` (by part: error of the nearest matrix of rank 0, 1, ..., over the norm of full attention's), and
    `equal_memory`: errors at the same memory of sparse alone (`sparse`), of the nearest matrix of a rank (`low_rank`),
    of both with the low rank fitted to the residual (`both`) and outside the support (`both_free`, see `fit_outside`),
    which spends `rank`.
    """
    weights = full_weights(inputs)
    length = weights.shape[0]
    rows = spread(length, num_queries)
    columns = budget_columns(length, memory)
    wholes = support_masks(inputs, weights, model, stage, memory, seed, whole=True)
    halves = support_masks(inputs, weights, model, stage, memory, seed, whole=False)
    weights = weights[rows]
    total = weights.norm().item()
    full_values = singular_values(weights)
    most = len(full_values)
    rank, half_rank = (min(features_for(part), most) for part in (columns, columns / 2))
    result = {}
    for name, (mask, sizes) in halves.items():
        sparse = weights * mask[rows]
        parts = (full_values, singular_values(sparse), singular_values(weights - sparse))
        values = dict(zip(PARTS, parts, strict=True))
        left = {part: left_after(each, total) for part, each in values.items()}
        alone = (weights * ~wholes[name][0][rows]).norm().item() / total
        energies = {f"{energy:g}": energy for energy in ENERGIES}
        counts = {
            part: {text: values_for_energy(each, energy) for text, energy in energies.items()}
            for part, each in values.items()
        }
        equal = {"sparse": alone, "low_rank": left["full"][rank].item(), "both": left["residual"][half_rank].item()}
        equal |= {"both_free": fit_outside(weights.float(), mask[rows], half_rank), "rank": half_rank}
        result[name] = {"sizes": sizes, "energy_on_support": (sparse.norm().item() / total) ** 2, "num_values": counts}
        result[name] |= {"left": {part: each.tolist() for part, each in left.items()}, "equal_memory": equal}
    return result


@torch.no_grad()
def token_maps(
    inputs: StageInputs, model: T2TViT, stage: int, memory: float, seed: int, where: Sequence[float] = (0.5, 0.5)
) -> Maps:
    """The row of one token: all of it, the window's part and the rest, the largest weights and the rest."""
    weights = full_weights(inputs)
    side = round(weights.shape[0] ** 0.5)
    token = tuple(int(part * side) for part in where)
    number = token[0] * side + token[1]
    row = weights[number]
    masks = support_masks(inputs, weights, model, stage, memory, seed, whole=False)
    grids = {"full attention": row}
    for name in ("local", "topk"):
        seen = masks[name][0][number]
        grids |= {f"{SUPPORTS[name]}: sparse part": row * seen, f"{SUPPORTS[name]}: residual": row * ~seen}
    return Maps(token, {title: (grid * len(row)).view(side, side).numpy() for title, grid in grids.items()})


def mean_of(items: Sequence[Any]) -> Any:
    """Means, entry by entry, of equal structures of dictionaries, lists and numbers."""
    first = items[0]
    if isinstance(first, Mapping):
        return {name: mean_of([item[name] for item in items]) for name in first}
    if isinstance(first, list):
        return np.mean(items, axis=0).tolist()
    return statistics.fmean(items)


def thinned(curve: Sequence[float]) -> list[tuple[int, float]]:
    """Pairs (rank, value) of a curve at about 60 ranks, evenly spaced in their logarithm, 0 among them."""
    ranks = {0, *(round(rank) for rank in np.geomspace(1, len(curve) - 1, 60))}
    return [(rank, curve[rank]) for rank in sorted(ranks)]


def measure_residuals(
    model: T2TViT, images: Sequence[torch.Tensor], memory: float = 1 / 32, num_queries: int = 784, seed: int = 1111
) -> list[dict[str, Any]]:
    """Means of `measure_stage` over images (3, image_size, image_size), a row for each stage and support.

    Rows have `stage`, `num_tokens`, `num_queries`, `support`, and the means; `left` as (rank, error) pairs.
    """
    found: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    lengths = {}
    for image in images:
        for stage, inputs in enumerate(capture_stage_inputs(model, image[None]), start=1):
            lengths[stage] = inputs.query.shape[1]
            for name, item in measure_stage(inputs, model, stage, memory, num_queries, seed).items():
                found[stage, name].append(item)
    rows = []
    for (stage, name), items in sorted(found.items(), key=lambda pair: pair[0][0]):
        sizes = items[0]["sizes"]
        means = mean_of([{key: value for key, value in item.items() if key != "sizes"} for item in items])
        means["left"] = {part: thinned(curve) for part, curve in means["left"].items()}
        size = min(num_queries, lengths[stage])
        row = {"stage": stage, "num_tokens": lengths[stage], "num_queries": size, "support": name}
        rows.append(row | {"sizes": sizes} | means)
    return rows


def draw(rows: Sequence[Mapping[str, Any]], maps: Sequence[Maps], pixels: np.ndarray) -> Figure:
    """Maps of a token in both stages above, with the photograph's pixels; errors by rank below."""
    figure = style.new_figure(11, 7.9)
    above, below = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    draw_maps(above, maps, pixels)
    for stage, axes in enumerate(below.subplots(1, 2, sharey=True), start=1):
        draw_spectra(axes, [row for row in rows if row["stage"] == stage])
    return figure


def draw_maps(figure: SubFigure, maps: Sequence[Maps], pixels: np.ndarray) -> None:
    """Draw the maps of a token in both stages, after the photograph's pixels."""
    grid = figure.subplots(2, len(maps[0].grids) + 1)
    for stage, (item, line) in enumerate(zip(maps, grid, strict=True), start=1):
        side = len(item.grids["full attention"])
        line[0].imshow(pixels, extent=(-0.5, side - 0.5, side - 0.5, -0.5))
        line[0].set_ylabel(f"stage {stage}, {side} \N{MULTIPLICATION SIGN} {side} tokens", fontsize=9, color=INK)
        for axes, (title, values) in zip(line[1:], item.grids.items(), strict=True):
            change = title == "difference"
            style.draw_grid(axes, values, style.change_colours() if change else style.weight_colours())
            axes.set_title(title, fontsize=8.5, color=INK)
            share = np.abs(values).mean() / 2 if change else values.mean()
            text = f"{100 * share:.0f} % of the weight{' moved' * change}"
            axes.set_xlabel(text, fontsize=8, color=FAINT)
        for axes in line:
            style.draw_token(axes, item.token)
    bar = figure.colorbar(style.weight_colours(), ax=grid, fraction=0.012, extend="both")
    bar.set_label("weight, times the average", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=7, labelcolor=INK)


def draw_spectra(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the error of the best fit of each rank, over full attention's norm, for one stage."""
    full = rows[0]["left"]["full"][1:]
    axes.plot(*zip(*full, strict=True), color=COLOURS["full"], linewidth=2, label="full")
    for row in rows:
        for part, line in (("residual", "-"), ("sparse", ":")):
            curve = row["left"][part][1:]
            label = f"{SUPPORTS[row['support']]}: {'residual' if part == 'residual' else 'sparse part'}"
            axes.plot(*zip(*curve, strict=True), color=COLOURS[row["support"]], linestyle=line, label=label)
        point = row["equal_memory"]["rank"], row["equal_memory"]["both_free"]
        axes.plot(*point, "*", color=COLOURS[row["support"]], markersize=9, markeredgecolor="white")
    axes.plot([], [], "*", color=FAINT, label="fit outside the support, half of the memory")
    axes.set(xscale="log", xlabel="rank of the best fit", ylabel="what it leaves, over the norm of full", ylim=(0, 1))
    axes.set_title(f"stage {rows[0]['stage']}: {rows[0]['num_queries']} queries, {rows[0]['num_tokens']:,} keys")
    style.style(axes)
    axes.legend(**LEGEND)


def residual_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Table of the numbers of singular values, and of the errors at equal memory."""
    headers = ("stage", "support", "energy on it", *PARTS, *(name.replace(", ", ",\n") for name in ERRORS.values()))
    title = "Singular values that hold 90 / 99 % of the energy, and errors of the matrix at equal memory"
    table = new_table(title, headers, headers)
    for row in rows:
        counts = (" / ".join(f"{count:.0f}" for count in row["num_values"][part].values()) for part in PARTS)
        errors = (f"{row['equal_memory'][name]:.3f}" for name in ERRORS)
        table.add_row(str(row["stage"]), row["support"], f"{100 * row['energy_on_support']:.0f} %", *counts, *errors)
    return table


def photograph_maps(model: T2TViT, image: torch.Tensor, memory: float, seed: int) -> tuple[list[Maps], np.ndarray]:
    """The maps of both stages, and the photograph's pixels (height, width, 3) in [0, 1]."""
    inputs = capture_stage_inputs(model, image[None])
    maps = [token_maps(each, model, stage, memory, seed) for stage, each in enumerate(inputs, start=1)]
    return maps, pixels_of(image)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, write and draw what the options of `scripts/experiment_residual.py` name."""
    check_whole_number("--seed", arguments.seed, 0, MAX_SEED)
    if not 0 < arguments.memory_fraction <= 0.5:
        raise UserError(f"--memory-fraction={arguments.memory_fraction:g} has to lie in (0, 0.5].")
    name, model = load_model(arguments.checkpoint)
    dataset = open_split(arguments.data_dir, arguments.split, model)
    chosen = spread(len(dataset), arguments.num_images)
    images = [dataset[position][0] for position in chosen]
    memory, seed = arguments.memory_fraction, arguments.seed
    rows = measure_residuals(model, shown(images, "Photographs"), memory, arguments.num_queries, seed)
    print_report([residual_table(rows)])
    content = provenance(torch.device("cpu")) | model_entries(name, arguments.checkpoint)
    content |= {"images": [dataset.paths[position] for position in chosen], "memory_fraction": memory}
    content |= {"seed": seed, "results": rows}
    write_results(arguments, content, lambda: draw(rows, *photograph_maps(model, images[0], memory, seed)))
