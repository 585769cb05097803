"""Check an evaluation against a direct float64 computation of the same images.

The images, in any data format, are decoded and transformed one after another and passed through the model in float64,
with the dense definition of the attention in its token stages: no batching, no workers, no fast kernel. Exit status 1
if a first prediction differs, a probability by more than rounding explains, or the configuration is not the results'.

    python scripts/verify_predictions.py logs/runs/2026-11-24/12-00-00-000000
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.tools import Parser, choose_device, positive, run_tool
from src.tasks.verify import verify


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a run, or of a multirun or of eval.attentions: all its runs")
    add("--limit", type=positive, metavar="N", help="check this many images, evenly spread, not all")
    add("--batch-size", type=positive, default=2, metavar="B", help="images of a float64 forward pass (2)")
    parser.add("device")
    return parser


main = partial(run_tool, build_parser, lambda x: verify(x.run, x.limit, x.batch_size, choose_device(x.device)))

if __name__ == "__main__":
    sys.exit(main())
