"""The summary of a training: `training.json` (settings, results, history) and `training.png` (its curves)."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from src.evaluation.figure_style import new_figure
from src.evaluation.results import CheckpointInfo
from src.utils.files import atomic_write, write_json

TRAINING_FILE = "training.json"
FIGURE_FILE = "training.png"


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """The content of `training.json`, fields in the order of the file.

    Args:
        model: name of the variant.
        attention: name of the token stages' attention config; None for a model that keeps its own.
        started_from: path and SHA-256 of the weights the training began with; both None for random ones.
        data: `dir`, `train` and `num_train_images`, `validation` and `num_validation_images`,
            `num_classes`.
        image_size: side of the input, pixels.
        precision: Lightning's name of it.
        device: name of the device.
        seed: of weights, order, augmentation and random features.
        epochs: epochs requested.
        complete: whether all of them were trained.
        updates: updates of the weights so far.
        images_per_update: over all processes and accumulated batches.
        learning_rate: largest of the schedule, scaled to `images_per_update`.
        ema_decay: of the averaged weights; None where they are not averaged.
        best: epoch (from 1) and top-1 accuracy in percent of the best epoch; None before the first validation.
        checkpoints: `best` and `last`, paths.
        images_per_second: median over the epochs, the first left out where there are more (it warms up).
        seconds: of training in the finished epochs, without validation.
        peak_memory_mib: peak memory of the device since the training was last started, MiB; None on the CPU.
        versions: version of Python and of each library that may change results.
        command: the command that was run.
        history: one entry for each epoch, see `ClassificationTraining`.
    """

    model: str
    attention: str | None
    started_from: CheckpointInfo
    data: dict[str, Any]
    image_size: int
    precision: str
    device: str
    seed: int
    epochs: int
    complete: bool
    updates: int
    images_per_update: int
    learning_rate: float
    ema_decay: float | None
    best: dict[str, float] | None
    checkpoints: dict[str, str | None]
    images_per_second: float | None
    seconds: float
    peak_memory_mib: float | None
    versions: dict[str, str]
    command: str
    history: list[dict[str, float]]


def best_epoch(history: list[dict[str, float]]) -> dict[str, float] | None:
    """Epoch and top-1 accuracy of the first of the best epochs; None where none was validated."""
    validated = [entry for entry in history if "val_top1" in entry]
    if not validated:
        return None
    best = max(validated, key=lambda entry: entry["val_top1"])
    return {"epoch": best["epoch"], "top1": best["val_top1"]}


def median_rate(history: list[dict[str, float]]) -> float | None:
    """Median of the images per second, without the first epoch where there are more; None without epochs."""
    rates = [entry["images_per_second"] for entry in history]
    return median(rates[1:] or rates) if rates else None


def write_training(folder: str | os.PathLike[str], summary: TrainingSummary) -> None:
    """Write `training.json`, and `training.png` where an epoch is finished.

    NaN and infinity, such as a loss that overflowed once, are written as null.

    Raises:
        UserError: the folder cannot be written to.
    """
    figure = Path(folder) / FIGURE_FILE
    figure.unlink(missing_ok=True)  # of an earlier part of the training: see `is_written`
    write_json(Path(folder) / TRAINING_FILE, _without_nan(dataclasses.asdict(summary)))
    if summary.history:
        with atomic_write(figure, "wb") as file:
            training_figure(summary).savefig(file, format="png")


def is_written(folder: str | os.PathLike[str], summary: TrainingSummary) -> bool:
    """Whether a folder holds the files of this training, as far as it is; the figure is the last one written."""
    try:
        content = json.loads((Path(folder) / TRAINING_FILE).read_text(encoding="utf-8"))
        same = all(content[name] == getattr(summary, name) for name in ("complete", "epochs", "updates"))
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return same and (Path(folder) / FIGURE_FILE).is_file()


def _without_nan(value: Any) -> Any:
    """Nested dicts and lists with None for NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def training_figure(summary: TrainingSummary) -> Figure:
    """Losses, validation accuracy and learning rate over the epochs.

    Returns:
        Figure on an Agg canvas; pyplot is not involved.
    """
    figure = new_figure(9, 3.6, dpi=150)
    losses, accuracy, rate = figure.subplots(1, 3)
    epochs = [entry["epoch"] for entry in summary.history]
    validated = [entry for entry in summary.history if "val_top1" in entry]
    marker = "o" if len(epochs) == 1 else None  # one point makes no line
    options = {"marker": marker, "linewidth": 1.3}

    losses.plot(epochs, [entry["train_loss"] for entry in summary.history], label="training", **options)
    if validated:
        times = [entry["epoch"] for entry in validated]
        label = "validation" if summary.ema_decay is None else "validation, averaged weights"
        losses.plot(times, [entry["val_loss"] for entry in validated], label=label, **options)
        accuracy.plot(times, [entry["val_top1"] for entry in validated], color="C1", **options)
        epoch, top1 = summary.best["epoch"], summary.best["top1"]
        accuracy.axhline(top1, color="0.6", linewidth=0.8, linestyle="--")
        accuracy.set_title(f"Validation top-1: best {top1:.2f} %, epoch {epoch}", fontsize=9)
    losses.set_title("Cross-entropy (training: augmented, smoothed)", fontsize=9)
    losses.legend(fontsize=8, frameon=False)
    accuracy.set_ylabel("percent", fontsize=8)
    rate.plot(epochs, [entry["lr"] for entry in summary.history], color="C2", **options)
    rate.set_title("Learning rate after the epoch", fontsize=9)
    for axes in (losses, accuracy, rate):
        axes.set_xlabel("epoch", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    figure.suptitle(f"{summary.model}, attention {summary.attention or 'its own'}", fontsize=10)
    return figure


def training_table(summary: TrainingSummary) -> Table:
    """The table that ends a training, for `rich.print`: one line per result."""
    data = summary.data
    title = (
        f"{data['num_train_images']:,} images of {data['train']}, "
        f"{data['num_validation_images']:,} of {data['validation']}"
    )
    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("model", summary.model)
    table.add_row("attention", summary.attention or "its own")
    done = len(summary.history)
    table.add_row("epochs", f"{done:,}" if summary.complete else f"{done:,} of {summary.epochs:,}")
    if summary.history:
        last = summary.history[-1]
        table.add_row("training loss", f"{last['train_loss']:.4f}")
        if "val_top1" in last:
            table.add_row("validation loss", f"{last['val_loss']:.4f}")
            table.add_row("validation top-1", f"{last['val_top1']:.2f} %")
    if summary.best is not None:
        table.add_row("best top-1", f"{summary.best['top1']:.2f} % (epoch {summary.best['epoch']})")
    if summary.images_per_second is not None:
        table.add_row("images/s", f"{summary.images_per_second:,.1f}")
    for name, path in summary.checkpoints.items():
        if path is not None:
            table.add_row(name, path)
    return table
