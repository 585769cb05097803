"""Error of the output against time, for every attention over its budgets, beside baselines of others.

Errors: relative Frobenius error against full attention in float64, mean over samples, on the queries, keys and values
of the token stages of a T2T-ViT (--checkpoint, --data-dir) and of files (--tensors). Times: at each of --lengths, over
that of full attention (cuDNN's where it is) in the same rounds; on CUDA the device's, by replay of a CUDA graph. Each
point has the same sizes (window, landmarks, ..., or a density) at every length, and in the file its columns of the
attention matrix, the peak memory of a call and the operations of its matrix products.

Baselines: `pisa` (errors by its dense definition, time by its own kernel, from a checkout of
github.com/xie-lab-ml/piecewise-sparse-attention that --pisa names), `topk-blocks` (its exact blocks alone, as the
sparse part of SLA, by FlexAttention) and `flex-window` (local attention by FlexAttention).

Times come first. --output is written after each time and each error; a run that was interrupted resumes from it.
Errors and times may be of two runs: --errors-only measures errors alone, on a CPU say, and --errors takes them from
the file of that run.

    python scripts/benchmark_frontier.py --checkpoint FILE --data-dir data/flowers --output FILE --figure FILE
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.benchmark.frontier import BUDGETS, FrontierBench
from src.analysis.tools import Parser, comma_separated, positive_list, positive_sequence, run_tool


def build_parser() -> Parser:
    parser = Parser(__doc__, heads=1, std=1.0, passes=("forward",), growth_length=None)
    parser.add("checkpoint", "data-dir", required=False)
    parser.add("split", "device", "dtype", "dim", "threads", "num-images", "tensors", "output", "figure")
    parser.add("repeats", default="7")
    option = parser.add_argument
    names = {"type": comma_separated(tuple(BUDGETS)), "default": ",".join(BUDGETS), "metavar": "NAMES"}
    option("--methods", **names, help="separated by commas (%(default)s)")
    option("--lengths", type=positive_list, default="784,3136", metavar="N,...", help="(%(default)s)")
    batch = "sequences (batch times heads) of all lengths, or of each, from the shortest on (%(default)s)"
    option("--batch", type=positive_sequence, default="4", metavar="B,...", help=batch)
    option("--errors", metavar="FILE", help="take the errors from this --output of another run")
    option("--errors-only", action="store_true", help="measure no times")
    option("--pisa", metavar="DIR", help="checkout of PISA's repository")
    return parser


main = partial(run_tool, build_parser, lambda arguments: FrontierBench(arguments).main())

if __name__ == "__main__":
    sys.exit(main())
