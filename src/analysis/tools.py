"""What the command-line tools of `scripts/` share: options and their types, errors in one line, figures."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from scatterbrain.attention import ATTENTIONS, COMPARED
from scatterbrain.errors import UserError, did_you_mean
from src.evaluation.result_rows import write_rows
from src.utils.files import atomic_write
from src.utils.machine import machine_info
from src.utils.signals import until_stopped

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from omegaconf import DictConfig

FIGURE_SUFFIXES = (".png", ".pdf", ".svg")
TABLE_WIDTH = 132  # characters in a line of tables that are not shown on a terminal
T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """Raises `UserError` where argparse would print its usage and exit with status 2; options are not abbreviated."""

    def __init__(self, description: str | None, *names: str, **defaults: Any) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        self.add(*names)
        self.set_defaults(**defaults)

    def error(self, message: str) -> None:
        """Raise `UserError`."""
        raise UserError(f"{message[:1].upper()}{message[1:]}. --help lists the options.")

    def add(self, *names: str, **changes: Any) -> None:
        """Add options that several tools have, see `OPTIONS`; `changes` go to each of them."""
        for name in names:
            self.add_argument(f"--{name}", **(OPTIONS[name] | changes))


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


def not_negative(text: str) -> int:
    """Type of an option that takes an integer from 0 to 2^63 - 1."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"'{text}' is not an integer of at least 0")
    return int(text)


def positive_sequence(text: str) -> tuple[int, ...]:
    """Type of an option that takes integers of at least 1, separated by commas, in their order."""
    return tuple(positive(part) for part in text.split(","))


def positive_list(text: str) -> tuple[int, ...]:
    """The same where order does not matter: ascending, each once."""
    return tuple(sorted(set(positive_sequence(text))))


def named_numbers(text: str) -> dict[str, float]:
    """Type of an option that takes sizes by name, such as `local_context=64,density=0.08`."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    return {name.strip(): (fraction if "." in number else positive)(number) for name, _, number in pairs}


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
    return tuple(sorted(set(map(positive_number, text.split(",")))))


def result_file(text: str) -> str:
    """Type of an option that takes a file to write; refused before minutes are spent on what would go there."""
    if not Path(text).absolute().parent.is_dir() or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} cannot be written: it has to be a file in a folder that exists")
    return text


def figure_file(text: str) -> str:
    """Type of an option that takes a figure to write."""
    if Path(text).suffix.lower() not in FIGURE_SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text}: the name has to end in .png, .pdf or .svg")
    return result_file(text)


PASSES = ("forward", "training")
_NAMES = {"metavar": "NAMES", "help": "separated by commas (%(default)s)"}
# Defaults that are text are parsed, as a command line is.
OPTIONS: dict[str, dict[str, Any]] = {
    "checkpoint": {"required": True, "metavar": "FILE", "help": "of one of the t2t_vit_t_* variants"},
    "data-dir": {"required": True, "metavar": "DIR", "help": "folder that holds the split's folder"},
    "images": {"nargs": "+", "metavar": "PATH", "help": "in the split; without --data-dir any files or folders"},
    "limit": {"type": positive, "metavar": "N", "help": "take N photographs, spread evenly, not all"},
    "split": {"default": "val", "metavar": "NAME", "help": "folder of the class folders (val)"},
    "memory-fraction": {"type": fraction, "default": 1 / 32, "metavar": "F", "help": "budget (1/32)"},
    "seed": {"type": int, "default": 1111, "metavar": "N", "help": "of what is random; the first of several (1111)"},
    "num-seeds": {"type": positive, "default": 3, "metavar": "K", "help": "seeds of what is random (3)"},
    "device": {"choices": ("auto", "cpu", "cuda"), "default": "auto", "help": "(auto: CUDA where it is)"},
    "threads": {"type": positive, "metavar": "T", "help": "CPU threads (PyTorch's choice)"},
    "output": {"type": result_file, "metavar": "FILE", "help": "write the results as JSON"},
    "figure": {"type": figure_file, "metavar": "FILE", "help": "draw them: .png, .pdf or .svg"},
    "attentions": {"type": comma_separated(tuple(ATTENTIONS)), "default": ",".join(COMPARED), **_NAMES},
    "passes": {"type": comma_separated(PASSES), "default": ",".join(PASSES), **_NAMES},
    "dtype": {"choices": ("float32", "bfloat16", "float16"), "default": "float32", "help": "(%(default)s)"},
    "dim": {"type": positive, "default": "64", "metavar": "E", "help": "width of a head (%(default)s)"},
    "variant": {"default": "t2t_vit_t_14", "metavar": "NAME", "help": "one of t2t_vit_t_* (%(default)s)"},
    "image-size": {"type": positive, "default": "224", "metavar": "N", "help": "in pixels (%(default)s)"},
    "num-classes": {"type": positive, "default": "1000", "metavar": "N", "help": "(%(default)s)"},
    "std": {"type": fraction, "default": "1", "metavar": "S", "help": "std of queries and keys (%(default)s)"},
    "repeats": {"type": positive, "default": "15", "metavar": "R", "help": "rounds (%(default)s)"},
    "rounds": {"type": positive, "default": "5", "metavar": "R", "help": "(%(default)s)"},
    "compile": {"action": "store_true", "help": "run through torch.compile"},
    "no-baselines": {"action": "store_true", "help": "time ours and SDPA alone"},
    "num-images": {"type": positive, "default": 5, "metavar": "N", "help": "photographs, spread evenly (%(default)s)"},
    "tensors": {"nargs": "+", "default": [], "metavar": "FILE", "help": ".npz with q<layer>, k<layer>, v<layer>"},
    "maps": {"type": result_file, "metavar": "FILE", "help": "draw weights of a token of two photographs, as PNG"},
    "variance-figure": {"type": figure_file, "metavar": "FILE", "help": "draw the variance: .png, .pdf or .svg"},
}


def compose_config(overrides: Mapping[str, Any], paths: Mapping[str, str | Path]) -> DictConfig:
    """The configuration of a run of `run.py`; paths are set afterwards, or they would have to be quoted."""
    from hydra import compose, initialize_config_dir  # here and below: --help does not need them
    from omegaconf import OmegaConf

    with initialize_config_dir(str(Path(__file__).resolve().parents[2] / "configs"), version_base="1.3"):
        config = compose("config", [f"{name}={value}" for name, value in overrides.items()])
    for name, path in paths.items():
        OmegaConf.update(config, name, str(path))
    return config


def choose_device(name: str) -> torch.device:
    """The device that `--device` names; `UserError` where CUDA is requested and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here. Use --device cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def split_folder(data_dir: str | os.PathLike[str], split: str) -> Path:
    """Folder of a split's class folders; `UserError` where there is none."""
    root = Path(data_dir).expanduser() / split
    if not root.is_dir():
        raise UserError(f"{root} is not a folder. Give --data-dir the folder that holds '{split}', or another --split.")
    return root


def without_paths(arguments: argparse.Namespace, *others: str) -> dict[str, Any]:
    """Options for a file of results: without the names of files, which are not part of the results, and `others`."""
    return {name: value for name, value in vars(arguments).items() if name not in ("output", "figure", *others)}


def run_tool(
    build_parser: Callable[[], argparse.ArgumentParser],
    work: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None = None,
    interrupted: str = "Nothing was written.",
) -> int:
    """Exit status of a tool; 1 after an error of the user's, which is one line on stderr, and after Ctrl-C.

    `work` gets the options of `argv`, the command line without the tool's name (None: that of the process), and returns
    the exit status, None for 0. `--threads`, where there is one, is the number of CPU threads of the work.
    `interrupted` is a sentence: what Ctrl-C leaves.
    """
    before = torch.get_num_threads()
    try:
        arguments = build_parser().parse_args(argv)
        torch.set_num_threads(getattr(arguments, "threads", None) or before)
        return work(arguments) or 0
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"Interrupted. {interrupted}", file=sys.stderr)
    finally:
        torch.set_num_threads(before)
    return 1


class Run:
    """Work whose results are saved whenever a part is complete, and which Ctrl-C or SIGTERM may end between parts.

    Subclasses have `arguments`, `results`, and `missing`, names of the parts not yet measured; and define
    `run(console, save)`, `report()` (for `write_rows`), `tables()`, `notes()` (lines below the tables) and, where there
    is a `--figure`, `draw()`.
    """

    draw: Callable[[], Figure] | None = None

    def main(self) -> int:
        """Run until done or stopped; returns the exit status: 1 where something is missing."""

        def save() -> None:
            if self.arguments.output is not None:
                with contextlib.suppress(UserError, OSError):  # the last write tries again, and reports it
                    write_rows(self.arguments.output, self.report())

        return until_stopped(lambda: self.run(Console(stderr=True), save), self.finish)

    def finish(self) -> int:
        """Print what is complete and write the files; returns the exit status."""
        if not self.results:
            print("Interrupted. Nothing was written.", file=sys.stderr)
            return 1
        print_report(self.tables(), *self.notes())
        write_results(self.arguments, self.report(), self.draw)
        if self.missing:
            print(f"Interrupted. Missing: {', '.join(self.missing)}.", file=sys.stderr)
        return 1 if self.missing else 0


def provenance(device: torch.device) -> dict[str, Any]:
    """Hardware and versions of the packages, which results are stored with."""
    from src.tasks.environment import package_versions  # imports Lightning, which --help does not need

    return {"machine": machine_info(device), "versions": package_versions()}


def left_out_lines(skipped: Iterable[tuple[str, str, str]], words: str = "") -> Iterator[str]:
    """Lines on what was left out, of (name, reason, place): each reason of a name once, with its places."""
    places: dict[tuple[str, str], dict[str, None]] = {}
    for name, reason, place in skipped:
        places.setdefault((name, reason), {})[place] = None
    for (name, reason), at in places.items():
        yield f"{name} left out at {words}{', '.join(at)}: {reason}."


def shown(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The items, with a progress bar on stderr that is gone at the end."""
    yield from track(items, description, total, console=Console(stderr=True), transient=True)


def say(text: str) -> None:
    """Print text as it is, one line of it on one line."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def print_report(tables: Iterable[Table], *lines: str) -> None:
    """Print tables, as wide as the terminal or `TABLE_WIDTH` in a file or a pipe, and lines below them."""
    console = Console()
    console = console if console.is_terminal else Console(width=TABLE_WIDTH)
    for table in tables:
        console.print(table, "")
    for line in lines:
        say(line)


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


def digits(value: float) -> str:
    """A positive number to three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
