"""Masks of the sparse supports as pictures: `scripts/plot_supports.py`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from scatterbrain.errors import UserError, check_whole_number
from scatterbrain.ops.common.windows import window_mask
from scatterbrain.ops.sparse.block_sparse import block_layout, layout_support
from scatterbrain.ops.sparse.window2d import neighbourhood_shape, neighbourhood_support
from src.analysis.plots.style import EDGE, FAINT, INK, new_figure
from src.analysis.tools import save_figure, say
from src.tasks.options import MAX_SEED

GROUND, SEEN = "#eef0f3", "#2f6fb7"
LAYOUTS = {"longformer": "Longformer", "bigbird": "BigBird", "openai": "OpenAI, fixed"}
# A picture of more tokens has several of them on a pixel.
LONGEST = 4096


def supports(length: int, window: int, block: int, seed: int) -> dict[str, torch.Tensor]:
    """Boolean masks (N, N) of the supports, by their title; the length N is a square number."""
    side, blocks = math.isqrt(length), -(-length // block)
    height, width = neighbourhood_shape(window)
    masks = {
        f"Local window, {window}": window_mask(length, length, window),
        f"Neighbourhood, {height} \N{MULTIPLICATION SIGN} {width}": neighbourhood_support(
            side, side, (height, width)
        ).dense(length, length)[0],
    }
    for name, title in LAYOUTS.items():
        layout = block_layout(name, blocks, blocks, seed)
        masks[f"{title}, blocks of {block}"] = layout_support(layout, block, length, length).dense(length, length)[0]
    return masks


def draw(masks: Mapping[str, torch.Tensor]) -> Figure:
    """One panel for each mask."""
    figure = new_figure(2.6 * len(masks), 3.2)
    colours = ListedColormap([GROUND, SEEN])
    for number, (title, mask) in enumerate(masks.items(), start=1):
        axes = figure.add_subplot(1, len(masks), number)
        axes.imshow(mask.numpy(), cmap=colours, vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(title, fontsize=9.5, color=INK)
        mean = mask.sum(1).double().mean().item()
        axes.set_xlabel(f"{mean:,.1f} keys per query", fontsize=8.5, color=FAINT)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color(EDGE)
    figure.axes[0].set_ylabel("queries", fontsize=8.5, color=FAINT)
    return figure


def plot(arguments: argparse.Namespace) -> None:
    """Draw the supports that the options of `scripts/plot_supports.py` name."""
    check_whole_number("--length", arguments.length, 1, LONGEST)
    check_whole_number("--seed", arguments.seed, 0, MAX_SEED)
    side = math.isqrt(arguments.length)
    if side * side != arguments.length:
        raise UserError(
            f"--length {arguments.length} is no square image of tokens. Try {side * side} or {(side + 1) ** 2}."
        )
    masks = supports(arguments.length, arguments.window, arguments.block, arguments.seed)
    save_figure(draw(masks), arguments.output)
    say(arguments.output)
