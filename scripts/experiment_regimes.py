"""Where sparse, low-rank and both together approximate attention, from nearly uniform to nearly one-hot weights.

Synthetic queries, keys and values at many softmax scales s = beta / sqrt(E): a small beta (a high temperature) gives
every key the same weight, a large one gives a single key all of it. For each, the relative Frobenius error of the
matrix of weights and of the output against full attention, at equal columns (`ops.common.budget`), is set against the
entropy of full attention. Chen et al., "Scatterbrain", NeurIPS 2021, section 3, is the claim: sparse and low-rank
attention err in different regimes, and together they err less in all.

Beside the attentions there are oracles, which see the whole matrix: the k largest weights of each query, the nearest
matrix of rank r, and both. A second figure checks the variance of the random features against its formula.

    python scripts/experiment_regimes.py --output regimes.json --figure regimes.png
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.experiments.regimes import DATA, TEMPERATURES, run
from src.analysis.tools import Parser, comma_separated, positive, positive_numbers, run_tool


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", type=comma_separated(tuple(DATA)), default=tuple(DATA), metavar="NAMES", help=f"({','.join(DATA)})")
    add("--length", type=positive, default=1024, metavar="N", help="tokens (1024)")
    add("--width", type=positive, default=64, metavar="E", help="of queries, keys and values (64)")
    add("--centres", type=positive, default=32, metavar="C", help="of the clustered data (32)")
    betas = ",".join(f"{beta:g}" for beta in TEMPERATURES)
    numbers = {"type": positive_numbers, "metavar": "X,..."}
    add("--temperatures", default=TEMPERATURES, **numbers, help=f"softmax scale in multiples of E ** -0.5 ({betas})")
    add("--memory-fractions", default=(1 / 32, 1 / 8), **numbers, help="budgets (1/32,1/8)")
    add("--variance-samples", type=positive, default=20_000, metavar="K", help="of the random features (20000)")
    parser.add("variance-figure", "num-seeds", "seed", "threads", "output", "figure")
    return parser


main = partial(run_tool, build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
