"""A language model of bytes and ListOps, trained from scratch with each attention: `scripts/experiment_training.py`."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from scatterbrain.errors import UserError, check_whole_number
from scatterbrain.ops.common.budget import budget_columns
from src.analysis import tools
from src.analysis.plots.style import COLOURS, DOTTED, FAINT, LEGEND, OTHER, label_ends, new_figure, style
from src.datamodules.sequence_tasks import create_task
from src.evaluation.colours import ATTENTION_MARKERS
from src.evaluation.result_rows import read_rows
from src.tasks.options import MAX_SEED
from src.tasks.sequence_training import Recipe, Result, Training
from src.utils.progress import progress_display
from src.utils.text import first_line

TITLES = {"language": "Language: the standard library's sources", "listops": "ListOps"}
METRICS = {"language": "bits per byte", "listops": "accuracy"}
COMPARED = (
    *("full", "local", "performer", "sblocal", "smyrf", "sbsmyrf"),
    *("cluster", "sbcluster", "pairedcluster", "reformer"),
)
PRECISIONS = ("float32", "bfloat16")


class Experiment(tools.Run):
    """All trainings of a run of the script with these options; `UserError` for a value out of range."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        check_whole_number("--seed", arguments.seed, 0, MAX_SEED - arguments.num_seeds - arguments.depth)
        self.device = tools.choose_device(arguments.device)
        precision = arguments.precision or PRECISIONS[self.device.type == "cuda"]
        chosen = {"device": self.device.type, "precision": precision}
        self.arguments = argparse.Namespace(**vars(arguments) | chosen)
        self.recipe = Recipe(**{name: getattr(self.arguments, name) for name in Recipe.__dataclass_fields__})
        budget_columns(arguments.length, arguments.memory_fraction)  # refuses what is out of range
        if arguments.dim % arguments.heads:
            raise UserError(f"--heads {arguments.heads} does not divide --dim {arguments.dim}. Choose another.")
        self.cases = [
            (seed, task, attention)
            for seed in range(arguments.seed, arguments.seed + arguments.num_seeds)
            for task in arguments.tasks
            for attention in arguments.attentions
        ]
        self.tasks: dict[str, dict[str, Any]] = {}
        self.results: list[Result] = []
        self.skipped: list[dict[str, Any]] = []

    def run(self, console: Console, save: Callable[[], None] = lambda: None) -> None:
        """Train all; `save` is called after each."""
        arguments, tasks = self.arguments, {}
        with progress_display(console) as progress:
            bar = progress.add_task("data", total=len(self.cases) * arguments.steps)
            for name in arguments.tasks:
                options = (arguments.length, arguments.num_expressions, arguments.seed, self.device)
                tasks[name] = create_task(name, *options)
            self.tasks = {name: task.description for name, task in tasks.items()}
            for number, (seed, name, attention) in enumerate(self.cases, start=1):
                progress.update(bar, description=f"{name}: {attention}")
                try:
                    training = Training(tasks[name], attention, self.recipe, seed, self.device)
                    self.results.append(training.run(lambda steps: progress.advance(bar, steps)))
                # the others are still trained: not causal, out of memory, no kernel
                except (UserError, RuntimeError) as error:
                    reason = "out of memory" if isinstance(error, torch.OutOfMemoryError) else first_line(error)
                    self.skipped.append({"task": name, "attention": attention, "seed": seed, "reason": reason})
                training = None  # its memory is the next one's
                progress.update(bar, completed=number * arguments.steps)
                save()
        if not self.results:
            raise UserError(f"No training was completed. {self.notes()[0]}")

    def tables(self) -> list[Table]:
        """See `result_tables`."""
        return result_tables(self.report())

    def notes(self) -> list[str]:
        """See `notes`."""
        return notes(self.report())

    def draw(self) -> Figure:
        """See `draw`."""
        return draw(self.report())

    @property
    def missing(self) -> list[str]:
        """Trainings that were not reached."""
        done = {(each.seed, each.task, each.attention) for each in self.results}
        done |= {(each["seed"], each["task"], each["attention"]) for each in self.skipped}
        cases = [case for case in self.cases if case not in done]
        return [f"{task} {attention} (seed {seed})" for seed, task, attention in cases]

    def report(self) -> dict[str, Any]:
        """Everything, for a file."""
        content = {"complete": not self.missing, **tools.provenance(self.device)}
        content |= {"settings": tools.without_paths(self.arguments), "tasks": self.tasks}
        return content | {"results": [asdict(result) for result in self.results], "skipped": self.skipped}


def read_results(path: str | Path) -> dict[str, Any]:
    """Content of a file of `--output`."""
    return read_rows(path, ("settings", "tasks", "results", "skipped"), "Give the --output of a run.")


def by_attention(content: Mapping[str, Any], task: str) -> dict[str, list[Mapping[str, Any]]]:
    """Trainings of a task by attention, the best first and those that diverged last."""
    results = [result for result in content["results"] if result["task"] == task]
    names = dict.fromkeys(result["attention"] for result in results)
    groups = {name: [result for result in results if result["attention"] == name] for name in names}

    def rank(name: str) -> float:
        metric = mean_metric(groups[name])
        return math.inf if metric is None else metric if task == "language" else -metric

    return {name: groups[name] for name in sorted(groups, key=rank)}


def mean_metric(results: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean over seeds; None where one of them diverged."""
    metrics = [result["metric"] for result in results]
    return None if None in metrics else statistics.fmean(metrics)


def as_metric(task: str, value: float | None) -> str:
    """A metric as text."""
    if value is None:
        return "diverged"
    return f"{value:.3f}" if task == "language" else f"{100 * value:.1f} %"


def result_tables(content: Mapping[str, Any]) -> list[Table]:
    """A table for each task, the best attention first."""
    tables = []
    for task in content["tasks"]:
        groups = by_attention(content, task)
        several = max((len(results) for results in groups.values()), default=1) > 1
        spread = "± over seeds" if several else "± of the data"
        headers = ("attention", "columns", "steps", METRICS[task], spread, "ms per step", "MiB")
        table = tools.new_table(f"{TITLES[task]}: {METRICS[task]} on held-out data", headers, ("attention",))
        for name, results in groups.items():
            metric, error = mean_metric(results), None
            if metric is not None and several:
                error = statistics.stdev(result["metric"] for result in results) if len(results) > 1 else None
            elif metric is not None:
                error = results[0]["standard_error"]
            peak = [result["peak_memory_mib"] for result in results]
            steps = " / ".join(str(steps) for steps in dict.fromkeys(result["steps"] for result in results))
            cells = [as_metric(task, metric), "-" if error is None else as_metric(task, error)]
            cells += [f"{1e3 * statistics.fmean(result['seconds_per_step'] for result in results):.1f}"]
            cells += ["-" if None in peak else f"{max(peak):.0f}"]
            table.add_row(name, f"{100 * results[0]['memory']:.1f} %", steps, *cells)
        for name, value in content["tasks"][task]["baselines"].items():
            table.add_row(f"({name})", "", "", as_metric(task, value), "", "", "")
        tables.append(table)
    return tables


def notes(content: Mapping[str, Any]) -> list[str]:
    """Lines on what was left out or diverged, and why."""
    lines = [f"{each['task']}: {each['attention']} left out. {each['reason']}." for each in content["skipped"]]
    diverged = [each for each in content["results"] if each["diverged_at"] is not None]
    template = "{task}: {attention} (seed {seed}) diverged at step {diverged_at}."
    lines += [template.format(**each) for each in diverged]
    return list(dict.fromkeys(lines))


def draw(content: Mapping[str, Any]) -> Figure:
    """Held-out metric against step, a panel for each task, of `Experiment.report`."""
    tasks = list(content["tasks"])
    figure = new_figure(6.6 * len(tasks), 4.2)
    for task, axes in zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0], strict=True):
        draw_task(axes, content, task)
    return figure


def draw_task(axes: Axes, content: Mapping[str, Any], task: str) -> None:
    """Draw the curves of all attentions, means over seeds with their range; baselines dashed."""
    scale = 1 if task == "language" else 100
    ends = []
    for name, results in by_attention(content, task).items():
        curves = [{point["step"]: scale * point["metric"] for point in result["curve"]} for result in results]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = [[curve[step] for curve in curves] for step in steps]
        colour = COLOURS[name]
        options = {"color": colour, "linewidth": 2.2 if name == "full" else 0.8 if colour == OTHER else 1.4}
        options |= {"marker": ATTENTION_MARKERS[name], "markersize": 3, "zorder": 2 if colour == OTHER else 3}
        label = f"{name}: {as_metric(task, mean_metric(results))}"
        axes.plot(steps, [statistics.fmean(each) for each in values], **options)
        if steps:
            ends.append((steps[-1], statistics.fmean(values[-1]), label, colour))
        if len(curves) > 1:
            low, high = [min(each) for each in values], [max(each) for each in values]
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        if mean_metric(results) is None and steps:
            axes.plot(steps[-1], statistics.fmean(values[-1]), "x", color=colour)
    lines = ((0, (5, 3)), DOTTED)
    for (name, value), line in zip(content["tasks"][task]["baselines"].items(), lines, strict=True):
        label = f"{name}: {as_metric(task, value)}"
        axes.axhline(scale * value, color=FAINT, linewidth=1, linestyle=line, label=label, zorder=0)
    unit = "" if task == "language" else " in %"
    axes.set(xlabel="step", ylabel=f"{METRICS[task]}{unit}, held out", title=TITLES[task])
    style(axes)
    # below: curves are everywhere above
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), **LEGEND | {"fontsize": 7, "ncols": 2})
    axes.figure.canvas.draw()  # limits and size of the panel are known then
    label_ends(axes, ends, 7)
