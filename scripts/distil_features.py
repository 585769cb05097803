"""Learned features of performer and sblocal: distilled from a trained T2T-ViT, and measured against random ones.

Every other photograph runs through the network, and feature maps are trained on the queries and keys of both token
stages, until the weights match full attention's (Zhang et al., ICLR 2024). Top-1, agreement with full attention and
error of the output are those of the other photographs, with as many features: random, where training starts, learned.

    python scripts/distil_features.py --checkpoint FILE --data-dir data/flowers --output learned.json --save DIR

--save writes DIR/sblocal_learned.safetensors, for model/t2tattn_cfg=sblocal model.t2tattn1_cfg.learned_heads=1, and
DIR/performer_learned.safetensors: the networks with the features of the first seed.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.experiments.distillation import run
from src.analysis.tools import Parser, positive, positive_number, run_tool


def build_parser() -> Parser:
    parser = Parser(__doc__, "checkpoint", "data-dir", "split", "limit")
    add = parser.add_argument
    add("--steps", type=positive, default=400, metavar="N", help="of training, for each stage (400)")
    add("--lr", type=positive_number, default=0.01, metavar="X", help="learning rate (0.01)")
    add("--num-queries", type=positive, default=128, metavar="N", help="of a step (128)")
    add("--save", metavar="DIR", help="write the networks with learned features there")
    parser.add("memory-fraction", "num-seeds", "seed", "device", "threads", "output")
    return parser


main = partial(run_tool, build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
