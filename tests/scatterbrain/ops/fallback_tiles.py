"""How often the fused kernels recompute a tile of queries exactly, on normal queries and keys.

Where the window's random-feature estimates of a query outweigh everything else, their difference to the exact weights
has lost its digits, and the kernels recompute the tile of such a query exactly, pair by pair (README.md of the
kernels). That is right but takes time, so that inputs with such a tile are slower than others. Here these fallback
tiles are counted in float64 by the kernels' own criterion, for queries, keys and features of one seed after another;
no GPU is needed.

    python -m tests.scatterbrain.ops.fallback_tiles --shapes 128,3136,49,12 128,784,12,3 --num-seeds 12
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from scatterbrain.ops.common.features import log_softmax_features
from scatterbrain.ops.common.projection import draw_projection
from scatterbrain.ops.common.windows import window_bounds
from scatterbrain.ops.scatterbrain.triton.operator import CANCELLATION_LIMIT
from src.analysis.benchmark.report import header
from src.analysis.benchmark.tiles import SHAPES, WIDTH, Shape
from src.analysis.tools import Parser, new_table, positive, print_report, run_tool, shown, write_results


def fallback_queries(
    query: torch.Tensor, key: torch.Tensor, projection: torch.Tensor, window: int, limit: float
) -> torch.Tensor:
    """Queries whose sum over all keys' estimates exceeds their normaliser `limit` times, as the kernels see it.

    Args:
        query: (B, N, E) float64.
        key: (B, N, E) float64.
        projection: random projections (R, E) float64, each taken with both signs.
        window: width W.
        limit: see `scatterbrain.ops.scatterbrain.triton.operator.CANCELLATION_LIMIT`.

    Returns:
        (B, N) bool.
    """
    scale, length = query.shape[-1] ** -0.5, query.shape[1]
    query_logs, key_logs = (log_softmax_features(x, projection, scale, cosh=True) for x in (query, key))
    # log sum_j phi(k_j), then relative to each query's largest term
    sums = query_logs + key_logs.logsumexp(1, keepdim=True)
    running_max = sums.amax(-1, keepdim=True)
    total = (sums - running_max).exp().sum(-1)
    normaliser = total.clone()
    features = (query_logs - running_max).exp()
    key_features = key_logs.exp()
    left, right = window_bounds(window)
    for offset in range(-left, right):
        i = slice(max(0, -offset), min(length, length - offset))
        j = slice(max(0, offset), min(length, length + offset))
        exact = (scale * (query[:, i] * key[:, j]).sum(-1) - running_max[:, i, 0]).exp()
        normaliser[:, i] += exact - (features[:, i] * key_features[:, j]).sum(-1)
    # also true where what is left of the difference is negative
    return ~(total <= limit * normaliser)


def count(shape: Shape, std: float, seed: int, tile: int) -> tuple[int, int]:
    """Queries of one seed whose tile falls back, and tiles of `tile` queries that hold any."""
    generator = torch.Generator().manual_seed(seed)
    projection = draw_projection(shape.projections, WIDTH, seed=seed).bfloat16().double()
    size = (1, shape.length, WIDTH)
    queries = tiles = 0
    for _ in range(shape.batch):
        query, key = ((std * torch.randn(size, generator=generator)).bfloat16().double() for _ in "qk")
        found = fallback_queries(query, key, projection, shape.window, CANCELLATION_LIMIT)[0]
        queries += int(found.sum())
        tiles += len(found.nonzero().div(tile, rounding_mode="floor").unique())
    return queries, tiles


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
    raise SystemExit(main())
