"""Accuracy of runs and agreement of their first predictions, as one file without speeds, which vary from run to run.

RUN is the folder of a multirun, of a run with eval.attentions, or of a single run. With --against, the first
predictions of each attention are also compared with those in another folder: of another precision, for example.

    python scripts/compare_runs.py logs/multiruns/DATE/TIME --output results.json
    python scripts/compare_runs.py BFLOAT16_RUN --against FLOAT32_RUN
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.tools import Parser, run_tool
from src.evaluation.agreement import compare_folders


def build_parser() -> Parser:
    parser = Parser(__doc__, "output")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder with results.json, or with folders of runs")
    parser.add_argument("--against", type=Path, metavar="RUN", help="compare first predictions with those in this one")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    command = shlex.join([Path(__file__).name, *(sys.argv[1:] if argv is None else argv)])
    return run_tool(build_parser, lambda x: compare_folders(x.run, x.against, x.output, command), argv)


if __name__ == "__main__":
    sys.exit(main())
