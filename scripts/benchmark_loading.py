"""Rate at which images are loaded for an evaluation: by timm's loader, by ours, and by ours from its cache.

All of them return the same bytes, resized and cropped; timm's loader without the prefetcher also normalises. In each
round every loader passes over all images in turn; the median of the rounds is reported. The images have been read
before, so that files come from memory.

    python scripts/benchmark_loading.py --data-dir /path/to/imagenet
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.benchmark.loading import TIMM_NORMALISED, make_candidates, measure
from src.analysis.benchmark.report import header, machine_line
from src.analysis.tools import Parser, digits, new_table, positive, print_report, run_tool, write_results
from src.utils.machine import usable_cpus


def build_parser() -> Parser:
    parser = Parser(__doc__, "data-dir", "split", "image-size", "rounds", "output", rounds="3")
    option = parser.add_argument
    option("--batch-size", type=positive, default=64, metavar="B", help="(%(default)s)")
    workers = "processes that decode (as many as there are CPUs, at most 16)"
    option("--num-workers", type=positive, default=min(16, usable_cpus()), metavar="N", help=workers)
    option("--cache-dir", metavar="DIR", help="folder of the cache (a temporary one)")
    return parser


def benchmark(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="decoded-images-") as folder:
        candidates, seconds = make_candidates(arguments, Path(arguments.cache_dir or folder))
        rows = measure(candidates, arguments.rounds)
    title = f"Loading {rows[0]['num_images']:,} images at {arguments.image_size} px: batch {arguments.batch_size}, "
    columns = ("loader", "images/s", "ratio to timm")
    table = new_table(f"{title}{arguments.num_workers} workers", columns, columns[:1])
    for row in rows:
        table.add_row(row["loader"], digits(row["images_per_second"]), f"{row['ratio_to_timm']:.2f}")
    made = "" if seconds is None else f" Making the cache took {digits(seconds)} s."
    note = f"Median of {arguments.rounds} rounds, the loaders in turn; bytes but for '{TIMM_NORMALISED}'.{made}"
    device = torch.device("cpu")
    print_report([table], note, machine_line(device))
    settings = header(arguments, device, "data_dir", "cache_dir")
    write_results(arguments, {**settings, "cache_seconds": seconds, "results": rows})


main = partial(run_tool, build_parser, benchmark)

if __name__ == "__main__":
    sys.exit(main())
