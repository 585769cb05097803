"""Figure of the results of measure.py: errors of the layers, and what each network is for, against the budget.

Whisper's word error rate is cut off at 104 %: a network that repeats itself has more errors than words.

    python experiments/pretrained/figures.py --inputs dinov2.json whisper.json minilm.json --figure pretrained.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # src is not installed: find it from any folder

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scatterbrain.errors import UserError
from src.analysis.tools import Parser, run_tool, save_figure
from src.evaluation.colours import ATTENTION_MARKERS
from src.evaluation.figure_style import COLOURS, DOTTED, FAINT, LEGEND, new_figure, style

Content = Mapping[str, Any]
# What each network is for: key of the results, label, limits of the axis.
METRICS = {
    "dinov2": ("correlation", "correlation of the maps", (-0.1, 1.02)),
    "whisper": ("word_error_rate", "word error rate, %", (-4, 104)),
    "minilm": ("cosine", "cosine of the embeddings", (0, 1.02)),
}


def read(path: str) -> Content:
    """A file of results.

    Raises:
        UserError: it is none.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["network"] in METRICS and content["results"] and content["layers"]:
            return content
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} holds no results of experiments/pretrained/measure.py. Make them with --output.")


def methods(content: Content) -> list[str]:
    """Names of the methods, in their order, without full attention and plans."""
    return list(dict.fromkeys(row["method"] for row in content["results"] if row["budget"] is not None))


def title(content: Content) -> str:
    """Network and number of tokens."""
    names = {"dinov2": "DINOv2-small", "whisper": "Whisper tiny.en", "minilm": "MiniLM-L6"}
    return f"{names[content['network']]}, {content['num_tokens']:,} tokens"


def draw(contents: Sequence[Content]) -> Figure:
    """Layer error above, the network's own metric below, against the budget: a column for each file."""
    figure = new_figure(1 + 3 * len(contents), 5.6)
    grid = figure.subplots(2, len(contents), squeeze=False)
    for content, (above, below) in zip(contents, grid.T, strict=True):
        metric, label, limits = METRICS[content["network"]]
        for name in methods(content):
            rows = [row for row in content["results"] if row["method"] == name]
            budgets = [row["budget"] for row in rows]
            width = 2.2 if name in ("sbcluster", "sbadaptive") else 1.2
            line = {"color": COLOURS[name], "marker": ATTENTION_MARKERS[name], "markersize": 3.5, "linewidth": width}
            line["label"] = name
            above.plot(budgets, [row["layer_error"] for row in rows], **line)
            below.plot(budgets, [min(row[metric], limits[1]) for row in rows], **line)
        full = content["results"][0]
        below.axhline(full[metric], color=FAINT, linestyle=DOTTED, linewidth=1)
        above.set(ylabel="error of a layer's output", ylim=(0, 1.3), title=title(content))
        below.set(ylabel=label, ylim=limits, xlabel="share of the columns")
        for axes in (above, below):
            style(axes)
            axes.set_xscale("log", base=2)
            axes.set_xticks(budgets, [f"1/{round(1 / each)}" for each in budgets])
            axes.minorticks_off()
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), **LEGEND)
    return figure


def draw_layers(contents: Sequence[Content], budget: float) -> Figure:
    """Error of each layer and method at one budget, a panel for each file."""
    depths = [1 + max(row["layer"] for row in content["layers"]) for content in contents]
    figure = new_figure(2 + 0.45 * sum(depths), 3.2)
    panels = figure.subplots(1, len(contents), squeeze=False, width_ratios=depths)[0]
    for content, axes, depth in zip(contents, panels, depths, strict=True):
        names = methods(content)
        values = np.full((len(names), depth), np.nan)
        for row in content["layers"]:
            if row["budget"] == budget:
                values[names.index(row["method"]), row["layer"]] = row["error"]
        draw_errors(axes, values)
        axes.set_xticks(range(depth))
        axes.set_yticks(range(len(names)), names if axes is panels[0] else [""] * len(names))
        axes.set(title=title(content), xlabel="layer")
        axes.tick_params(labelsize=8, length=0)
        axes.title.set_fontsize(9)
        axes.xaxis.label.set_fontsize(9)
    return figure


def draw_errors(axes: Axes, values: np.ndarray) -> None:
    """Draw a heat map of errors, with the numbers."""
    axes.imshow(values, cmap="YlOrRd", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text = f"{value:.2f}".removeprefix("0")
        colour = "white" if value > 0.6 else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument(
        "--inputs", nargs="+", required=True, metavar="FILE", help="of measure.py, one for each network"
    )
    parser.add("figure", required=True)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Read and draw."""
    save_figure(draw([read(path) for path in arguments.inputs]), arguments.figure)


main = partial(run_tool, build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
