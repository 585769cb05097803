"""Trainings on sequences side by side: a table, training curves, and a file with all results."""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from scatterbrain.errors import UserError
from src.evaluation.colours import ATTENTION_COLOURS, ATTENTION_MARKERS, OTHER_COLOUR
from src.evaluation.comparison_callback import ComparisonCallback, find_runs
from src.evaluation.comparison_files import comparison_paths
from src.evaluation.figure_style import FAINT, new_figure
from src.evaluation.result_rows import read_rows, write_rows
from src.evaluation.sequence_summary import SEQUENCE_FILE, SequenceSummary, metric_text, read_summary
from src.utils.files import atomic_write

# What differs from machine to machine, and is not kept in a file of several trainings.
_LEFT_OUT = {"checkpoints": {}, "command": ""}
_HEADERS = ("attention", "seeds", "columns", "steps", "test", "±", "validation", "best", "tokens/s", "minutes", "MiB")


# What may set trainings with one attention apart, as text.
_PARTS: tuple[Callable[[SequenceSummary], str], ...] = (
    lambda summary: f"lr {summary.learning_rate:g}",
    lambda summary: ", ".join(f"{name} {size}" for name, size in summary.sizes.items()),
    lambda summary: f"{summary.steps:,} steps",
    lambda summary: f"batch {summary.batch_size}",
    lambda summary: f"{summary.parameters:,} weights",
    lambda summary: summary.precision,
    lambda summary: f"data {(summary.data.get('sha256') or '')[:6]}",
    lambda summary: "" if summary.test or summary.error else "not tested",  # its result must not hide those of others
)


@dataclass(frozen=True)
class SequenceComparison:
    """Trainings, in the order of their folders.

    Attributes:
        summaries: of the trainings.
        failed: names of folders without results.
    """

    summaries: list[SequenceSummary]
    failed: list[str] = field(default_factory=list)

    def tasks(self) -> dict[str, dict[str, list[SequenceSummary]]]:
        """Trainings by task and label, the best label of a task first; those with one label differ in their seeds."""
        tasks: dict[str, list[SequenceSummary]] = {}
        lengths = {(summary.task, summary.length) for summary in self.summaries}
        for summary in self.summaries:
            several = sum(task == summary.task for task, _ in lengths) > 1
            name = f"{summary.task}, N {summary.length:,}" if several else summary.task
            tasks.setdefault(name, []).append(summary)
        return {name: _by_label(summaries) for name, summaries in tasks.items()}


def _by_label(summaries: list[SequenceSummary]) -> dict[str, list[SequenceSummary]]:
    """Trainings of a task by what sets them apart, the best first and the diverged last."""
    groups: dict[str, list[SequenceSummary]] = {}
    for summary in summaries:
        mine = [other for other in summaries if other.attention == summary.attention]
        label = [summary.attention]
        texts = [(part(summary), {part(other) for other in mine}) for part in _PARTS]
        label += [text for text, of_all in texts if text and len(of_all) > 1]
        for name in dict.fromkeys(name for other in mine for name in other.options):
            if len({str(other.options.get(name)) for other in mine}) > 1:
                label.append(f"{name} {summary.options.get(name)}")
        name = text = ", ".join(label)
        number = 1
        # a seed that is there already: the trainings differ in an option that a summary does not have
        while summary.seed in {other.seed for other in groups.get(name, [])}:
            number += 1
            name = f"{text} ({number})"
        groups.setdefault(name, []).append(summary)

    def rank(label: str) -> tuple[bool, float]:
        value = _mean(groups[label], "test")
        if value is None and not any(summary.error for summary in groups[label]):
            value = _mean(groups[label], "validation")
        sign = -1 if summaries[0].higher_is_better else 1
        return (value is None, 0.0 if value is None else sign * value)

    return {label: groups[label] for label in sorted(groups, key=rank)}


def _mean(summaries: Sequence[SequenceSummary], part: str) -> float | None:
    """Mean over seeds of the metric on the test part (`test`) or in an evaluation; None where one lacks it."""
    entries = [getattr(summary, part) for summary in summaries]
    if None in entries:
        return None
    return statistics.fmean(entry[summaries[0].metric] for entry in entries)


def compare_trainings(folders: Sequence[str | os.PathLike[str]], failed: Sequence[Path] = ()) -> SequenceComparison:
    """The trainings in some folders, of single runs, of multiruns, or of both.

    Raises:
        UserError: there is none in a folder, or a file is damaged.
    """
    summaries, without = [], [str(folder) for folder in failed]
    known: set[Path] = set()  # folders may hold one another
    for folder in map(Path, folders):
        runs = find_runs(folder, SEQUENCE_FILE)
        if not any(not lacks for lacks in runs.values()):
            raise UserError(f"There is no {SEQUENCE_FILE} under {folder}. Give folders of trainings.")
        for run, lacks in runs.items():
            if run.resolve() in known:
                continue
            known.add(run.resolve())
            if lacks:
                without.append(str(run))
            else:
                summaries.append(read_summary(run / SEQUENCE_FILE))
    return SequenceComparison(summaries, without)


def save_results(path: str | os.PathLike[str], comparison: SequenceComparison) -> None:
    """Write the trainings as JSON, one a line, without paths and commands.

    Raises:
        UserError: the path cannot be written.
    """
    rows = [dataclasses.asdict(summary) for summary in comparison.summaries]
    rows = [{name: value for name, value in row.items() if name not in _LEFT_OUT} for row in rows]
    write_rows(path, {"results": rows, "failed": comparison.failed})


def read_results(path: str | os.PathLike[str]) -> SequenceComparison:
    """What `save_results` has written.

    Raises:
        UserError: the file is missing, or holds something else.
    """
    content = read_rows(path, ("results", "failed"), "Give the comparison.json of trainings on sequences.")
    try:
        summaries = [SequenceSummary(**row, **_LEFT_OUT) for row in content["results"]]
    except TypeError as error:
        raise UserError(f"{path} holds no trainings on sequences of this version. Compare them again.") from error
    return SequenceComparison(summaries, content["failed"])


def _rows(groups: dict[str, list[SequenceSummary]]) -> list[list[str]]:
    """Cells of a task's table, in the order of `_HEADERS`."""
    rows = []
    for label, summaries in groups.items():
        first = summaries[0]

        def text(part: str, summaries: list[SequenceSummary] = summaries) -> str:
            return metric_text(summaries[0].metric, _mean(summaries, part))

        tests = [summary.test for summary in summaries if summary.test is not None]
        error = None
        if len(tests) > 1:
            error = statistics.stdev(test[first.metric] for test in tests)
        elif tests:
            error = tests[0]["standard_error"]
        done = " / ".join(f"{steps:,}" for steps in dict.fromkeys(summary.steps_done for summary in summaries))
        rates = [summary.tokens_per_second for summary in summaries if summary.tokens_per_second]
        peaks = [summary.peak_memory_mib for summary in summaries if summary.peak_memory_mib]
        cells = [label, str(len(summaries)), f"{100 * first.memory:.1f} %"]
        cells += [done if all(summary.complete for summary in summaries) else f"{done} of {first.steps:,}"]
        cells += [
            "diverged" if any(summary.error for summary in summaries) else text("test"),
            metric_text(first.metric, error),
            text("validation"),
            text("best"),
        ]
        cells += [f"{statistics.fmean(rates):,.0f}" if rates else "-"]
        cells += [f"{statistics.fmean(summary.total_seconds for summary in summaries) / 60:.1f}"]
        rows.append([*cells, f"{max(peaks):,.0f}" if peaks else "-"])
    first = next(iter(groups.values()))[0]
    for name, value in first.data["baselines"].items():
        rows.append([f"({name})", "", "", "", metric_text(first.metric, value), *[""] * 6])
    return rows


def _title(name: str, groups: dict[str, list[SequenceSummary]]) -> str:
    first = next(iter(groups.values()))[0]
    devices = sorted({summary.device for summaries in groups.values() for summary in summaries})
    return f"{name}: {first.metric.replace('_', ' ')}, {first.precision}, {' and '.join(devices)}"


def comparison_tables(comparison: SequenceComparison) -> list[Table]:
    """A table for each task, the best attention first."""
    tables = []
    for name, groups in comparison.tasks().items():
        table = Table(title=_title(name, groups))
        for header in _HEADERS:
            table.add_column(header, justify="left" if header == "attention" else "right", no_wrap=True)
        for cells in _rows(groups):
            table.add_row(*cells)
        tables.append(table)
    return tables


def comparison_markdown(comparison: SequenceComparison) -> str:
    """The tables as a Markdown document."""
    lines = ["# Trainings on sequences compared"]
    for name, groups in comparison.tasks().items():
        lines += ["", f"## {_title(name, groups)}", "", "| " + " | ".join(_HEADERS) + " |"]
        lines += ["|" + " --- |" * len(_HEADERS), *("| " + " | ".join(cells) + " |" for cells in _rows(groups))]
    lines += ["", "- ±: standard deviation over seeds, or the standard error of the test part with one seed."]
    lines += [
        "- columns: of the attention, over those of full attention's matrix. Where the task is causal, windows count "
        "both halves, of which the mask hides one, and `sbcluster` counts what a query sees.",
        "- minutes: with evaluations.",
    ]
    if comparison.failed:
        lines += ["", f"Runs without results: {', '.join(comparison.failed)}."]
    return "\n".join(lines) + "\n"


def comparison_figure(comparison: SequenceComparison) -> Figure:
    """Validation results against steps (above) and minutes of training (below), a column of panels for each task."""
    tasks = comparison.tasks()
    figure = new_figure(7 * len(tasks), 7.2, dpi=150)
    for column, (name, groups) in enumerate(tasks.items()):
        above, below = (figure.add_subplot(2, len(tasks), row * len(tasks) + column + 1) for row in (0, 1))
        first = next(iter(groups.values()))[0]
        unit = "accuracy in %" if first.metric == "accuracy" else first.metric.replace("_", " ")
        for axes, what in ((above, "step"), (below, "minutes of training")):
            _draw_curves(axes, groups, what)
            axes.set(xlabel=what, ylabel=f"{unit}, validation")
            if first.metric == "perplexity":
                axes.set_yscale("log")
        above.set_title(name, fontsize=10)
        above.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))  # right of the panel
    return figure


def _draw_curves(axes: Axes, groups: dict[str, list[SequenceSummary]], what: str) -> None:
    """Draw the curves of a task: one of each training, and its baselines."""
    labelled: set[str] = set()
    for label, summaries in groups.items():
        colour = ATTENTION_COLOURS.get(summaries[0].attention, OTHER_COLOUR)
        marker = ATTENTION_MARKERS.get(summaries[0].attention, "o")
        for summary in summaries:
            scale = 100 if summary.metric == "accuracy" else 1
            seconds, xs = 0.0, []
            for entry in summary.history:
                seconds += entry["seconds"]
                xs.append(entry["step"] if what == "step" else seconds / 60)
            ys = [scale * entry[summary.metric] for entry in summary.history]
            text = f"{label}: {metric_text(summary.metric, _mean(summaries, 'test'))}"
            options: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 3, "linewidth": 1.3}
            axes.plot(xs, ys, label=None if text in labelled else text, **options)
            labelled.add(text)
    for (name, value), line in zip(summary.data["baselines"].items(), ("--", ":", "-.") * 9, strict=False):
        text = f"{name}: {metric_text(summary.metric, value)}"
        axes.axhline(scale * value, color=FAINT, linewidth=1, linestyle=line, label=text, zorder=0)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def write_comparison(folder: str | os.PathLike[str], comparison: SequenceComparison) -> list[Path]:
    """Paths of `comparison.json`, `comparison.md` and `comparison.png`, which are written to a folder.

    Raises:
        UserError: the folder cannot be written to.
    """
    paths = comparison_paths(folder)
    save_results(paths[0], comparison)
    with atomic_write(paths[1]) as file:
        file.write(comparison_markdown(comparison))
    with atomic_write(paths[2], "wb") as file:
        comparison_figure(comparison).savefig(file, format="png")
    return paths


def print_comparison(comparison: SequenceComparison, paths: Sequence[Path]) -> None:
    """Print the tables of a comparison and where its files are."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log file has no width
    for table in comparison_tables(comparison):
        console.print(table)
    for path in paths:
        console.print(str(path), soft_wrap=True, highlight=False, markup=False)


class SequenceComparisonCallback(ComparisonCallback):
    """Compares the trainings of a multirun when it ends, as `ComparisonCallback` does evaluations."""

    results_file = SEQUENCE_FILE
    _compare = staticmethod(compare_trainings)
    _write_files = staticmethod(write_comparison)
    _print = staticmethod(print_comparison)
