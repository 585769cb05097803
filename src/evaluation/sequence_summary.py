"""The summary of a training on sequences: `sequence_training.json`, and its table."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from scatterbrain.errors import UserError
from src.utils.files import write_json

SEQUENCE_FILE = "sequence_training.json"


@dataclass(frozen=True, kw_only=True)
class SequenceSummary:
    """The content of `sequence_training.json`, fields in the order of the file.

    Args:
        task: name of the experiment.
        attention: name of the attention.
        options: of the attention, those that were given.
        sizes: of the attention: window, features, landmarks.
        memory: columns of the attention over those of full attention's matrix.
        metric: what results are compared by.
        higher_is_better: of the metric.
        seed: of weights, order, dropout and random features.
        data: sizes of the parts, baselines, digest.
        length: most tokens of a sequence.
        batch_size: sequences of a step.
        parameters: number of the network's weights.
        precision: Lightning's name of it.
        device: name of the device.
        learning_rate: the highest one.
        steps: steps that were requested.
        steps_done: steps that were reached.
        complete: whether all of them were reached.
        error: why the training ended before, where its loss or weights became infinite or NaN; else None.
        validation: the last evaluation, see `history`; None before the first one.
        best: the best of them.
        test: `loss` (nats), `accuracy`, the metric and its `standard_error` on the test part, by the last weights; None
            where the training was interrupted, was killed or diverged.
        tokens_per_second: of training, with padding; median over the history, the first entry left out where there are
            more.
        seconds: of training, evaluations not counted.
        total_seconds: of training and evaluations, in all parts of a resumed training.
        peak_memory_mib: peak memory of the device since the training was last started; None on the CPU.
        checkpoints: `best` and `last`, paths.
        versions: version of Python and of each library that may change results.
        command: the command that was run.
        history: one entry for each evaluation, see `SequenceTraining`.
    """

    task: str
    attention: str
    options: dict[str, Any]
    sizes: dict[str, Any]
    memory: float
    metric: str
    higher_is_better: bool
    seed: int
    data: dict[str, Any]
    length: int
    batch_size: int
    parameters: int
    precision: str
    device: str
    learning_rate: float
    steps: int
    steps_done: int
    complete: bool
    error: str | None
    validation: dict[str, Any] | None
    best: dict[str, Any] | None
    test: dict[str, float] | None
    tokens_per_second: float | None
    seconds: float
    total_seconds: float
    peak_memory_mib: float | None
    checkpoints: dict[str, str]
    versions: dict[str, str]
    command: str
    history: list[dict[str, Any]]


def write_summary(folder: str | os.PathLike[str], summary: SequenceSummary) -> Path:
    """Path of the file that the summary is written to.

    Raises:
        UserError: the folder cannot be written to.
    """
    path = Path(folder) / SEQUENCE_FILE
    write_json(path, dataclasses.asdict(summary))
    return path


def read_summary(path: str | os.PathLike[str]) -> SequenceSummary:
    """The summary in a file.

    Raises:
        UserError: the file is missing, or holds something else.
    """
    try:
        return SequenceSummary(**json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Give the folder of a training.") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no {SEQUENCE_FILE} of this version. Repeat the training.") from error


def metric_text(metric: str, value: float | None) -> str:
    """A result as text: accuracy in percent, bits per byte and perplexity with three decimals."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{100 * value:.2f} %" if metric == "accuracy" else f"{value:.3f}"


def summary_table(summary: SequenceSummary) -> Table:
    """The table that ends a training, for `rich.print`: one line per result."""
    name, metric = summary.metric.replace("_", " "), summary.metric
    table = Table(title=f"{summary.task}, attention {summary.attention}", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    steps = f"{summary.steps_done:,}"
    table.add_row("steps", steps if summary.complete else f"{steps} of {summary.steps:,}")
    for part, entry in (("validation", summary.validation), ("best validation", summary.best), ("test", summary.test)):
        if entry is not None:
            step = f" (step {entry['step']:,})" if "step" in entry else ""
            text = f"{metric_text(metric, entry[metric])} ± {metric_text(metric, entry['standard_error'])}"
            table.add_row(f"{part} {name}", f"{text}{step}")
    for baseline, value in summary.data["baselines"].items():
        table.add_row(f"({baseline})", metric_text(metric, value))
    if summary.tokens_per_second is not None:
        table.add_row("tokens/s", f"{summary.tokens_per_second:,.0f}")
    table.add_row("minutes", f"{summary.total_seconds / 60:.1f} ({summary.seconds / 60:.1f} of training)")
    for checkpoint, path in summary.checkpoints.items():
        table.add_row(checkpoint, path)
    return table
