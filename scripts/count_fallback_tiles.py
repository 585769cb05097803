"""How often the fused kernels recompute a tile of queries exactly, on normal queries and keys.

Where the window's random-feature estimates of a query outweigh everything else, their difference to the exact weights
has lost its digits, and the kernels recompute the tile of such a query exactly, pair by pair (README.md of the
kernels). That is right but takes time, so that inputs with such a tile are slower than others. Here these fallback
tiles are counted in float64 by the kernels' own criterion, for queries, keys and features of one seed after another;
no GPU is needed.

    python scripts/count_fallback_tiles.py --shapes 128,3136,49,12 128,784,12,3 --num-seeds 12
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.benchmark.fallback_tiles import CANCELLATION_LIMIT, count
from src.analysis.benchmark.report import header
from src.analysis.benchmark.tiles import SHAPES, WIDTH, Shape
from src.analysis.tools import Parser, new_table, positive, print_report, run_tool, shown, write_results


def build_parser() -> Parser:
    parser = Parser(__doc__, "std", "output")
    parser.add("num-seeds", default=12, help="(%(default)s)")
    shapes = f"sequences, tokens, window, random projections ({' '.join(map(str, SHAPES[:2]))})"
    option = parser.add_argument
    option("--shapes", type=Shape.parse, nargs="+", default=SHAPES[:2], metavar="B,N,W,R", help=shapes)
    option("--tile", type=positive, default=32, metavar="ROWS", help="queries of a tile (%(default)s)")
    return parser


def count_all(arguments: argparse.Namespace) -> None:
    rows = []
    cases = [(shape, seed) for shape in arguments.shapes for seed in range(arguments.num_seeds)]
    for shape, seed in shown(cases, "Counting"):
        queries, tiles = count(shape, arguments.std, seed, arguments.tile)
        rows.append({"shape": str(shape), "seed": seed, "queries": queries, "tiles": tiles})
    title = f"normal queries and keys, standard deviation {arguments.std:g}, width {WIDTH}, bfloat16"
    columns = ("B,N,W,R", "seeds", "without a\nfallback tile", "fallback tiles of each seed", "queries that fall back")
    table = new_table(title, columns, columns[:1])
    for shape in arguments.shapes:
        found = [row for row in rows if row["shape"] == str(shape)]
        without, tiles = sum(row["tiles"] == 0 for row in found), " ".join(str(row["tiles"]) for row in found)
        queries = f"{sum(row['queries'] for row in found)} of {len(found) * shape.batch * shape.length:,}"
        table.add_row(str(shape), str(len(found)), str(without), tiles, queries)
    print_report([table])
    settings = {"shapes": [str(shape) for shape in arguments.shapes], "limit": CANCELLATION_LIMIT}
    write_results(arguments, {**header(arguments, torch.device("cpu"), **settings), "results": rows})


main = partial(run_tool, build_parser, count_all)

if __name__ == "__main__":
    sys.exit(main())
