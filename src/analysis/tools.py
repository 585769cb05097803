"""What the command-line tools of `scripts/` share: options and their types, errors in one line, figures."""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from scatterbrain.errors import UserError, did_you_mean
from src.analysis.records import write_rows
from src.utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE_SUFFIXES = (".png", ".pdf", ".svg")

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """Raises `UserError` where argparse would print its usage and exit with status 2; options are not abbreviated."""

    def __init__(self, description: str | None = None, **options: Any) -> None:
        defaults = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(description=description, **(defaults | options))

    def error(self, message: str) -> None:
        """Raise `UserError`."""
        raise UserError(f"{message[:1].upper()}{message[1:]}. --help lists the options.")

    def add(self, *names: str, **changes: Any) -> None:
        """Add options that several tools have, see `COMMON_OPTIONS`; `changes` go to each of them."""
        for name in names:
            self.add_argument(f"--{name}", **(COMMON_OPTIONS[name] | changes))


def comma_separated(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Type of an option that takes a list of `known` names."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name for name in text.split(",") if name))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"'{name}' is unknown. {did_you_mean(name, known)}")
        if not names:
            raise argparse.ArgumentTypeError(f"the list is empty. {did_you_mean('', known)}")
        return names

    return parse


def positive(text: str) -> int:
    """Type of an option that takes an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not an integer of at least 1")
    return int(text)


def positive_sequence(text: str) -> tuple[int, ...]:
    """Type of an option that takes integers of at least 1, separated by commas, in their order."""
    return tuple(positive(part) for part in text.split(","))


def positive_list(text: str) -> tuple[int, ...]:
    """The same where order does not matter: ascending, each once."""
    return tuple(sorted(set(positive_sequence(text))))


def fraction(text: str) -> float:
    """Type of an option that takes a number, fractions such as 1/32 included."""
    numerator, _, denominator = text.partition("/")
    try:
        return float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number or a fraction such as 1/32") from error


def positive_number(text: str) -> float:
    """Type of an option that takes a positive number."""
    number = fraction(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return number


def positive_numbers(text: str) -> tuple[float, ...]:
    """Type of an option that takes positive numbers, separated by commas, ascending."""
    numbers = tuple(sorted({fraction(part) for part in text.split(",")}))
    if not all(0 < number < math.inf for number in numbers):
        raise argparse.ArgumentTypeError(f"'{text}' holds a number that is not positive")
    return numbers


COMMON_OPTIONS: dict[str, dict[str, Any]] = {
    "checkpoint": {"required": True, "metavar": "FILE", "help": "of one of the t2t_vit_t_* variants"},
    "data-dir": {"required": True, "metavar": "DIR", "help": "folder that holds the split's folder"},
    "split": {"default": "val", "metavar": "NAME", "help": "folder of the class folders (val)"},
    "memory-fraction": {"type": fraction, "default": 1 / 32, "metavar": "F", "help": "budget (1/32)"},
    "seed": {"type": int, "default": 1111, "metavar": "N", "help": "of what is random; the first of several (1111)"},
    "num-seeds": {"type": positive, "default": 3, "metavar": "K", "help": "seeds of what is random (3)"},
    "device": {"choices": ("auto", "cpu", "cuda"), "default": "auto", "help": "(auto: CUDA where it is)"},
    "threads": {"type": positive, "metavar": "T", "help": "CPU threads (PyTorch's choice)"},
    "output": {"metavar": "FILE", "help": "write the results as JSON"},
    "figure": {"metavar": "FILE", "help": "draw them: .png, .pdf or .svg"},
}


def choose_device(name: str) -> torch.device:
    """The device that `--device` names; `UserError` where CUDA is requested and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here. Use --device cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def check_writable(*paths: str | None) -> None:
    """Raise `UserError` for a path that cannot be written, before minutes are spent on what would go there."""
    for path in paths:
        if path is not None and (not Path(path).absolute().parent.is_dir() or Path(path).is_dir()):
            raise UserError(f"{path} cannot be written: it has to be a file in a folder that exists.")


def check_figure(path: str | None, option: str = "--figure") -> None:
    """Raise `UserError` for a figure whose suffix is none of `FIGURE_SUFFIXES`, or that cannot be written."""
    check_writable(path)
    if path is not None and Path(path).suffix.lower() not in FIGURE_SUFFIXES:
        raise UserError(f"{option} {path}: the name has to end in .png, .pdf or .svg.")


def without_paths(arguments: argparse.Namespace, *others: str) -> dict[str, Any]:
    """Options for a file of results: without the names of files, which are not part of the results, and `others`."""
    return {name: value for name, value in vars(arguments).items() if name not in ("output", "figure", *others)}


def run_tool(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None,
    interrupted: str = "Nothing was written.",
) -> int:
    """Exit status of a tool; 1 after an error of the user's, which is one line on stderr, and after Ctrl-C.

    Args:
        parser: of its options; `--threads`, where it has it, is the number of CPU threads of the work.
        work: what it does with them; its exit status, None for 0.
        argv: the command line without the tool's name; None is that of the process.
        interrupted: what Ctrl-C leaves, a sentence.
    """
    before = torch.get_num_threads()
    try:
        arguments = parser.parse_args(argv)
        torch.set_num_threads(getattr(arguments, "threads", None) or before)
        return work(arguments) or 0
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"Interrupted. {interrupted}", file=sys.stderr)
    finally:
        torch.set_num_threads(before)
    return 1


def until_stopped(work: Callable[[], None], then: Callable[[], T]) -> T:
    """What `then` returns, after work that is done, or stopped by Ctrl-C or by SIGTERM, with which batch systems stop.

    Only the first of the signals counts: they are often sent twice, and `then` saves what there is.

    Args:
        work: may be stopped anywhere, by KeyboardInterrupt.
        then: follows in both cases, but not where `work` fails.
    """
    heeded = True

    def stop(*_: object) -> None:
        nonlocal heeded
        if heeded:
            heeded = False
            raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # one that is ignored stays so: nohup and background jobs of a shell want it
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, stop)
    try:
        try:
            work()
            heeded = False
        except KeyboardInterrupt:
            heeded = False
        return then()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def saved_until_stopped(
    run: Callable[[Console, Callable[[], None]], None],
    report: Callable[[], Any],
    output: str | None,
    then: Callable[[], T],
) -> T:
    """`until_stopped` for work whose results are written as it runs.

    Args:
        run: the work; it is given a console for its progress, and what it calls whenever a part is complete.
        report: everything there is so far, for `write_rows`.
        output: file that it is written to; None for none.
        then: follows, and writes the file for the last time.
    """

    def save() -> None:
        if output is not None:
            with contextlib.suppress(UserError, OSError):  # the last write tries again, and reports it
                write_rows(output, report())

    return until_stopped(lambda: run(Console(stderr=True), save), then)


def say(text: str) -> None:
    """Print text as it is, one line of it on one line."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def console_for_tables(width: int) -> Console:
    """Standard output: as wide as the terminal, or `width` in a file or a pipe, where rich would guess too little."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def new_table(title: str, headers: Sequence[str], left: Sequence[str] = (), **options: Any) -> Table:
    """A table with the title on the left; the columns of numbers, all but `left`, are aligned to the right."""
    table = Table(title=title, title_justify="left", caption_justify="left", **options)
    for header in headers:
        table.add_column(header, justify="left" if header in left else "right", no_wrap=True)
    return table


def save_figure(drawing: Figure, path: str) -> None:
    """Write a figure in the format of the path's suffix."""
    with atomic_write(path, "wb") as file:
        drawing.savefig(file, format=Path(path).suffix.lstrip(".").lower(), dpi=150)


def write_results(
    arguments: argparse.Namespace, content: Mapping[str, Any], draw: Callable[[], Figure] | None = None
) -> None:
    """Write the results to `--output`, and what `draw` returns to `--figure`, where these are given."""
    if arguments.output is not None:
        write_rows(arguments.output, content)
    if draw is not None and arguments.figure is not None:
        save_figure(draw(), arguments.figure)


def figure(value: float) -> str:
    """A positive number to three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
