"""What `scatterbrain.profile` returns."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scatterbrain.errors import UserError
from scatterbrain.tuning.calls import AttentionMap, CallReport, Measurement, duration, fraction, number, shorten
from scatterbrain.tuning.figure import heat_map
from scatterbrain.tuning.files import dataclass_of, read_json, write_file, write_json
from scatterbrain.tuning.html import page
from scatterbrain.tuning.plan import Plan
from scatterbrain.tuning.tables import PrintsTable, Table

FORMAT = "scatterbrain profile 1"


@dataclass
class ProfileReport(PrintsTable):
    """Errors and times of attention methods at each attention call of a model.

    `print(report)` shows a table, `report.print()` shows it in colours where rich is installed.

    Attributes:
        model: class of the model.
        device: where it was measured.
        versions: of torch and scatterbrain.
        methods: the methods.
        budgets: the budgets.
        calls: the attention calls, in the order in which the model made them.
        not_reached: attention that does not call scaled_dot_product_attention, with the number of calls.
        thumbnails: images that the attention maps are of, PNG files in base64.
    """

    model: str
    device: str
    versions: dict[str, str]
    methods: list[str]
    budgets: list[float]
    calls: list[CallReport]
    not_reached: dict[str, int] = field(default_factory=dict)
    thumbnails: list[str] = field(default_factory=list)

    def table(self) -> Table:
        """The report as a table: in each cell the error, and how many times as fast as full attention."""
        columns = ["call", "budget", *self.methods]
        rows: list[Sequence[str]] = []
        styles: dict[tuple[int, int], str] = {}
        for call in self.calls:
            keys = "-" if call.effective_keys is None else f"{call.effective_keys:.0f}"
            first = [call.label, call.size, f"{keys} effective keys", f"full {duration(call.milliseconds)}"]
            for line in range(max(len(first), len(self.budgets))):
                budget = self.budgets[line] if line < len(self.budgets) else None
                row = [first[line] if line < len(first) else "", fraction(budget) if budget else ""]
                for method in self.methods:
                    # a method without a budget has one cell, in the first line
                    found = [
                        m
                        for m in call.measurements
                        if m.method == method and (line == 0 if m.budget is None else m.budget == budget)
                    ]
                    row.append(_cell(found[0], call) if found else "")
                    if found:
                        styles[len(rows), len(row) - 1] = _style(found[0], call)
                rows.append(row)
            rows.append([""] * len(columns))
        title = f"{self.model} on {self.device}: error of the output, and times as fast as full attention"
        return Table(title, columns, rows[:-1], self._notes(), styles)

    def _notes(self) -> list[str]:
        notes = []
        found: dict[tuple[str, str], list[str]] = {}
        for call in self.calls:
            for reason, labels in call.reasons().items():
                taken = "all methods" if len(labels) == len(call.measurements) else ", ".join(dict.fromkeys(labels))
                found.setdefault((reason, taken), []).append(call.label)
        for (reason, labels), names in found.items():
            notes.append(f"- {reason} ({labels}): {shorten(names)}")
        notes += [f"Not reached, {name}: {count} calls" for name, count in self.not_reached.items()]
        return notes

    def save(self, path: str | os.PathLike[str]) -> Path | None:
        """Write the report as JSON, and return the path of the backup of a file that was there, or None.

        Args:
            path: the file.

        Raises:
            UserError: the file cannot be written.
        """
        return write_json(path, FORMAT, self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ProfileReport:
        """The report that `save` wrote.

        Args:
            path: the file.

        Raises:
            UserError: the file cannot be read, or is no report.
        """
        content = read_json(path, FORMAT)
        try:
            calls = [
                dataclass_of(
                    CallReport,
                    {
                        **call,
                        "measurements": [dataclass_of(Measurement, x) for x in call["measurements"]],
                        "maps": [dataclass_of(AttentionMap, x) for x in call["maps"]],
                    },
                )
                for call in content.pop("calls")
            ]
            if not calls:
                raise TypeError("it has no calls")
            return dataclass_of(cls, {**content, "calls": calls})
        except (TypeError, KeyError) as error:
            raise UserError(
                f"{os.fspath(path)} is no complete report ({error}). Write it again with `save`."
            ) from error

    def figure(self) -> Any:
        """Heat map of the errors, calls by methods and budgets: a figure of matplotlib, which has to be installed."""
        return heat_map(self.model, self.calls)

    def save_figure(self, path: str | os.PathLike[str]) -> Path | None:
        """Write `figure` as an image, and return the path of the backup of a file that was there, or None.

        Args:
            path: the file, whose ending is the format, such as .png or .svg.

        Raises:
            UserError: the file cannot be written, or the format is unknown.
            ImportError: matplotlib is not installed.
        """
        content = io.BytesIO()
        kind = Path(path).suffix.removeprefix(".") or "png"
        try:
            self.figure().savefig(content, format=kind, dpi=160)
        except ValueError as error:
            raise UserError(f"{os.fspath(path)}: matplotlib writes no '{kind}'. Name a .png or .svg file.") from error
        return write_file(path, content.getvalue())

    def save_html(self, path: str | os.PathLike[str], plan: Plan | None = None) -> Path | None:
        """Write the report as one HTML page, and return the path of the backup of a file that was there, or None.

        The page loads nothing from elsewhere: heat maps, tables that sort by each column, attention maps.

        Args:
            path: the file.
            plan: a plan made from the report, whose choices the page marks.

        Raises:
            UserError: the file cannot be written.
        """
        about = f"{self.device}, " + ", ".join(f"{name} {version}" for name, version in self.versions.items())
        goal, planned = ("", []) if plan is None else (plan.goal, plan.calls)
        return write_file(path, page(self.model, about, self.calls, self.not_reached, self.thumbnails, goal, planned))


def _cell(measurement: Measurement, call: CallReport) -> str:
    if measurement.error is None:
        return "-"
    if not measurement.milliseconds:  # none was measured
        return number(measurement.error)
    ratio = call.milliseconds / measurement.milliseconds
    return f"{number(measurement.error)} {ratio:.{0 if ratio >= 10 else 1}f}x"


def _style(measurement: Measurement, call: CallReport) -> str:
    """Colour by error; dim where full attention is as fast."""
    if measurement.error is None:
        return "dim"
    colour = "green" if measurement.error <= 0.1 else "yellow" if measurement.error <= 0.3 else "red"
    slow = measurement.milliseconds and measurement.milliseconds >= call.milliseconds
    return f"dim {colour}" if slow else colour
