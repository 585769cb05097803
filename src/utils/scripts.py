"""What the command-line tools of `scripts/` share: options and their types, faults told in one line, files."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress

from scatterbrain.errors import UserError, did_you_mean
from src.utils.files import atomic_write, write_json
from src.utils.machine import usable_cpus
from src.utils.parallel import run_in_processes
from src.utils.progress import progress_display  # noqa: F401 - for scripts
from src.utils.text import first_line  # noqa: F401 - for scripts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE_SUFFIXES = (".png", ".pdf", ".svg")

T = TypeVar("T")


def run_tool(
    parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], int | None], argv: Sequence[str] | None
) -> int:
    """Do the work of a tool, with as many CPU threads as its option `--threads` asks for, if it has one.

    Args:
        parser: of its options.
        work: what it does with them; its exit status, None for 0.
        argv: the command line without the tool's name; None is that of the process.

    Returns:
        Exit status; 1 after an error of the user's, which is told in one line on stderr.
    """
    try:
        arguments = parser.parse_args(argv)
        with threads(getattr(arguments, "threads", None)):
            return work(arguments) or 0
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1


def until_stopped(work: Callable[[], None], then: Callable[[], T]) -> T:
    """Work until that is done, or until Ctrl-C or SIGTERM, by which batch systems end a job; go on with `then`.

    Only the first of the signals counts: they are often sent twice, and `then` saves what there is.

    Args:
        work: may be broken off anywhere, by KeyboardInterrupt.
        then: follows in both cases, but not where `work` fails.

    Returns:
        What `then` does.
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
    """`until_stopped` for work whose results are written as it goes.

    Args:
        run: the work; it is given a console for its progress, and what it calls whenever a part is complete.
        report: everything there is so far, for JSON.
        output: file that it is written to; None for none.
        then: follows, and writes the file for the last time.

    Returns:
        What `then` does.
    """

    def save() -> None:
        if output is not None:
            with contextlib.suppress(UserError, OSError):  # the end of the run tries again, and tells of it
                write_json(output, report())

    return until_stopped(lambda: run(Console(stderr=True), save), then)


def console_for_tables(width: int) -> Console:
    """Standard output: as wide as the terminal, or `width` in a file or a pipe, where rich would guess too little."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


class Parser(argparse.ArgumentParser):
    """Raises `UserError` where argparse would print its usage and exit with status 2."""

    def error(self, message: str) -> None:
        """Refuse the arguments.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message[:1].upper()}{message[1:]}. --help lists the options.")


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


def choose_device(name: str) -> torch.device:
    """The device that `--device` asks for.

    Raises:
        UserError: CUDA is asked for and absent.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here. Use --device cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def say(text: str) -> None:
    """Print text as it is, one line of it on one line."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Run with `number` CPU threads, and with as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_writable(*paths: str | None) -> None:
    """Refuse a path that cannot be written before minutes are spent on what would go there.

    Raises:
        UserError: its folder does not exist, or it is a folder.
    """
    for path in paths:
        if path is not None and (not Path(path).absolute().parent.is_dir() or Path(path).is_dir()):
            raise UserError(f"{path} cannot be written: it has to be a file in a folder that exists.")


def check_figure(path: str | None) -> None:
    """Refuse the name of a figure that says no format, before minutes are spent.

    Raises:
        UserError: its suffix is none of `FIGURE_SUFFIXES`, or it cannot be written.
    """
    check_writable(path)
    if path is not None and Path(path).suffix.lower() not in FIGURE_SUFFIXES:
        raise UserError(f"--figure {path}: the name has to end in .png, .pdf or .svg.")


def save_figure(drawing: Figure, path: str) -> None:
    """Write a figure in the format of the path's suffix."""
    with atomic_write(path, "wb") as file:
        drawing.savefig(file, format=Path(path).suffix.lstrip(".").lower(), dpi=150)


def compile_ahead(work: Callable[[T], object], cases: Sequence[T], jobs: int, progress: Progress) -> None:
    """Have several processes do what fills the caches of compilers, of which each compiles one kernel at a time.

    Args:
        work: runs one case, see `run_in_processes`.
        cases: each compiles kernels.
        jobs: number of processes.
        progress: shows how far they are.
    """
    task = progress.add_task("compiling kernels", total=len(cases))
    run_in_processes(work, cases, jobs, lambda: progress.advance(task))
    progress.remove_task(task)


def default_jobs() -> int:
    """Processes that compile where nothing else is asked for: each takes memory of the device."""
    return min(8, usable_cpus())


def without_paths(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options for a file of results: without the names of files, which say nothing of the results."""
    return {name: value for name, value in vars(arguments).items() if name not in ("output", "figure")}


def figure(value: float) -> str:
    """A positive number to three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
