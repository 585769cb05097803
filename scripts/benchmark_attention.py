"""Time and memory of every attention against sequence length, beside other implementations in the same run.

Machines are shared and noisy, so what counts are ratios: in each round every candidate runs once at every length, in
turn, its time is divided by that of PyTorch's scaled_dot_product_attention (SDPA) at that length in the same round,
and the median of the rounds is reported; so is the growth from one length to the next. Sizes (window, features,
clusters) follow from --memory-fraction for each length; for the growth they are kept as they are at --growth-length,
in rows of their own. Where Scatterbrain's kernels have tiles of queries to compute from pairs, which depends on the
inputs (README.md of the kernels), their number is reported, and a draw of the inputs without any has a row of its own.

Memory is the peak of what one call allocates, its inputs not counted and its output counted. CUDA: the caching
allocator's peak. CPU: the peak of live bytes from PyTorch's allocator, as its profiler records every allocation and
release, those inside fused kernels too; scratch space that BLAS libraries take from the system is not seen.

On CUDA each length is measured on its own, since the growth there is that of graph replays; on the CPU it is taken
within rounds, which all lengths share. Ctrl-C and SIGTERM end the run with what is complete by then: lengths on CUDA,
passes on the CPU, in each of which all rows are there. --output is written after each of them, with "complete": false
until all are done. On CUDA, --jobs processes first fill Triton's cache on disk.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import statistics
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # before torch is imported: its profiler writes to stderr otherwise

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from scatterbrain.attention import ATTENTIONS, COMPARED, create_attention
from scatterbrain.attention.sblocal import SBLocalAttention
from scatterbrain.errors import UserError
from scatterbrain.ops.common.features import log_softmax_features
from scatterbrain.ops.common.projection import draw_projection
from scatterbrain.ops.scatterbrain.triton import choose_backend, count_marked_tiles
from src.utils.files import write_json
from src.utils.machine import machine_info
from src.utils.scripts import (
    Parser,
    check_figure,
    check_writable,
    choose_device,
    comma_separated,
    compile_ahead,
    console_for_tables,
    default_jobs,
    figure,
    first_line,
    fraction,
    positive,
    positive_list,
    positive_sequence,
    progress_display,
    run_tool,
    save_figure,
    saved_until_stopped,
    without_paths,
)
from src.utils.timing import in_turn, seconds_per_call

PASSES = ("forward", "training")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BASELINE = "SDPA"
CUDA_BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Sizes that have a column of their own in the tables, and how those of the clusters are called there.
WINDOW, FEATURES = "local_context", "nb_features"
SYMBOLS = {"num_landmarks": "C", "num_query_landmarks": "Q", "num_exact": "X"}
# Draws of the inputs in which one without a marked tile is looked for.
OTHER_DRAWS = 20
# A sample shorter than this says more about the clock than about the candidate; calls are repeated until it is passed.
SHORTEST_SAMPLE_SECONDS = 2e-3
# Of the tables where they are not shown on a terminal.
WIDTH = 132
# What fast-transformers' local products hold at positions without a key.
NO_KEY = -1e20

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Function = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Candidate:
    """One implementation at one length.

    Attributes:
        name: its row in the tables.
        kind: `attention` (ours), `growth` (ours, with the sizes of another length), `draw` (one of these with other
            inputs), `compiled` or `peer`.
        function: query (B, N, H, E), key and value likewise, to output (B, N, H, E).
        sizes: what its memory is spent on, by the names of the options; empty for full attention.
        memory_fraction: memory over that of full attention, by the published rule of counting.
        module: of ours, None of others.
        draw: which of the draws of inputs it takes.
        marked_tiles: tiles of queries that its kernels compute from pairs; None where it has no such kernels.
    """

    name: str
    kind: str
    function: Function
    sizes: dict[str, int] = field(default_factory=dict)
    memory_fraction: float = 1.0
    module: torch.nn.Module | None = None
    draw: int = 0
    marked_tiles: int | None = None

    @property
    def window(self) -> int:
        """Number of keys in the window, 0 for none."""
        return self.sizes.get(WINDOW, 0)

    @property
    def features(self) -> int:
        """Number of random features, 0 for none."""
        return self.sizes.get(FEATURES, 0)


@dataclass
class Measurement:
    """Figures of one candidate at one length in one pass; times are those of one call."""

    name: str
    kind: str
    length: int
    attention_pass: str
    window: int
    features: int
    sizes: dict[str, int]
    memory_fraction: float
    temporary_bytes: int
    calls_per_sample: int
    milliseconds: float
    milliseconds_min: float
    ratio_to_sdpa: float
    device_milliseconds: float | None
    milliseconds_per_round: list[float] = field(repr=False)
    draw: int = 0
    marked_tiles: int | None = None


@dataclass(frozen=True)
class KernelCase:
    """A call that compiles kernels of ours.

    Attributes:
        attention: its name.
        length: number of tokens N.
        budget_length: that its sizes fit.
        attention_pass: one of `PASSES`.
    """

    attention: str
    length: int
    budget_length: int
    attention_pass: str


@dataclass
class Entry:
    """A candidate at one length in one pass, while it is measured."""

    candidate: Candidate
    length: int
    attention_pass: str
    call: Callable[[], object]
    number: int = 1
    temporary_bytes: int = 0
    device_milliseconds: float | None = None
    milliseconds: list[float] = field(default_factory=list)


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--attentions",
        type=comma_separated(tuple(ATTENTIONS)),
        default=COMPARED,
        metavar="NAMES",
        help=f"separated by commas ({','.join(COMPARED)})",
    )
    parser.add_argument(
        "--lengths", type=positive_list, default=(784, 3136, 12544), metavar="N,...", help="(784,3136,12544)"
    )
    parser.add_argument(
        "--passes",
        type=comma_separated(PASSES),
        default=PASSES,
        metavar="NAMES",
        help="forward (in inference mode), training (forward and backward) (forward,training)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto: CUDA where it is)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="(float32)")
    parser.add_argument(
        "--batch",
        type=positive_sequence,
        default=(4,),
        metavar="B,...",
        help="of all lengths, or one of each length, from the shortest to the longest (4)",
    )
    parser.add_argument("--heads", type=positive, default=1, metavar="H", help="(1)")
    parser.add_argument("--dim", type=positive, default=64, metavar="E", help="width of a head (64)")
    parser.add_argument("--memory-fraction", type=fraction, default=1 / 32, metavar="F", help="budget (1/32)")
    parser.add_argument(
        "--std", type=fraction, default=1.0, metavar="S", help="deviation of the queries' and keys' elements (1)"
    )
    parser.add_argument(
        "--growth-length",
        type=positive,
        metavar="N",
        help="length whose window, features, ... the growth is taken with",
    )
    parser.add_argument(
        "--growth-only",
        action="store_true",
        help="leave out sizes that fit other lengths than --growth-length; long ones take most of the time",
    )
    parser.add_argument("--threads", type=positive, metavar="T", help="CPU threads (PyTorch's choice)")
    parser.add_argument("--repeats", type=positive, default=15, metavar="R", help="rounds (15)")
    parser.add_argument("--compile", action="store_true", help="also time the attentions under torch.compile")
    parser.add_argument("--no-peers", action="store_true", help="of the peers, time SDPA alone")
    parser.add_argument(
        "--memory-limit",
        type=fraction,
        default=2.0,
        metavar="GIB",
        help="leave out softmax written out where its N x N matrices take more (2)",
    )
    parser.add_argument(
        "--jobs",
        type=positive,
        default=default_jobs(),
        metavar="J",
        help="processes that compile kernels ahead on CUDA, 1 for none (as many as usable CPUs, 8 at most)",
    )
    parser.add_argument("--output", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--figure", metavar="FILE", help="plot time against length (.png, .pdf, .svg)")
    return parser


# Candidates -----------------------------------------------------------------------------------------------------------


def module_function(module: torch.nn.Module) -> Function:
    """An attention module as a function of three tensors."""
    return lambda query, key, value: module(query, key, value)[0]


def compiled(function: Function) -> Function:
    """A function under `torch.compile`, for one shape."""
    # with code of its own, or PyTorch would count the shapes of all candidates against one limit of recompilations
    code = function.__code__.replace(co_name=f"compiled_{id(function)}")
    return torch.compile(types.FunctionType(code, globals(), closure=function.__closure__), dynamic=False)


def heads_first(function: Function) -> Function:
    """A function of (B, H, N, E) tensors as one of (B, N, H, E) tensors."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return function(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)

    return attend


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Full attention by PyTorch's fused kernels, (B, H, N, E)."""
    return F.scaled_dot_product_attention(query, key, value)


def sdpa_through(backend: SDPBackend) -> Function:
    """`sdpa` by one of its kernels."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return sdpa(query, key, value)

    return attend


def softmax_written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Full attention with its N x N matrix, (B, H, N, E)."""
    return torch.softmax(query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5, dim=-1) @ value


def fast_transformers_peers(shape: Sequence[int], device: torch.device, sizes: dict[str, tuple[int, int]]) -> list:
    """Peers out of pytorch-fast-transformers, with windows and features of our own attentions.

    Args:
        shape: (B, N, H, E).
        device: where they run.
        sizes: window and features by attention.

    Raises:
        ImportError: the package is not installed.
        RuntimeError: its kernels are not built for `device`.
    """
    from fast_transformers import local_product
    from fast_transformers.attention.linear_attention import LinearAttention
    from fast_transformers.feature_maps import Favor
    from fast_transformers.masking import FullMask, LengthMask

    if local_product.LocalDotProduct.dot[device.type] is None:
        raise RuntimeError(f"its kernels are not built for {device.type}")
    batch, length, _, dim = shape
    scale = dim**-0.5
    lengths = torch.full((batch,), length, dtype=torch.int64, device=device)
    no_mask = torch.zeros(1, 1, device=device).expand(length, length)  # the kernels want one; a view takes no memory

    def products(left: torch.Tensor, right: torch.Tensor, window: int) -> torch.Tensor:
        return local_product.local_dot_product(left.contiguous(), right.contiguous(), no_mask, lengths, window)

    def local(window: int) -> Function:
        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            weights = torch.softmax(products(query, key, window) * scale, dim=-1)
            return local_product.local_weighted_average(weights, value.contiguous())

        return attend

    def scatterbrain(window: int, features: int) -> Function:
        rows = draw_projection(features // 2, dim, seed=0).to(device)

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            # as published: the low-rank part over all keys, and its share inside the window taken off again
            log_query = log_softmax_features(query, rows, scale, cosh=True)
            log_key = log_softmax_features(key, rows, scale, cosh=True)
            query_max = log_query.detach().amax(-1, keepdim=True)
            key_max = log_key.detach().amax((-2, -1), keepdim=True)
            query_features, key_features = (log_query - query_max).exp(), (log_key - key_max).exp()
            logits = products(query, key, window) * scale
            estimate = products(query_features, key_features, window)
            estimate = estimate.masked_fill(estimate < NO_KEY, 0.0)
            log_scale = query_max + key_max
            reference = torch.maximum(logits.detach().amax(-1, keepdim=True), log_scale)
            low_rank_scale = (log_scale - reference).exp()
            correction = (logits - reference).exp() - estimate * low_rank_scale
            sums = query_features @ (key_features.transpose(-2, -1) @ value)
            norms = query_features @ key_features.sum(-2).unsqueeze(-1)
            numerator = local_product.local_weighted_average(correction, value.contiguous()) + sums * low_rank_scale
            return numerator / (correction.sum(-1, keepdim=True) + norms * low_rank_scale)

        return attend

    def performer(features: int) -> Function:
        # Its features come in pairs; the rows are drawn once, as ours are, and not on each call. Its orthogonal rows
        # need a function that PyTorch has removed; for the time it does not matter which rows they are.
        options = {"orthogonal": False, "stabilize": True, "deterministic_eval": True}
        favor = Favor.factory(n_dims=max(2, features // 2 * 2), **options)
        attention = LinearAttention(dim, feature_map=favor).to(device)
        attention.feature_map.new_feature_map(device)
        attention.eval()
        full = FullMask(length, device=device)
        keys = LengthMask(lengths, max_len=length, device=device)
        # it builds these on first use, and if that is in inference mode, they are of no use in training
        masks = (full, keys, keys) if full.all_ones and keys.float_matrix is not None else ()
        return lambda query, key, value: attention(query, key, value, *masks)

    peers = []
    for name, (window, features) in sizes.items():
        if name == "local":
            peers.append(Candidate("fast-transformers local", "peer", heads_first(local(window)), {WINDOW: window}))
        elif name == "performer":
            peers.append(Candidate("fast-transformers performer", "peer", performer(features), {FEATURES: features}))
        elif name == "sblocal":
            form = heads_first(scatterbrain(window, features))
            peers.append(Candidate("published form of sblocal", "peer", form, {WINDOW: window, FEATURES: features}))
    return peers


class Bench:
    """One run: what is timed, on what, and what was left out.

    Args:
        arguments: the options.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = choose_device(arguments.device)
        self.dtype = DTYPES[arguments.dtype]
        self.growth_length = arguments.growth_length or arguments.lengths[len(arguments.lengths) // 2]
        batches = arguments.batch * len(arguments.lengths) if len(arguments.batch) == 1 else arguments.batch
        if len(batches) != len(arguments.lengths):
            raise UserError(
                f"--batch has {len(batches)} numbers and there are {len(arguments.lengths)} lengths. Give one, or one "
                "for each length."
            )
        self.batches = dict(zip(arguments.lengths, batches, strict=True))
        self.skipped: list[dict[str, str | int]] = []
        self.measurements: list[Measurement] = []

    def skip(self, name: str, length: int, reason: str, attention_pass: str = "all") -> None:
        """Note that a candidate is left out, and why."""
        self.skipped.append({"name": name, "length": length, "pass": attention_pass, "reason": reason})

    def inputs(self, length: int, draw: int = 0) -> Tensors:
        """Normal query, key and value (B, N, H, E), the same in each run."""
        arguments = self.arguments
        # of a seed the generator takes 32 bits, so that the draw has to be among them
        generator = torch.Generator().manual_seed(length + (draw << 24))
        shape = (self.batches[length], length, arguments.heads, arguments.dim)
        query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
        query, key = query * arguments.std, key * arguments.std
        return tuple(x.to(self.device, self.dtype) for x in (query, key, value))

    def attention(self, name: str, length: int, budget_length: int) -> Candidate:
        """One of our attentions, with the sizes that fit `budget_length`."""
        arguments = self.arguments
        module = create_attention(name, budget_length, arguments.dim, memory_fraction=arguments.memory_fraction)
        module.to(self.device).eval()
        share = min(1.0, module.memory_columns(length) / length)
        kind = "attention" if budget_length == length else "growth"
        label = name if kind == "attention" else f"{name} as at {budget_length}"
        return Candidate(label, kind, module_function(module), module.sizes(), share, module)

    def with_other_draws(self, length: int, tensors: Tensors, candidates: list[Candidate]) -> Iterator[Candidate]:
        """The candidates, their marked tiles counted; those that have some also with inputs for which none is."""
        for item in candidates:
            item.marked_tiles = count_marked(item.module, tensors)
            yield item
            if not item.marked_tiles:
                continue
            for draw in range(1, OTHER_DRAWS + 1):
                if count_marked(item.module, self.inputs(length, draw)) == 0:
                    name = f"{item.name}, none marked"
                    yield replace(item, name=name, kind="draw", draw=draw, marked_tiles=0)
                    break

    def candidates(self, length: int) -> list[Candidate]:
        """Everything that is timed at one length; SDPA, the baseline, comes first."""
        arguments = self.arguments
        ours = [self.attention(name, length, length) for name in arguments.attentions]
        if arguments.growth_only and length != self.growth_length:
            ours = [item for item in ours if not item.sizes]
        found = [Candidate(BASELINE, "peer", heads_first(sdpa))]
        if not arguments.no_peers:
            if self.device.type == "cuda":
                found += [
                    Candidate(f"SDPA {name}", "peer", heads_first(sdpa_through(backend)))
                    for name, backend in CUDA_BACKENDS.items()
                ]
            found.append(Candidate("softmax written out", "peer", heads_first(softmax_written_out)))
            found += self.fast_transformers(length, {item.name: (item.window, item.features) for item in ours})
        found += ours
        if arguments.compile:
            for item in ours:
                form = compiled(item.function)
                found.append(Candidate(f"{item.name}, compiled", "compiled", form, item.sizes, item.memory_fraction))
        if length != self.growth_length:
            grown = [self.attention(name, length, self.growth_length) for name in arguments.attentions]
            found += [item for item in grown if item.sizes]
        return found

    def fast_transformers(self, length: int, sizes: dict[str, tuple[int, int]]) -> list[Candidate]:
        """Its peers, none where they cannot run."""
        arguments = self.arguments
        reason = f"it knows float32 only, not {arguments.dtype}"
        if self.dtype == torch.float32:
            shape = (self.batches[length], length, arguments.heads, arguments.dim)
            try:
                return fast_transformers_peers(shape, self.device, sizes)
            except ImportError:
                reason = "pytorch-fast-transformers is not installed"
            except RuntimeError as error:
                reason = str(error)
        self.skip("fast-transformers", length, reason)
        return []

    def call(self, candidate: Candidate, tensors: Tensors, attention_pass: str) -> Callable[[], object]:
        """One call of a candidate, without arguments."""
        if attention_pass == "forward":

            def forward() -> torch.Tensor:
                with torch.inference_mode():
                    return candidate.function(*tensors)

            return forward
        leaves = tuple(x.detach().requires_grad_() for x in tensors)
        gradient = torch.ones_like(tensors[2])

        def training() -> tuple[torch.Tensor, ...]:
            # Reformer shares queries and keys: its keys have no gradient
            return torch.autograd.grad(candidate.function(*leaves), leaves, gradient, allow_unused=True)

        return training

    def fits(self, candidate: Candidate, length: int, attention_pass: str) -> bool:
        """Whether a candidate's N x N matrices keep to the memory limit; notes it where they do not."""
        if candidate.name not in ("softmax written out", "SDPA math"):
            return True
        matrices = 2 if attention_pass == "forward" else 4
        size = matrices * self.batches[length] * self.arguments.heads * length**2 * self.dtype.itemsize / 2**30
        if size <= self.arguments.memory_limit:
            return True
        self.skip(candidate.name, length, f"its N x N matrices take {size:.1f} GiB (--memory-limit)", attention_pass)
        return False

    def run(self, console: Console, save: Callable[[], None] = lambda: None) -> None:
        """Measure everything; `save` is called whenever lengths are complete in a pass."""
        # before anything takes time: sizes that do not fit are found here
        candidates = {length: self.candidates(length) for length in self.arguments.lengths}
        with progress_display(console) as progress:
            if self.device.type == "cuda" and self.arguments.jobs > 1:
                work = functools.partial(compile_kernels, self.arguments)
                compile_ahead(work, self.kernel_cases(), self.arguments.jobs, progress)
            for lengths in self.measured_together():
                by_length = []
                for length in lengths:
                    tensors = self.inputs(length)
                    by_length.append((length, tensors, [*self.with_other_draws(length, tensors, candidates[length])]))
                for attention_pass in self.arguments.passes:
                    self.measure(by_length, attention_pass, progress)
                    save()

    def measured_together(self) -> list[tuple[int, ...]]:
        """The lengths, in groups that share their rounds; see the top of this file."""
        lengths = self.arguments.lengths
        return [(length,) for length in lengths] if self.device.type == "cuda" else [lengths]

    def kernel_cases(self) -> list[KernelCase]:
        """Everything of ours that is run and not compiled by `torch.compile`."""
        arguments = self.arguments
        return [
            KernelCase(name, length, budget_length, attention_pass)
            for length in arguments.lengths
            for attention_pass in arguments.passes
            for budget_length in dict.fromkeys((*([] if arguments.growth_only else [length]), self.growth_length))
            for name in arguments.attentions
        ]

    def missing(self) -> dict[str, list[int]]:
        """Lengths that are not complete, by pass."""
        arguments = self.arguments
        complete = {(item.attention_pass, item.length) for item in self.measurements}
        missing = {name: [x for x in arguments.lengths if (name, x) not in complete] for name in arguments.passes}
        return {name: lengths for name, lengths in missing.items() if lengths}

    def measure(
        self, by_length: Sequence[tuple[int, Tensors, list[Candidate]]], attention_pass: str, progress: Progress
    ) -> None:
        """Measure the candidates of some lengths in one pass."""
        entries = [
            Entry(
                item,
                length,
                attention_pass,
                self.call(item, self.inputs(length, item.draw) if item.draw else tensors, attention_pass),
            )
            for length, tensors, candidates in by_length
            for item in candidates
            if self.fits(item, length, attention_pass)
        ]
        task = progress.add_task(attention_pass, total=len(entries) * (self.arguments.repeats + 1))

        def say(text: str, entry: Entry) -> None:
            where = f"{entry.attention_pass}, N = {entry.length}: {text}{entry.candidate.name}"
            progress.update(task, advance=1, description=where)

        running = [entry for entry in entries if self.warm_up(entry, say)]
        progress.update(task, total=len(entries) + len(running) * self.arguments.repeats)
        self.time_in_rounds(running, say)
        # all rows at once, whenever an interrupt comes
        self.measurements += list(self.summarise(running))
        progress.remove_task(task)

    def warm_up(self, entry: Entry, say: Callable[[str, Entry], None]) -> bool:
        """First calls, memory, and for CUDA the replay; whether the candidate runs at all."""
        item, call = entry.candidate, entry.call
        say("warming up ", entry)
        try:
            with warnings.catch_warnings():
                # SDPA warns of each reason why a kernel does not fit; the error that follows says what matters
                warnings.simplefilter("ignore")
                for _ in range(3 if self.device.type == "cuda" else 1):
                    call()
        except RuntimeError as error:
            # a kernel that does not take these tensors, no compiler, no memory: the others can still be measured
            if item.kind == "attention" or item.name == BASELINE:
                raise UserError(f"{item.name} fails at N = {entry.length} ({first_line(error)}).") from error
            self.skip(item.name, entry.length, first_line(error), entry.attention_pass)
            return False
        entry.number = max(1, math.ceil(SHORTEST_SAMPLE_SECONDS / seconds_per_call(call, 1, self.device)))
        entry.temporary_bytes = peak_bytes(call, self.device)
        if self.device.type == "cuda":
            entry.device_milliseconds = graph_milliseconds(call, self.arguments.repeats)
        return True

    def time_in_rounds(self, entries: list[Entry], say: Callable[[str, Entry], None]) -> None:
        """Time each entry once in each round."""
        for entry in in_turn(entries, self.arguments.repeats):
            say("", entry)
            entry.milliseconds.append(1e3 * seconds_per_call(entry.call, entry.number, self.device))

    def summarise(self, entries: list[Entry]) -> Iterator[Measurement]:
        """Medians and ratios of one pass."""
        baselines = {entry.length: entry.milliseconds for entry in entries if entry.candidate.name == BASELINE}
        for entry in entries:
            yield Measurement(
                entry.candidate.name,
                entry.candidate.kind,
                entry.length,
                entry.attention_pass,
                entry.candidate.window,
                entry.candidate.features,
                entry.candidate.sizes,
                entry.candidate.memory_fraction,
                entry.temporary_bytes,
                entry.number,
                statistics.median(entry.milliseconds),
                min(entry.milliseconds),
                median_ratio(entry.milliseconds, baselines[entry.length]),
                entry.device_milliseconds,
                entry.milliseconds,
                entry.candidate.draw,
                entry.candidate.marked_tiles,
            )


def count_marked(module: torch.nn.Module | None, tensors: Tensors) -> int | None:
    """Tiles that a module's kernels compute from pairs; None where it has none that do, or they do not run here."""
    if not isinstance(module, SBLocalAttention):
        return None
    query, key, value = (x.transpose(1, 2) for x in tensors)
    rows = module.projection_matrix
    if choose_backend(module.backend, query, value, rows, cosh=True) != "triton":
        return None
    return count_marked_tiles(query, key, value, rows, module.local_context, scale=module.softmax_temp)


def compile_kernels(arguments: argparse.Namespace, case: KernelCase) -> None:
    """Compile the kernels of one case, by a call of it.

    Its batch is the one that is timed: into how many chunks the kernels cut a sequence follows from batch and heads.
    """
    bench = Bench(arguments)
    candidate = bench.attention(case.attention, case.length, case.budget_length)
    bench.call(candidate, bench.inputs(case.length), case.attention_pass)()


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios within each round."""
    return statistics.median(x / y for x, y in zip(numerators, denominators, strict=True))


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Peak of the memory that one call allocates, see the top of this file."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    live = peak = 0
    for _, change in sorted((item.start_ns(), item.nbytes()) for item in events if item.name() == "[memory]"):
        live += change
        peak = max(peak, live)
    return peak


def graph_milliseconds(call: Callable[[], object], repeats: int) -> float | None:
    """Time of the replay of a CUDA graph, that is, without what the host costs; None where capture fails."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    samples = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(4):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(begin.elapsed_time(end) / 4)
    return statistics.median(samples)


# Output ---------------------------------------------------------------------------------------------------------------


def growth(bench: Bench) -> Iterator[dict[str, str | int | float]]:
    """Growth of the time from each length to the next, sizes kept where there are any."""
    lengths = bench.arguments.lengths
    for attention_pass in bench.arguments.passes:
        times: dict[str, dict[int, list[float]]] = {}
        for item in bench.measurements:
            at_home = item.kind == "attention" and (not item.sizes or item.length == bench.growth_length)
            if item.attention_pass == attention_pass and (at_home or item.kind == "growth" or item.name == BASELINE):
                times.setdefault(item.name.split(" as at ")[0], {})[item.length] = rounds(item)
        for name, by_length in times.items():
            for shorter, longer in itertools.pairwise(lengths):
                if bench.batches[shorter] != bench.batches[longer]:
                    continue  # more of the machine would be busy with one than with the other
                if shorter in by_length and longer in by_length:
                    if len(by_length[longer]) != len(by_length[shorter]):
                        continue  # a CUDA graph could be captured for one of them only
                    factor = median_ratio(by_length[longer], by_length[shorter])
                    exponent = math.log(factor) / math.log(longer / shorter)
                    yield {
                        "name": name,
                        "pass": attention_pass,
                        "from": shorter,
                        "to": longer,
                        "factor": factor,
                        "exponent": exponent,
                    }


def rounds(item: Measurement) -> list[float]:
    """Times for growth and figure: those of the device where known, or short sequences would show the host's."""
    return item.milliseconds_per_round if item.device_milliseconds is None else [item.device_milliseconds]


def other_sizes(sizes: dict[str, int]) -> str:
    """Sizes beside window and features, as the tables have them; empty where there are none."""
    others = {name: size for name, size in sizes.items() if name not in (WINDOW, FEATURES)}
    return ", ".join(f"{SYMBOLS.get(name, name.removeprefix('num_'))} {size}" for name, size in others.items())


def result_tables(bench: Bench) -> Iterator[Table]:
    """One table for each length and pass, and the one of growth."""
    arguments = bench.arguments
    on_cuda = bench.device.type == "cuda"
    for length in arguments.lengths:
        for attention_pass in arguments.passes:
            rows = [x for x in bench.measurements if (x.length, x.attention_pass) == (length, attention_pass)]
            if not rows:
                continue  # it was not complete
            others = any(other_sizes(item.sizes) for item in rows)
            marked = any(item.marked_tiles for item in rows)
            clustered = any(SYMBOLS.keys() & item.sizes for item in rows)
            clusters = ", C clusters of keys, Q of queries, X exact keys" if clustered else ""
            table = Table(
                title=f"N = {length}, {attention_pass}: {arguments.dtype} on {bench.device.type}, batch "
                f"{bench.batches[length]}, heads {arguments.heads}, width {arguments.dim}"
                + ("" if arguments.std == 1 else f", std {arguments.std:g}"),
                title_justify="left",
                caption=f"W keys in the window, M features{clusters}; MiB: memory of one call, inputs not counted"
                + ("; marked: tiles of queries that the kernels compute from pairs" if marked else ""),
                caption_justify="left",
            )
            table.add_column("attention", no_wrap=True)
            sizes = ("W", "M", *(["others"] if others else []))
            times = ("ms", *(["device\nms"] if on_cuda else []), "time/\nSDPA", "MiB/\nSDPA")
            for header in (*sizes, *(["marked"] if marked else []), "MiB", *times):
                table.add_column(header, justify="right", no_wrap=True)
            baseline = next(x for x in rows if x.name == BASELINE)
            kind = None
            for item in rows:
                if kind is not None and item.kind != kind:
                    table.add_section()
                kind = item.kind
                device_time = "-" if item.device_milliseconds is None else figure(item.device_milliseconds)
                table.add_row(
                    item.name,
                    str(item.window or "-"),
                    str(item.features or "-"),
                    *([other_sizes(item.sizes) or "-"] if others else []),
                    *(["-" if item.marked_tiles is None else str(item.marked_tiles)] if marked else []),
                    figure(item.temporary_bytes / 2**20),
                    figure(item.milliseconds),
                    *([device_time] if on_cuda else []),
                    f"{item.ratio_to_sdpa:.3f}",
                    f"{item.temporary_bytes / max(1, baseline.temporary_bytes):.2f}",
                )
            yield table
    rows = list(growth(bench))
    if rows:
        table = Table(
            title=f"Growth of the time with N; sizes as at N = {bench.growth_length}",
            title_justify="left",
            caption="exponent: 1 is linear in N, 2 quadratic",
            caption_justify="left",
        )
        for header in ("pass", "attention", "from N", "to N"):
            table.add_column(header, justify="right" if "N" in header else "left")
        for header in ("N grows by", "time grows by", "exponent"):
            table.add_column(header, justify="right")
        for row in rows:
            table.add_row(
                row["pass"],
                row["name"],
                str(row["from"]),
                str(row["to"]),
                f"{row['to'] / row['from']:.3g}",
                f"{row['factor']:.2f}",
                f"{row['exponent']:.2f}",
            )
        yield table


def colour(name: str) -> str:
    """The colour of an attention, for all that is like it too; greys for the forms of full attention."""
    from src.evaluation.colours import ATTENTION_COLOURS  # here, as Matplotlib: for figures alone

    # sblocal is not local, nor is local2d another
    attention = max((known for known in ATTENTION_COLOURS if known in name), key=len, default="")
    greys = {BASELINE: "black", "softmax written out": "silver"}
    return ATTENTION_COLOURS.get(attention) or greys.get(name, "grey")


def plot(bench: Bench, path: str) -> None:
    """Time against length, one panel for each pass; the device's where that is known.

    Raises:
        UserError: the path cannot be written, or its suffix names no format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arguments = bench.arguments
    passes = [name for name in arguments.passes if any(item.attention_pass == name for item in bench.measurements)]
    panels, axes = plt.subplots(1, len(passes), figsize=(6 * len(passes), 5), squeeze=False, layout="constrained")
    styles = {"attention": ("o", "-"), "growth": ("^", "--"), "compiled": ("d", "-."), "peer": ("s", ":")}
    for axis, attention_pass in zip(axes[0], passes, strict=True):
        rows = [x for x in bench.measurements if x.attention_pass == attention_pass and x.kind != "draw"]
        for name in dict.fromkeys(item.name for item in rows):
            line = [item for item in rows if item.name == name]
            marker, dashes = styles[line[0].kind]
            if line[0].kind == "growth":
                # at the length that the sizes come from, the attention itself is the point
                line += [x for x in rows if x.length == bench.growth_length and x.name == name.split(" as at ")[0]]
                line.sort(key=lambda item: item.length)
            values = [statistics.median(rounds(item)) for item in line]
            style = {"marker": marker, "linestyle": dashes, "color": colour(name)}
            axis.plot([item.length for item in line], values, label=name, **style)
        of_device = any(item.device_milliseconds is not None for item in rows)
        unit = "milliseconds of the device" if of_device else "milliseconds"
        axis.set(xscale="log", yscale="log", xlabel="sequence length N", ylabel=unit, title=attention_pass)
        axis.set_xticks(arguments.lengths, [str(length) for length in arguments.lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.01, 1.0))
    batch = ", ".join(str(number) for number in arguments.batch)
    panels.suptitle(f"{arguments.dtype} on {bench.device.type}, batch {batch}, heads {arguments.heads}")
    save_figure(panels, path)
    plt.close(panels)


def report(bench: Bench) -> dict:
    """Everything that was measured, for JSON."""
    results = [asdict(item) for item in bench.measurements]
    for result in results:
        result["pass"] = result.pop("attention_pass")
    settings = {**without_paths(bench.arguments), "device": bench.device.type, "growth_length": bench.growth_length}
    return {
        "complete": not bench.missing(),
        "machine": machine_info(bench.device),
        "settings": settings,
        "results": results,
        "growth": list(growth(bench)),
        "skipped": bench.skipped,
    }


def benchmark(arguments: argparse.Namespace) -> int:
    """Run the benchmark, print its tables and write its files; returns the exit status."""
    check_writable(arguments.output)
    check_figure(arguments.figure)
    bench = Bench(arguments)
    return saved_until_stopped(bench.run, lambda: report(bench), arguments.output, lambda: conclude(bench))


def conclude(bench: Bench) -> int:
    """Print what is complete and write the files; returns the exit status."""
    arguments = bench.arguments
    if not bench.measurements:
        print("Interrupted. Nothing was written.", file=sys.stderr)
        return 1
    console = console_for_tables(WIDTH)
    for table in result_tables(bench):
        console.print(table, "")
    for reason in dict.fromkeys(f"{x['name']} left out at N = {x['length']}: {x['reason']}." for x in bench.skipped):
        console.print(reason, markup=False, highlight=False, soft_wrap=True)
    info = ", ".join(f"{name} {value}" for name, value in machine_info(bench.device).items() if value is not None)
    console.print(info, markup=False, highlight=False, soft_wrap=True)
    if arguments.output is not None:
        write_json(arguments.output, report(bench))
    if arguments.figure is not None:
        plot(bench, arguments.figure)
    missing = [f"{name} at N = {', '.join(map(str, lengths))}" for name, lengths in bench.missing().items()]
    if missing:
        print(f"Interrupted. Missing: {'; '.join(missing)}.", file=sys.stderr)
    return 1 if missing else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark that `argv` asks for; returns the exit status."""
    return run_tool(build_parser(), benchmark, argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted. Nothing was written.")
