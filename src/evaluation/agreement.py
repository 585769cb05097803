"""Accuracy and first predictions of the runs in a folder, without their speed: `scripts/compare_runs.py`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scatterbrain.errors import UserError
from src.evaluation.comparison import compare_runs, count_same_predictions
from src.evaluation.comparison_callback import find_runs
from src.evaluation.predictions import read_predictions
from src.evaluation.result_rows import write_rows
from src.evaluation.results import Results, read_results
from src.evaluation.results_table import accuracy_text

# Of a row of a comparison: what does not depend on the load of the machine.
_ACCURACY = ("num_images", "top1", "top1_std", "top1_difference", "agreement")
_COLUMNS = (*_ACCURACY, "attention_memory", "attention_operations", "attention_peak_mib")


def compare_folders(folder: Path, against: Path | None, output: str | os.PathLike[str] | None, command: str) -> None:
    """Print and write accuracy and agreement of runs.

    Args:
        folder: of a multirun, of a run with `eval.attentions`, or of a single run.
        against: another one, whose first predictions with the same attention are counted too; None for none.
        output: file of the results, None for none.
        command: that was run, for the file.

    Raises:
        UserError: no results in a folder; `against` has not one run of each attention, or other images.
    """
    runs = _finished(folder)
    comparison = compare_runs(list(runs))
    rows: list[dict[str, Any]] = [
        {"attention": run.attention, "num_seeds": len(run.seeds), **{name: getattr(row, name) for name in _COLUMNS}}
        for run, row in zip(runs.values(), comparison.rows, strict=True)
    ]
    content: dict[str, Any] = {"command": command, **comparison.common}
    content["commands"] = list(dict.fromkeys(run.command for run in runs.values()))
    content["versions"] = next(iter(runs.values())).versions
    if against is not None:
        others = _finished(against)
        content["against"] = {
            **{name: compare_runs(list(others)).common.get(name) for name in ("precision", "device")},
            "commands": list(dict.fromkeys(run.command for run in others.values())),
        }
        for row, own in zip(rows, runs, strict=True):
            same_attention = [each for each, run in others.items() if run.attention == row["attention"]]
            if len(same_attention) != 1:
                raise UserError(
                    f"{against} has {len(same_attention)} runs with attention {row['attention']}, where one is needed. "
                    "Give a folder with one run of each attention."
                )
            (other,) = same_attention
            row["same_as_against"] = count_same_predictions(own, read_predictions(own), other, read_predictions(other))
    Console(width=100).print(_table(rows, against))
    if output is not None:
        write_rows(output, {**content, "results": rows})


def _finished(folder: Path) -> dict[Path, Results]:
    """The finished runs in a folder, in the order of their numbers."""
    folders = [each for each, failed in find_runs(folder).items() if not failed]
    runs = {each: read_results(each) for each in folders}
    runs = {each: run for each, run in runs.items() if run.complete}
    if not runs:
        raise UserError(f"{folder} holds no finished evaluation. Give the folder of a run of run.py.")
    return runs


def _table(rows: list[dict[str, Any]], against: Path | None) -> Table:
    table = Table(title=None if against is None else f"same: first predictions equal to those in {against}")
    for name in ("attention", "images", "top-1", "agrees with full", *(() if against is None else ("same",))):
        table.add_column(name, justify="left" if name == "attention" else "right", no_wrap=True)
    for row in rows:
        top1 = "-" if row["top1"] is None else accuracy_text(row["top1"], row["top1_std"], row["num_seeds"])
        agreement = "-" if row["agreement"] is None else f"{row['agreement']:.2f}"
        same = () if against is None else (f"{row['same_as_against']:,}",)
        table.add_row(row["attention"] or "its own", f"{row['num_images']:,}", top1, agreement, *same)
    return table
