"""Trainings on sequences of several folders in one table, one file and one figure of their curves.

FOLDER is that of a training, of a multirun, or one that holds several of them.

    python scripts/compare_trainings.py logs/multiruns/DATE/TIME --output results.json --figure curves.png
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.tools import Parser, run_tool, save_figure, say
from src.evaluation.sequence_comparison import compare_trainings, comparison_figure, print_comparison, save_results


def build_parser() -> Parser:
    parser = Parser(__doc__, "output", "figure")
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="with sequence_training.json, or above")
    return parser


def compare(arguments: argparse.Namespace) -> None:
    """Print the tables, and write the files that were requested."""
    comparison = compare_trainings(arguments.folders)
    if arguments.output is not None:
        save_results(arguments.output, comparison)
    if arguments.figure is not None:
        save_figure(comparison_figure(comparison), arguments.figure)
    print_comparison(comparison, [path for path in (arguments.output, arguments.figure) if path is not None])
    if comparison.failed:
        say(f"Runs without results: {', '.join(comparison.failed)}")


main = partial(run_tool, build_parser, compare)

if __name__ == "__main__":
    sys.exit(main())
