"""The same photographs in every data format, evaluated and compared: `scripts/compare_formats.py`."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scatterbrain.errors import UserError
from src.analysis import tools
from src.analysis.benchmark.loading import count_classes
from src.analysis.benchmark.report import machine_line
from src.datamodules.writers import REFERENCE, WRITERS, Photograph, photographs_of, stem
from src.evaluation.predictions import Evaluation, compare, read_predictions
from src.tasks.build import check_swappable
from src.tasks.evaluate import evaluate
from src.utils.machine import machine_info
from src.utils.progress import progress_display


def read_photographs(arguments: argparse.Namespace) -> list[Photograph]:
    """Every image of the class folders, damaged as requested; `arguments.num_classes` is filled in."""
    root = tools.split_folder(arguments.data_dir, arguments.split)
    arguments.num_classes = arguments.num_classes or count_classes(root)
    return photographs_of(root, arguments.num_classes, arguments.damage)


def evaluate_format(arguments: argparse.Namespace, format: str, folder: Path) -> Evaluation:
    """Evaluation of the data in `folder / format`; `UserError` where that is taken for another format."""
    overrides = {"experiment": "imagenet-t2tvit-eval", "eval.num_seeds": 1, "callbacks": "none", "logger": "none"}
    overrides |= {"model/t2tmodel": arguments.variant, "model/t2tattn_cfg": arguments.attention}
    overrides |= {"model.image_size": arguments.image_size, "model.num_classes": arguments.num_classes}
    overrides |= {"datamodule.batch_size": arguments.batch_size}
    overrides |= {"datamodule.num_workers": "null" if arguments.num_workers is None else arguments.num_workers}
    overrides |= {"datamodule.on_error": "skip" if arguments.damage else "raise"}
    output_dir = folder / "runs" / format
    output_dir.mkdir(parents=True)
    paths = {"paths.output_dir": output_dir, "datamodule.data_dir": folder / format, "eval.ckpt": arguments.checkpoint}
    config = tools.compose_config(overrides, paths)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            results, objects = evaluate(config)
    finally:
        logging.disable(before)
    recognised = objects.datamodule.test_dataset.listing.format
    if recognised != format:
        raise UserError(f"{folder / format} was taken for {recognised}. datamodule.format={format} names the format.")
    found = read_predictions(output_dir)
    found.images[:] = map(stem, found.images)
    return found, set(map(stem, results.skipped["images"])) if results.skipped else set(), results.top1


def compare_all(arguments: argparse.Namespace, images: Sequence[Photograph], folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of every format, written, evaluated and compared, class folders first.

    `UserError` where class folders cannot be evaluated, or a format cannot be written.
    """
    reference = None
    with progress_display(Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(WRITERS))
        for format, write in WRITERS.items():
            progress.update(task, description=format)
            if format == "parquet" and importlib.util.find_spec("pyarrow") is None:
                yield {"format": format, "left_out": "PyArrow is not installed"}
                continue
            try:
                (folder / format).mkdir(parents=True)
                write(folder / format, images)
            except OSError as error:
                reason = error.strerror or error
                raise UserError(f"{folder / format} cannot be written ({reason}). Name a folder by --keep.") from error
            try:
                found = evaluate_format(arguments, format, folder)
            except UserError as error:
                if reference is None:  # no fault of a format
                    raise
                reason = str(error).replace(f"{folder}{os.sep}", "").rstrip(".")
                yield {"format": format, "differences": [f"that it cannot be evaluated: {reason}"]}
            else:
                reference = reference or found
                yield {"format": format, **compare(found, reference)}
            progress.advance(task)


def result_table(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> Table:
    """Table with one row for each format."""
    title = f"{arguments.variant} with {arguments.attention}, {arguments.image_size} px, batch {arguments.batch_size}"
    counts = ("images", "skipped", "same\nlabel", "same first\nprediction")
    headers = ("format", *counts, "largest difference\nof a probability", "top-1 %", "result")
    table = tools.new_table(title, headers, ("format", "result"))
    styles = dict.fromkeys(("num_images", "num_skipped", "labels_equal", "first_predictions_equal"), ",")
    styles |= {"probability_difference": ".1e", "top1": ".2f"}
    for row in rows:
        result = f"left out: {row['left_out']}" if "left_out" in row else "differs" if row["differences"] else "equal"
        cells = (format(row[name], style) if name in row else "-" for name, style in styles.items())
        table.add_row(row["format"], *cells, result)
    return table


def run(arguments: argparse.Namespace) -> int:
    """Compare, print and write what the options of `scripts/compare_formats.py` name; the exit status."""
    check_swappable(arguments.variant)
    keep = arguments.keep and Path(arguments.keep).expanduser()
    if keep and keep.exists() and not (keep.is_dir() and not any(keep.iterdir())):
        raise UserError(f"--keep {keep} is there already. Name a folder that is empty or does not exist.")
    images = read_photographs(arguments)
    with contextlib.nullcontext(keep) if keep else tempfile.TemporaryDirectory(prefix="formats-") as folder:
        rows = list(compare_all(arguments, images, Path(folder)))
    device = tools.choose_device("auto")
    tools.print_report([result_table(rows, arguments)], machine_line(device))
    differing = [row for row in rows if row.get("differences")]
    settings = tools.without_paths(arguments, "data_dir", "checkpoint", "keep")
    content = {"machine": machine_info(device), "settings": settings, "equal": not differing, "results": rows}
    tools.write_results(arguments, content)
    for row in differing:
        print(f"Error: {row['format']} differs from {REFERENCE} in {', '.join(row['differences'])}.", file=sys.stderr)
    return 1 if differing else 0
