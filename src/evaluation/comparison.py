"""Several runs side by side: what swapping the attention costs in accuracy, and what it saves.

`ComparisonCallback` writes the three files of a comparison into the sweep folder when `run.py -m` is done.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scatterbrain.errors import UserError
from src.evaluation.published import PublishedFigure
from src.evaluation.results import (
    RESULTS_FILE,
    Predictions,
    Results,
    accuracy_text,
    percent_text,
    read_predictions,
    read_results,
)
from src.utils.files import atomic_write, write_json

logger = logging.getLogger(__name__)

JSON_FILE = "comparison.json"
MARKDOWN_FILE = "comparison.md"
FIGURE_FILE = "comparison.png"

# What the labels leave out of the overrides: the attention has its own place in front.
_ATTENTION_OVERRIDE = "model/t2tattn_cfg"


@dataclass(frozen=True)
class ComparisonRow:
    """One run of a comparison, a line of `comparison.json`. The reference is the run with full attention.

    Args:
        run: name of the run's folder.
        label: attention, and what sets the run apart where another has the same attention.
        model: name of the variant.
        attention: name of the token stages' attention config; None for a model that keeps its own.
        draws: number of seeds.
        top1: percent, mean over seeds.
        top1_std: sample deviation over seeds, points; None with one seed.
        top1_difference: `top1` minus that of the reference, points; None without a reference.
        top5: percent, mean over seeds.
        loss: nats, mean over seeds.
        agreement: percent of images whose first prediction (first seed) is the reference's; None without one.
        images_per_second: throughput.
        speedup: `images_per_second` over that of the reference; None without one of the same device, precision
            and form (`fast`).
        attention_memory: fraction of the full attention matrix; None where it does not apply.
        published: published top-1; None where there is none.
        num_images: number of images evaluated; without those that were skipped, since they could not be decoded.
    """

    run: str
    label: str
    model: str
    attention: str | None
    draws: int
    top1: float
    top1_std: float | None
    top1_difference: float | None
    top5: float
    loss: float
    agreement: float | None
    images_per_second: float
    speedup: float | None
    attention_memory: float | None
    published: PublishedFigure | None
    num_images: int | None = None


@dataclass(frozen=True, kw_only=True)
class OnePass:
    """What there is to tell of one pass over the images with several attentions, apart from each of them.

    Args:
        attentions: their number.
        forward_passes: of each image, over all attentions and draws.
        seconds: duration of the pass, reading and decoding of the images included.
        peak_memory_mib: peak memory of the device, MiB; None on the CPU.
    """

    attentions: int
    forward_passes: int
    seconds: float
    peak_memory_mib: float | None

    def describe(self, num_images: int) -> str:
        """Duration and rate in words, without a full stop.

        Args:
            num_images: number of images of the pass.
        """
        memory = "" if self.peak_memory_mib is None else f", peak memory {self.peak_memory_mib:,.0f} MiB"
        number = f"{self.attentions} attention" + ("s" if self.attentions > 1 else "")
        return (
            f"one pass over {num_images:,} images with {number} "
            f"({self.forward_passes} forward passes of each image) took {self.seconds:,.1f} s, "
            f"{num_images / self.seconds:,.1f} images/s{memory}"
        )


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Args:
        common: the entries of `results.json` that all runs share, of model, checkpoint, data, image_size,
            precision, device and seeds.
        rows: one per run, in the order given.
        failed: names of runs that left no results, or results of a part of the images.
        one_pass: where the runs were one pass over the images; None where each had its own.
    """

    common: dict[str, Any]
    rows: list[ComparisonRow]
    failed: list[str] = field(default_factory=list)
    one_pass: OnePass | None = None


def compare_runs(
    run_folders: Sequence[str | os.PathLike[str]],
    failed: Sequence[str | os.PathLike[str]] = (),
    one_pass: OnePass | None = None,
) -> Comparison:
    """Compare finished runs; one that was interrupted is left out, and named among those that failed.

    A run's reference is the first run with attention `"full"` on the same model, weights, images and image
    size, one of the same device, precision and form if there is any. Images are matched by name. Runs that skipped
    different numbers of images have no reference in each other, and a warning names them.

    Args:
        run_folders: folders that hold `results.json` and `predictions.csv`, in the order of the rows.
        failed: folders of runs that left none.
        one_pass: where the runs were one pass over the images.

    Returns:
        The comparison.

    Raises:
        UserError: no folders or finished runs, a file is missing or damaged, or two runs on the same data hold
            different images.
    """
    folders = [Path(folder) for folder in run_folders]
    if not folders:
        raise UserError("There is nothing to compare: no run left results. Run the evaluation first.")
    runs = [read_results(folder) for folder in folders]
    incomplete = [folder for folder, run in zip(folders, runs, strict=True) if not run.complete]
    if incomplete:
        names = ", ".join(map(str, incomplete))
        logger.warning("Left out of the comparison, since it was interrupted (eval.resume=true resumes it): %s", names)
        folders = [folder for folder in folders if folder not in incomplete]
        runs = [run for run in runs if run.complete]
        failed = [*failed, *incomplete]
        if not folders:
            raise UserError(f"There is nothing to compare: {names} was interrupted. Resume it with eval.resume=true.")
    labels = _labels(folders, runs)
    references = [_reference(index, runs) for index in range(len(runs))]
    _warn_of_unequal_images(folders, runs, references)
    # Only what is compared is read, and each file once.
    needed = {index for pair in enumerate(references) if pair[1] is not None for index in pair}
    predictions = {index: read_predictions(folders[index]) for index in sorted(needed)}

    rows = []
    for index, run in enumerate(runs):
        number = references[index]
        reference = None if number is None else runs[number]
        agreement = None
        if number is not None:
            agreement = _agreement(folders[index], predictions[index], folders[number], predictions[number])
        comparable = reference is not None and _speed_key(reference) == _speed_key(run)
        rows.append(
            ComparisonRow(
                run=folders[index].name,
                label=labels[index],
                model=run.model,
                attention=run.attention,
                draws=len(run.top1_per_seed),
                top1=run.top1,
                top1_std=run.top1_std,
                top1_difference=None if reference is None else run.top1 - reference.top1,
                top5=run.top5,
                loss=run.loss,
                agreement=agreement,
                images_per_second=run.images_per_second,
                speedup=run.images_per_second / reference.images_per_second if comparable else None,
                attention_memory=run.attention_memory,
                published=run.published,
                num_images=run.data["num_images"],
            )
        )
    return Comparison(_common(runs), rows, [Path(folder).name for folder in failed], one_pass)


def _reference(index: int, runs: Sequence[Results]) -> int | None:
    """Number of the run with full attention that run `index` is compared with, or None."""
    run = runs[index]
    key = (run.model, run.checkpoint["sha256"], run.data, run.image_size)
    candidates = [
        number
        for number, other in enumerate(runs)
        if other.attention == "full" and (other.model, other.checkpoint["sha256"], other.data, other.image_size) == key
    ]
    return min(candidates, key=lambda number: _speed_key(runs[number]) != _speed_key(run), default=None)


def _warn_of_unequal_images(folders: Sequence[Path], runs: Sequence[Results], references: Sequence[int | None]) -> None:
    """Name the runs that have no reference only because other images of theirs could not be decoded."""
    for folder, run, reference in zip(folders, runs, references, strict=True):
        for other_folder, other in zip(folders, runs, strict=True):
            if (
                reference is None
                and other.attention == "full"
                and (other.model, other.checkpoint["sha256"], other.image_size)
                == (run.model, run.checkpoint["sha256"], run.image_size)
                and {**other.data, "num_images": None} == {**run.data, "num_images": None}
            ):
                logger.warning(
                    "%s is not compared with full attention: it evaluated %s images, and %s %s of the same data. Run "
                    "both on the same images.",
                    *(folder, f"{run.data['num_images']:,}", other_folder, f"{other.data['num_images']:,}"),
                )
                break


def _speed_key(run: Results) -> tuple[str, str, bool]:
    return run.device, run.precision, run.fast


def _agreement(folder: Path, ours: Predictions, reference_folder: Path, theirs: Predictions) -> float:
    """Percent of images with the same first prediction."""
    reference = dict(zip(theirs.images, theirs.classes[:, 0].tolist(), strict=True))
    if odd := set(ours.images) ^ reference.keys():
        raise UserError(
            f"{folder} and {reference_folder} evaluated different images of the same data: "
            f"{min(odd)} is in one of them only. Run both again on unchanged data."
        )
    same = [reference[image] == label for image, label in zip(ours.images, ours.classes[:, 0].tolist(), strict=True)]
    return 100.0 * sum(same) / len(same)


def _common(runs: Sequence[Results]) -> dict[str, Any]:
    names = ("model", "checkpoint", "data", "image_size", "precision", "device", "seeds")
    first = runs[0]
    return {
        name: getattr(first, name) for name in names if all(getattr(run, name) == getattr(first, name) for run in runs)
    }


def _labels(folders: Sequence[Path], runs: Sequence[Results]) -> list[str]:
    """A different label for each run: the attention, then what it takes to tell equal ones apart."""
    base = [run.attention or run.model for run in runs]
    counts = Counter(base)
    settings = [_settings(folder, run) for folder, run in zip(folders, runs, strict=True)]
    labels = []
    for index, name in enumerate(base):
        if counts[name] == 1:
            labels.append(name)
            continue
        peers = [settings[other] for other, peer in enumerate(base) if peer == name]
        differing = {
            key: value
            for key, value in settings[index].items()
            if any(peer.get(key) != value for peer in peers) and value != name
        }
        # "trainer.precision" reads as "precision" as long as no other key ends the same way.
        short = Counter(re.split(r"[./]", key)[-1] for key in differing)
        words = []
        for key, value in differing.items():
            last = re.split(r"[./]", key)[-1]
            words.append(f"{last if short[last] == 1 else key}={value}")
        labels.append(", ".join([name, *words]))
    counts = Counter(labels)
    return [
        label if counts[label] == 1 else f"{label} (run {folder.name})"
        for label, folder in zip(labels, folders, strict=True)
    ]


def _settings(folder: Path, run: Results) -> dict[str, str]:
    """What may set a run apart: the overrides Hydra saved, or entries of the results where it saved none."""
    path = folder / ".hydra" / "overrides.yaml"
    if path.is_file():
        try:
            overrides = OmegaConf.to_container(OmegaConf.load(path))
        except (OSError, ValueError, OmegaConfBaseException):  # labels are not worth failing for
            overrides = []
        pairs = dict(str(item).lstrip("+~").partition("=")[::2] for item in overrides or [])
        for name in (_ATTENTION_OVERRIDE, "eval.resume"):
            pairs.pop(name, None)
        return pairs
    names = ("model", "image_size", "precision", "device", "seeds", "fast")
    settings = {name: str(getattr(run, name)) for name in names}
    settings["checkpoint"] = Path(run.checkpoint["path"] or "none").name
    return settings


# Tables


def _columns(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """Heading and cells of every column that has anything to say, the label first."""
    rows = comparison.rows

    def cells(name: str, template: str) -> list[str]:
        values = [getattr(row, name) for row in rows]
        return ["-" if value is None else template.format(value) for value in values]

    columns = [
        ("attention", [row.label for row in rows]),
        ("images", cells("num_images", "{:,}") if len({row.num_images for row in rows}) > 1 else ["-"] * len(rows)),
        ("top-1", [accuracy_text(row.top1, row.top1_std, row.draws) for row in rows]),
        ("to full", cells("top1_difference", "{:+.2f}")),
        ("published", ["-" if row.published is None else row.published.text for row in rows]),
        ("top-5", cells("top5", "{:.2f}")),
        ("agreement", cells("agreement", "{:.2f}")),
        ("images/s", cells("images_per_second", "{:,.1f}")),
        ("speed-up", cells("speedup", "{:.2f}x")),
        ("memory", [percent_text(row.attention_memory) for row in rows]),
    ]
    return [(heading, column) for heading, column in columns if any(cell != "-" for cell in column)]


def _model_text(comparison: Comparison) -> str:
    return str(comparison.common.get("model", "several models"))


def _conditions(comparison: Comparison) -> list[str]:
    """What all runs share, in words, for headings."""
    common = comparison.common
    words = []
    if data := common.get("data"):
        words.append(f"{data['num_images']:,} images of {data['split']}")
    if image_size := common.get("image_size"):
        words.append(f"{image_size} px")
    if checkpoint := common.get("checkpoint"):
        name = Path(checkpoint["path"]).name if checkpoint["path"] else "none (untrained weights)"
        digest = f" (sha256 {checkpoint['sha256'][:8]})" if checkpoint["sha256"] else ""
        words.append(f"checkpoint {name}{digest}")
    words += [str(common[name]) for name in ("device", "precision") if name in common]
    return words


_NOTES = {
    "top-1": "top-1, top-5: accuracy in percent, mean (± sample deviation) over draws of the random features",
    "to full": "to full: points of top-1 above the run with full attention",
    "published": "published: top-1 on the whole ImageNet validation set",
    "agreement": "agreement: percent of images given the same first class as with full attention",
    "speed-up": "speed-up: images/s over those with full attention",
    "memory": "memory: of the attention in both token stages, relative to the full attention matrix",
}


def comparison_table(comparison: Comparison) -> Table:
    """The comparison for the screen, for `rich.print`.

    Args:
        comparison: the runs.

    Returns:
        Table with one line per run; columns without any entry are left out.
    """
    columns = _columns(comparison)
    table = Table(title=escape(f"{_model_text(comparison)}: {', '.join(_conditions(comparison))}"))
    for number, (heading, _) in enumerate(columns):
        table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=number > 0)
    for cells in zip(*(column for _, column in columns), strict=True):
        table.add_row(*(escape(cell) for cell in cells))
    return table


def comparison_markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown document.

    Args:
        comparison: the runs.

    Returns:
        Heading, the line of what all runs share, the table, and what its columns mean.
    """
    columns = _columns(comparison)

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

    lines = [
        f"# Attention of the token stages compared: {_model_text(comparison)}",
        "",
        ", ".join(_conditions(comparison)) + "." if _conditions(comparison) else "The runs share no conditions.",
        "",
        line([heading for heading, _ in columns]),
        line(["---", *["---:"] * (len(columns) - 1)]),
        *(line(cells) for cells in zip(*(column for _, column in columns), strict=True)),
        "",
        *(f"- {_NOTES[heading]}." for heading, _ in columns if heading in _NOTES),
    ]
    if comparison.one_pass is not None:
        described = comparison.one_pass.describe(comparison.common["data"]["num_images"])
        lines.append(f"- images/s: of the device's work on that attention alone, without the loader; {described}.")
    if comparison.failed:
        lines += ["", f"Runs without complete results: {', '.join(comparison.failed)}."]
    return "\n".join(lines) + "\n"


# Figure

# One colour per attention in every figure: what is alike in kind is alike in hue.
ATTENTION_COLOURS = {
    "full": "#3b4252",
    "local": "#3b7dc4",
    "performer": "#e08a1e",
    "sblocal": "#2e9e62",
    "smyrf": "#8e63c7",
    "sbsmyrf": "#5fb98a",
    "reformer": "#b06ac0",
    "linear-attention-performer": "#c9a227",
    "combination-local-performer": "#1f9aa6",
    "combination-smyrf-performer": "#69a9b0",
    "bs-bigbird": "#6f9fd8",
    "bs-longformer": "#5583bd",
    "bs-openai": "#93b7e0",
    "sbbs-bigbird": "#4c8f3f",
    "sbbs-longformer": "#7bb661",
    "sbbs-openai": "#a5c95c",
    "local2d": "#2f5f9e",
    "sblocal2d": "#1f7a4a",
    "cluster": "#d1495b",
    "sbcluster": "#b5344a",
    "pairedcluster": "#8f1d3f",
    "sbpairedcluster": "#6b0f2f",
}
_OTHER_COLOUR = "#8a8f98"
_INK = "#22262e"
_FAINT = "#6b7280"
_LABEL_WIDTH = 30  # characters


def comparison_figure(comparison: Comparison) -> Figure:
    """The comparison as a figure: one line per run, one panel per quantity.

    Panels are top-1 (with deviation over draws, published figures as diamonds), agreement with full
    attention, images per second, and attention memory; those without any value are left out.

    Args:
        comparison: the runs.

    Returns:
        Figure on an Agg canvas; pyplot is not involved.
    """
    rows = comparison.rows
    panels = [_draw_top1]
    if any(row.agreement is not None for row in rows):
        panels.append(_draw_agreement)
    panels.append(_draw_speed)
    if any(row.attention_memory is not None for row in rows):
        panels.append(_draw_memory)
    labels = [_plain(textwrap.fill(row.label, _LABEL_WIDTH)) for row in rows]
    lines = sum(label.count("\n") + 1 for label in labels)

    header, footer = 0.85, 0.75  # inches
    height = header + footer + max(0.8, 0.42 * len(rows) + 0.14 * (lines - len(rows)))
    width = 3.0 + 2.9 * len(panels)
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", rect=(0.008, 0, 0.984, 1 - header / height), wspace=0.07)
    figure.text(
        0.16 / width,
        1 - 0.18 / height,
        _plain(f"Attention of the token stages compared: {_model_text(comparison)}"),
        fontsize=14,
        fontweight="bold",
        color=_INK,
        va="top",
    )
    conditions = textwrap.shorten(" · ".join(_conditions(comparison)), int(13.5 * width), placeholder=" …")
    figure.text(0.16 / width, 1 - 0.50 / height, _plain(conditions), fontsize=9.5, color=_FAINT, va="top")

    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for draw, axes in zip(panels, all_axes, strict=True):
        draw(axes, rows)
        axes.set_axisbelow(True)
        axes.grid(axis="x", color="#e5e7eb", linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color("#c4c8cf")
        axes.tick_params(axis="x", labelsize=9, color="#c4c8cf", labelcolor=_FAINT)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.label.set(fontsize=10, color=_INK)
        for number in range(0, len(rows), 2):
            axes.axhspan(number - 0.5, number + 0.5, color="#f6f7f9", zorder=0)
    all_axes[0].set_yticks(range(len(rows)), labels, fontsize=10.5, color=_INK)
    all_axes[0].set_ylim(len(rows) - 0.5, -0.5)  # the first run on top
    return figure


def _plain(text: str) -> str:
    """Text that Matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")


def _colour(row: ComparisonRow) -> str:
    return ATTENTION_COLOURS.get(row.attention or "", _OTHER_COLOUR)


def _write_values(axes: Axes, texts: Sequence[str]) -> None:
    """A column of values right of the panel, where no mark can lie under them."""
    for number, text in enumerate(texts):
        axes.text(1.03, number, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9.5, color=_INK)


def _set_percent_limits(axes: Axes, values: Sequence[float]) -> None:
    """Limits around percentages: a margin for the marks, and never so narrow that noise looks like a cliff."""
    low, high = min(values), max(values)
    margin = max(0.12 * (high - low), 0.25)
    low, high = low - margin, high + margin
    if (lack := 2.0 - (high - low)) > 0:
        low, high = low - lack / 2, high + lack / 2
    axes.set_xlim(low, high)
    # The limits may pass 100 for the sake of the marks, the numbers may not.
    ticks = MaxNLocator(nbins=4, steps=[1, 2, 5, 10]).tick_values(low, high)
    axes.set_xticks([tick for tick in ticks if low <= tick <= min(high, 100.0)])


def _draw_top1(axes: Axes, rows: Sequence[ComparisonRow]) -> None:
    values: list[float] = []
    texts = []
    full = [row.top1 for row in rows if row.attention == "full"]
    if len(full) == 1 and len(rows) > 1:
        axes.axvline(
            full[0], color=ATTENTION_COLOURS["full"], linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.6, zorder=1
        )
    for number, row in enumerate(rows):
        deviation = row.top1_std or 0.0
        values += [row.top1 - deviation, row.top1 + deviation]
        if row.published is not None:
            ends = sorted({row.published.low, row.published.high})
            values += ends
            # Beneath the measured mark, so that both show where they coincide.
            below = [number + 0.26] * len(ends)
            axes.plot(ends, below, "D-", color=_FAINT, markersize=4.2, markerfacecolor="white", linewidth=0.9)
        axes.errorbar(
            row.top1,
            number,
            xerr=row.top1_std,
            fmt="o",
            color=_colour(row),
            markersize=8,
            capsize=3.5,
            elinewidth=1.6,
            zorder=3,
        )
        texts.append(f"{row.top1:.2f}" + (f" ±{row.top1_std:.2f}" if row.top1_std is not None else ""))
    _set_percent_limits(axes, values)
    _write_values(axes, texts)
    published = any(row.published is not None for row in rows)
    axes.set_xlabel("top-1 accuracy, %" + (" (◇ published)" if published else ""))


def _draw_agreement(axes: Axes, rows: Sequence[ComparisonRow]) -> None:
    values = [row.agreement for row in rows if row.agreement is not None]
    for number, row in enumerate(rows):
        if row.agreement is not None:
            axes.plot(row.agreement, number, "o", color=_colour(row), markersize=8, zorder=3)
    _set_percent_limits(axes, values)
    _write_values(axes, ["-" if row.agreement is None else f"{row.agreement:.1f}" for row in rows])
    axes.set_xlabel("same class as full attention, %")


def _draw_speed(axes: Axes, rows: Sequence[ComparisonRow]) -> None:
    speeds = [row.images_per_second for row in rows]
    axes.barh(range(len(rows)), speeds, height=0.5, color=[_colour(row) for row in rows], zorder=2)
    axes.set_xlim(0, 1.04 * max(speeds) or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter("{x:,g}")
    texts = []
    for row in rows:
        digits = 0 if row.images_per_second >= 100 else 1
        speedup = "" if row.speedup is None else f"  {row.speedup:.2f}x"
        texts.append(f"{row.images_per_second:,.{digits}f}{speedup}")
    _write_values(axes, texts)
    speedups = any(row.speedup is not None for row in rows)
    axes.set_xlabel("images per second" + (" (x full)" if speedups else ""))


def _draw_memory(axes: Axes, rows: Sequence[ComparisonRow]) -> None:
    values = [row.attention_memory for row in rows if row.attention_memory]
    axes.set_xscale("log")
    low = min([*(100 * value for value in values), 1.0]) * 0.6
    high = max([*(100 * value for value in values), 100.0]) * 1.7
    axes.set_xlim(low, high)
    for number, row in enumerate(rows):
        if row.attention_memory:  # nothing to draw for zero on a logarithmic axis
            percent = 100 * row.attention_memory
            axes.plot([low, percent], [number, number], color=_colour(row), linewidth=2, zorder=2)
            axes.plot(percent, number, "o", color=_colour(row), markersize=8, zorder=3)
    decades = [10.0**power for power in range(-4, 5) if low <= 10.0**power <= high]
    axes.set_xticks(decades, [f"{decade:g}" for decade in decades])
    axes.xaxis.set_minor_locator(NullLocator())
    _write_values(axes, ["-" if row.attention_memory is None else percent_text(row.attention_memory) for row in rows])
    axes.set_xlabel("attention memory, % of full")


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
    paths = [Path(folder) / name for name in (JSON_FILE, MARKDOWN_FILE, FIGURE_FILE)]
    content = {
        "common": comparison.common,
        "runs": [_row_content(row) for row in comparison.rows],
        "failed": comparison.failed,
    }
    if comparison.one_pass is not None:
        content["one_pass"] = dataclasses.asdict(comparison.one_pass)
    write_json(paths[0], content)
    with atomic_write(paths[1]) as file:
        file.write(comparison_markdown(comparison))
    with atomic_write(paths[2], "wb") as file:
        comparison_figure(comparison).savefig(file, format="png")
    return paths


def print_comparison(comparison: Comparison, paths: Sequence[Path]) -> None:
    """Print the table of a comparison and where its files are."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a log file has no width to keep to
    console.print(comparison_table(comparison))
    for path in paths:
        console.print(str(path), soft_wrap=True, highlight=False, markup=False)


def _row_content(row: ComparisonRow) -> dict[str, Any]:
    content = dataclasses.asdict(row)
    if row.published is not None:
        content["published"]["text"] = row.published.text
    return content


# Hydra


class ComparisonCallback(Callback):
    """Compares the runs of a multirun when it ends: three files in the sweep folder, and a table on stdout.

    Hydra ends a multirun with a failed run by that run's error and calls no `on_multirun_end`; the files are
    then written as the runs end, and the log says where they are. Single runs are left alone.
    """

    def __init__(self) -> None:
        self._ended: dict[Path, bool] = {}  # folder of a run -> whether it failed, in order

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Take note of a run of a multirun; from the first failed one on, bring the comparison up to date.

        Args:
            config: the run's config, with `hydra.runtime.output_dir`.
            job_return: how it ended.
            **kwargs: not used.
        """
        if OmegaConf.select(config, "hydra.mode") != RunMode.MULTIRUN:
            return
        folder = Path(config.hydra.runtime.output_dir)
        failed = job_return.status == JobStatus.FAILED or not (folder / RESULTS_FILE).is_file()
        self._ended[folder] = failed
        if job_return.status == JobStatus.FAILED:
            logger.warning("Run %s failed and is missing from the comparison.", folder)
        if any(self._ended.values()) and not all(self._ended.values()):
            try:
                paths = self._write(_sweep_folder(config))[1]
            except UserError as error:
                logger.error("The runs could not be compared: %s", error)
            else:
                logger.info("Comparison of the runs so far: %s", paths[1])

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Compare the runs, write the files and print the table.

        Args:
            config: the composed config, with `hydra.sweep.dir`.
            **kwargs: not used.
        """
        sweep = _sweep_folder(config)
        try:
            if not self._ended:  # the runs ended in other processes
                self._ended = _find_runs(sweep)
            if all(self._ended.values()):
                logger.warning("No run in %s left results: there is nothing to compare.", sweep)
                return
            comparison, paths = self._write(sweep)
        except UserError as error:
            logger.error("The runs could not be compared: %s", error)
            return
        if comparison.failed:
            logger.warning("Runs without complete results in %s: %s", sweep, ", ".join(comparison.failed))
        print_comparison(comparison, paths)

    def _write(self, sweep: Path) -> tuple[Comparison, list[Path]]:
        finished = [folder for folder, failed in self._ended.items() if not failed]
        comparison = compare_runs(finished, [folder for folder, failed in self._ended.items() if failed])
        return comparison, write_comparison(sweep, comparison)


def _sweep_folder(config: DictConfig) -> Path:
    # The folder is relative to where the command was started, which hydra.job.chdir may have left.
    return Path(OmegaConf.select(config, "hydra.runtime.cwd") or ".") / str(config.hydra.sweep.dir)


def _find_runs(sweep: Path) -> dict[Path, bool]:
    """Folders of runs under a sweep folder in the order of their numbers, and whether they failed."""
    folders = {path.parent for path in sweep.rglob(RESULTS_FILE)}
    folders |= {path.parent.parent for path in sweep.rglob(".hydra/hydra.yaml")}
    # Digits as numbers, so that run 10 comes after run 9.
    ordered = sorted(
        folders,
        key=lambda folder: [
            (0, int(part), "") if part.isdigit() else (1, 0, part) for part in folder.relative_to(sweep).parts
        ],
    )
    return {folder: not (folder / RESULTS_FILE).is_file() for folder in ordered}
