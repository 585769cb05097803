"""The search for the kernels' tile settings on a GPU, by coordinate descent, and the rows of their table."""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from rich.table import Table

from scatterbrain.errors import UserError
from scatterbrain.ops.common.projection import draw_projection
from scatterbrain.ops.scatterbrain import naive_scatterbrain_attention
from scatterbrain.ops.scatterbrain.triton import attention, unsupported
from scatterbrain.ops.scatterbrain.triton.tiles import Tiles, tiles_for, use_tiles
from src.analysis.benchmark.report import DTYPES, machine_line
from src.analysis.benchmark.timing import graph_milliseconds
from src.analysis.tools import digits, new_table, positive, print_report, shown
from src.utils.signals import until_stopped
from src.utils.text import first_line

WIDTH = 64
SCALE = WIDTH**-0.5
SEED = 0
# RMS of the difference from float64 over the RMS of the result, as in the tests of the kernels.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
GRADIENT_TOLERANCE = {name: 2 * value for name, value in TOLERANCE.items()} | {torch.float32: 1e-5}
# Registers that let two, three and four warps share a part of an SM, and None: what the compiler takes.
STAGES, WARPS, REGISTERS = (2, 3, 4), (1, 2, 4, 8), (None, 128, 168, 232)
# Values of each setting, in the order of the search; matrix products take 16 rows at least.
VALUES: dict[str, tuple[int | None, ...]] = {
    **{"sum_rows": (16, 32, 64, 128, 256), "sum_programs": (64, 128, 256, 512, 1024, 2048, 4096)},
    **{"sum_warps": (2, 4, 8), "sum_stages": STAGES},
    **{"query_rows": (16, 32, 64, 128), "key_rows": (16, 32, 64, 128), "query_tiles": (1, 2, 4, 8, 16)},
    **{"query_warps": WARPS, "query_stages": STAGES, "query_registers": REGISTERS},
    **{"dq_rows": (16, 32), "dq_keys": (16, 32, 64, 128)},
    **{"dq_warps": WARPS, "dq_stages": STAGES, "dq_registers": REGISTERS},
    **{"dk_rows": (16, 32), "dk_queries": (16, 32, 64, 128)},
    **{"dk_warps": WARPS, "dk_stages": STAGES, "dk_registers": REGISTERS},
}
MAX_SWEEPS = 4
TENSORS = ("output", "gradient of query", "gradient of key", "gradient of value")
# A candidate replaces the best so far where it is faster by this part: less is noise.
MIN_GAIN = 0.01
REPEATS = 15


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
        """Length at which results are compared with the specification, whose matrices are N x N for each feature.

        It leaves the same remainder by every tile, so that masks fall as in the whole.
        """
        return self.length if self.length <= 1024 else 512 + self.length % 512


def outputs(module: Callable[..., Sequence[torch.Tensor]], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients of a module, in the order of `TENSORS`."""
    *leaves, gradient = (x.detach() for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    out = module(*leaves)[0]
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


SHAPES = (Shape(128, 3136, 49, 12), Shape(128, 784, 12, 3), Shape(16, 12544, 49, 12), Shape(1, 65536, 49, 12))


class Workload:
    """Calls of the kernels on one shape, their time, and their errors against the float64 specification."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, passes: Sequence[str]) -> None:
        self.shape, self.dtype, self.device, self.passes = shape, dtype, device, passes
        self.checked = sorted({0, shape.batch - 1})  # sequences that are compared
        *tensors, projection = self.inputs(shape.checked_length)
        options = {"projection": projection.double(), "window": shape.window, "scale": SCALE}
        attend = functools.partial(naive_scatterbrain_attention, **options)
        self.expected = [x.cpu() for x in outputs(attend, [x[self.checked].double() for x in tensors])]

    def inputs(self, length: int) -> tuple[torch.Tensor, ...]:
        """Query, key, value and gradient (B, 1, length, 64), and projection (R, 64): the same at each call."""
        generator = torch.Generator(self.device).manual_seed(SEED)
        size = (self.shape.batch, 1, length, WIDTH)
        tensors = (torch.randn(size, generator=generator, device=self.device).to(self.dtype) for _ in range(4))
        return *tensors, draw_projection(self.shape.projections, WIDTH, SEED).to(self.device, self.dtype)

    def call(self, length: int, attention_pass: str) -> Callable[[], Sequence[torch.Tensor]]:
        """One call, giving the output and, in training, the gradients."""
        *tensors, projection = self.inputs(length)

        def attend(*tensors: torch.Tensor) -> tuple[torch.Tensor]:
            return (attention(*tensors, self.shape.window, scale=SCALE, projection=projection, cosh=True),)

        forward = torch.inference_mode()(lambda: attend(*tensors[:3]))
        return forward if attention_pass == "forward" else functools.partial(outputs, attend, tensors)

    def error(self, tiles: Tiles) -> str | None:
        """What is wrong with the results of a candidate, None where nothing is."""
        for attention_pass in self.passes:
            with use_tiles(tiles):
                results = self.call(self.shape.checked_length, attention_pass)()
            for name, expected, result in zip(TENSORS, self.expected, results, strict=False):
                error = ((result[self.checked].double().cpu() - expected).norm() / expected.norm()).item()
                tolerance = (TOLERANCE if name == "output" else GRADIENT_TOLERANCE)[self.dtype]
                if not error <= tolerance:
                    return f"wrong: {attention_pass}, {name}: {error:.2g} is above {tolerance:.2g}"
        return None

    def milliseconds(self, tiles: Tiles) -> float | None:
        """Device time of a candidate, geometric mean over the passes; None where a CUDA graph cannot capture it."""
        with use_tiles(tiles):
            calls = (self.call(self.shape.length, attention_pass) for attention_pass in self.passes)
            found = [graph_milliseconds(call, REPEATS) for call in calls]
        torch.cuda.empty_cache()  # what a graph leaves behind, only another graph could use
        return None if None in found else statistics.geometric_mean(found)


@dataclass
class Search:
    """The tiles of one shape: `run` changes one setting at a time, as long as that makes the kernels faster."""

    best: Tiles  # the fastest so far; before `run` the present ones
    milliseconds: float = math.inf  # their time; infinite where the present ones do not run
    present_milliseconds: float = math.inf  # that of the tiles it started from
    tried: int = 0  # number of candidates
    left_out: Counter[str] = field(default_factory=Counter)  # reasons why candidates do not count, with their number

    def run(self, workload: Workload) -> None:
        """Search; a workload of the forward pass alone leaves the gradients' settings as they are.

        Raises:
            RuntimeError: the device no longer works, as after an illegal access.
        """
        seen: set[Tiles] = set()
        self.attempt(workload, self.best, seen)
        self.present_milliseconds = self.milliseconds
        names = [name for name in VALUES if "training" in workload.passes or not name.startswith(("dq_", "dk_"))]
        for _ in range(MAX_SWEEPS):
            before = self.best
            for name in names:
                for value in VALUES[name]:
                    self.attempt(workload, replace(self.best, **{name: value}), seen)
            if self.best == before:
                return

    def attempt(self, workload: Workload, tiles: Tiles, seen: set[Tiles]) -> None:
        """Time a candidate that is new; it becomes the best where it is faster, and right."""
        if tiles in seen:
            return
        seen.add(tiles)
        self.tried += 1
        try:
            milliseconds = workload.milliseconds(tiles)
            faster = milliseconds is not None and milliseconds < (1 - MIN_GAIN) * self.milliseconds
            reason = "a CUDA graph cannot capture it" if milliseconds is None else None
            if faster:
                reason = workload.error(tiles)
        except Exception as error:  # whatever the compiler raises
            reason = f"{type(error).__name__}: {first_line(error)}"
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # raises where the device is lost
        if reason is not None:
            self.left_out[reason] += 1
        elif faster:
            self.best, self.milliseconds = tiles, milliseconds


def table_rows(found: Mapping[Shape, Tiles], itemsize: int, device_class: int) -> list[str]:
    """Lines for `TABLE` of the kernels' `tiles.py`, whose first row that fits is taken.

    `itemsize` is that of the dtype in bytes, `device_class` the major version of the compute capability.
    """
    lines: list[str] = []
    for shape in sorted(found, key=lambda shape: (shape.length, shape.window, shape.padded_features)):
        changed = (x.name for x in fields(Tiles) if getattr(found[shape], x.name) != getattr(Tiles(), x.name))
        tiles = f"Tiles({', '.join(f'{name}={getattr(found[shape], name)}' for name in changed)})"
        row = f"({shape.length}, {shape.window}, {shape.padded_features}, {itemsize}, {device_class}, {tiles}),"
        lines += [f"    # measured with B = {shape.batch}"]
        lines += textwrap.wrap(row, 120, initial_indent="    ", subsequent_indent=" " * 8)
    return lines


def result_table(searches: Mapping[Shape, Search]) -> Table:
    """A row for each shape."""
    columns = ("shape", "tried", "present ms", "best ms", "ratio")
    table = new_table("Tiles of the fused attention", columns, columns[:1])
    for shape, search in searches.items():
        present = search.present_milliseconds
        times = (present, search.milliseconds, search.milliseconds / present if present < math.inf else math.inf)
        table.add_row(str(shape), str(search.tried), *(digits(x) if math.isfinite(x) else "-" for x in times))
    return table


def tune(arguments: argparse.Namespace) -> int:
    """Search the tiles of each shape until done or stopped, and print the results; returns the exit status.

    Raises:
        UserError: there is no CUDA device, or the kernels do not take a shape.
    """
    if not torch.cuda.is_available():
        raise UserError("Tiles are measured on a CUDA device, and PyTorch finds none here.")
    device, dtype = torch.device("cuda"), DTYPES[arguments.dtype]
    shapes = tuple(dict.fromkeys(arguments.shapes))
    check_shapes(shapes, dtype, device)
    # before anything runs: after a fault the device answers nothing
    machine, device_class = machine_line(device), torch.cuda.get_device_capability(device)[0]
    searches: dict[Shape, Search] = {}
    stopped = ["interrupted"]

    def search_all() -> None:
        try:
            for shape in shown(shapes, "Searching"):
                start = tiles_for(shape.length, shape.window, shape.padded_features, WIDTH, dtype, device)
                workload = Workload(shape, dtype, device, arguments.passes)
                searches[shape] = Search(start)
                searches[shape].run(workload)
            stopped.clear()
        except RuntimeError as error:  # the device or its memory: what was measured before is kept
            stopped[0] = f"stopped at {shape}: {first_line(error)}"

    def finish() -> int:
        found = {shape: search.best for shape, search in searches.items() if math.isfinite(search.milliseconds)}
        rows = table_rows(found, dtype.itemsize, device_class)
        head = "Rows for TABLE of scatterbrain/ops/scatterbrain/triton/tiles.py:" if rows else "Nothing was measured."
        reasons = [f"{shape}: {n} left out: {x}" for shape in searches for x, n in searches[shape].left_out.items()]
        print_report([result_table(searches)] if searches else [], *reasons, head, *rows, machine)
        for reason in stopped:
            print(f"Error: {reason}.", file=sys.stderr)
        return len(stopped)

    return until_stopped(search_all, finish)


def check_shapes(shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> None:
    """Raise `UserError` for a shape that the kernels do not take, before minutes are spent."""
    token = torch.empty(1, 1, 1, WIDTH, dtype=dtype, device=device)
    for shape in shapes:
        reason = unsupported(token, token, token.new_empty(shape.projections, WIDTH), cosh=True)
        if reason is not None:
            raise UserError(f"--shapes {shape}: the fused attention cannot run this: {reason}.")
