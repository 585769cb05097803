"""Where one token of a photograph attends: its row of the attention matrix, under each attention, as a picture.

The photograph runs through a trained T2T-ViT with full attention. For both token stages, the weights that the marked
token gives to every token are drawn over the grid of tokens, and below them the changes of full attention's weights by
each attention.

    python scripts/plot_attention_maps.py --checkpoint FILE --data-dir data/flowers    # two photographs of it
    python scripts/plot_attention_maps.py --checkpoint FILE --images me.jpg
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.plots.attention_maps import NAMES, plot
from src.analysis.tools import Parser, run_tool


def build_parser() -> Parser:
    parser = Parser(__doc__, "checkpoint", "images", "split")
    add = parser.add_argument
    parser.add("attentions", default=",".join(NAMES))
    parser.add("data-dir", required=False)
    token = {"nargs": 2, "type": float, "default": (0.5, 0.5), "metavar": ("ROW", "COL")}
    add("--token", **token, help="as fractions of height and width in [0, 1) (0.5 0.5)")
    parser.add("memory-fraction", "seed", "device", "threads")
    parser.add("output", default="attention_maps.png", help="(attention_maps.png)")
    return parser


main = partial(run_tool, build_parser, plot)

if __name__ == "__main__":
    sys.exit(main())
