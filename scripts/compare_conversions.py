"""The table of conversions of language models, as Markdown, from files of `scripts/convert_language_model.py`.

python scripts/compare_conversions.py full.json sbcluster.json --output conversion.json
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.tools import Parser, run_tool, say, write_results


def build_parser() -> Parser:
    parser = Parser(__doc__, "output", figure=None)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="results, of one machine")
    return parser


def compare(arguments: argparse.Namespace) -> None:
    from src.analysis.experiments.conversion import join_results, markdown

    content = join_results(arguments.files)
    say(markdown(content["results"]))
    write_results(arguments, content)


main = partial(run_tool, build_parser, compare)

if __name__ == "__main__":
    sys.exit(main())
