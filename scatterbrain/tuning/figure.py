"""Heat map of a report by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scatterbrain.tuning.calls import CallReport, fraction, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heat_map(model: str, calls: Sequence[CallReport]) -> Figure:
    """Figure of the errors: calls by methods and budgets, by the logarithm from 0.01 to 1.

    Args:
        model: class of the model.
        calls: its calls.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figure needs matplotlib: pip install matplotlib") from error
    columns = list(dict.fromkeys((m.method, m.budget) for call in calls for m in call.measurements))
    errors = [
        [{(m.method, m.budget): m.error for m in call.measurements}.get(column) for column in columns] for call in calls
    ]
    shown = [[float("nan") if error is None else max(error, 1e-9) for error in row] for row in errors]
    size = (2.5 + 0.42 * len(columns), 1.6 + 0.26 * len(calls))
    figure = Figure(figsize=size, layout="constrained")
    axes: Any = figure.subplots()
    image = axes.imshow(shown, norm=LogNorm(0.01, 1, clip=True), cmap="RdYlBu_r", aspect="auto")
    for i, row in enumerate(errors):
        for j, error in enumerate(row):
            text = "-" if error is None else number(error)
            colour = "white" if error is not None and not 0.02 < error < 0.6 else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=6.5, color=colour)
    labels = [method if budget is None else f"{method} {fraction(budget)}" for method, budget in columns]
    axes.set_xticks(range(len(columns)), labels, rotation=45, ha="right", fontsize=7)
    axes.set_yticks(range(len(calls)), [call.label for call in calls], fontsize=7)
    axes.set_title(f"{model}: relative error of the attention output", fontsize=9)
    figure.colorbar(image, ax=axes, label="relative error", pad=0.01)
    return figure
