"""What each part and each choice of adaptive attention contributes: `scripts/measure_adaptive.py`."""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.table import Table

from scatterbrain.errors import UserError
from scatterbrain.ops.adaptive import exact_pairs, plan_adaptive_attention
from scatterbrain.ops.adaptive.plan import AdaptivePlan, exact_keys
from scatterbrain.ops.common.windows import window_mask
from scatterbrain.ops.sparse.naive import naive_block_attention, naive_support_attention
from src.analysis.approximation import load_model, open_split, pixels_of, relative_error
from src.analysis.benchmark.frontier import BLOCK, all_layers, chosen_blocks
from src.analysis.experiments.memory import LOG_TICKS, set_ticks
from src.analysis.experiments.regimes import full_weights
from src.analysis.experiments.residual import Maps, draw_maps
from src.analysis.plots.attention_maps import write_png
from src.analysis.tools import new_table, print_report, provenance, shown, without_paths, write_results
from src.datamodules.sampling import spread
from src.evaluation.figure_style import INK, LEGEND, new_figure, style
from src.models.attention_inputs import StageInputs, capture_stage_inputs
from src.models.t2t_vit import T2TViT

Options = dict[str, Any]

SIZES: Options = {"window": 64, "num_landmarks": 128, "num_query_landmarks": 48, "density": 0.08, "num_steps": 1}
SHORT, SHORT_SHARES = 600, {"window": 2, "num_landmarks": 2, "num_query_landmarks": 3}  # by which sizes are divided
NETWORK_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")
# What differs from `SIZES`, by name, in groups.
GROUPS: tuple[dict[str, Options], ...] = (
    {
        "all parts": {},
        "no window": {"window": 0},
        "no chosen clusters": {"density": 0.0},
        "no landmarks": {"landmarks": False},
        "window alone": {"density": 0.0, "landmarks": False},
        "chosen clusters alone": {"window": 0, "landmarks": False},
        "landmarks alone": {"window": 0, "density": 0.0},
    },
    {f"by loss, {name}": {"choice": f"loss, {name}"} for name in ("one by one", "by coordinates", "one variance")}
    | {f"by {name}": {"choice": name} for name in ("mass times std", "mass", "variance")}
    | {"at random": {"choice": "random"}}
    | {f"oracle: {name}": {"choice": name} for name in ("heaviest clusters", "heaviest keys")},
    {f"{number} steps": {"num_steps": number} for number in (0, 4)},
    {f"M = {number}": {"num_landmarks": number} for number in (64, 256)}
    | {f"Q = {number}": {"num_query_landmarks": number} for number in (16, 128)},
    {f"density {density:g}": {"density": density} for density in (0.03, 0.15)},
    {f"tolerance {x:g}": {"density": 0.3, "tolerance": x} for x in (0.1, 0.3)},
    {f"PISA {density:.2f}": {"pisa": density} for density in (0.05, 0.15, 0.3)},
)
VARIANTS: dict[str, Options] = {name: changes for group in GROUPS for name, changes in group.items()}


def scores(choice: str, inputs: StageInputs, plan: AdaptivePlan) -> torch.Tensor:
    """Scores (Q, M) by which the query clusters of one sequence choose key clusters, the largest first."""
    labels = (plan.query_assignment[0, 0], plan.key_assignment[0, 0])
    of_query, of_key = (F.one_hot(x, n).double() for x, n in zip(labels, plan.taken.shape[2:], strict=True))
    if choice == "random":
        return torch.rand(plan.taken.shape[2:], generator=torch.Generator().manual_seed(0))
    if choice == "heaviest clusters":
        return of_query.T @ full_weights(inputs) @ of_key
    query, key = (x[0, :, 0].double() for x in (inputs.query, inputs.key))
    means = inputs.scale * (of_query.T @ query) / of_query.sum(0).clamp_min(1)[:, None]
    logits, sizes = means @ (key - key.mean(0)).T, of_key.sum(0).clamp_min(1)
    mean = logits @ of_key / sizes
    variance = (logits.square() @ of_key / sizes - mean.square()).clamp_min(1e-12)
    log_mass = mean + sizes.log()
    if choice in ("loss, by coordinates", "loss, one variance"):  # variances of the keys, not of their logits
        offsets = key - (of_key.T @ key / sizes[:, None])[labels[1]]
        spread = of_key.T @ offsets.square() / sizes[:, None]  # [M, E]
        spread = spread if choice == "loss, by coordinates" else spread.mean(1, keepdim=True).expand_as(spread)
        variance = (means.square() @ spread.T).clamp_min(1e-12)
    return {
        "loss": log_mass + variance / 2 + (-torch.expm1(-variance)).log() / 2,
        "mass times std": log_mass + variance.log() / 2,
        "mass": log_mass,
        "variance": variance,
    }[choice.partition(",")[0]]


def take(scores: torch.Tensor, sizes: torch.Tensor, room: int) -> torch.Tensor:
    """Boolean (Q, M): clusters in the order of their scores, each if `room` has space for all of its `sizes` (M,)."""
    taken, used = torch.zeros_like(scores, dtype=torch.bool), torch.zeros(len(scores), 1, dtype=torch.int64)
    for column in scores.argsort(-1, descending=True).T[..., None]:
        fits = used + sizes[column] <= room
        taken.scatter_(1, column, fits)
        used += sizes[column] * fits
    return taken


def attend(
    inputs: StageInputs, window: int, choice: str | None = None, landmarks: bool = True, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output (1, 1, N, D), weights (1, 1, N, N) and exact pairs (1, 1, N, N) of one sequence with one head, dense.

    `options` are those of `plan_adaptive_attention`. `choice` is one of `scores`, or `heaviest keys`: those of each
    query, as many as the rule takes; None is the rule. Without `landmarks`, keys that are not exact have no weight.
    """
    query, key, value = (x.transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))
    plan = plan_adaptive_attention(query, key, value, scale=inputs.scale, **options)
    labels = plan.key_assignment[0, 0]
    if choice not in (None, "heaviest keys"):
        members, room = labels.bincount(minlength=plan.taken.shape[3]), exact_keys(options["density"], key.shape[2])
        plan = plan._replace(taken=take(scores(choice, inputs, plan), members, room)[None, None])
    support = exact_pairs(*plan[:3], window)
    if choice == "heaviest keys":
        number = exact_pairs(*plan[:3], 0).sum(-1, keepdim=True)
        ranks = (query @ key.transpose(2, 3)).argsort(-1, descending=True).argsort(-1)
        support = (ranks < number) | window_mask(query.shape[2], key.shape[2], window, key.device)
    of_key = F.one_hot(labels, plan.taken.shape[3]).double()
    means = of_key.T @ key[0, 0].double() / of_key.sum(0).clamp_min(1)[:, None]
    logits = (inputs.scale * query.double() @ means.T)[..., labels] if landmarks else None
    return *naive_support_attention(query, key, value, support.flatten(0, 1), inputs.scale, logits), support


@torch.no_grad()
def measure_layer(network: str, layer: str, inputs: StageInputs) -> Iterator[dict[str, Any]]:
    """Rows of all variants: `error`, the relative Frobenius error, and `share` of exact pairs, means over samples."""
    length = inputs.key.shape[1]
    shares = SHORT_SHARES if length < SHORT else {}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for number in range(len(inputs.key)):
        one = inputs.image(number)
        tensors = [x.transpose(1, 2).double() for x in (one.query, one.key, one.value)]
        reference = full_weights(one) @ tensors[2]
        for name, changes in VARIANTS.items():
            if "pisa" in changes:
                blocks = chosen_blocks(changes["pisa"], length)
                out, share = naive_block_attention(*tensors, blocks, one.scale, True), blocks * BLOCK / length
            else:
                options = SIZES | changes
                out, _, support = attend(one, **options | {key: options[key] // shares[key] for key in shares})
                share = support.double().mean().item()
            found[name].append((relative_error(out, reference).item(), min(1.0, share)))
    for name, values in found.items():
        error, share = map(statistics.fmean, zip(*values, strict=True))
        where = {"network": network, "layer": layer, "length": length, "samples": len(values)}
        yield where | {"variant": name, "error": error, "share": share}


def result_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Table of the errors, with the share of exact pairs: a row for each variant, a column for each layer."""
    layers = list(dict.fromkeys(title(row) for row in rows))
    headers = ("variant", *layers)
    table = new_table("Relative error of the output (exact pairs in %)", headers, headers[:1], pad_edge=False)
    for group in GROUPS:
        for name in group:
            chosen = [row for row in rows if row["variant"] == name]
            table.add_row(name, *(f"{row['error']:.3f} ({100 * row['share']:.0f})" for row in chosen))
        table.add_section()
    return table


def title(row: Mapping[str, Any]) -> str:
    """Name of a layer, on two lines."""
    network = row["network"].split("_")[0]
    return network.replace(" ", "\n", 1) if network.startswith("demo") else f"{network}\nlayer {row['layer']}"


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The error of each variant: a point for each layer, and a line for their geometric mean."""
    places = {name: [*VARIANTS].index(name) + number for number, group in enumerate(GROUPS) for name in group}
    figure = new_figure(8, 6.2)
    axes = figure.add_subplot()
    networks = itertools.groupby(dict.fromkeys(map(title, rows)), lambda layer: layer.split("\n")[0])
    for colour, (_, layers) in zip(itertools.cycle(NETWORK_COLOURS), networks, strict=False):
        for marker, layer in zip(itertools.cycle("os^v"), layers, strict=False):
            points = [(row["error"], places[row["variant"]]) for row in rows if title(row) == layer]
            look = {"color": colour, "marker": marker, "linestyle": "", "markersize": 5, "alpha": 0.8}
            axes.plot(*zip(*points, strict=True), label=layer.replace("\n", " "), **look)
    for name, place in places.items():
        errors = [max(1e-9, row["error"]) for row in rows if row["variant"] == name]  # some may be exact
        mean = statistics.geometric_mean(errors)
        axes.plot([mean, mean], [place - 0.4, place + 0.4], color=INK, linewidth=1.6)
    axes.set_yticks(list(places.values()), list(places))
    axes.set(xscale="log", xlabel="relative error of the output; line: geometric mean")
    axes.margins(y=0.02)
    axes.invert_yaxis()
    style(axes)
    set_ticks(axes.xaxis, LOG_TICKS)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), **LEGEND)
    return figure


@torch.no_grad()
def token_maps(inputs: StageInputs, where: Sequence[float] = (0.5, 0.5)) -> Maps:
    """The row of one token under full and adaptive attention, its parts, and the difference."""
    _, weights, support = attend(inputs, **SIZES)
    length = weights.shape[3]
    side = round(length**0.5)
    token = tuple(int(part * side) for part in where)
    number = token[0] * side + token[1]
    row, exact = weights[0, 0, number], support[0, 0, number]
    full, near = full_weights(inputs)[number], window_mask(length, length, SIZES["window"], row.device)[number]
    parts = {"window": near, "chosen clusters": exact & ~near, "landmarks": ~exact}
    grids = {"full attention": full, "adaptive attention": row}
    grids |= {f"{name}: {int(part.sum()):,} keys": row * part for name, part in parts.items()}
    grids["difference"] = row - full
    return Maps(token, {name: (grid * length).view(side, side).numpy() for name, grid in grids.items()})


def draw_photographs(model: T2TViT, images: Sequence[torch.Tensor]) -> Figure:
    """Maps of a token in the middle of each photograph, in both stages."""
    figure = new_figure(12.5, 4.1 * len(images))
    figure.set_dpi(150)
    for image, part in zip(images, figure.subfigures(len(images), 1, squeeze=False)[:, 0], strict=True):
        maps = [token_maps(inputs) for inputs in capture_stage_inputs(model, image[None])]
        draw_maps(part, maps, pixels_of(image))
    return figure


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, write and draw what the options of `scripts/measure_adaptive.py` name."""
    if arguments.maps is not None and arguments.checkpoint is None:
        raise UserError("--maps draws photographs. Give --checkpoint and --data-dir.")
    rows = [row for layer in shown(all_layers(arguments), "Layers") for row in measure_layer(*layer)]
    print_report([result_table(rows)])
    settings = without_paths(arguments, "checkpoint", "data_dir", "tensors", "maps")
    content = {**provenance(torch.device("cpu")), "settings": settings, "sizes": SIZES, "results": rows}
    write_results(arguments, content, lambda: draw(rows))
    if arguments.maps is not None:
        _, model = load_model(arguments.checkpoint)
        dataset = open_split(arguments.data_dir, arguments.split, model)
        images = [dataset[position][0] for position in spread(len(dataset), 2)]
        write_png(draw_photographs(model, images), arguments.maps)
