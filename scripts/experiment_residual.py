"""What a sparse support leaves of a trained network's attention, and whether a low rank fits that.

Photographs run through a T2T-ViT with full attention. In both token stages the matrix of weights is split into the
part on a sparse support and the residual, which Scatterbrain's low-rank part has to fit (Chen et al., "Scatterbrain",
NeurIPS 2021, section 3). The singular values of all three give the rank that each needs. Supports: the local window,
SMYRF's clusters, and as an oracle the largest weights of each query, each with half of the columns.

    python scripts/experiment_residual.py --checkpoint FILE --data-dir data/flowers
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.experiments.residual import run
from src.analysis.tools import Parser, positive, run_tool


def build_parser() -> Parser:
    parser = Parser(__doc__, "checkpoint", "data-dir", "split")
    add = parser.add_argument
    parser.add("num-images", default=4)
    add("--num-queries", type=positive, default=784, metavar="N", help="rows of the matrix, spread evenly (784)")
    parser.add("memory-fraction", "seed", "threads", "output", "figure")
    return parser


main = partial(run_tool, build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
