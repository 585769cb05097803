"""Measure the tile settings of the fused attention kernels on this GPU, and print rows for their `tiles.py`.

The search is a coordinate descent from the present settings: it tries the values of one setting after another, keeps
what is faster, and ends when a whole round changes nothing. Settings for causal masking are not searched. The time is
that of the replay of a CUDA graph: what the device needs, without the host. A candidate that is faster is compared with
the float64 specification before it is kept. With several passes, what counts is the geometric mean of their times.

Inputs are one head of width 64 from a normal distribution; the attention is Scatterbrain's (window and cosh features).
Ctrl-C and SIGTERM end the run with the results so far.

    timeout -s INT 1h python scripts/tune_attention.py --shapes 128,3136,49,12
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.benchmark.tiles import SHAPES, Shape, tune
from src.analysis.tools import Parser, run_tool


def build_parser() -> Parser:
    parser = Parser(__doc__, "dtype", "passes", dtype="bfloat16")
    shapes = f"sequences, tokens, window, random projections ({' '.join(map(str, SHAPES))})"
    parser.add_argument("--shapes", type=Shape.parse, nargs="+", default=SHAPES, metavar="B,N,W,R", help=shapes)
    return parser


main = partial(run_tool, build_parser, tune)

if __name__ == "__main__":
    sys.exit(main())
