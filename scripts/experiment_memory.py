"""What accuracy, agreement with full attention and output error each attention has for its columns: a curve for each.

A T2T-ViT that was trained with full attention has it swapped in both token stages for one of each kind, at several
budgets of attention columns and seeds. All photographs give the top-1 accuracy, and the share whose first prediction is
that of full attention; some give the relative Frobenius error of the output of each stage, on full attention's inputs.
Columns follow from the sizes (`scatterbrain.ops.common.budget`); block-sparse attentions and Reformer exceed a budget.

Ctrl-C and SIGTERM end the run with the configurations that are complete by then. --output is written after each
attention, with "complete": false until all are done.

    python scripts/experiment_memory.py --checkpoint FILE --data-dir data/flowers --figure memory.png
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.experiments.memory import BUDGETED, MEMORY_FRACTIONS, Experiment
from src.analysis.tools import Parser, comma_separated, positive, positive_numbers, run_tool


def build_parser() -> Parser:
    parser = Parser(__doc__, "checkpoint", "data-dir", "split", "limit")
    add = parser.add_argument
    parser.add("attentions", type=comma_separated(BUDGETED), default=",".join(BUDGETED))
    fractions = {"type": positive_numbers, "default": MEMORY_FRACTIONS, "metavar": "F,..."}
    add("--memory-fractions", **fractions, help="budgets (1/64,1/32,1/16,1/8,1/4)")
    add("--error-images", type=positive, default=16, metavar="N", help="photographs of the output errors (16)")
    add("--batch-size", type=positive, metavar="B", help="(64 on CUDA, 8 on the CPU)")
    parser.add("num-seeds", "seed", "device", "threads", "output", "figure")
    return parser


main = partial(run_tool, build_parser, lambda arguments: Experiment(arguments).main())

if __name__ == "__main__":
    sys.exit(main())
