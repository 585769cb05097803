"""Time and memory of every attention against sequence length, beside other implementations in the same run.

Machines are shared and noisy, so what counts are ratios: in each round every candidate runs once at every length, in
turn, its time is divided by that of PyTorch's scaled_dot_product_attention (SDPA) at that length in the same round,
and the median of the rounds is reported. Sizes (window, features, clusters) follow from --memory-fraction for each
length; rows of their own keep them as they are at --growth-length, for `experiment_scaling.py`. Scatterbrain's kernels
recompute tiles of queries exactly where the subtraction cancels: the number of these fallback tiles is reported, and
inputs without any have a row of their own.

Memory is the peak of what one call allocates, its inputs not counted and its output counted.

On CUDA each length is measured on its own. "ms" is the time of eager calls in a row, "device ms" the replay of a CUDA
graph, without the host's part, and "host µs" what the host takes to launch an eager call without waiting for it.
Ctrl-C and SIGTERM end the run with what is complete by then: lengths on CUDA, passes on the CPU. --output is written
after each of them, with "complete": false until all are done.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.benchmark.attention import AttentionBench
from src.analysis.tools import Parser, named_numbers, positive, positive_list, positive_sequence, run_tool


def build_parser() -> Parser:
    shared = ("attentions", "passes", "device", "dtype", "dim", "memory-fraction", "std", "threads", "repeats")
    parser = Parser(__doc__, *shared, "no-baselines", "output", "figure")
    option = parser.add_argument
    option("--lengths", type=positive_list, default="784,3136,12544", metavar="N,...", help="(%(default)s)")
    batch = "of all lengths, or one of each length, from the shortest to the longest (%(default)s)"
    option("--batch", type=positive_sequence, default="4", metavar="B,...", help=batch)
    sizes = "e.g. local_context=64,density=0.08: sizes of the attentions that have them, at all lengths"
    option("--sizes", type=named_numbers, default={}, metavar="NAME=N,...", help=sizes)
    option("--heads", type=positive, default=1, metavar="H", help="(%(default)s)")
    growth = "length whose window, features, ... are kept at the others, too (the middle one)"
    option("--growth-length", type=positive, metavar="N", help=growth)
    only = "leave out sizes that fit other lengths than --growth-length; long ones take most of the time"
    option("--growth-only", action="store_true", help=only)
    return parser


main = partial(run_tool, build_parser, lambda arguments: AttentionBench(arguments).main())

if __name__ == "__main__":
    sys.exit(main())
