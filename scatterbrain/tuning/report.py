"""What `scatterbrain.profile` returns."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scatterbrain.errors import UserError
from scatterbrain.tuning.files import dataclass_of, read_json, write_file, write_json
from scatterbrain.tuning.tables import Table

if TYPE_CHECKING:
    from scatterbrain.tuning.plan import Plan

FORMAT = "scatterbrain profile 1"


@dataclass
class Measurement:
    """A method with a budget at an attention call.

    Attributes:
        method: one of `scatterbrain.ATTENTIONS`.
        budget: share of the attention columns, `memory_fraction`; None for a method without a budget.
        error: relative Frobenius error of the output against full attention in float32, mean over samples; None where
            the method took no call. Calls that it did not take have none.
        milliseconds: time of a call on the device of the profile.
        reason: why the method did not take the call, or some of several; None where it took all.
    """

    method: str
    budget: float | None
    error: float | None = None
    milliseconds: float | None = None
    reason: str | None = None

    @property
    def label(self) -> str:
        """Method and budget, such as `sbcluster 1/16`."""
        return method_label(self.method, self.budget)


@dataclass
class AttentionMap:
    """Attention of one query over the tokens of an image, mean over the heads.

    Attributes:
        query: which query.
        label: the method and its budget.
        png: the map as a PNG file in base64; the brightest colour is the largest weight of full attention.
    """

    query: str
    label: str
    png: str


@dataclass
class CallReport:
    """An attention call of a model.

    Attributes:
        name: the innermost module whose forward makes the call, as in `model.named_modules()`; empty for the model.
        index: number of the call within that forward, from 0.
        shape: (B, H, T, E) of the queries, of the longest where there are several.
        num_keys: number of keys S.
        kv_heads: number of heads of keys and values.
        value_width: width D of values.
        dtype: of queries, keys and values.
        is_causal: whether the call is causal.
        mask: `none`, `keys` (padding) or `other`.
        min_tokens: number of queries of the shortest.
        num_calls: number of calls, over all batches.
        effective_keys: exp of the mean entropy of the weights, in nats; None where it cannot be computed.
        milliseconds: time of full attention.
        seed: of the random parts of the methods.
        measurements: of each method and budget.
        maps: attention maps, where they were requested.
    """

    name: str
    index: int
    shape: list[int]
    num_keys: int
    kv_heads: int
    value_width: int
    dtype: str
    is_causal: bool
    mask: str
    min_tokens: int
    num_calls: int
    effective_keys: float | None
    milliseconds: float
    seed: int
    measurements: list[Measurement] = field(default_factory=list)
    maps: list[AttentionMap] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Name of the call: that of the module, and `#index` for its second call and later ones."""
        return call_label(self.name, self.index)

    @property
    def size(self) -> str:
        """Shape of the queries as text."""
        return " x ".join(map(str, self.shape))

    def reasons(self) -> dict[str, list[str]]:
        """Labels of the methods that did not take all calls, by reason."""
        found: dict[str, list[str]] = {}
        for measurement in self.measurements:
            if measurement.reason is not None:
                found.setdefault(measurement.reason, []).append(measurement.label)
        return found


@dataclass
class ProfileReport:
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

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Any:
        """The table as an object of rich."""
        return self.table().__rich__()

    def print(self) -> None:
        """Print the table on standard output, in colours where rich is installed."""
        self.table().print()

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
        from scatterbrain.tuning.figure import heat_map

        return heat_map(self)

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
        from scatterbrain.tuning.html import page

        return write_file(path, page(self, plan))


def call_label(name: str, index: int) -> str:
    """Name of a call for a reader.

    Args:
        name: name of the module; empty for the model.
        index: number of the call within the module's forward.
    """
    return (name or "(model)") + (f"#{index}" if index else "")


def method_label(method: str, budget: float | None) -> str:
    """Name of a method with its budget for a reader, such as `sbcluster 1/16`.

    Args:
        method: the method.
        budget: the budget; None for none.
    """
    return method if budget is None else f"{method} {fraction(budget)}"


def fraction(budget: float) -> str:
    """A budget as text, such as 1/16.

    Args:
        budget: the share.
    """
    nearest = Fraction(budget).limit_denominator(4096)
    return str(nearest) if math.isclose(nearest, budget, rel_tol=1e-9) and nearest.numerator == 1 else f"{budget:.3g}"


def shorten(names: Sequence[str], limit: int = 4) -> str:
    """The first names, and how many more there are.

    Args:
        names: the names.
        limit: number of names that are shown.
    """
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def duration(milliseconds: float) -> str:
    """A time with its unit.

    Args:
        milliseconds: the time.
    """
    return f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.3g} s"


def number(value: float) -> str:
    """A number with two digits.

    Args:
        value: the number.
    """
    return f"{value:.1e}" if 0 < value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


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
