"""Measure the tile settings of the fused attention kernels on this GPU, and print rows for their `tiles.py`.

Groups of settings that do not influence one another are searched one after another: the sums over keys and queries,
the queries of the forward pass, the gradients. A group's candidates are the settings around the best one so far, and
the search moves on as long as that improves. Settings for causal masking are not searched. Each candidate is first
compiled and run in another process, where it can do no harm, and compared with the float64 specification; those that
pass are timed here, one after another, by the replay of a CUDA graph: what the device needs, without the host. The
processes fill Triton's cache on disk, so that nothing is compiled here.

Inputs are one head of width 64, drawn from a normal distribution; the attention is Scatterbrain's (window and cosh
features). With several passes, what counts is the geometric mean of their times.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import multiprocessing
import signal
import statistics
import sys
import textwrap
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from scatterbrain.errors import UserError
from scatterbrain.ops.common.projection import draw_projection
from scatterbrain.ops.scatterbrain import naive_scatterbrain_attention
from scatterbrain.ops.scatterbrain.triton import attention, unsupported
from scatterbrain.ops.scatterbrain.triton.tiles import Tiles, tiles_for, use_tiles
from scripts.benchmark_attention import DTYPES, PASSES, graph_milliseconds
from src.utils.files import write_json
from src.utils.machine import machine_info, usable_cpus
from src.utils.scripts import (
    Parser,
    check_writable,
    comma_separated,
    figure,
    first_line,
    positive,
    progress_display,
    run_tool,
    say,
)
from src.utils.timing import in_turn

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
# Smallest and largest value of each setting. Matrix products take 16 rows at least.
LIMITS = {
    "sum_rows": (16, 256),
    "sum_programs": (64, 4096),
    "sum_warps": (2, 8),
    "sum_stages": (2, 4),
    "query_rows": (16, 128),
    "key_rows": (16, 128),
    "query_tiles": (1, 16),
    "query_warps": (1, 8),
    "query_stages": (2, 4),
    "query_registers": (96, 255),
    "dq_rows": (16, 32),
    "dq_keys": (16, 128),
    "dq_warps": (1, 8),
    "dq_stages": (2, 4),
    "dq_registers": (96, 255),
    "dk_rows": (16, 32),
    "dk_queries": (16, 128),
    "dk_warps": (1, 8),
    "dk_stages": (2, 4),
    "dk_registers": (96, 255),
}
# Registers that let two, three and four warps share a part of a multiprocessor, and None: what the compiler takes.
REGISTERS = (None, 128, 168, 232)
# A candidate differs from the best so far in this many settings at most: the search moves on to what is further away.
MAX_CHANGES = 3
MAX_MOVES = 4
FINALISTS, FINAL_ROUNDS = 5, 5
# What has been measured is kept unless another is faster by this part: less is noise.
MIN_GAIN = 0.01
ROWS_SHOWN = 10
# A candidate may take this long to compile, the start of its process counted; one that hangs is ended.
CANDIDATE_SECONDS = 300.0
# The budget is looked at between batches of this many candidates a process.
BATCH_PER_JOB = 4


@dataclass(frozen=True)
class Shape:
    """What the kernels are measured on.

    Attributes:
        batch: number of sequences B.
        length: number of tokens N.
        window: width W.
        rows: rows R of the projection, two features each.
    """

    batch: int
    length: int
    window: int
    rows: int

    def __str__(self) -> str:
        return f"{self.batch},{self.length},{self.window},{self.rows}"

    @property
    def padded_features(self) -> int:
        """Number of features as the kernels pad it: a power of two, 16 at least."""
        return max(16, 1 << (2 * self.rows - 1).bit_length())

    @property
    def checked_length(self) -> int:
        """Length at which results are compared with the specification."""
        return self.length if self.length <= MOST_CHECKED else REMAINDER + self.length % REMAINDER


SHAPES = (Shape(128, 3136, 49, 12), Shape(128, 784, 12, 3), Shape(16, 12544, 49, 12), Shape(1, 65536, 49, 12))


@dataclass(frozen=True)
class Group:
    """Settings that are searched together, since they influence one another and nothing else.

    Attributes:
        name: its title.
        fields: those of `Tiles`.
        passes: that they matter to.
    """

    name: str
    fields: tuple[str, ...]
    passes: tuple[str, ...]


GROUPS = (
    Group("sums", ("sum_rows", "sum_programs", "sum_warps", "sum_stages"), PASSES),
    Group(
        "queries", ("query_rows", "key_rows", "query_tiles", "query_warps", "query_stages", "query_registers"), PASSES
    ),
    Group("query gradient", ("dq_rows", "dq_keys", "dq_warps", "dq_stages", "dq_registers"), ("training",)),
    Group(
        "key gradients",
        ("dk_rows", "dk_queries", "dk_warps", "dk_stages", "dk_registers"),
        ("training",),
    ),
)


@dataclass(frozen=True)
class Verdict:
    """What the first run of a candidate showed.

    Attributes:
        reason: why it is left out; None where it may be timed.
        errors: RMS of the difference from the specification over the RMS of the result, by tensor.
    """

    reason: str | None = None
    errors: dict[str, float] = field(default_factory=dict)


@dataclass
class Trial:
    """A candidate and its figures.

    Attributes:
        tiles: the settings.
        verdict: of its first run.
        milliseconds: times of a call, by pass; none where it was left out.
    """

    tiles: Tiles
    verdict: Verdict
    milliseconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """Geometric mean of the passes' medians; infinite where it was left out."""
        if not self.milliseconds:
            return math.inf
        return statistics.geometric_mean(statistics.median(times) for times in self.milliseconds.values())


# Search: needs no GPU -------------------------------------------------------------------------------------------------


def groups_of(passes: Sequence[str]) -> list[Group]:
    """The groups that matter to some of the passes."""
    return [group for group in GROUPS if set(group.passes) & set(passes)]


def values_around(name: str, present: int | None) -> tuple[int | None, ...]:
    """Values of one setting that are tried beside the present one; None leaves it to the compiler."""
    low, high = LIMITS[name]
    if name.endswith("_registers"):
        return (present, *(value for value in REGISTERS if value != present))
    near = (present - 1, present + 1) if name.endswith("_stages") else (present // 2, present * 2)
    return (present, *(value for value in near if low <= value <= high))


def candidates_around(tiles: Tiles, group: Group) -> list[Tiles]:
    """The grid around `tiles` in the fields of `group`, nearest first, `tiles` itself before all others."""
    grid = itertools.product(*(values_around(name, getattr(tiles, name)) for name in group.fields))
    candidates = [replace(tiles, **dict(zip(group.fields, values, strict=True))) for values in grid]

    def changes(other: Tiles) -> int:
        return sum(getattr(other, name) != getattr(tiles, name) for name in group.fields)

    # the budget may end before the list does
    return sorted((other for other in candidates if changes(other) <= MAX_CHANGES), key=changes)


Prepare = Callable[[Sequence[Tiles], tuple[str, ...], float], dict[Tiles, Verdict]]
Measure = Callable[[Tiles, str], float | None]


class Search:
    """The search for the tiles of one shape.

    Args:
        start: the present settings.
        passes: that are timed.
        prepare: compiles and checks candidates in some passes, until a time of `clock` past which it begins no more.
        measure: milliseconds of a call of a candidate in a pass; None where it cannot be timed.
        batch_size: candidates that are prepared before they are timed.
        clock: in seconds.
    """

    def __init__(
        self,
        start: Tiles,
        passes: Sequence[str],
        prepare: Prepare,
        measure: Measure,
        batch_size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.start = self.best = start
        self.passes = tuple(passes)
        self.prepare = prepare
        self.measure = measure
        self.batch_size = batch_size
        self.clock = clock
        self.trials: dict[str, dict[Tiles, Trial]] = {}
        self.present: dict[str, Tiles] = {}
        self.unfinished: list[str] = []

    @property
    def measured(self) -> bool:
        """Whether anything was."""
        return any(trial.milliseconds for trials in self.trials.values() for trial in trials.values())

    def run_group(self, group: Group, deadline: float) -> None:
        """Search one group until nothing near is faster, or until the deadline; its best goes on to the next group."""
        trials = self.trials[group.name] = {}
        self.present[group.name] = self.best
        passes = tuple(name for name in group.passes if name in self.passes)
        for _ in range(MAX_MOVES):
            new = [tiles for tiles in candidates_around(self.best, group) if tiles not in trials]
            complete = self.try_all(new, trials, passes, deadline)
            before, self.best = self.best, self.choose(trials, passes)
            if not complete:
                self.unfinished.append(group.name)
                return
            if self.best == before:
                return

    def try_all(
        self, candidates: Sequence[Tiles], trials: dict[Tiles, Trial], passes: tuple[str, ...], deadline: float
    ) -> bool:
        """Prepare and time candidates by batches, into `trials`; whether all of them had their turn."""
        for start in range(0, len(candidates), self.batch_size):
            if self.clock() >= deadline:
                return False
            batch = candidates[start : start + self.batch_size]
            verdicts = self.prepare(batch, passes, deadline)
            for tiles in batch:
                if tiles in verdicts:
                    trials[tiles] = Trial(tiles, verdicts[tiles])
                    # what failed elsewhere is never run here: a fault of the device would end everything
                    if verdicts[tiles].reason is None:
                        self.time(trials[tiles], passes)
            if len(verdicts) < len(batch):
                return False
        return True

    def time(self, trial: Trial, passes: tuple[str, ...]) -> None:
        """Time a candidate once in each pass."""
        times = {name: self.measure(trial.tiles, name) for name in passes}
        if None in times.values():
            trial.verdict = replace(trial.verdict, reason="it cannot be captured in a CUDA graph")
            trial.milliseconds = {}
            return
        for name, value in times.items():
            trial.milliseconds.setdefault(name, []).append(value)

    def choose(self, trials: dict[Tiles, Trial], passes: tuple[str, ...]) -> Tiles:
        """The fastest, after the best few and the best so far ran in turn; the latter where the gain is noise."""
        finalists = ranking(trials)[:FINALISTS]
        kept = trials.get(self.best)
        if kept is not None and kept.milliseconds and kept not in finalists:
            finalists.append(kept)
        for trial in in_turn(finalists, FINAL_ROUNDS):
            if trial.milliseconds:
                self.time(trial, passes)
        winner = min(finalists, key=lambda trial: trial.score, default=None)
        if winner is None or not winner.milliseconds:
            return self.best
        if kept is not None and winner.score > (1 - MIN_GAIN) * kept.score:
            return self.best
        return winner.tiles


def ranking(trials: dict[Tiles, Trial]) -> list[Trial]:
    """The trials that were timed, fastest first."""
    return sorted((trial for trial in trials.values() if trial.milliseconds), key=lambda trial: trial.score)


def ratio_to_present(trial: Trial, present: Trial | None) -> float | None:
    """Time over that of the present settings, None where one of them was not timed."""
    if present is None or not trial.milliseconds or not present.milliseconds:
        return None
    return trial.score / present.score


def run_searches(
    shapes: Sequence[Shape],
    passes: Sequence[str],
    budget: float | None,
    make_search: Callable[[Shape], contextlib.AbstractContextManager[Search]],
    tell: Callable[[Shape, Group], None] = lambda shape, group: None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[dict[Shape, Search], str | None]:
    """Search all groups of all shapes, each with an equal share of the time that is left.

    Args:
        shapes: to search.
        passes: that are timed.
        budget: seconds, None without an end.
        make_search: the search of a shape, with what it holds while it runs.
        tell: called before each group.
        clock: in seconds.

    Returns:
        The searches, and what broke them off: None where nothing did.
    """
    groups = groups_of(passes)
    end = math.inf if budget is None else clock() + budget
    left = len(shapes) * len(groups)
    searches: dict[Shape, Search] = {}
    for shape in shapes:
        try:
            with make_search(shape) as search:
                searches[shape] = search
                for group in groups:
                    tell(shape, group)
                    search.run_group(group, clock() + (end - clock()) / left)
                    left -= 1
        except RuntimeError as error:  # the device or its memory: what was measured before is worth telling
            return searches, f"{shape}: {first_line(error)}"
    return searches, None


# Compilation in other processes ---------------------------------------------------------------------------------------

Check = Callable[[Tiles, tuple[str, ...]], Verdict]


def device_works() -> bool:
    """Whether the device still takes work in this process: after an illegal access it does not."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def serve(connection: Connection, check: Check) -> None:
    """What a process does: check the candidates that it is sent, until one breaks its device."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    usable = True
    while usable:
        try:
            tiles, passes = connection.recv()
        except EOFError:
            return
        try:
            verdict = check(tiles, passes)
        except Exception as error:  # whatever the compiler or the device have to say
            verdict = Verdict(f"{type(error).__name__}: {first_line(error)}")
            usable = device_works()
        connection.send((verdict, usable))


@dataclass(eq=False)
class Worker:
    """A process, and what it does."""

    process: BaseProcess
    connection: Connection
    tiles: Tiles | None = None
    since: float = 0.0

    def end(self) -> int | None:
        """End it; its exit status."""
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()
        return self.process.exitcode


class Workers:
    """Processes that compile and check, replaced where a candidate takes one down.

    Args:
        check: what they do; can be pickled.
        jobs: number of processes.
        seconds: that a candidate may take.
        method: how processes start. A process forked from one that uses CUDA cannot use it.
    """

    def __init__(self, check: Check, jobs: int, seconds: float = CANDIDATE_SECONDS, method: str = "spawn") -> None:
        self.check = check
        self.jobs = jobs
        self.seconds = seconds
        self.context = multiprocessing.get_context(method)
        self.idle: list[Worker] = []
        self.busy: list[Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in (*self.idle, *self.busy):
            worker.end()

    def start(self) -> Worker:
        """A new process."""
        connection, other_end = self.context.Pipe()
        process = self.context.Process(target=serve, args=(other_end, self.check), daemon=True)
        process.start()
        other_end.close()  # or the end of the process would not be seen
        return Worker(process, connection)

    def give(self, tiles: Tiles, passes: tuple[str, ...]) -> None:
        """Send a candidate to a process."""
        while self.idle and not self.idle[-1].process.is_alive():
            self.idle.pop().end()  # the system ended it while it waited
        worker = self.idle.pop() if self.idle else self.start()
        worker.connection.send((tiles, passes))
        worker.tiles, worker.since = tiles, time.monotonic()
        self.busy.append(worker)

    def run(self, candidates: Sequence[Tiles], passes: tuple[str, ...], deadline: float) -> dict[Tiles, Verdict]:
        """Verdicts on the candidates; past the deadline no other is begun.

        Args:
            candidates: to compile and check.
            passes: that they are run in.
            deadline: by `time.monotonic`.
        """
        waiting = deque(candidates)
        verdicts: dict[Tiles, Verdict] = {}
        while True:
            while waiting and len(self.busy) < self.jobs and time.monotonic() < deadline:
                self.give(waiting.popleft(), passes)
            if not self.busy:
                return verdicts
            oldest = min(worker.since for worker in self.busy)
            ready = wait(
                [worker.connection for worker in self.busy], max(0.0, oldest + self.seconds - time.monotonic())
            )
            for worker in list(self.busy):
                verdict, usable = None, False
                if worker.connection in ready:
                    verdict, usable = self.receive(worker)
                elif time.monotonic() - worker.since >= self.seconds:
                    worker.end()
                    verdict = Verdict(f"it took more than {self.seconds:g} s")
                if verdict is not None:
                    verdicts[worker.tiles] = verdict
                    self.busy.remove(worker)
                    if usable:
                        self.idle.append(worker)

    def receive(self, worker: Worker) -> tuple[Verdict, bool]:
        """The verdict of a process, and whether the process can go on."""
        try:
            verdict, usable = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            return Verdict(f"its process ended with status {worker.end()}"), False
        if not usable:
            worker.end()
        return verdict, usable


# The attention --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def draw(shape: Shape, length: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """Query, key, value and gradient (B, 1, length, 64), and projection (R, 64): the same in every process."""
    generator = torch.Generator(device).manual_seed(SEED)
    size = (shape.batch, 1, length, WIDTH)
    tensors = (torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(4))
    return *tensors, draw_projection(shape.rows, WIDTH, SEED).to(device, dtype)


def checked_sequences(shape: Shape) -> list[int]:
    """Sequences that are compared with the specification: the first and the last."""
    return sorted({0, shape.batch - 1})


def specification(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """Output and gradients in float64, on the CPU, of the sequences that are compared."""
    *tensors, projection = draw(shape, shape.checked_length, dtype, device)
    query, key, value, gradient = (x[checked_sequences(shape)].double() for x in tensors)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out, _ = naive_scatterbrain_attention(*leaves, projection.double(), shape.window, SCALE)
    gradients = torch.autograd.grad(out, leaves, gradient)
    return {name: x.detach().cpu() for name, x in zip(RESULTS, (out, *gradients), strict=True)}


RESULTS = ("out", "gradient of query", "gradient of key", "gradient of value")


@dataclass(frozen=True)
class Workload:
    """Calls of the kernels on one shape.

    Attributes:
        shape: of the inputs.
        dtype: of the inputs.
        device: where they are.
    """

    shape: Shape
    dtype: torch.dtype
    device: str

    def call(self, length: int, attention_pass: str) -> Callable[[], tuple[torch.Tensor, ...]]:
        """One call, giving the output and, in training, the gradients."""
        *tensors, gradient, projection = draw(self.shape, length, self.dtype, self.device)

        def attend(*tensors: torch.Tensor) -> torch.Tensor:
            return attention(*tensors, self.shape.window, scale=SCALE, projection=projection, cosh=True)

        if attention_pass == "forward":

            def forward() -> tuple[torch.Tensor, ...]:
                with torch.inference_mode():
                    return (attend(*tensors),)

            return forward
        leaves = [x.detach().requires_grad_() for x in tensors]

        def training() -> tuple[torch.Tensor, ...]:
            out = attend(*leaves)
            return (out.detach(), *torch.autograd.grad(out, leaves, gradient))

        return training


@dataclass(frozen=True)
class KernelCheck:
    """Runs a candidate: at the full shape, which compiles what will be timed, and on a slice that can be compared.

    Attributes:
        workload: its calls.
        expected: see `specification`.
    """

    workload: Workload
    expected: dict[str, torch.Tensor]

    def __call__(self, tiles: Tiles, passes: tuple[str, ...]) -> Verdict:
        """The verdict on the candidate.

        Raises:
            Exception: whatever the compiler or the device raise.
        """
        shape, dtype = self.workload.shape, self.workload.dtype
        errors: dict[str, float] = {}
        for attention_pass in passes:
            for length in dict.fromkeys((shape.length, shape.checked_length)):
                with use_tiles(tiles):
                    results = self.workload.call(length, attention_pass)()
                if not all(bool(x.isfinite().all()) for x in results):
                    return Verdict(f"wrong: {attention_pass} gives values that are not finite", errors)
            for name, result in zip(RESULTS, results, strict=False):
                error = relative_error(self.expected[name], result[checked_sequences(shape)])
                errors[f"{attention_pass}: {name}"] = error
                tolerance = (TOLERANCE if name == "out" else GRADIENT_TOLERANCE)[dtype]
                if not error <= tolerance:
                    return Verdict(f"wrong: {attention_pass}, {name}: {error:.2g} is above {tolerance:.2g}", errors)
        return Verdict(None, errors)


def relative_error(expected: torch.Tensor, result: torch.Tensor) -> float:
    """RMS of the difference over the RMS of `expected`."""
    expected, result = expected.double().cpu(), result.double().cpu()
    return ((result - expected).norm() / expected.norm()).item()


def check_shapes(arguments: argparse.Namespace, device: torch.device) -> None:
    """Refuse what the kernels do not take before minutes are spent.

    Raises:
        UserError: there is such a shape.
    """
    token = torch.empty(1, 1, 1, WIDTH, dtype=DTYPES[arguments.dtype], device=device)
    for shape in arguments.shapes:
        reason = unsupported(token, token, token.new_empty(shape.rows, WIDTH), cosh=True)
        if reason is not None:
            raise UserError(f"--shapes {shape}: the fused attention cannot run this: {reason}.")


@contextlib.contextmanager
def gpu_search(shape: Shape, arguments: argparse.Namespace) -> Iterator[Search]:
    """The search of a shape on the GPU, with its processes."""
    dtype, device = DTYPES[arguments.dtype], torch.device("cuda")
    start = tiles_for(shape.length, shape.window, shape.padded_features, WIDTH, dtype, device)
    workload = Workload(shape, dtype, device.type)

    def measure(tiles: Tiles, attention_pass: str) -> float | None:
        with use_tiles(tiles):
            milliseconds = graph_milliseconds(workload.call(shape.length, attention_pass), arguments.repeats)
        torch.cuda.empty_cache()  # what graphs leave behind only another graph could use, and the processes need memory
        return milliseconds

    check = KernelCheck(workload, specification(shape, dtype, device.type))
    torch.cuda.empty_cache()  # the specification takes far more than the kernels, and the processes need memory
    with Workers(check, arguments.jobs) as workers:
        yield Search(start, arguments.passes, workers.run, measure, BATCH_PER_JOB * arguments.jobs)


# Output ---------------------------------------------------------------------------------------------------------------


def settings_text(tiles: Tiles) -> str:
    """The settings that differ from the defaults of `Tiles`, as code."""
    defaults = Tiles()
    names = (item.name for item in fields(Tiles))
    changed = (name for name in names if getattr(tiles, name) != getattr(defaults, name))
    return f"Tiles({', '.join(f'{name}={getattr(tiles, name)}' for name in changed)})"


def table_rows(found: dict[Shape, Tiles], itemsize: int, device_class: int) -> list[str]:
    """Lines for `TABLE` of `scatterbrain/ops/scatterbrain/triton/tiles.py`, whose first row that fits is taken.

    Args:
        found: the best tiles of each shape.
        itemsize: bytes of the dtype.
        device_class: major version of the compute capability.
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
        row = f"({', '.join(map(str, (*key, itemsize, device_class)))}, {settings_text(found[shape])}),"
        lines += textwrap.wrap(row, 120, initial_indent=prefix, subsequent_indent=f"{prefix}    ")
    return lines


def result_table(shape: Shape, group: Group, search: Search) -> Table:
    """The best of a group and the present settings."""
    trials = search.trials[group.name]
    present = trials.get(search.present[group.name])
    passes = [name for name in group.passes if name in search.passes]
    ranked = ranking(trials)
    shown = ranked[:ROWS_SHOWN]
    if present in ranked[ROWS_SHOWN:]:
        shown.append(present)
    table = Table(title=f"{shape}: {group.name}, {len(ranked)} measured", title_justify="left")
    for header in (*(name.replace("_", " ") for name in group.fields), *(f"{name} ms" for name in passes), "ratio"):
        table.add_column(header, justify="right")
    table.add_column("")
    for trial in shown:
        ratio = ratio_to_present(trial, present)
        marks = {"present": trial is present, "chosen": is_chosen(trial, group, search)}
        table.add_row(
            *(str(getattr(trial.tiles, name)) for name in group.fields),
            *(figure(statistics.median(trial.milliseconds[name])) for name in passes),
            "-" if ratio is None else f"{ratio:.3f}",
            ", ".join(text for text, applies in marks.items() if applies),
        )
    return table


def is_chosen(trial: Trial, group: Group, search: Search) -> bool:
    """Whether the search took this trial of a group; later groups change other settings."""
    return all(getattr(trial.tiles, name) == getattr(search.best, name) for name in group.fields)


def left_out(trials: dict[Tiles, Trial]) -> list[str]:
    """Why candidates were left out, and how many."""
    reasons = Counter(trial.verdict.reason for trial in trials.values() if trial.verdict.reason is not None)
    return [f"left out {number}: {reason}" for reason, number in reasons.most_common()]


def content(searches: dict[Shape, Search]) -> list[dict[str, Any]]:
    """The searches as JSON has them."""
    shapes = []
    for shape, search in searches.items():
        groups = []
        for name, trials in search.trials.items():
            present = trials.get(search.present[name])
            rows = [
                {
                    "tiles": asdict(trial.tiles),
                    "milliseconds": {key: statistics.median(times) for key, times in trial.milliseconds.items()},
                    "samples": trial.milliseconds,
                    "ratio_to_present": ratio_to_present(trial, present),
                    "errors": trial.verdict.errors,
                    "left_out": trial.verdict.reason,
                }
                for trial in trials.values()
            ]
            groups.append({"group": name, "finished": name not in search.unfinished, "trials": rows})
        shapes.append(
            {"shape": asdict(shape), "present": asdict(search.start), "best": asdict(search.best), "groups": groups}
        )
    return shapes


def report(console: Console, searches: dict[Shape, Search], rows: Sequence[str]) -> None:
    """Print tables, what was left out, and the rows to paste."""
    for shape, search in searches.items():
        for group in GROUPS:
            if group.name in search.trials:
                console.print(result_table(shape, group, search))
                for line in left_out(search.trials[group.name]):
                    say(line)
                if group.name in search.unfinished:
                    say("The budget ended before all candidates had their turn.")
    say(
        "\n".join(
            ("Rows for TABLE of scatterbrain/ops/scatterbrain/triton/tiles.py:", *rows)
            if rows
            else ("Nothing was measured.",)
        )
    )


def parse_shape(text: str) -> Shape:
    """Type of the option `--shapes`."""
    parts = text.split(",")
    if len(parts) != len(fields(Shape)):
        raise argparse.ArgumentTypeError(f"'{text}' is not B,N,W,R such as {SHAPES[0]}")
    return Shape(*map(positive, parts))


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--shapes",
        type=parse_shape,
        nargs="+",
        default=SHAPES,
        metavar="B,N,W,R",
        help=f"sequences, tokens, window, rows of the projection ({' '.join(map(str, SHAPES))})",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="(bfloat16)")
    parser.add_argument(
        "--passes",
        type=comma_separated(PASSES),
        default=PASSES,
        metavar="NAMES",
        help="forward (in inference mode), training (forward and backward) (forward,training)",
    )
    parser.add_argument(
        "--budget", type=positive, metavar="SECONDS", help="stop then and report what was measured (until all is)"
    )
    parser.add_argument("--jobs", type=positive, metavar="J", help="processes that compile (as many as usable CPUs)")
    parser.add_argument("--repeats", type=positive, default=15, metavar="R", help="samples of each timing (15)")
    parser.add_argument("--output", metavar="FILE", help="write all figures as JSON")
    return parser


def tune(arguments: argparse.Namespace) -> int:
    """Search, print the results and write the file; returns the exit status.

    Raises:
        UserError: there is no CUDA device, or the kernels do not take a shape.
    """
    check_writable(arguments.output)
    if not torch.cuda.is_available():
        raise UserError("Tiles are measured on a CUDA device, and PyTorch finds none here.")
    arguments.jobs = arguments.jobs or usable_cpus()
    arguments.shapes = tuple(dict.fromkeys(arguments.shapes))
    device = torch.device("cuda")
    check_shapes(arguments, device)
    # asked for first: after a fault the device answers nothing
    machine = machine_info(device)
    device_class = torch.cuda.get_device_capability(device)[0]
    with progress_display(Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(arguments.shapes) * len(groups_of(arguments.passes)))
        done = itertools.count()
        searches, broken_off = run_searches(
            arguments.shapes,
            arguments.passes,
            arguments.budget,
            lambda shape: gpu_search(shape, arguments),
            lambda shape, group: progress.update(task, completed=next(done), description=f"{shape}: {group.name}"),
        )
    found = {shape: search.best for shape, search in searches.items() if search.measured}
    rows = table_rows(found, DTYPES[arguments.dtype].itemsize, device_class)
    report(Console(), searches, rows)
    say(", ".join(f"{name} {value}" for name, value in machine.items() if value is not None))
    if arguments.output is not None:
        settings = {**vars(arguments), "shapes": list(map(str, arguments.shapes)), "device_class": device_class}
        results = {"shapes": content(searches), "table": rows, "broken_off": broken_off}
        write_json(arguments.output, {"machine": machine, "settings": settings, **results})
    if broken_off is not None:
        print(f"Error: broken off at {broken_off}.", file=sys.stderr)
    return 0 if broken_off is None else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what `argv` asks for; returns the exit status."""
    return run_tool(build_parser(), tune, argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted. Nothing was written.")
