"""What each part of adaptive attention contributes: its error without one, and with other choices and sizes.

On the queries, keys and values of the token stages of a T2T-ViT (--checkpoint, --data-dir) and of files (--tensors), in
float64: without the window, the chosen clusters or the landmarks; with clusters chosen by other rules, at random, or by
an oracle that sees all weights; other steps of k-means, sizes and densities; and PISA's definition. Sequences of fewer
than 600 tokens have half of the window and of the landmarks, and a third of the query clusters. Reported are the
relative Frobenius error of the output and the share of pairs whose weights are exact, means over photographs or heads.

--maps draws what a token of a photograph looks at, and with which part: window, chosen clusters, landmarks.

    python scripts/measure_adaptive.py --checkpoint FILE --data-dir data/flowers --tensors FILE --figure ablation.png
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.experiments.adaptive import run
from src.analysis.tools import Parser, run_tool


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add("checkpoint", "data-dir", required=False)
    parser.add("split", "num-images", "tensors", "maps", "threads", "output", "figure")
    return parser


main = partial(run_tool, build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
