"""Measure the tile settings of the fused attention kernels on this GPU, and print rows for their `tiles.py`.

Groups of settings that do not influence one another are searched one after another: the sums over keys and queries,
the queries of the forward pass, the gradients. A group's candidates are the settings around the best one so far, and
the search moves on as long as that improves. Settings for causal masking are not searched. Each candidate is first
compiled and run in another process, where it can do no harm, and compared with the float64 specification; those that
pass are timed here, one after another, by the replay of a CUDA graph: what the device needs, without the host. The
processes fill Triton's cache on disk, so that nothing is compiled here.

Inputs are one head of width 64, drawn from a normal distribution; the attention is Scatterbrain's (window and cosh
features). With several passes, what counts is the geometric mean of their times. Ctrl-C and SIGTERM end the run with
the results so far.

    timeout -s INT 1h python scripts/tune_attention.py --shapes 128,3136,49,12
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.benchmark.report import DTYPES, make_parser
from src.analysis.benchmark.tiles import SHAPES, Shape, tune
from src.analysis.tools import Parser, positive, run_tool
from src.utils.machine import usable_cpus


def build_parser() -> Parser:
    parser = make_parser(__doc__, "dtype", "passes", dtype="bfloat16")
    shapes = f"sequences, tokens, window, random projections ({' '.join(map(str, SHAPES))})"
    option = parser.add_argument
    option("--shapes", type=Shape.parse, nargs="+", default=SHAPES, metavar="B,N,W,R", help=shapes)
    jobs = "processes that compile (as many as usable CPUs)"
    option("--jobs", type=positive, default=usable_cpus(), metavar="J", help=jobs)
    return parser


def run(arguments: argparse.Namespace) -> int:
    shapes = tuple(dict.fromkeys(arguments.shapes))
    return tune(shapes, DTYPES[arguments.dtype], arguments.passes, arguments.jobs)


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
