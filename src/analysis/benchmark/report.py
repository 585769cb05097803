"""What the benchmarks share around their measurements: options, the machine, and saving as a run proceeds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from scatterbrain.attention import ATTENTIONS, COMPARED
from src.analysis.records import write_rows
from src.analysis.tools import (
    COMMON_OPTIONS,
    Parser,
    comma_separated,
    console_for_tables,
    fraction,
    positive,
    saved_until_stopped,
    say,
    without_paths,
)
from src.utils.machine import machine_info

T = TypeVar("T")
PASSES = ("forward", "training")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Characters in a line of the tables where they are not shown on a terminal.
TABLE_WIDTH = 132

_NAMES = {"metavar": "NAMES", "help": "separated by commas (%(default)s)"}
_STD = "standard deviation of the elements of queries and keys (%(default)s)"
# Options that several benchmarks have; each takes those it needs. Defaults are text, as a command line has them.
OPTIONS: dict[str, dict[str, Any]] = COMMON_OPTIONS | {
    "attentions": {"type": comma_separated(tuple(ATTENTIONS)), "default": ",".join(COMPARED), **_NAMES},
    "passes": {"type": comma_separated(PASSES), "default": ",".join(PASSES), **_NAMES},
    "dtype": {"choices": tuple(DTYPES), "default": "float32", "help": "(%(default)s)"},
    "dim": {"type": positive, "default": "64", "metavar": "E", "help": "width of a head (%(default)s)"},
    "variant": {"default": "t2t_vit_t_14", "metavar": "NAME", "help": "one of t2t_vit_t_* (%(default)s)"},
    "image-size": {"type": positive, "default": "224", "metavar": "N", "help": "in pixels (%(default)s)"},
    "num-classes": {"type": positive, "default": "1000", "metavar": "N", "help": "(%(default)s)"},
    "std": {"type": fraction, "default": "1", "metavar": "S", "help": _STD},
    "repeats": {"type": positive, "default": "15", "metavar": "R", "help": "rounds (%(default)s)"},
    "rounds": {"type": positive, "default": "5", "metavar": "R", "help": "(%(default)s)"},
    "compile": {"action": "store_true", "help": "run through torch.compile"},
    "no-peers": {"action": "store_true", "help": "leave out the implementations of others"},
}


def make_parser(description: str | None, *options: str, **defaults: str) -> Parser:
    """A parser with some of `OPTIONS`, of which a benchmark may have other defaults."""
    parser = Parser(description)
    for name in options:
        parser.add_argument(f"--{name}", **OPTIONS[name])
    parser.set_defaults(**defaults)
    return parser


def cell(value: float | None, shape: Callable[[float], str]) -> str:
    """A number as text, a dash where there is none."""
    return "-" if value is None else shape(value)


def header(arguments: argparse.Namespace, device: torch.device, *without: str, **settings: Any) -> dict[str, Any]:
    """Machine and settings, which results are stored with; of the options paths and those `without` are left out."""
    settings = {**without_paths(arguments, *without), "device": device.type, **settings}
    return {"machine": machine_info(device), "settings": settings}


def machine_line(device: torch.device) -> str:
    """Hardware and software versions, as they stand below the tables."""
    return ", ".join(f"{name} {value}" for name, value in machine_info(device).items() if value is not None)


def print_report(tables: Iterable[Table], *lines: str) -> None:
    """Print tables, and lines below them."""
    console = console_for_tables(TABLE_WIDTH)
    for table in tables:
        console.print(table, "")
    for line in lines:
        say(line)


def shown(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The items, with a progress bar on stderr that is gone at the end."""
    yield from track(items, description, total, console=Console(stderr=True), transient=True)


class Bench:
    """A benchmark that is saved whenever a part is complete, and may be stopped between parts.

    Subclasses define `run(console, save)`, `tables()`, `plot(path)`, `more()` (what the JSON has beside the rows of
    `results`) and `place`: the key by which `skipped` says where, and its words. `missing` are parts not yet measured.
    """

    place: tuple[str, str]

    def __init__(self, arguments: argparse.Namespace, missing: Iterable[str]) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.results: list[dict[str, Any]] = []
        self.skipped: list[dict[str, Any]] = []
        self.missing = list(missing)

    def main(self) -> int:
        """Run until done, or until Ctrl-C or SIGTERM; returns the exit status: 1 where something is missing."""
        return saved_until_stopped(self.run, self.report, self.arguments.output, self.finish)

    def report(self) -> dict[str, Any]:
        """What is complete, for JSON."""
        content = {"complete": not self.missing, **header(self.arguments, self.device), "results": self.results}
        return {**content, **self.more(), "skipped": self.skipped}

    def left_out(self) -> list[str]:
        """What could not be measured and why, each reason once."""
        key, words = self.place
        places: dict[tuple[str, str], dict[str, None]] = {}
        for item in self.skipped:
            places.setdefault((item["name"], item["reason"]), {})[str(item[key])] = None
        return [f"{name} left out at {words} {', '.join(at)}: {reason}." for (name, reason), at in places.items()]

    def finish(self) -> int:
        """Print what is complete and write the files; returns the exit status."""
        if not self.results:
            print("Interrupted. Nothing was written.", file=sys.stderr)
            return 1
        print_report(self.tables(), *self.left_out(), machine_line(self.device))
        if self.arguments.output is not None:
            write_rows(self.arguments.output, self.report())
        if self.arguments.figure is not None:
            self.plot(self.arguments.figure)
        if self.missing:
            print(f"Interrupted. Missing: {', '.join(self.missing)}.", file=sys.stderr)
        return 1 if self.missing else 0
