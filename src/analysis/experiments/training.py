"""A language model of bytes and ListOps, trained from scratch with each attention: `scripts/experiment_training.py`."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn

from scatterbrain.attention import attention_memory, create_attention
from scatterbrain.errors import UserError, check_whole_number
from scatterbrain.ops.common.budget import budget_columns
from src.analysis import tools
from src.analysis.plots.style import COLOURS, DOTTED, FAINT, LEGEND, new_figure, style
from src.analysis.records import read_rows
from src.datamodules.sequence_tasks import Task, create_task
from src.models.sequence_network import Network
from src.tasks.device_time import seconds_now
from src.tasks.options import MAX_SEED
from src.utils.progress import progress_display
from src.utils.text import first_line

TITLES = {"language": "Language: the standard library's sources", "listops": "ListOps"}
METRICS = {"language": "bits per byte", "listops": "accuracy"}
COMPARED = (
    *("full", "local", "performer", "sblocal", "smyrf", "sbsmyrf"),
    *("cluster", "sbcluster", "pairedcluster", "reformer"),
)
PRECISIONS = ("float32", "bfloat16")
EVALUATION_BATCHES = 4  # training batches that an evaluation takes at a time
WARM_UP = 1 / 20  # of the training, in which the learning rate rises
WEIGHT_DECAY = 0.01
LARGEST_GRADIENT = 1.0
LEGEND_COLUMNS = 2


@dataclass(frozen=True)
class Recipe:
    """How a network is built and trained, whatever its attention: options of the script."""

    steps: int = 1500
    batch_size: int = 32
    length: int = 1024
    memory_fraction: float = 1 / 16
    depth: int = 4
    dim: int = 128
    heads: int = 2
    lr: float = 1e-3
    eval_every: int = 150
    precision: str = "float32"


@dataclass
class Result:
    """A training; without first passes, which compile, and evaluations in its seconds and memory."""

    task: str
    attention: str
    seed: int  # of weights, batches and features
    sizes: dict[str, int]  # of the attention
    memory: float  # over that of full attention's matrix
    steps: int
    diverged_at: int | None  # the first step whose loss is not finite, with which the training ends
    curve: list[dict[str, float]]  # step, metric on held-out data, mean train_loss (nats) since the point before
    metric: float | None  # the last one
    standard_error: float | None  # of the metric, over held-out samples
    seconds_per_step: float
    peak_memory_mib: float | None  # of the device, data and all; None on the CPU


def create_network(task: Task, attention: str, recipe: Recipe, seed: int) -> Network:
    """The network of an attention; each block has its own seed. `UserError` where the attention cannot do the task."""
    # one that has no such option is not refused where it is not needed
    options = {"memory_fraction": recipe.memory_fraction, "causal": True if task.causal else None}
    length, dim, heads = recipe.length, recipe.dim, recipe.heads
    seeds = range(seed, seed + recipe.depth)
    attentions = [create_attention(attention, length, dim // heads, seed=each, **options) for each in seeds]
    return Network(attentions, task.vocabulary, task.num_outputs, length, dim, heads, task.causal, seed)


def learning_rate(progress: float, highest: float) -> float:
    """Learning rate after a part of the training in [0, 1]: linear warm-up to `highest`, then half a cosine to zero."""
    if progress < WARM_UP:
        return highest * progress / WARM_UP
    return highest * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))))


class Training:
    """The training of one network; the seed is that of weights, batches and features."""

    def __init__(self, task: Task, attention: str, recipe: Recipe, seed: int, device: torch.device) -> None:
        self.task, self.attention, self.recipe, self.seed, self.device = task, attention, recipe, seed, device
        self.network = create_network(task, attention, recipe, seed).to(device).train()
        self.order = task.draw_order(recipe.steps, recipe.batch_size, seed)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=recipe.lr, weight_decay=WEIGHT_DECAY, fused=device.type == "cuda" or None
        )
        self.losses = torch.zeros(recipe.steps, device=device)

    def autocast(self) -> torch.autocast:
        """Context of the recipe's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16")

    def backward(self, index: torch.Tensor) -> torch.Tensor:
        """Loss of a batch, and its gradients."""
        tokens, lengths, targets = self.task.batch(index)
        with self.autocast():
            loss = self.task.loss(self.network(tokens, lengths), targets)
        loss.backward()
        return loss.detach()

    def step(self, number: int, progress: float) -> None:
        """Do one update without synchronising: the loss stays on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(progress, self.recipe.lr)
        self.optimizer.zero_grad()
        self.losses[number] = self.backward(self.order[number])
        nn.utils.clip_grad_norm_(self.network.parameters(), LARGEST_GRADIENT)
        self.optimizer.step()

    @torch.no_grad()
    def held_out_scores(self, start: int) -> torch.Tensor:
        """Scores of some held-out samples, from one on."""
        size = EVALUATION_BATCHES * self.recipe.batch_size
        tokens, lengths, targets = self.task.held_out(slice(start, start + size))
        self.network.eval()
        with self.autocast():
            logits = self.network(tokens, lengths)
        self.network.train()
        return self.task.score(logits, targets)

    def evaluate(self) -> tuple[float, float]:
        """Metric on held-out data, and its standard error."""
        size = EVALUATION_BATCHES * self.recipe.batch_size
        every = torch.cat([self.held_out_scores(start) for start in range(0, self.task.num_held_out, size)]).double()
        error = every.std().item() / len(every) ** 0.5 if len(every) > 1 else 0.0
        return every.mean().item(), error

    def run(self, advance: Callable[[int], None] = lambda steps: None) -> Result:
        """Train to the end; `advance` is called with the number of steps done."""
        recipe, device = self.recipe, self.device
        on_cuda = device.type == "cuda"
        self.backward(self.order[0])  # compiles
        self.optimizer.zero_grad()
        self.held_out_scores(0)
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        curve: list[dict[str, float]] = []
        metric = error = diverged_at = None
        peak, spent, done = 0, 0.0, 0
        since = seconds_now(device)
        while done < recipe.steps and diverged_at is None:
            self.step(done, (done + 1) / recipe.steps)
            done += 1
            advance(1)
            if done % recipe.eval_every and done < recipe.steps:
                continue
            spent += seconds_now(device) - since
            if on_cuda:
                peak = max(peak, torch.cuda.max_memory_allocated(device))
            first = int(curve[-1]["step"]) if curve else 0
            losses = self.losses[first:done]
            finite = losses.isfinite()
            metric, error = self.evaluate() if finite.all() else (math.nan, None)
            if math.isfinite(metric):
                curve.append({"step": done, "metric": metric, "train_loss": losses.mean().item()})
            else:
                metric = error = None
                diverged_at = done if finite.all() else first + int((~finite).int().argmax()) + 1
            if on_cuda:
                torch.cuda.reset_peak_memory_stats(device)
            since = seconds_now(device)
        attention = self.network.blocks[0].attention
        return Result(
            task=self.task.name,
            attention=self.attention,
            seed=self.seed,
            sizes=attention.sizes(),
            memory=attention_memory(attention, recipe.length),
            steps=done,
            diverged_at=diverged_at,
            curve=curve,
            metric=metric,
            standard_error=error,
            seconds_per_step=spent / done,
            peak_memory_mib=peak / 2**20 if on_cuda else None,
        )


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
        return {
            "complete": not self.missing,
            **tools.provenance(self.device),
            "settings": tools.without_paths(self.arguments),
            "tasks": self.tasks,
            "results": [asdict(result) for result in self.results],
            "skipped": self.skipped,
        }


def read_results(path: str | Path) -> dict[str, Any]:
    """Content of a file of `--output`."""
    return read_rows(path, ("settings", "tasks", "results", "skipped"), "Give the --output of a run.")


def by_attention(content: Mapping[str, Any], task: str) -> dict[str, list[Mapping[str, Any]]]:
    """Trainings of a task by attention, the best first and those that diverged last."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in content["results"]:
        if result["task"] == task:
            groups.setdefault(result["attention"], []).append(result)

    def rank(name: str) -> float:
        metric = mean_metric(groups[name])
        if metric is None:
            return math.inf
        return metric if task == "language" else -metric

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
        headers = ("attention", "memory", "steps", METRICS[task], spread, "ms per step", "MiB")
        table = tools.new_table(f"{TITLES[task]}: {METRICS[task]} on held-out data", headers, ("attention",))
        for name, results in groups.items():
            metric, error = mean_metric(results), None
            if metric is not None and several:
                error = statistics.stdev(result["metric"] for result in results) if len(results) > 1 else None
            elif metric is not None:
                error = results[0]["standard_error"]
            peak = [result["peak_memory_mib"] for result in results]
            table.add_row(
                name,
                f"{100 * results[0]['memory']:.1f} %",
                " / ".join(str(steps) for steps in dict.fromkeys(result["steps"] for result in results)),
                as_metric(task, metric),
                "-" if error is None else as_metric(task, error),
                f"{1e3 * statistics.fmean(result['seconds_per_step'] for result in results):.1f}",
                "-" if None in peak else f"{max(peak):.0f}",
            )
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
    most = max(len(by_attention(content, task)) for task in tasks)
    rows = -(-(most + 2) // LEGEND_COLUMNS)  # and the baselines
    figure = new_figure(5.6 * len(tasks), 3.6 + 0.17 * rows)
    for task, axes in zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0], strict=True):
        draw_task(axes, content, task)
    return figure


def draw_task(axes: Axes, content: Mapping[str, Any], task: str) -> None:
    """Draw the curves of all attentions, means over seeds with their range; baselines dashed."""
    scale = 1 if task == "language" else 100
    for name, results in by_attention(content, task).items():
        curves = [{point["step"]: scale * point["metric"] for point in result["curve"]} for result in results]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = [[curve[step] for curve in curves] for step in steps]
        colour = COLOURS[name]
        options = {"color": colour, "linewidth": 2.2 if name == "full" else 1.4}
        label = f"{name}: {as_metric(task, mean_metric(results))}"
        axes.plot(steps, [statistics.fmean(each) for each in values], label=label, **options)
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
    place = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.13)}  # below: curves are everywhere above
    axes.legend(**LEGEND | {"fontsize": 7, "ncols": LEGEND_COLUMNS} | place)
