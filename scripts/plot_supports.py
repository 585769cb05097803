"""Which keys each query sees exactly, under each sparse support, as a picture: queries downwards, keys to the right.

The tokens are those of a square image in raster order.

    python scripts/plot_supports.py --length 196 --block 14
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.plots.supports import plot
from src.analysis.tools import Parser, figure_file, positive, run_tool


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--length", type=positive, default=196, metavar="N", help="tokens, a square number (196)")
    add("--window", type=positive, default=25, metavar="W", help="keys of a window (25)")
    add("--block", type=positive, default=14, metavar="N", help="tokens of a block (14)")
    add("--seed", type=int, default=0, metavar="N", help="of BigBird's random blocks (0)")
    add("--output", type=figure_file, default="supports.png", metavar="FILE", help=".png, .pdf or .svg (supports.png)")
    return parser


main = partial(run_tool, build_parser, plot)

if __name__ == "__main__":
    sys.exit(main())
