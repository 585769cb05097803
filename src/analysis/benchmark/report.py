"""What the benchmarks share around their measurements: options, tables, files, and saving as a run goes."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.table import Table

from scatterbrain.attention import ATTENTIONS, COMPARED
from scatterbrain.errors import UserError
from src.analysis.rows import write_rows
from src.utils.machine import machine_info
from src.utils.scripts import (
    Parser,
    comma_separated,
    console_for_tables,
    default_jobs,
    fraction,
    positive,
    say,
    until_stopped,
    without_paths,
)

PASSES = ("forward", "training")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Characters in a line of the tables where they are not shown on a terminal.
TABLE_WIDTH = 132

# Options that several benchmarks have; each takes those it needs. Defaults are text, as a command line has them.
OPTIONS: dict[str, dict[str, Any]] = {
    "attentions": {
        "type": comma_separated(tuple(ATTENTIONS)),
        "default": ",".join(COMPARED),
        "metavar": "NAMES",
        "help": "separated by commas (%(default)s)",
    },
    "passes": {
        "type": comma_separated(PASSES),
        "default": ",".join(PASSES),
        "metavar": "NAMES",
        "help": "forward (in inference mode), training (forward and backward) (%(default)s)",
    },
    "device": {"choices": ("auto", "cpu", "cuda"), "default": "auto", "help": "(auto: CUDA where it is)"},
    "dtype": {"choices": tuple(DTYPES), "default": "float32", "help": "(%(default)s)"},
    "dim": {"type": positive, "default": "64", "metavar": "E", "help": "width of a head (%(default)s)"},
    "variant": {"default": "t2t_vit_t_14", "metavar": "NAME", "help": "one of t2t_vit_t_* (%(default)s)"},
    "image-size": {"type": positive, "default": "224", "metavar": "N", "help": "in pixels (%(default)s)"},
    "num-classes": {"type": positive, "default": "1000", "metavar": "N", "help": "(%(default)s)"},
    "memory-fraction": {"type": fraction, "default": "1/32", "metavar": "F", "help": "memory budget (%(default)s)"},
    "std": {
        "type": fraction,
        "default": "1",
        "metavar": "S",
        "help": "standard deviation of the elements of queries and keys (%(default)s)",
    },
    "threads": {"type": positive, "metavar": "T", "help": "CPU threads (PyTorch's choice)"},
    "repeats": {"type": positive, "default": "15", "metavar": "R", "help": "rounds (%(default)s)"},
    "rounds": {"type": positive, "default": "5", "metavar": "R", "help": "(%(default)s)"},
    "compile": {"action": "store_true", "help": "run through torch.compile"},
    "no-peers": {"action": "store_true", "help": "leave out the implementations of others"},
    "jobs": {
        "type": positive,
        "default": default_jobs(),
        "metavar": "J",
        "help": "processes that compile kernels ahead on CUDA, 1 for none (as many as usable CPUs, 8 at most)",
    },
    "output": {"metavar": "FILE", "help": "write the results as JSON"},
    "figure": {"metavar": "FILE", "help": "plot the results (.png, .pdf, .svg)"},
}


def make_parser(description: str | None, *options: str, **defaults: str) -> Parser:
    """A parser with some of `OPTIONS`.

    Args:
        description: docstring of the script.
        *options: names without dashes in front.
        **defaults: of options for which this benchmark has others than `OPTIONS`.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=description, formatter_class=formatter, allow_abbrev=False)
    for name in options:
        parser.add_argument(f"--{name}", **OPTIONS[name])
    parser.set_defaults(**defaults)
    return parser


def make_table(title: str, first: str, columns: Iterable[str], rows: Iterable[Sequence[str]] = ()) -> Table:
    """A table with one column of names and columns of numbers."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def cell(value: float | None, shape: Callable[[float], str]) -> str:
    """A number as text, a dash where there is none."""
    return "-" if value is None else shape(value)


def header(arguments: argparse.Namespace, device: torch.device, **settings: Any) -> dict[str, Any]:
    """Machine and settings, which results are stored with.

    Args:
        arguments: the options; paths are left out.
        device: that was measured.
        **settings: that replace or complete the options.
    """
    settings = {**without_paths(arguments), "device": device.type, **settings}
    return {"machine": machine_info(device), "settings": settings}


def machine_line(device: torch.device) -> str:
    """Hardware and software versions, as they stand below the tables."""
    return ", ".join(f"{name} {value}" for name, value in machine_info(device).items() if value is not None)


def print_report(tables: Iterable[Table], lines: Iterable[str]) -> None:
    """Print tables, and lines below them."""
    console = console_for_tables(TABLE_WIDTH)
    for table in tables:
        console.print(table, "")
    for line in lines:
        say(line)


class Bench(Protocol):
    """A benchmark whose parts are complete one after another."""

    arguments: argparse.Namespace
    device: torch.device
    results: list[Any]

    def run(self, console: Console, save: Callable[[], None]) -> None:
        """Measure everything; `save` is called whenever a part is complete."""

    def missing(self) -> str:
        """Parts that are not complete, empty at the end."""

    def tables(self) -> Iterator[Table]:
        """What is complete."""

    def left_out(self) -> Iterable[str]:
        """Why candidates are left out, a line each."""

    def report(self) -> dict[str, Any]:
        """What is complete, for JSON."""

    def plot(self, path: str) -> None:
        """Draw what is complete."""


def run_until_stopped(bench: Bench) -> int:
    """Run a benchmark to its end or until Ctrl-C or SIGTERM, print what is complete and write its files.

    Returns:
        Exit status: 1 where something is missing.
    """
    output, figure = bench.arguments.output, bench.arguments.figure

    def save() -> None:
        if output is not None:
            with contextlib.suppress(UserError, OSError):  # the end of the run tries again, and reports it
                write_rows(output, bench.report())

    def finish() -> int:
        if not bench.results:
            print("Interrupted. Nothing was written.", file=sys.stderr)
            return 1
        print_report(bench.tables(), (*bench.left_out(), machine_line(bench.device)))
        if output is not None:
            write_rows(output, bench.report())
        if figure is not None:
            bench.plot(figure)
        missing = bench.missing()
        if missing:
            print(f"Interrupted. Missing: {missing}.", file=sys.stderr)
        return 1 if missing else 0

    return until_stopped(lambda: bench.run(Console(stderr=True), save), finish)
