"""A comparison as a table on the screen and as a Markdown document."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from src.evaluation.comparison import Comparison
from src.evaluation.results_table import accuracy_text, percent_text


def _columns(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """Heading and cells of every column that has an entry, the label first."""
    rows = comparison.rows

    def cells(name: str, template: str) -> list[str]:
        values = [getattr(row, name) for row in rows]
        return ["-" if value is None else template.format(value) for value in values]

    columns = [
        ("attention", [row.label for row in rows]),
        ("images", cells("num_images", "{:,}") if len({row.num_images for row in rows}) > 1 else ["-"] * len(rows)),
        (
            "top-1",
            ["-" if row.top1 is None else accuracy_text(row.top1, row.top1_std, row.num_seeds) for row in rows],
        ),
        ("to full", cells("top1_difference", "{:+.2f}")),
        ("published", ["-" if row.published is None else row.published.text for row in rows]),
        ("top-5", cells("top5", "{:.2f}")),
        ("agreement", cells("agreement", "{:.2f}")),
        ("images/s", cells("images_per_second", "{:,.1f}")),
        ("speed-up", cells("speedup", "{:.2f}x")),
        ("attention columns", [percent_text(row.attention_memory) for row in rows]),
        ("operations", [percent_text(row.attention_operations) for row in rows]),
        ("MiB", cells("attention_peak_mib", "{:.1f}")),
    ]
    return [(heading, column) for heading, column in columns if any(cell != "-" for cell in column)]


_NO_LABELS = "accuracy is left out: the images have no labels"
_NOTES = {
    "top-1": "top-1, top-5: accuracy in percent, mean (± sample standard deviation) over seeds of the random features",
    "to full": "to full: points of top-1 above the run with full attention",
    "published": "published: top-1 on the whole ImageNet validation set",
    "agreement": "agreement: percent of images given the same first class as with full attention, with the first seed",
    "speed-up": "speed-up: images/s over those with full attention",
    "attention columns": "attention columns: of the attention matrix of both token stages, relative to all of them",
    "operations": "operations: of the attention's matrix products in both token stages, relative to full attention",
    "MiB": "MiB: peak memory of a call of the attention for one image, its output included, in the larger stage",
}


def comparison_table(comparison: Comparison) -> Table:
    """The comparison for the screen, for `rich.print`.

    Args:
        comparison: the runs.

    Returns:
        Table with one line per run; columns without any entry are left out.
    """
    columns = _columns(comparison)
    table = Table(title=escape(f"{comparison.model_text}: {', '.join(comparison.conditions)}"))
    if comparison.unlabelled:
        table.caption = _NO_LABELS
    for number, (heading, _) in enumerate(columns):
        # the longest heading on two lines: the screen is narrower than a file
        heading = heading.replace("attention columns", "attention\ncolumns")
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
        f"# Attention of the token stages compared: {comparison.model_text}",
        "",
        ", ".join(comparison.conditions) + "." if comparison.conditions else "The runs share no conditions.",
        "",
        line([heading for heading, _ in columns]),
        line(["---", *["---:"] * (len(columns) - 1)]),
        *(line(cells) for cells in zip(*(column for _, column in columns), strict=True)),
        "",
        *(f"- {_NOTES[heading]}." for heading, _ in columns if heading in _NOTES),
    ]
    if comparison.unlabelled:
        lines.append(f"- {_NO_LABELS}.")
    if errors := [row.sampling_error for row in comparison.rows if row.sampling_error]:
        lines.append(f"- the number of images alone gives a top-1 a standard error of up to {max(errors):.2f} points.")
    if comparison.one_pass is not None:
        one_pass = comparison.one_pass.describe(comparison.common["data"]["num_images"])
        lines.append(f"- images/s: of the device's work on that attention alone, without the loader; {one_pass}.")
    if comparison.failed:
        lines += ["", f"Runs without complete results: {', '.join(comparison.failed)}."]
    return "\n".join(lines) + "\n"
