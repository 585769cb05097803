"""Tables and figure of the attention benchmark, from the rows of its results."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from src.analysis.benchmark.baselines import WRITTEN_OUT
from src.analysis.benchmark.report import BASELINE, Bench, cell, sizes_text
from src.analysis.tools import digits, new_table

Row = Mapping[str, Any]

MARKERS = {"attention": ("o", "-"), "growth": ("^", "--")}  # those of baselines differ


def rounds(row: Row) -> list[float]:
    """Milliseconds for the figure: the device's where known, or short sequences would show the host's."""
    return row["milliseconds_per_round"] if row["device_milliseconds"] is None else [row["device_milliseconds"]]


def other_sizes(sizes: Mapping[str, int]) -> str:
    """Sizes beside window and features, as the tables have them; empty where there are none."""
    return sizes_text({name: size for name, size in sizes.items() if name not in ("local_context", "nb_features")})


def colour(name: str) -> str:
    """The colour of an attention and of all that is like it; greys for implementations of full attention."""
    from src.evaluation.colours import ATTENTION_COLOURS

    # sblocal is not local, nor is local2d another
    attention = max((known for known in ATTENTION_COLOURS if known in name), key=len, default="")
    greys = {BASELINE: "black", WRITTEN_OUT: "silver"}
    return ATTENTION_COLOURS.get(attention) or greys.get(name, "grey")


class AttentionReport(Bench):
    """What is printed and drawn of `results`, a row for each implementation, length and pass."""

    place = ("length", "N =")
    batches: Mapping[int, int]

    def tables(self) -> Iterator[Table]:
        """One table for each length and pass."""
        for length, attention_pass in itertools.product(self.arguments.lengths, self.arguments.passes):
            rows = [row for row in self.results if (row["length"], row["pass"]) == (length, attention_pass)]
            if rows:  # it was complete
                yield self.pass_table(rows)

    def pass_table(self, rows: list[Row]) -> Table:
        """The table of one length and pass, each kind in a section; columns that say nothing are left out."""
        arguments, baseline = self.arguments, next(row for row in rows if row["name"] == BASELINE)
        length, attention_pass = baseline["length"], baseline["pass"]
        columns = {
            "W": lambda row: str(row["window"] or "-"),
            "M": lambda row: str(row["features"] or "-"),
            "others": lambda row: other_sizes(row["sizes"]) or "-",
            "fallback": lambda row: cell(row["fallback_tiles"], str),
            "MiB": lambda row: digits(row["temporary_bytes"] / 2**20),
            "ms": lambda row: digits(row["milliseconds"]),
            "device\nms": lambda row: cell(row["device_milliseconds"], digits),
            "host\nµs": lambda row: cell(row["host_microseconds"], digits),
            "time/\nSDPA": lambda row: f"{row['ratio_to_sdpa']:.3f}",
            "MiB/\nSDPA": lambda row: f"{row['temporary_bytes'] / max(1, baseline['temporary_bytes']):.2f}",
        }
        caption = "W keys in the window, M features"
        if any("num_landmarks" in row["sizes"] for row in rows):
            caption += ", C clusters of keys, Q of queries, X exact keys"
        caption += "; MiB: memory of one call, inputs not counted"
        if not any(other_sizes(row["sizes"]) for row in rows):
            del columns["others"]
        if any(row["fallback_tiles"] for row in rows):
            caption += "; fallback: tiles of queries that the kernels recompute exactly"
        else:
            del columns["fallback"]
        if self.device.type != "cuda":
            del columns["device\nms"], columns["host\nµs"]
        title = f"N = {length}, {attention_pass}: {arguments.dtype} on {self.device.type}, "
        title += f"batch {self.batches[length]}, heads {arguments.heads}, width {arguments.dim}"
        title += "" if arguments.std == 1 else f", std {arguments.std:g}"
        table = new_table(title, ["attention", *columns], ["attention"], caption=caption)
        for _, section in itertools.groupby(rows, lambda row: row["kind"]):
            for row in section:
                table.add_row(row["name"], *(column(row) for column in columns.values()))
            table.add_section()
        return table

    def draw(self) -> Figure:
        """Time against length, one panel for each pass; the device's where that is known."""
        arguments = self.arguments
        passes = [name for name in arguments.passes if any(row["pass"] == name for row in self.results)]
        drawing = Figure(figsize=(6 * len(passes), 5), layout="constrained")
        axes = drawing.subplots(1, len(passes), squeeze=False)[0]
        for axis, attention_pass in zip(axes, passes, strict=True):
            rows = [row for row in self.results if row["pass"] == attention_pass and row["kind"] != "seed"]
            baselines = itertools.cycle("sDvXP*")  # most of them are grey
            for name in dict.fromkeys(row["name"] for row in rows):
                line = [row for row in rows if row["name"] == name]
                kind = line[0]["kind"]
                marker, dashes = MARKERS[kind] if kind != "baseline" else (next(baselines), ":")
                if kind == "growth":
                    # at the length that the sizes come from, the attention itself is the point
                    own = name.split(" as at ")[0]
                    line += [row for row in rows if (row["length"], row["name"]) == (self.arguments.growth_length, own)]
                    line.sort(key=lambda row: row["length"])
                # of one sequence: the batch may differ between lengths
                values = [statistics.median(rounds(row)) / self.batches[row["length"]] for row in line]
                style = {"marker": marker, "linestyle": dashes, "color": colour(name)}
                axis.plot([row["length"] for row in line], values, label=name, **style)
            of_device = any(row["device_milliseconds"] is not None for row in rows)
            unit = "milliseconds of the device per sequence" if of_device else "milliseconds per sequence"
            axis.set(xscale="log", yscale="log", xlabel="sequence length N", ylabel=unit, title=attention_pass)
            axis.set_xticks(arguments.lengths, [str(length) for length in arguments.lengths])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[-1].legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.01, 1.0))
        batch = ", ".join(str(number) for number in arguments.batch)
        drawing.suptitle(f"{arguments.dtype} on {self.device.type}, batch {batch}, heads {arguments.heads}")
        return drawing
