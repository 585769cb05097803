"""The paper's theorem, MSE(Scatterbrain) = (1 - P_LSH) MSE(Performer), against simulation.

A pair that a hash finds, with probability P_LSH, has its exact exp(s q.k), any other the estimate of random features
(Chen et al., "Scatterbrain", NeurIPS 2021, section 4). Beside independent hashes, for which it is proved: a hash made
of the features' own projections, SMYRF's clusters, and weights that are normalised over all keys.

    python scripts/experiment_theory.py --output theory.json --figure theory.png
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.experiments.theory import run
from src.analysis.tools import Parser, positive, run_tool


def build_parser() -> Parser:
    parser = Parser(__doc__)
    samples = {"type": positive, "default": 100_000, "metavar": "K", "help": "of a pair; K / 20 of 32 tokens (100000)"}
    parser.add_argument("--num-samples", **samples)
    parser.add("seed", "threads", "output", "figure")
    return parser


main = partial(run_tool, build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
