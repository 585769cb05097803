"""The results of one evaluation as a table on the screen."""

from __future__ import annotations

from rich.table import Table

from src.evaluation.published import PublishedAccuracy
from src.evaluation.results import Results


def accuracy_text(mean: float, std: float | None, num_seeds: int) -> str:
    """A percentage as shown in tables: `"81.69"`, or `"78.40 ± 0.35 (5 seeds)"` over several seeds."""
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f} ({num_seeds} seeds)"


def percent_text(fraction: float | None) -> str:
    """A fraction as shown in tables: 1/32 as `"3.1 %"`, 1 as `"100 %"`, None as `"-"`."""
    if fraction is None:
        return "-"
    percent = 100.0 * fraction
    return f"{percent:.0f} %" if percent >= 99.95 else f"{percent:.2g} %"


def results_table(results: Results, published: PublishedAccuracy | None) -> Table:
    """The table that ends one run, for `rich.print`: one line per result.

    Args:
        results: to write.
        published: what they are compared with, such as `results.published`; None leaves the line out.

    Returns:
        Table of two columns without header.
    """
    data = results.data
    number = f"{data['num_images']:,}" if results.complete else f"{results.num_evaluated:,} of {data['num_images']:,}"
    table = Table(title=f"{number} images of {data['split']}", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    if results.skipped is not None and results.skipped["number"]:
        table.add_row("left out", f"{results.skipped['number']:,} that cannot be decoded")
    table.add_row("model", results.model)
    table.add_row("attention", results.attention or "its own")
    if results.top1 is None:
        table.add_row("accuracy", "left out: the images have no labels")
    else:
        top1 = accuracy_text(results.top1, results.top1_std, len(results.top1_per_seed))
        table.add_row("top-1", f"{top1} %" if results.top1_std is None else top1)
    if published is not None:
        difference = published.difference(results.top1)
        table.add_row("published top-1", f"{published.text} % ({difference:+.2f} here): {published.source}")
    if results.top1 is not None:
        table.add_row("top-5", f"{results.top5:.2f} %")
        table.add_row("loss", f"{results.loss:.4f}")
    table.add_row("images/s", f"{results.images_per_second:,.1f}")
    if results.attention_memory is not None:
        table.add_row("attention columns", f"{percent_text(results.attention_memory)} of full")
    if results.attention_operations is not None:
        table.add_row("its operations", f"{percent_text(results.attention_operations)} of full")
        table.add_row("its peak memory", f"{results.attention_peak_mib:.1f} MiB for one image")
    return table
