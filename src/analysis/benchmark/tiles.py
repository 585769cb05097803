"""Measurement of the kernels' tile settings on a GPU, and the rows of their table."""

from __future__ import annotations

import argparse
import faulthandler
import functools
import itertools
import os
import statistics
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from rich.table import Table

from scatterbrain.errors import UserError
from scatterbrain.ops.common.projection import draw_projection
from scatterbrain.ops.scatterbrain import naive_scatterbrain_attention
from scatterbrain.ops.scatterbrain.triton import attention, unsupported
from scatterbrain.ops.scatterbrain.triton.tiles import Tiles, tiles_for, use_tiles
from src.analysis.benchmark.precision import TENSORS, outputs
from src.analysis.benchmark.report import cell, machine_line, print_report, shown
from src.analysis.benchmark.tile_search import GROUPS, Search, Trial, passes_of, ranking, ratio_to_present
from src.analysis.benchmark.timing import graph_milliseconds
from src.analysis.tools import figure, new_table, positive, until_stopped
from src.utils.parallel import run_in_processes
from src.utils.text import first_line

WIDTH = 64
SCALE = WIDTH**-0.5
SEED = 0
# RMS of the difference from float64 over the RMS of the result, as in the tests of the kernels.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
GRADIENT_TOLERANCE = {name: 2 * value for name, value in TOLERANCE.items()} | {torch.float32: 1e-5}
# The specification holds matrices N x N for each feature: it is taken on this many tokens at most, ...
MOST_CHECKED = 1024
# ... of sequences of a length that leaves the same remainder by every tile, so that masks fall as in the whole.
REMAINDER = 512
ROWS_SHOWN = 10
# Graph replays of each timing.
REPEATS = 15
# A candidate may take this long to compile and run; the process of one that hangs is ended.
CANDIDATE_SECONDS = 300.0


@dataclass(frozen=True)
class Shape:
    """What the kernels are measured on: sequences B, tokens N, window W, and random projections (two features each)."""

    batch: int
    length: int
    window: int
    projections: int

    def __str__(self) -> str:
        return f"{self.batch},{self.length},{self.window},{self.projections}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Type of an option that takes a shape."""
        parts = text.split(",")
        if len(parts) != len(fields(cls)):
            raise argparse.ArgumentTypeError(f"'{text}' is not B,N,W,R such as {SHAPES[0]}")
        return cls(*map(positive, parts))

    @property
    def padded_features(self) -> int:
        """Number of features as the kernels pad it: a power of two, 16 at least."""
        return max(16, 1 << (2 * self.projections - 1).bit_length())

    @property
    def checked_length(self) -> int:
        """Length at which results are compared with the specification."""
        return self.length if self.length <= MOST_CHECKED else REMAINDER + self.length % REMAINDER

    @property
    def checked_sequences(self) -> list[int]:
        """Sequences that are compared with the specification: the first and the last."""
        return sorted({0, self.batch - 1})

    def specification(self, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
        """Output and gradients in float64, on the CPU, of the sequences that are compared."""
        *tensors, projection = inputs(self, self.checked_length, dtype, device)
        options = {"projection": projection.double(), "window": self.window, "scale": SCALE}
        attend = functools.partial(naive_scatterbrain_attention, **options)
        return [x.cpu() for x in outputs(attend, [x[self.checked_sequences].double() for x in tensors])]


SHAPES = (Shape(128, 3136, 49, 12), Shape(128, 784, 12, 3), Shape(16, 12544, 49, 12), Shape(1, 65536, 49, 12))


@functools.lru_cache(maxsize=2)
def inputs(shape: Shape, length: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """Query, key, value and gradient (B, 1, length, 64), and projection (R, 64): the same in every process."""
    generator = torch.Generator(device).manual_seed(SEED)
    size = (shape.batch, 1, length, WIDTH)
    tensors = (torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(4))
    return *tensors, draw_projection(shape.projections, WIDTH, SEED).to(device, dtype)


@dataclass(frozen=True)
class Workload:
    """Calls of the kernels on one shape, and what they are compared with, see `Shape.specification`."""

    shape: Shape
    dtype: torch.dtype
    device: str
    expected: Sequence[torch.Tensor]

    def call(self, length: int, attention_pass: str) -> Callable[[], Sequence[torch.Tensor]]:
        """One call, giving the output and, in training, the gradients."""
        *tensors, projection = inputs(self.shape, length, self.dtype, self.device)

        def attend(*tensors: torch.Tensor) -> tuple[torch.Tensor]:
            return (attention(*tensors, self.shape.window, scale=SCALE, projection=projection, cosh=True),)

        def forward() -> tuple[torch.Tensor]:
            with torch.inference_mode():
                return attend(*tensors[:3])

        return forward if attention_pass == "forward" else functools.partial(outputs, attend, tensors)

    def check(self, tiles: Tiles, passes: Sequence[str]) -> str | None:
        """What is wrong with a candidate's results, None where nothing is.

        It runs at the full shape, which compiles what will be timed, and on a slice that is compared.

        Raises:
            Exception: whatever the compiler or the device raise.
        """
        for attention_pass in passes:
            for length in dict.fromkeys((self.shape.length, self.shape.checked_length)):
                with use_tiles(tiles):
                    results = self.call(length, attention_pass)()
                if not all(bool(x.isfinite().all()) for x in results):
                    return f"wrong: {attention_pass} gives values that are not finite"
            for name, expected, result in zip(TENSORS, self.expected, results, strict=False):
                result = result[self.shape.checked_sequences].double().cpu()
                error = ((result - expected).norm() / expected.norm()).item()
                tolerance = (TOLERANCE if name == "output" else GRADIENT_TOLERANCE)[self.dtype]
                if not error <= tolerance:
                    return f"wrong: {attention_pass}, {name}: {error:.2g} is above {tolerance:.2g}"
        return None

    def milliseconds(self, tiles: Tiles, attention_pass: str) -> float | None:
        """Device time of a call of a candidate, None where it cannot be captured in a CUDA graph."""
        with use_tiles(tiles):
            found = graph_milliseconds(self.call(self.shape.length, attention_pass), REPEATS)
        torch.cuda.empty_cache()  # what graphs leave behind only another graph could use, and the processes need memory
        return found


# Candidates in other processes ----------------------------------------------------------------------------------------

Check = Callable[[Tiles, tuple[str, ...]], str | None]


def device_works() -> bool:
    """Whether the device still takes work in this process: after an illegal access it does not."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def check_one(check: Check, passes: tuple[str, ...], seconds: float, case: tuple[Tiles, Path]) -> None:
    """Write to a file why a candidate is left out; end the process where it hangs or breaks the device."""
    tiles, path = case
    path.write_text(f"its process ended, or it took more than {seconds:g} s", encoding="utf-8")
    with open(os.devnull, "w", encoding="utf-8") as nothing:
        faulthandler.dump_traceback_later(seconds, exit=True, file=nothing)
        try:
            reason = check(tiles, passes) or ""
        except Exception as error:  # whatever the compiler or the device raise
            reason = f"{type(error).__name__}: {first_line(error)}"
        faulthandler.cancel_dump_traceback_later()
    path.write_text(reason, encoding="utf-8")
    if not device_works():
        os._exit(1)


def check_all(
    check: Check,
    jobs: int,
    candidates: Sequence[Tiles],
    passes: tuple[str, ...],
    seconds: float = CANDIDATE_SECONDS,
    method: str = "spawn",
) -> dict[Tiles, str | None]:
    """Why candidates are left out, or None: `check` runs them in other processes, where they can do no harm.

    A candidate may take `seconds`. Processes are spawned: one that is forked from a process with CUDA cannot use it.
    """
    with tempfile.TemporaryDirectory() as folder:
        cases = [(tiles, Path(folder, str(number))) for number, tiles in enumerate(candidates)]
        waiting, before = cases, None
        while waiting != before:  # as long as there is progress: processes that ended are replaced
            run_in_processes(functools.partial(check_one, check, passes, seconds), waiting, jobs, method=method)
            before, waiting = waiting, [case for case in waiting if not case[1].exists()]
        lost = "no process could check it"
        return {x: (path.read_text(encoding="utf-8") or None) if path.exists() else lost for x, path in cases}


# Output ---------------------------------------------------------------------------------------------------------------


def table_rows(found: Mapping[Shape, Tiles], itemsize: int, device_class: int) -> list[str]:
    """Lines for `TABLE` of the kernels' `tiles.py`, whose first row that fits is taken.

    `itemsize` is that of the dtype in bytes, `device_class` the major version of the compute capability.
    """
    lines: list[str] = []
    taken = set()
    for shape in sorted(found, key=lambda shape: (shape.length, shape.window, shape.padded_features)):
        key = (shape.length, shape.window, shape.padded_features)
        # the table does not know of B: a second row of the same shape would never be reached
        prefix = "    # " if key in taken else "    "
        note = "; the row above is taken" if key in taken else ""
        taken.add(key)
        lines.append(f"    # measured with B = {shape.batch}{note}")
        changed = (x.name for x in fields(Tiles) if getattr(found[shape], x.name) != getattr(Tiles(), x.name))
        tiles = f"Tiles({', '.join(f'{name}={getattr(found[shape], name)}' for name in changed)})"
        row = f"({', '.join(map(str, (*key, itemsize, device_class)))}, {tiles}),"
        lines += textwrap.wrap(row, 120, initial_indent=prefix, subsequent_indent=f"{prefix}    ")
    return lines


def result_table(shape: Shape, group: str, search: Search) -> Table:
    """The best of a group and the present settings; what was left out stands below."""
    names, passes = GROUPS[group], passes_of(group, search.passes)
    trials = search.trials[group]
    present = trials.get(search.present[group])
    ranked = ranking(trials)
    rows = ranked[:ROWS_SHOWN] + [trial for trial in ranked[ROWS_SHOWN:] if trial is present]
    columns = [*(name.replace("_", "\n") for name in names), *(f"{name}\nms" for name in passes), "ratio", ""]
    title = f"{shape}: {group}, {len(ranked)} measured"
    table = new_table(title, columns, columns[-1:], caption="\n".join(left_out(trials)))
    for trial in rows:
        # later groups change other settings
        chosen = all(getattr(trial.tiles, name) == getattr(search.best, name) for name in names)
        marks = ["present"] * (trial is present) + ["chosen"] * chosen
        times = (figure(statistics.median(trial.milliseconds[name])) for name in passes)
        ratio = cell(ratio_to_present(trial, present), "{:.3f}".format)
        table.add_row(*(str(getattr(trial.tiles, name)) for name in names), *times, ratio, ", ".join(marks))
    return table


def left_out(trials: Mapping[Tiles, Trial]) -> list[str]:
    """Why candidates were left out, and how many."""
    reasons = Counter(trial.reason for trial in trials.values() if trial.reason is not None)
    return [f"left out {number}: {reason}" for reason, number in reasons.most_common()]


# The run --------------------------------------------------------------------------------------------------------------


def check_shapes(shapes: Iterable[Shape], dtype: torch.dtype, device: torch.device) -> None:
    """Raise `UserError` for a shape that the kernels do not take, before minutes are spent."""
    token = torch.empty(1, 1, 1, WIDTH, dtype=dtype, device=device)
    for shape in shapes:
        reason = unsupported(token, token, token.new_empty(shape.projections, WIDTH), cosh=True)
        if reason is not None:
            raise UserError(f"--shapes {shape}: the fused attention cannot run this: {reason}.")


def make_search(shape: Shape, dtype: torch.dtype, passes: Sequence[str], jobs: int) -> Search:
    """The search of a shape on the GPU."""
    device = torch.device("cuda")
    workload = Workload(shape, dtype, device.type, shape.specification(dtype, device.type))
    torch.cuda.empty_cache()  # the specification takes far more than the kernels, and the processes need memory
    start = tiles_for(shape.length, shape.window, shape.padded_features, WIDTH, dtype, device)
    return Search(start, passes, functools.partial(check_all, workload.check, jobs), workload.milliseconds)


def tune(shapes: Sequence[Shape], dtype: torch.dtype, passes: Sequence[str], jobs: int) -> int:
    """Search the tiles of each shape until done or stopped, and print the results; returns the exit status.

    Raises:
        UserError: there is no CUDA device, or the kernels do not take a shape.
    """
    if not torch.cuda.is_available():
        raise UserError("Tiles are measured on a CUDA device, and PyTorch finds none here.")
    device = torch.device("cuda")
    check_shapes(shapes, dtype, device)
    # before anything runs: after a fault the device answers nothing
    machine, device_class = machine_line(device), torch.cuda.get_device_capability(device)[0]
    groups = [name for name in GROUPS if passes_of(name, passes)]
    searches: dict[Shape, Search] = {}
    broken_off = ["interrupted"]

    def search_all() -> None:
        try:
            for shape, group in shown(list(itertools.product(shapes, groups)), "Searching"):
                if shape not in searches:
                    searches[shape] = make_search(shape, dtype, passes, jobs)
                searches[shape].run_group(group)
            broken_off.clear()
        except RuntimeError as error:  # the device or its memory: what was measured before is kept
            broken_off[0] = f"broken off at {shape}, {group}: {first_line(error)}"

    def finish() -> int:
        found = {shape: search.best for shape, search in searches.items() if search.measured}
        rows = table_rows(found, dtype.itemsize, device_class)
        head = "Rows for TABLE of scatterbrain/ops/scatterbrain/triton/tiles.py:" if rows else "Nothing was measured."
        tables = [result_table(shape, name, search) for shape, search in searches.items() for name in search.trials]
        print_report(tables, head, *rows, machine)
        for reason in broken_off:
            print(f"Error: {reason}.", file=sys.stderr)
        return len(broken_off)

    return until_stopped(search_all, finish)
