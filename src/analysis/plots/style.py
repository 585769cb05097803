"""The look that all figures share: colours, axes, and tokens of an image as squares."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, SymLogNorm
from matplotlib.figure import Figure

from src.evaluation.colours import ATTENTION_COLOURS

INK, FAINT, GRID, OTHER, EDGE = "#22262e", "#6b7280", "#e5e7eb", "#8a8f98", "#c4c8cf"
# An attention has one colour in every figure; the oracles are darker shades of sparse, low-rank and both.
COLOURS = {
    "largest": "#1d4f8c",
    "svd": "#b5651d",
    "largest+svd": "#1c7a48",
    "topk": "#1d4f8c",
    "sbtopk": "#145a36",
    "uniform": OTHER,
} | ATTENTION_COLOURS
LEGEND = {"fontsize": 7.5, "frameon": False, "labelcolor": INK}
DOTTED = (0, (1, 2))


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, on an Agg canvas; pyplot is not involved."""
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
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
