"""Networks trained from scratch with each attention: a causal language model of bytes, and ListOps.

Chen et al., "Scatterbrain", NeurIPS 2021, section 5, trains on language and on the Long Range Arena; here are both in
small, from data that any machine has: the sources of Python's standard library, split by file, and random nested lists.
Initial weights, batches, schedule and the attentions' columns are the same for all. An attention that cannot be causal
is left out of the language model. A causal window of W keys shows W // 2 + 1 of them; all of them are counted.

    python scripts/experiment_training.py --output training.json --figure training.png

--output is written after each training; Ctrl-C and SIGTERM end the run with the trainings that are complete by then
("complete": false).
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.experiments.training import COMPARED, PRECISIONS, Experiment
from src.analysis.tools import Parser, comma_separated, positive, positive_number, run_tool
from src.datamodules.sequence_tasks import TASKS


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--tasks", type=comma_separated(TASKS), default=TASKS, metavar="NAMES", help=f"({','.join(TASKS)})")
    parser.add("attentions", default=",".join(COMPARED))
    add("--steps", type=positive, default=1500, metavar="N", help="of a training (1500)")
    add("--batch-size", type=positive, default=32, metavar="B", help="(32)")
    add("--length", type=positive, default=1024, metavar="N", help="tokens (1024)")
    parser.add("memory-fraction", default=1 / 16, help="budget of the attentions (1/16)")
    add("--depth", type=positive, default=4, metavar="N", help="blocks (4)")
    add("--dim", type=positive, default=128, metavar="N", help="width of the tokens (128)")
    add("--heads", type=positive, default=2, metavar="H", help="(2)")
    add("--lr", type=positive_number, default=1e-3, metavar="R", help="highest learning rate (1e-3)")
    parser.add("num-seeds", default=1, help="of weights, batches and features (1)")
    add("--num-expressions", type=positive, default=20_000, metavar="N", help="of ListOps to train on (20000)")
    add("--eval-every", type=positive, default=150, metavar="N", help="steps between evaluations (150)")
    add("--precision", choices=tuple(PRECISIONS), help="bfloat16 is autocast (bfloat16 on CUDA, else float32)")
    parser.add("seed", help="the first one, and that of the lists (1111)")
    parser.add("device", "threads", "output", "figure")
    return parser


main = partial(run_tool, build_parser, lambda arguments: Experiment(arguments).main())

if __name__ == "__main__":
    sys.exit(main())
