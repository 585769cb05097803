"""Growth of time and memory with the sequence length: `scripts/experiment_scaling.py`."""

from __future__ import annotations

import argparse
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from scatterbrain.errors import UserError
from src.analysis.benchmark.report import BASELINE, cell, sizes_text
from src.analysis.tools import digits, new_table, print_report, save_figure
from src.evaluation.colours import ATTENTION_MARKERS
from src.evaluation.figure_style import COLOURS, DOTTED, FAINT, INK, LEGEND, new_figure, style
from src.evaluation.results import read_json

ATTENTION_LINES = ("sblocal", "pairedcluster", "cluster", "local", "performer")
FIT_FROM = 1024
QUANTITIES = {"milliseconds": "time of one sequence, ms", "mebibytes": "memory of one sequence, MiB"}
REMEDY = "Give --inputs what benchmark_attention.py has written by --output."


Rows = dict[int, dict[str, Any]]  # by length


@dataclass(frozen=True)
class Point:
    """One attention at one length."""

    length: int  # number of tokens N
    milliseconds: float  # time of one sequence of the batch, forward
    ratio: float  # of that time to SDPA's
    mebibytes: float  # peak of what the call allocates, over the batch


@dataclass(frozen=True)
class Line:
    """One attention over all lengths, with the same sizes at each."""

    name: str  # of the attention, or SDPA
    sizes: dict[str, int]  # by the names of their options; empty for full attention
    clock: str  # `device` or `call`, see `scripts/experiment_scaling.py`
    points: tuple[Point, ...]  # from the shortest length to the longest

    def exponent(self, quantity: str, fit_from: int = FIT_FROM) -> float | None:
        """Slope of the logarithm of one of `QUANTITIES` against that of N, by least squares over N >= `fit_from`.

        It is 1 where the quantity is linear in N, 2 where it is quadratic; None with fewer than two lengths.
        """
        chosen = [point for point in self.points if point.length >= fit_from]
        if len(chosen) < 2:
            return None
        x = [math.log(point.length) for point in chosen]
        return float(np.polyfit(x, [math.log(getattr(point, quantity)) for point in chosen], 1)[0])

    def last_step(self) -> float | None:
        """Exponent of the time from the longest length but one to the longest; None with a single length."""
        return self.exponent("milliseconds", self.points[-2].length) if len(self.points) > 1 else None

    def faster_from(self) -> int | None:
        """Shortest length from which on it is faster than SDPA at every length; None where it is not at the longest."""
        faster = [*itertools.takewhile(lambda point: point.ratio < 1, reversed(self.points))]
        return faster[-1].length if faster else None


@dataclass(frozen=True)
class Scaling:
    """One run of the benchmark."""

    device: str  # `cpu` or `cuda`
    title: str  # of device and machine
    growth_length: int  # length that the sizes fit
    batches: dict[int, int]  # number of sequences of a call, by length
    lines: tuple[Line, ...]  # SDPA first


def read_scaling(path: str | os.PathLike[str], attentions: Sequence[str] = ATTENTION_LINES) -> Scaling:
    """SDPA and the attentions in the forward pass, of a file of benchmark_attention.py; what it lacks is left out.

    Raises:
        UserError: there is no such file, it holds something else, or no forward pass of SDPA and an attention.
    """
    content = read_json(path, REMEDY)
    try:
        settings, machine = content["settings"], content["machine"]
        growth_length = settings["growth_length"]
        batch, lengths = settings["batch"], settings["lengths"]
        batches = dict(zip(lengths, batch * len(lengths) if len(batch) == 1 else batch, strict=True))
        rows = [row for row in content["results"] if row["pass"] == "forward"]
        baseline = {row["length"]: row for row in rows if row["name"] == BASELINE}
        found = {BASELINE: baseline} | {name: _constant_sizes(rows, name, growth_length) for name in attentions}
        if not baseline or not any(found[name] for name in attentions):
            raise UserError(
                f"{os.fspath(path)} has no forward pass of SDPA and one of {', '.join(attentions)}. Run "
                "benchmark_attention.py with --passes forward and these --attentions."
            )
        lines = tuple(_line(name, by_length, baseline, batches) for name, by_length in found.items() if by_length)
        device = settings["device"]
        maker = machine["gpu"] if device == "cuda" else f"{machine['processor']}, {machine['threads']} threads"
        title = f"{'GPU' if device == 'cuda' else 'CPU'}: {maker}, {settings['dtype']}"
        return Scaling(device, title, growth_length, {x: batches[x] for x in sorted(baseline)}, lines)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{os.fspath(path)} is not a file of benchmark_attention.py. {REMEDY}") from error


def _constant_sizes(rows: Sequence[dict[str, Any]], name: str, growth_length: int) -> Rows:
    """Rows of an attention, by length, whose sizes are those that fit `growth_length`."""
    grown = [row for row in rows if row["kind"] == "growth" and row["name"] == f"{name} as at {growth_length}"]
    own = [row for row in rows if row["kind"] == "attention" and row["name"] == name]
    at_home = [row for row in own if not row["sizes"] or row["length"] == growth_length]
    return {row["length"]: row for row in sorted((*grown, *at_home), key=lambda row: row["length"])}


def _line(name: str, by_length: Rows, baseline: Rows, batches: dict[int, int]) -> Line:
    """The points of one attention, all of them by the same clock."""
    pairs = [(row, baseline[length]) for length, row in sorted(by_length.items())]
    device = all(item["device_milliseconds"] is not None for pair in pairs for item in pair)
    points = []
    for row, full in pairs:
        batch = batches[row["length"]]
        milliseconds = row["device_milliseconds" if device else "milliseconds"]
        ratio = milliseconds / full["device_milliseconds"] if device else row["ratio_to_sdpa"]
        points.append(Point(row["length"], milliseconds / batch, ratio, row["temporary_bytes"] / 2**20 / batch))
    return Line(name, pairs[0][0]["sizes"], "device" if device else "call", tuple(points))


def point_table(scaling: Scaling) -> Table:
    """Table of time, its ratio to SDPA and memory of each attention at each length."""
    headers = ("attention", "N", "ms", "time/SDPA", "MiB")
    table = new_table(f"{scaling.title}; forward, one sequence", headers, ("attention",))
    of_each = ", ".join(f"{batch} at N = {length:,}" for length, batch in scaling.batches.items())
    batches = {str(batch) for batch in scaling.batches.values()}
    batch = of_each if len(batches) > 1 else batches.pop()
    table.caption = f"sizes as at N = {scaling.growth_length}, whatever N is; batch {batch}"
    for line in scaling.lines:
        for point in line.points:
            numbers = (digits(point.milliseconds), f"{point.ratio:.3f}", digits(point.mebibytes))
            table.add_row(line.name if point is line.points[0] else "", f"{point.length:,}", *numbers)
        table.add_section()
    return table


def growth_table(scaling: Scaling, fit_from: int = FIT_FROM) -> Table:
    """Table of the exponents of each attention, and the length from which on it is faster than SDPA."""
    headers = ("attention", "sizes", "clock", "time ~ N^", "last step ~ N^", "memory ~ N^", "faster than SDPA")
    left = [header for header in headers if "~" not in header]
    table = new_table(f"{scaling.title}; growth with N", headers, left)
    lengths = ", ".join(f"{length:,}" for length in scaling.batches if length >= fit_from)
    table.caption = (
        f"sizes as at N = {scaling.growth_length}, whatever N is (W keys in the window, M features, C clusters of "
        f"keys, Q of queries)\nexponents: of N, fitted over N = {lengths}; last step: over the two longest; 1 is "
        "linear, 2 quadratic"
    )
    for line in scaling.lines:
        time, memory = (line.exponent(quantity, fit_from) for quantity in QUANTITIES)
        first = line.faster_from()
        never = f"not up to N = {line.points[-1].length:,}"
        faster = "-" if line.name == BASELINE else f"from N = {first:,} on" if first else never
        exponents = (cell(exponent, "{:.2f}".format) for exponent in (time, line.last_step(), memory))
        table.add_row(line.name, sizes_text(line.sizes) or "-", line.clock, *exponents, faster)
    return table


def draw(scalings: Sequence[Scaling]) -> Figure:
    """Time and memory against N, a row of panels for each file.

    Faint guides have the slopes 1 and 2. A dashed line is by the clock of the call where SDPA's is by the device's.
    """
    figure = new_figure(10, 0.6 + 3.5 * len(scalings))
    grid = figure.subplots(len(scalings), len(QUANTITIES), squeeze=False)
    for scaling, panels in zip(scalings, grid, strict=True):
        titles = (scaling.title, f"sizes as at N = {scaling.growth_length:,}")
        for axes, (quantity, label), title in zip(panels, QUANTITIES.items(), titles, strict=True):
            draw_panel(axes, scaling, quantity)
            axes.set_title(title, loc="left", fontsize=9, color=INK)
            axes.set_ylabel(label)
    for axes in grid[-1]:
        axes.set_xlabel("sequence length N")
    pairs = [pair for panels in grid for pair in zip(*panels[0].get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in pairs}
    options = {"loc": "outside lower center", **LEGEND, "fontsize": 8.5, "ncols": len(handles)}
    figure.legend(handles.values(), handles.keys(), **options)
    return figure


def draw_panel(axes: Axes, scaling: Scaling, quantity: str) -> None:
    """Draw one quantity against N, with the guides."""
    for line in scaling.lines:
        bold = line.name in (BASELINE, "sblocal", "pairedcluster")
        dashed = line.clock != scaling.lines[0].clock and quantity == "milliseconds"
        look = {"color": COLOURS.get(line.name, "black"), "linestyle": "--" if dashed else "-", "markersize": 4}
        look |= {"linewidth": 2 if bold else 1.2, "marker": ATTENTION_MARKERS.get(line.name, "o"), "zorder": 3}
        points = ((point.length, getattr(point, quantity)) for point in line.points)
        axes.plot(*zip(*points, strict=True), label=line.name, **look)
    axes.set(xscale="log", yscale="log")
    style(axes)
    lengths = list(scaling.batches)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    draw_guides(axes, lengths)


def draw_guides(axes: Axes, lengths: Sequence[int]) -> None:
    """Draw faint lines of slope 1 and 2 through the lower left corner, named at their ends; the limits stay."""
    low, high = axes.get_ylim()
    limits = axes.get_xlim()
    first, last = lengths[0], lengths[-1]
    for slope in (1, 2):
        # as far as the panel goes
        end = min(last, first * (0.9 * high / low) ** (1 / slope))
        options = {"color": FAINT, "linewidth": 0.8, "linestyle": DOTTED, "zorder": 1}
        axes.plot([first, end], [low, low * (end / first) ** slope], **options)
        at = (end, low * (end / first) ** slope)
        text = {"xytext": (3, -3), "textcoords": "offset points", "fontsize": 8, "color": FAINT, "va": "top"}
        axes.annotate(f"N{'²' if slope == 2 else ''}", at, **text)
    axes.set(ylim=(low, high), xlim=limits)


def run(arguments: argparse.Namespace) -> None:
    """Read, print and draw what the options of `scripts/experiment_scaling.py` name."""
    scalings = [read_scaling(path, arguments.attentions) for path in arguments.inputs]
    for scaling in scalings:
        print_report([point_table(scaling), growth_table(scaling, arguments.fit_from)])
    if arguments.figure is not None:
        save_figure(draw(scalings), arguments.figure)
