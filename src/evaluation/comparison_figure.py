"""A comparison as a figure: one line per run, one panel per quantity."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from src.evaluation.colours import ATTENTION_COLOURS, OTHER_COLOUR
from src.evaluation.comparison import Comparison, ComparisonRow
from src.evaluation.figure_style import EDGE, FAINT, GRID, INK, new_figure
from src.evaluation.results_table import percent_text

_LABEL_WIDTH = 30  # characters


def comparison_figure(comparison: Comparison) -> Figure:
    """The comparison as a figure: one line per run, one panel per quantity.

    Panels are top-1 (bars: standard deviation over seeds; bands: sampling error of the images; diamonds: published),
    agreement with full attention, images per second, and attention columns; those without any value, such as accuracy
    without labels, are left out.

    Args:
        comparison: the runs.

    Returns:
        Figure on an Agg canvas; pyplot is not involved.
    """
    rows = comparison.rows
    panels = [] if comparison.unlabelled else [_draw_top1]
    if any(row.agreement is not None for row in rows):
        panels.append(_draw_agreement)
    panels.append(_draw_speed)
    if any(row.attention_memory is not None for row in rows):
        panels.append(_draw_columns)
    labels = [_escape_dollars(textwrap.fill(row.label, _LABEL_WIDTH)) for row in rows]
    lines = sum(label.count("\n") + 1 for label in labels)

    header, footer = 0.85, 0.75  # inches
    height = header + footer + max(0.8, 0.42 * len(rows) + 0.14 * (lines - len(rows)))
    width = 3.0 + 2.9 * len(panels)
    figure = new_figure(width, height, dpi=150, layout=None)
    figure.set_layout_engine("constrained", rect=(0.008, 0, 0.984, 1 - header / height), wspace=0.07)
    figure.text(
        0.16 / width,
        1 - 0.18 / height,
        _escape_dollars(f"Attention of the token stages compared: {comparison.model_text}"),
        fontsize=14,
        fontweight="bold",
        color=INK,
        va="top",
    )
    conditions = textwrap.shorten(" · ".join(comparison.conditions), int(13.5 * width), placeholder=" …")
    figure.text(0.16 / width, 1 - 0.50 / height, _escape_dollars(conditions), fontsize=9.5, color=FAINT, va="top")

    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for draw, axes in zip(panels, all_axes, strict=True):
        draw(axes, rows)
        axes.set_axisbelow(True)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(EDGE)
        axes.tick_params(axis="x", labelsize=9, color=EDGE, labelcolor=FAINT)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.label.set(fontsize=10, color=INK)
        for number in range(0, len(rows), 2):
            axes.axhspan(number - 0.5, number + 0.5, color="#f6f7f9", zorder=0)
    all_axes[0].set_yticks(range(len(rows)), labels, fontsize=10.5, color=INK)
    all_axes[0].set_ylim(len(rows) - 0.5, -0.5)  # the first run on top
    return figure


def _escape_dollars(text: str) -> str:
    """Text that Matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")


def _colour(row: ComparisonRow) -> str:
    return ATTENTION_COLOURS.get(row.attention or "", OTHER_COLOUR)


def _write_values(axes: Axes, texts: Sequence[str]) -> None:
    """Write a column of values right of the panel."""
    for number, text in enumerate(texts):
        axes.text(1.03, number, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9.5, color=INK)


def _set_percent_limits(axes: Axes, values: Sequence[float]) -> None:
    """Set limits around percentages, with a margin for the marks, and at least 2 points wide."""
    low, high = min(values), max(values)
    margin = max(0.12 * (high - low), 0.25)
    low, high = low - margin, high + margin
    if (lack := 2.0 - (high - low)) > 0:
        low, high = low - lack / 2, high + lack / 2
    axes.set_xlim(low, high)
    # The limits may exceed 100 to fit the marks, the ticks may not.
    ticks = MaxNLocator(nbins=4, steps=[1, 2, 5, 10]).tick_values(low, high)
    axes.set_xticks([tick for tick in ticks if low <= tick <= min(high, 100.0)])


def _draw_top1(axes: Axes, rows: Sequence[ComparisonRow]) -> None:
    values: list[float] = []
    texts = []
    full = [row.top1 for row in rows if row.attention == "full" and row.top1 is not None]
    if len(full) == 1 and len(rows) > 1:
        axes.axvline(
            full[0], color=ATTENTION_COLOURS["full"], linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.6, zorder=1
        )
    for number, row in enumerate(rows):
        if row.top1 is None:
            texts.append("-")
            continue
        sampling = row.sampling_error or 0.0
        widest = max(row.top1_std or 0.0, sampling)
        values += [row.top1 - widest, row.top1 + widest]
        axes.plot([row.top1 - sampling, row.top1 + sampling], [number] * 2, color=_colour(row), linewidth=7, alpha=0.25)
        if row.published is not None:
            ends = sorted({row.published.low, row.published.high})
            values += ends
            # Below the measured mark, so that both are visible where they coincide.
            below = [number + 0.26] * len(ends)
            axes.plot(ends, below, "D-", color=FAINT, markersize=4.2, markerfacecolor="white", linewidth=0.9)
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
    axes.set_xlabel("top-1 accuracy, %" + (" (◇ published)" if published else "") + "\nbar: seeds, band: images")


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


def _draw_columns(axes: Axes, rows: Sequence[ComparisonRow]) -> None:
    values = [row.attention_memory for row in rows if row.attention_memory]
    axes.set_xscale("log")
    low = min([*(100 * value for value in values), 1.0]) * 0.6
    high = max([*(100 * value for value in values), 100.0]) * 1.7
    axes.set_xlim(low, high)
    for number, row in enumerate(rows):
        if row.attention_memory:  # zero has no place on a logarithmic axis
            percent = 100 * row.attention_memory
            axes.plot([low, percent], [number, number], color=_colour(row), linewidth=2, zorder=2)
            axes.plot(percent, number, "o", color=_colour(row), markersize=8, zorder=3)
    decades = [10.0**power for power in range(-4, 5) if low <= 10.0**power <= high]
    axes.set_xticks(decades, [f"{decade:g}" for decade in decades])
    axes.xaxis.set_minor_locator(NullLocator())
    _write_values(axes, ["-" if row.attention_memory is None else percent_text(row.attention_memory) for row in rows])
    axes.set_xlabel("attention columns, % of full")
