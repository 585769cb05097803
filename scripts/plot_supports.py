"""Which keys each query sees exactly, under each sparse support, as a picture: queries downwards, keys to the right.

The tokens are those of a square image in raster order.

    python scripts/plot_supports.py --length 196 --block 14
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from scatterbrain.errors import UserError, check_whole_number
from scatterbrain.ops.common.windows import window_mask
from scatterbrain.ops.sparse.block_sparse import block_layout, layout_support
from scatterbrain.ops.sparse.window2d import neighbourhood_shape, neighbourhood_support
from src.tasks.options import MAX_SEED
from src.utils.scripts import FIGURE_SUFFIXES, Parser, check_writable, positive, run_tool, save_figure, say

INK, FAINT = "#22262e", "#6b7280"
GROUND, SEEN = "#eef0f3", "#2f6fb7"
LAYOUTS = {"longformer": "Longformer", "bigbird": "BigBird", "openai": "OpenAI, fixed"}
# A picture of more tokens has several of them on a pixel.
LONGEST = 4096


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--length", type=positive, default=196, metavar="N", help="tokens, a square number (196)")
    parser.add_argument("--window", type=positive, default=25, metavar="W", help="keys of a window (25)")
    parser.add_argument("--block", type=positive, default=14, metavar="N", help="tokens of a block (14)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of BigBird's random blocks (0)")
    parser.add_argument("--output", default="supports.png", metavar="FILE", help=".png, .pdf or .svg (supports.png)")
    return parser


def supports(length: int, window: int, block: int, seed: int) -> dict[str, torch.Tensor]:
    """Boolean masks (N, N) of the supports, by their title.

    Args:
        length: number of tokens N, a square number.
        window: keys of a window.
        block: tokens of a block.
        seed: of BigBird's random blocks.
    """
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
    """One panel for each mask, on an Agg canvas; pyplot is not involved."""
    figure = Figure(figsize=(2.6 * len(masks), 3.2), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    colours = ListedColormap([GROUND, SEEN])
    for number, (title, mask) in enumerate(masks.items(), start=1):
        axes = figure.add_subplot(1, len(masks), number)
        axes.imshow(mask.numpy(), cmap=colours, vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(title, fontsize=9.5, color=INK)
        mean = mask.sum(1).double().mean().item()
        axes.set_xlabel(f"{mean:,.1f} keys per query", fontsize=8.5, color=FAINT)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#c4c8cf")
    figure.axes[0].set_ylabel("queries", fontsize=8.5, color=FAINT)
    return figure


def plot(arguments: argparse.Namespace) -> None:
    """Make the masks and draw them."""
    check_writable(arguments.output)
    if Path(arguments.output).suffix.lower() not in FIGURE_SUFFIXES:
        raise UserError(f"--output {arguments.output}: the name has to end in .png, .pdf or .svg.")
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


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the picture that `argv` asks for; returns the exit status."""
    return run_tool(build_parser(), plot, argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted. Nothing was written.")
