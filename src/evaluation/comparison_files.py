"""The files of a comparison: `comparison.json`, `comparison.md` and `comparison.png`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from src.evaluation.comparison import Comparison, ComparisonRow
from src.evaluation.comparison_figure import comparison_figure
from src.evaluation.comparison_table import comparison_markdown, comparison_table
from src.utils.files import atomic_write, write_json

JSON_FILE = "comparison.json"
MARKDOWN_FILE = "comparison.md"
FIGURE_FILE = "comparison.png"


def comparison_paths(folder: str | os.PathLike[str]) -> list[Path]:
    """The three files of a comparison in a folder."""
    return [Path(folder) / name for name in (JSON_FILE, MARKDOWN_FILE, FIGURE_FILE)]


def write_comparison(folder: str | os.PathLike[str], comparison: Comparison) -> list[Path]:
    """Write `comparison.json`, `comparison.md` and `comparison.png`.

    Args:
        folder: where they go; must exist.
        comparison: the runs.

    Returns:
        Paths of the three files, in this order.

    Raises:
        UserError: the folder cannot be written to.
    """
    paths = comparison_paths(folder)
    with atomic_write(paths[2], "wb") as file:
        comparison_figure(comparison).savefig(file, format="png")
    with atomic_write(paths[1]) as file:
        file.write(comparison_markdown(comparison))
    write_json(paths[0], _content(comparison))  # last: see `is_written`
    return paths


def is_written(folder: str | os.PathLike[str], comparison: Comparison) -> bool:
    """Whether a folder holds the files of this comparison, of which `comparison.json` is the last one written."""
    paths = comparison_paths(folder)
    try:
        content = json.loads(paths[0].read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # as the file returns it
    return content == json.loads(json.dumps(_content(comparison))) and all(path.is_file() for path in paths)


def print_comparison(comparison: Comparison, paths: Sequence[Path]) -> None:
    """Print the table of a comparison and where its files are."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log file has no width
    console.print(comparison_table(comparison))
    for path in paths:
        console.print(str(path), soft_wrap=True, highlight=False, markup=False)


def _content(comparison: Comparison) -> dict[str, Any]:
    content = {
        "common": comparison.common,
        "runs": [_row_content(row) for row in comparison.rows],
        "failed": comparison.failed,
    }
    if comparison.one_pass is not None:
        content["one_pass"] = dataclasses.asdict(comparison.one_pass)
    return content


def _row_content(row: ComparisonRow) -> dict[str, Any]:
    content = dataclasses.asdict(row)
    if row.published is not None:
        content["published"]["text"] = row.published.text
    return content
