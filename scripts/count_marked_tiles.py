"""How often the fused kernels compute a tile of queries from pairs, on normal queries and keys.

Where the window's random-feature estimates of a query outweigh everything else, their difference to the exact weights
has lost its digits, and the kernels compute the tile of such a query again, pair by pair (README.md of the kernels).
That is right but takes time, so that a draw of the inputs with such a tile is slower than one without. Here they are
counted in float64 by the kernels' own criterion, one draw of queries, keys and features after another; no GPU is
needed.

    python scripts/count_marked_tiles.py --shapes 128,3136,49,12 128,784,12,3 --num-draws 12
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from scatterbrain.ops.common.features import log_softmax_features
from scatterbrain.ops.common.projection import draw_projection
from scatterbrain.ops.common.windows import window_bounds
from scatterbrain.ops.scatterbrain.triton.operator import CANCELLATION_LIMIT
from scripts.tune_attention import SHAPES, Shape, parse_shape
from src.utils.files import write_json
from src.utils.machine import machine_info
from src.utils.scripts import Parser, check_writable, fraction, positive, run_tool

WIDTH = 64


def marked_queries(
    query: torch.Tensor, key: torch.Tensor, projection: torch.Tensor, window: int, limit: float
) -> torch.Tensor:
    """Queries whose sum over all keys' estimates exceeds their normaliser `limit` times, as the kernels see it.

    Args:
        query: (B, N, E) float64.
        key: (B, N, E) float64.
        projection: rows (R, E) float64, each taken with both signs.
        window: width W.
        limit: see `scatterbrain.ops.scatterbrain.triton.operator.CANCELLATION_LIMIT`.

    Returns:
        (B, N) bool.
    """
    scale, length = query.shape[-1] ** -0.5, query.shape[1]
    query_logs, key_logs = (log_softmax_features(x, projection, scale, cosh=True) for x in (query, key))
    # log sum_j phi(k_j), then relative to each query's largest term
    sums = query_logs + key_logs.logsumexp(1, keepdim=True)
    reference = sums.amax(-1, keepdim=True)
    total = (sums - reference).exp().sum(-1)
    normaliser = total.clone()
    features = (query_logs - reference).exp()
    key_features = key_logs.exp()
    left, right = window_bounds(window)
    for offset in range(-left, right):
        i = slice(max(0, -offset), min(length, length - offset))
        j = slice(max(0, offset), min(length, length + offset))
        exact = (scale * (query[:, i] * key[:, j]).sum(-1) - reference[:, i, 0]).exp()
        normaliser[:, i] += exact - (features[:, i] * key_features[:, j]).sum(-1)
    # also true where what is left of the difference is negative
    return ~(total <= limit * normaliser)


def count(shape: Shape, deviation: float, seed: int, tile: int) -> tuple[int, int]:
    """Marked queries of one draw, and tiles of `tile` queries that hold any."""
    generator = torch.Generator().manual_seed(seed)
    rows = draw_projection(shape.rows, WIDTH, seed=seed).bfloat16().double()
    queries = tiles = 0
    for _ in range(shape.batch):
        query, key = (
            (deviation * torch.randn(1, shape.length, WIDTH, generator=generator)).bfloat16().double() for _ in "qk"
        )
        marked = marked_queries(query, key, rows, shape.window, CANCELLATION_LIMIT)[0]
        queries += int(marked.sum())
        tiles += len(marked.nonzero().div(tile, rounding_mode="floor").unique())
    return queries, tiles


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--shapes",
        type=parse_shape,
        nargs="+",
        default=SHAPES[:2],
        metavar="B,N,W,R",
        help=f"sequences, tokens, window, rows of the projection ({' '.join(map(str, SHAPES[:2]))})",
    )
    parser.add_argument("--std", type=fraction, default=1.0, metavar="S", help="deviation of the elements (1)")
    parser.add_argument("--num-draws", type=positive, default=12, metavar="K", help="(12)")
    parser.add_argument("--tile", type=positive, default=32, metavar="ROWS", help="queries of a tile (32)")
    parser.add_argument("--output", metavar="FILE", help="write the figures as JSON")
    return parser


def count_all(arguments: argparse.Namespace) -> int:
    """Count, print, write; returns the exit status."""
    check_writable(arguments.output)
    table = Table(title=f"normal queries and keys, deviation {arguments.std:g}, width {WIDTH}, bfloat16")
    columns = ("B,N,W,R", "draws", "without a marked tile", "marked tiles of each draw", "marked queries of")
    for name in columns:
        table.add_column(name, justify="left" if name == columns[0] else "right")
    results = []
    cases = [(shape, seed) for shape in arguments.shapes for seed in range(arguments.num_draws)]
    for shape, seed in track(cases, "Counting", console=Console(stderr=True), transient=True):
        queries, tiles = count(shape, arguments.std, seed, arguments.tile)
        results.append({"shape": str(shape), "seed": seed, "queries": queries, "tiles": tiles})
    for shape in arguments.shapes:
        draws = [each for each in results if each["shape"] == str(shape)]
        table.add_row(
            str(shape),
            str(len(draws)),
            str(sum(each["tiles"] == 0 for each in draws)),
            " ".join(str(each["tiles"]) for each in draws),
            f"{sum(each['queries'] for each in draws)} of {len(draws) * shape.batch * shape.length:,}",
        )
    Console(width=120).print(table)
    if arguments.output is not None:
        settings = {
            **vars(arguments),
            "shapes": [str(shape) for shape in arguments.shapes],
            "limit": CANCELLATION_LIMIT,
        }
        del settings["output"]
        write_json(
            arguments.output,
            {"machine": machine_info(torch.device("cpu")), "settings": settings, "results": results},
        )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Count what `argv` asks for; returns the exit status."""
    return run_tool(build_parser(), count_all, argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted. Nothing was written.")
