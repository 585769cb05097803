"""Rows of the attention matrices of a trained network as pictures: `scripts/plot_attention_maps.py`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from scatterbrain.attention.base import AttentionModule
from scatterbrain.errors import UserError, check_whole_number
from scatterbrain.ops.common.windows import window_bounds
from src.analysis import approximation
from src.analysis.tools import choose_device, say, shown
from src.datamodules.sampling import spread
from src.evaluation import figure_style as style
from src.models.attention_inputs import capture_stage_inputs, create_stage_attentions
from src.models.t2t_vit import T2TViT
from src.tasks.options import MAX_SEED
from src.utils.files import atomic_write

NAMES = {"full": "Full", "local": "Local", "performer": "Performer", "sblocal": "Scatterbrain"}
# The sizes of an attention, in words.
SIZES = {
    "local_context": "{} in a row",
    "num_neighbours": "{} nearest",
    "cluster_size": "clusters of {}",
    "bucket_size": "buckets of {}",
    "block": "blocks of {}",
    "nb_features": "{} features",
    "num_landmarks": "{} clusters",
    "num_query_landmarks": "{} of queries",
    "num_exact": "{} exact",
}
# Lengths in hundredths of an inch, multiples of 3: at 400/3 dots per inch all edges fall on pixels, and a panel has 224
# of them, 4 for each of 56 tokens.
DOTS_PER_INCH = 400 / 3
PANEL, GAP, MARGIN = 168, 12, 12
# From top to bottom: header, then for each photograph and stage: heading, maps, caption, differences, caption.
HEADER, HEADING, CAPTION = 120, 75, 24
LEAST_WIDTH = 2 * MARGIN + 4 * PANEL + 3 * GAP


@dataclass
class AttentionMap:
    """Row of the attention matrix of one token."""

    weights: np.ndarray  # (side, side), in multiples of 1 / N: 1 everywhere is equal attention to all N tokens
    options: dict[str, int]  # window and number of features
    effective_keys: float  # number of tokens that the weights are spread over, exp of their entropy
    error: float  # || row - full || / || full ||


@dataclass
class StageMaps:
    """The maps of one photograph in one stage."""

    token: tuple[int, int]  # row and column of the query
    maps: dict[str, AttentionMap]  # by attention, full attention first

    @property
    def side(self) -> int:
        """Tokens in a row and in a column."""
        return len(self.maps["full"].weights)


@dataclass
class Photograph:
    """A photograph and its maps."""

    path: str  # folder and name
    pixels: np.ndarray  # (height, width, 3) in [0, 1], as the network sees it
    stages: list[StageMaps]  # maps of stage 1 and stage 2


def stage_maps(
    model: T2TViT, attentions: Mapping[str, Sequence[AttentionModule]], image: torch.Tensor, where: Sequence[float]
) -> list[StageMaps]:
    """The maps of both stages for a normalised image (3, image_size, image_size).

    The model has full attention; `attentions` are modules of both stages by name, full attention first, and `where` is
    the query, as fractions of height and width.
    """
    stages = []
    for stage, inputs in enumerate(capture_stage_inputs(model, image[None])):
        num_tokens = inputs.query.shape[1]
        side = round(num_tokens**0.5)
        token = tuple(int(fraction * side) for fraction in where)
        number = token[0] * side + token[1]
        maps: dict[str, AttentionMap] = {}
        rows: dict[str, torch.Tensor] = {}
        for name, modules in attentions.items():
            rows[name] = approximation.attention_weights(inputs, modules[stage])[:, 0, number].cpu()
            keys = approximation.effective_keys(rows[name])
            error = approximation.relative_error(rows[name], rows["full"])
            weights = (rows[name] * num_tokens).reshape(side, side).numpy()
            maps[name] = AttentionMap(weights, modules[stage].sizes(), keys.item(), error.item())
        stages.append(StageMaps(token, maps))
    return stages


def draw(photographs: Sequence[Photograph], conditions: str) -> Figure:
    """For each photograph and stage a row of maps, and below it the photograph and the differences.

    All photographs have the same attentions; `conditions` are a sentence below the title.
    """
    columns = len(photographs[0].stages[0].maps)
    width = max(LEAST_WIDTH, 2 * MARGIN + columns * PANEL + (columns - 1) * GAP)
    stage_height = HEADING + 2 * (PANEL + CAPTION)
    height = HEADER + 2 * len(photographs) * stage_height
    figure = style.new_figure(width / 100, height / 100)
    figure.set(dpi=DOTS_PER_INCH, layout_engine="none")

    def write(left: float, top: float, text: str, size: float, **options: object) -> None:
        options = {"fontsize": size, "color": style.INK, "va": "top", **options}
        figure.text(left / width, 1 - top / height, text, **options)

    def place(left: float, top: float, size: tuple[float, float] = (PANEL, PANEL)) -> Axes:
        axes = figure.add_axes((left / width, 1 - (top + size[1]) / height, size[0] / width, size[1] / height))
        axes.spines[:].set_color(style.EDGE)
        return axes

    write(MARGIN, 12, "What one token looks at, and what each attention makes of it", 13, fontweight="bold")
    text = f"Ring: the token that looks. Outline: its window. {conditions}"
    write(MARGIN, 39, text, 9, color=style.FAINT)
    bars = (
        (style.weight_colours(), "weight of a token, times the average", (0.1, 0.3, 1, 3, 10)),
        (style.change_colours(), "change of the weight against full attention", (-10, -3, -1, 0, 1, 3, 10)),
    )
    for number, (colours, label, ticks) in enumerate(bars):
        left = MARGIN + number * (2 * PANEL + 2 * GAP)
        write(left, 63, label, 9)
        bar = figure.colorbar(colours, place(left, 81, (2 * PANEL - 9, 9)), orientation="horizontal", extend="both")
        bar.set_ticks(ticks, labels=[f"{tick:g}".replace("-", "\N{MINUS SIGN}") for tick in ticks])
        bar.ax.minorticks_off()
        bar.ax.tick_params(labelsize=8, length=2, labelcolor=style.INK)
        bar.outline.set_visible(False)

    top = HEADER
    for photograph in photographs:
        for number, stage in enumerate(photograph.stages, start=1):
            heading = f"Stage {number}: {stage.side} \N{MULTIPLICATION SIGN} {stage.side} tokens"
            write(MARGIN, top + 12, heading, 10, fontweight="bold")
            write(MARGIN + 2 * (PANEL + GAP), top + 12, photograph.path, 9, color=style.FAINT)
            for column, name in enumerate(stage.maps):
                left = MARGIN + column * (PANEL + GAP)
                above = place(left, top + HEADING)
                below = place(left, top + HEADING + PANEL + CAPTION)
                draw_map(above, stage, name)
                if name == "full":
                    below.imshow(photograph.pixels, extent=(-0.5, stage.side - 0.5, stage.side - 0.5, -0.5))
                    below.set_xlabel("the photograph", fontsize=8.5, color=style.INK, labelpad=3)
                else:
                    draw_difference(below, stage, name)
                for axes in (above, below):
                    style.draw_token(axes, stage.token)
            top += stage_height
    return figure


def draw_map(axes: Axes, stage: StageMaps, name: str) -> None:
    """Draw the weights of one attention, with its name and sizes."""
    item = stage.maps[name]
    style.draw_grid(axes, item.weights, style.weight_colours())
    outline_window(axes, stage, name, "white")
    parts = [SIZES[option].format(size) for option, size in item.options.items() if option in SIZES]
    sizes = " + ".join(parts) or f"all {stage.side**2:,} keys"
    axes.set_title(sizes, fontsize=8.5 * min(1, 28 / len(sizes)), color=style.INK, pad=4)  # 28 characters fit
    label, colour = NAMES.get(name, name), style.COLOURS.get(name, style.OTHER)
    where = {"transform": axes.transAxes, "ha": "center"}
    ink = style.INK if colour == style.OTHER else colour  # grey is for lines
    axes.text(0.5, 1.12, label, fontsize=11, fontweight="bold", color=ink, **where)
    axes.set_xlabel(f"spread over {item.effective_keys:,.0f} keys", fontsize=8.5, color=style.INK, labelpad=3)


def draw_difference(axes: Axes, stage: StageMaps, name: str) -> None:
    """Draw the weights of one attention less those of full attention."""
    item = stage.maps[name]
    style.draw_grid(axes, item.weights - stage.maps["full"].weights, style.change_colours())
    outline_window(axes, stage, name, style.INK)
    axes.set_xlabel(f"change, relative error {item.error:.2f}", fontsize=8.5, color=style.INK, labelpad=3)


def outline_window(axes: Axes, stage: StageMaps, name: str, colour: str) -> None:
    """Draw a line around the tokens of the window, where the attention has one."""
    window = stage.maps[name].options.get("local_context")
    if window:
        edges = window_edges(stage.side, stage.token, window)
        axes.add_collection(LineCollection(edges, colors=colour, linewidths=0.6))


def window_edges(side: int, token: tuple[int, int], window: int) -> list[tuple[tuple[float, float], ...]]:
    """Edges of unit length around the window of a token, each from (x, y) to (x, y); x counts columns, y rows."""
    left, right = window_bounds(window)
    offsets = np.arange(side**2).reshape(side, side) - (token[0] * side + token[1])
    inside = np.pad((offsets >= -left) & (offsets < right), 1)
    # where a token is inside and its neighbour above, or on the left, is not, or the other way round
    edges = [((x - 1.5, y - 0.5), (x - 0.5, y - 0.5)) for y, x in np.argwhere(inside[1:] != inside[:-1])]
    edges += [((x - 0.5, y - 1.5), (x - 0.5, y - 0.5)) for y, x in np.argwhere(inside[:, 1:] != inside[:, :-1])]
    return edges


def write_png(figure: Figure, path: str) -> None:
    """Write a figure in 256 colours, which takes a third of the bytes and looks the same."""
    figure.canvas.draw()
    pixels = np.ascontiguousarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    picture = Image.fromarray(pixels).quantize(256, dither=Image.Dither.NONE)
    with atomic_write(path, "wb") as file:
        picture.save(file, format="png", optimize=True)


def plot(arguments: argparse.Namespace) -> None:
    """Compute and draw the maps that the options of `scripts/plot_attention_maps.py` name."""
    if Path(arguments.output).suffix.lower() != ".png":
        raise UserError(f"--output {arguments.output}: the name has to end in .png.")
    check_whole_number("--seed", arguments.seed, 0, MAX_SEED)
    if not all(0 <= fraction < 1 for fraction in arguments.token):
        row, column = arguments.token
        raise UserError(f"--token {row:g} {column:g} is not valid. Give two fractions of at least 0 and below 1.")
    arguments.attentions = list(dict.fromkeys(["full", *arguments.attentions]))
    if len(arguments.attentions) == 1:
        raise UserError("--attentions full alone leaves nothing to compare. Add another one, such as sblocal.")
    device = choose_device(arguments.device)
    variant, model = approximation.load_model(arguments.checkpoint)
    model.to(device)
    dataset = approximation.open_photographs(arguments, model)
    attentions = {
        name: create_stage_attentions(name, model, arguments.memory_fraction, arguments.seed)
        for name in arguments.attentions
    }
    # without --images two, a quarter of the split from either end
    chosen = range(len(dataset)) if arguments.images else spread(len(dataset), 2)
    photographs = []
    for position in shown(chosen, "Photographs"):
        image = dataset[position][0]
        stages = stage_maps(model, attentions, image.to(device), arguments.token)
        name = "/".join(Path(dataset.paths[position]).parts[-2:])
        photographs.append(Photograph(name, approximation.pixels_of(image), stages))
    columns = f"{100 * arguments.memory_fraction:.3g} % of the attention columns"
    write_png(draw(photographs, f"{variant}, {columns}, seed {arguments.seed}."), arguments.output)
    say(arguments.output)
