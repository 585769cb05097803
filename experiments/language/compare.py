"""Table of conversions of language models, as Markdown, from files of `convert.py`.

python experiments/language/compare.py full.json sbcluster.json --output conversion.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # src is not installed: find it from any folder

from scatterbrain.errors import UserError
from src.analysis.tools import Parser, run_tool, say, write_results
from src.evaluation.result_rows import read_rows

TEXTS = ("validation", "test", "WikiText-2 validation", "WikiText-2 test")
STAGES = ("trained", "swapped", "fine-tuned")
REMEDY = "Make it again: experiments/language/convert.py."


def grouped(results: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], list[Mapping[str, Any]]]:
    """The rows by attention that they were trained with, attention and stage."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in results:
        groups.setdefault((row["attention"], row["method"], row["stage"]), []).append(row)
    return groups


def mean_cell(values: Sequence[float]) -> str:
    """Mean of some seeds, and half of their range where there are several."""
    half = (max(values) - min(values)) / 2
    return f"{sum(values) / len(values):.3f}" + (f" ± {half:.3f}" if len(values) > 1 else "")


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """The table of a file of results as Markdown: a row for each attention, bits per byte of every stage.

    Rows: attention that the network was trained with, and that which it has; columns: a text at a stage.
    """
    names = [name for name in TEXTS if name in results[0]["bits_per_byte"]]
    stages = [stage for stage in STAGES[1:] if any(row["stage"] == stage for row in results)]
    groups = grouped(results)
    heads = ["trained with", "attention", *(f"{name}, {stage}" for name in names for stage in stages)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for trained, method in dict.fromkeys(key[:2] for key in groups):
        cells = []
        for name in names:
            for stage in stages:
                # its own attention is not swapped
                found = "trained" if stage == "swapped" and trained == method else stage
                rows = groups.get((trained, method, found), [])
                cells.append(mean_cell([row["bits_per_byte"][name] for row in rows]) if rows else "-")
        lines.append(f"| {trained} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def join_results(paths: Sequence[Path]) -> dict[str, Any]:
    """The content of several files of results as one, with the settings of each and the networks that they are for.

    Raises:
        UserError: a file cannot be read, is not of a conversion, or is incomplete; or two have the same network.
    """
    contents = [read_rows(path, ("complete", "length", "settings", "results"), REMEDY) for path in paths]
    for path, content in zip(paths, contents, strict=True):
        if not content["complete"] or content["length"] != contents[0]["length"]:
            raise UserError(f"{path} is incomplete, or of another length. {REMEDY}")
    rows = [row for content in contents for row in content["results"]]
    check_seeds(rows, " and ".join(map(str, paths)))
    settings = [
        {"networks": sorted({f"{row['attention']}, seed {row['seed']}" for row in each["results"]}), **each["settings"]}
        for each in contents
    ]
    return {**contents[0], "settings": settings, "results": rows}


def check_seeds(rows: Sequence[Mapping[str, Any]], source: str) -> None:
    """Refuse rows that would be averaged although they do not differ in their seeds.

    Args:
        rows: of networks, with `attention` and `seed` they were trained with, and of results `method` and `stage`.
        source: what they are from, for the message.

    Raises:
        UserError: there are two of one seed.
    """
    known = set()
    for row in rows:
        key = tuple(row.get(name) for name in ("attention", "seed", "method", "stage"))
        if key in known:
            raise UserError(
                f"There are two results of attention {row['attention']} and seed {row['seed']} in {source}. Give one "
                "of each: a mean is over seeds."
            )
        known.add(key)


def build_parser() -> Parser:
    parser = Parser(__doc__, "output", figure=None)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="results, of one machine")
    return parser


def compare(arguments: argparse.Namespace) -> None:
    """Print the table of the files, and write their rows to one."""
    content = join_results(arguments.files)
    say(markdown(content["results"]))
    write_results(arguments, content)


main = partial(run_tool, build_parser, compare)

if __name__ == "__main__":
    sys.exit(main())
