"""The look that all figures share: colours, axes, and tokens of an image as squares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, SymLogNorm
from matplotlib.figure import Figure

from src.evaluation.colours import ATTENTION_COLOURS, OTHER_COLOUR

INK, FAINT, GRID, EDGE = "#22262e", "#6b7280", "#e5e7eb", "#c4c8cf"
OTHER = OTHER_COLOUR
# An attention has one colour in every figure. The oracles have those of sparse, low-rank and both; PISA is the largest
# blocks and a low-rank part, as sbtopk is the largest weights and random features.
COLOURS = {
    "largest": ATTENTION_COLOURS["local"],
    "svd": ATTENTION_COLOURS["performer"],
    "largest+svd": ATTENTION_COLOURS["sblocal"],
    "topk": ATTENTION_COLOURS["sbadaptive"],
    "sbtopk": "#661100",
    "pisa": "#661100",
    "topk-blocks": "#999933",
    "flex-window": ATTENTION_COLOURS["local"],
    "uniform": OTHER,
} | ATTENTION_COLOURS
LEGEND = {"fontsize": 7.5, "frameon": False, "labelcolor": INK}
DOTTED = (0, (1, 2))


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """An empty figure, sizes in inches, with `options` of `Figure`, on an Agg canvas; pyplot is not involved."""
    figure = Figure(figsize=(width, height), facecolor="white", **{"layout": "constrained"} | options)
    FigureCanvasAgg(figure)
    return figure


def style(axes: Axes) -> None:
    """Give a panel its grid, spines, and sizes of text."""
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(EDGE)
    axes.tick_params(labelsize=8, color=EDGE, labelcolor=FAINT)
    axes.xaxis.label.set(fontsize=9, color=INK)
    axes.yaxis.label.set(fontsize=9, color=INK)
    axes.title.set(fontsize=9.5, color=INK)


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]], size: float = 6.5) -> None:
    """Write texts right of a panel, each as near to the end of its line as the others allow.

    Limits and scales of the axes are set. `ends` are x and y of a line's end in the units of the data, its text, and
    its colour; `size` is that of the text in points.
    """
    transform = axes.transData + axes.transAxes.inverted()
    places = ((*transform.transform((x, y)), text, colour) for x, y, text, colour in sorted(ends))
    places = sorted(places, key=lambda place: place[1])
    height = axes.get_position().height * axes.figure.get_size_inches()[1] * 72 or 1
    gap = 1.25 * size / height
    heights: list[float] = []
    for _, y, _, _ in places:
        heights.append(max(y, heights[-1] + gap) if heights else max(y, 0.0))
    # those above the panel move down again
    top = 1.0
    for number in reversed(range(len(heights))):
        heights[number] = min(heights[number], top)
        top = heights[number] - gap
    for (x, y, text, colour), height in zip(places, heights, strict=True):
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 2, "relpos": (0, 0.5)}
        options = {"xytext": (1.06, height), "xycoords": "axes fraction", "textcoords": "axes fraction"}
        options |= {"fontsize": size, "color": FAINT if colour == OTHER else colour, "va": "center"}
        axes.annotate(text, (x, y), annotation_clip=False, arrowprops=arrow, **options)


def weight_colours() -> ScalarMappable:
    """Colours of weights in multiples of 1 / N, which is what equal attention gives; zero is drawn as the least."""
    return ScalarMappable(LogNorm(0.1, 10, clip=True), "magma")


def change_colours() -> ScalarMappable:
    """Colours of changes of weights: linear to 1, logarithmic beyond."""
    return ScalarMappable(SymLogNorm(1, vmin=-10, vmax=10), "RdBu_r")


def draw_grid(axes: Axes, values: np.ndarray, colours: ScalarMappable) -> None:
    """Draw one square of colour for each token, values (side, side)."""
    axes.imshow(values, norm=colours.norm, cmap=colours.cmap, interpolation="nearest")


def draw_token(axes: Axes, token: tuple[int, int]) -> None:
    """Draw a ring around a token (row, column), visible on any colour."""
    row, column = token
    for colour, width in (("black", 2.2), ("white", 1.1)):
        axes.plot(column, row, "o", markersize=6, fillstyle="none", color=colour, markeredgewidth=width, clip_on=False)
    axes.set(xticks=[], yticks=[])
