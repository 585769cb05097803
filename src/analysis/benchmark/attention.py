"""The attention benchmark: what is timed at each length, in which order, and what is kept of it."""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console

from scatterbrain.attention import create_attention
from scatterbrain.attention.sblocal import SBLocalAttention
from scatterbrain.errors import UserError
from scatterbrain.ops.scatterbrain.triton import count_fallback_tiles, is_fast, unsupported
from src.analysis.benchmark import baselines
from src.analysis.benchmark.attention_report import AttentionReport
from src.analysis.benchmark.report import BASELINE, DTYPES
from src.analysis.benchmark.timing import graph_milliseconds, in_turn, median_ratio, seconds_per_call
from src.analysis.tools import choose_device, shown
from src.utils.peak_memory import peak_bytes
from src.utils.text import first_line

# Seeds of the inputs among which one without a fallback tile is looked for.
OTHER_SEEDS = 20
# A sample shorter than this says more about the clock than about the candidate: calls are repeated until it is passed.
MIN_SAMPLE_SECONDS = 2e-3
# Calls in a row whose time on the host is taken: few enough that the queue of launches has room for all.
HOST_CALLS = 8
# Softmax written out is left out where its N x N matrices take more than this.
MATRICES_GIB = 2.0

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class Candidate:
    """One implementation at one length.

    Its `kind` is `attention` (ours), `growth` (ours, with the sizes of another length), `seed` (one of these with other
    inputs) or `baseline`. Sizes are what its memory is spent on, by the names of the options; `memory_fraction` is
    counted by the published rule. Fallback tiles are the tiles of queries that its kernels recompute exactly because
    the subtraction cancels; None where it has no such kernels.
    """

    name: str
    kind: str
    function: baselines.Function
    sizes: dict[str, int] = field(default_factory=dict)
    memory_fraction: float = 1.0
    module: torch.nn.Module | None = None
    seed: int = 0
    fallback_tiles: int | None = None

    @property
    def window_and_features(self) -> tuple[int, int]:
        """Number of keys in the window and of random features, 0 for none."""
        return self.sizes.get("local_context", 0), self.sizes.get("nb_features", 0)


@dataclass
class Entry:
    """A candidate at one length in one pass, while it is measured."""

    candidate: Candidate
    length: int
    attention_pass: str
    call: Callable[[], object]
    calls_per_sample: int = 1
    temporary_bytes: int = 0
    device_milliseconds: float | None = None
    host_microseconds: float | None = None
    milliseconds: list[float] = field(default_factory=list)

    def row(self, baseline: Sequence[float]) -> dict[str, Any]:
        """Results for JSON, times being those of one call; `baseline` is that of `BASELINE` in the same rounds."""
        item, milliseconds = self.candidate, self.milliseconds
        window, features = item.window_and_features
        row = {"name": item.name, "kind": item.kind, "length": self.length, "pass": self.attention_pass}
        row |= {"window": window, "features": features, "sizes": item.sizes, "memory_fraction": item.memory_fraction}
        row |= {"temporary_bytes": self.temporary_bytes, "milliseconds": statistics.median(milliseconds)}
        row |= {"milliseconds_min": min(milliseconds), "ratio_to_sdpa": median_ratio(milliseconds, baseline)}
        row |= {"device_milliseconds": self.device_milliseconds, "host_microseconds": self.host_microseconds}
        row |= {"milliseconds_per_round": milliseconds, "seed": item.seed, "fallback_tiles": item.fallback_tiles}
        return row


class AttentionBench(AttentionReport):
    """One run, with the options of `scripts/benchmark_attention.py`."""

    with_host_time = True  # whether the time of calls on the host is taken

    def __init__(self, arguments: argparse.Namespace) -> None:
        lengths, batches = arguments.lengths, arguments.batch
        if len(batches) not in (1, len(lengths)):
            raise UserError(
                f"--batch has {len(batches)} numbers and there are {len(lengths)} lengths. Give one, or one for each "
                "length."
            )
        filled = {
            "device": choose_device(arguments.device).type,
            "growth_length": arguments.growth_length or lengths[len(lengths) // 2],
        }
        missing = (f"{name} at N = {length}" for length in lengths for name in arguments.passes)
        super().__init__(argparse.Namespace(**(vars(arguments) | filled)), missing)
        self.dtype = DTYPES[arguments.dtype]
        self.batches = dict(zip(lengths, batches * len(lengths) if len(batches) == 1 else batches, strict=True))

    def skip(self, name: str, length: int, reason: str, attention_pass: str = "all") -> None:
        """Note that a candidate is left out, and why."""
        self.skipped.append({"name": name, "length": length, "pass": attention_pass, "reason": reason})

    # Candidates -------------------------------------------------------------------------------------------------------

    def inputs(self, length: int, seed: int = 0) -> Tensors:
        """Normal query, key and value (B, N, H, E), the same in each run."""
        arguments = self.arguments
        # the generator takes 32 bits of a seed: both numbers have to be among them
        generator = torch.Generator().manual_seed(length + (seed << 24))
        shape = (self.batches[length], length, arguments.heads, arguments.dim)
        query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
        return tuple(x.to(self.device, self.dtype) for x in (query * arguments.std, key * arguments.std, value))

    def attention(self, name: str, length: int, budget_length: int) -> Candidate:
        """One of our attentions, with the sizes that fit `budget_length`."""
        arguments = self.arguments
        module = create_attention(name, budget_length, arguments.dim, memory_fraction=arguments.memory_fraction)
        given = {size: arguments.sizes[size] for size in module.sizes() if size in arguments.sizes}
        if given:
            module = create_attention(name, budget_length, arguments.dim, **(module.sizes() | given))
        module.to(self.device).eval()
        share = min(1.0, module.memory_columns(length) / length)
        kind = "attention" if budget_length == length else "growth"
        label = name if kind == "attention" else f"{name} as at {budget_length}"
        return Candidate(label, kind, lambda *tensors: module(*tensors)[0], module.sizes(), share, module)

    def candidates(self, length: int) -> list[Candidate]:
        """Everything that is timed at one length; the baseline that all times are divided by comes first."""
        arguments = self.arguments
        ours = [self.attention(name, length, length) for name in arguments.attentions]
        if arguments.growth_only and length != self.arguments.growth_length:
            ours = [item for item in ours if not item.sizes]
        found = [Candidate(BASELINE, "baseline", baselines.heads_first(F.scaled_dot_product_attention))]
        if not arguments.no_baselines:
            pytorch = baselines.pytorch_baselines(self.device)
            found += [Candidate(name, "baseline", function) for name, function in pytorch.items()]
            found += self.fast_transformers(length, ours)
        found += ours
        if length != self.arguments.growth_length and not arguments.sizes:
            grown = [self.attention(name, length, self.arguments.growth_length) for name in arguments.attentions]
            found += [item for item in grown if item.sizes]
        return found

    def fast_transformers(self, length: int, ours: Iterable[Candidate]) -> list[Candidate]:
        """Its counterparts of our attentions, none where they cannot run."""
        arguments = self.arguments
        reason = f"it knows float32 only, not {arguments.dtype}"
        if self.dtype == torch.float32:
            shape = (self.batches[length], length, arguments.heads, arguments.dim)
            by_name = {item.name: item for item in ours}
            sizes = {name: item.window_and_features for name, item in by_name.items()}
            try:
                found = baselines.fast_transformers_baselines(shape, self.device, sizes)
                return [Candidate(label, "baseline", call, by_name[key].sizes) for key, (label, call) in found.items()]
            except ImportError:
                reason = "pytorch-fast-transformers is not installed"
            except RuntimeError as error:
                reason = str(error)
        self.skip("fast-transformers", length, reason)
        return []

    def with_other_seeds(self, length: int, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
        """The candidates, fallback tiles counted; those that have some also with inputs for which there are none."""
        tensors = self.inputs(length)
        for item in candidates:
            item.fallback_tiles = fallback_tiles(item.module, tensors)
            yield item
            if not item.fallback_tiles:
                continue
            for seed in range(1, OTHER_SEEDS + 1):
                if fallback_tiles(item.module, self.inputs(length, seed)) == 0:
                    name = f"{item.name}, no fallback"
                    yield replace(item, name=name, kind="seed", seed=seed, fallback_tiles=0)
                    break

    def call(self, candidate: Candidate, tensors: Tensors, attention_pass: str) -> Callable[[], object]:
        """One call of a candidate, without arguments."""
        if attention_pass == "forward":
            return torch.inference_mode()(functools.partial(candidate.function, *tensors))
        leaves = tuple(x.detach().requires_grad_() for x in tensors)
        gradient = torch.ones_like(tensors[2])

        def training() -> tuple[torch.Tensor, ...]:
            # Reformer shares queries and keys: its keys have no gradient
            return torch.autograd.grad(candidate.function(*leaves), leaves, gradient, allow_unused=True)

        return training

    def fits(self, candidate: Candidate, length: int, attention_pass: str) -> bool:
        """Whether a candidate's N x N matrices keep to `MATRICES_GIB`; notes it where they do not."""
        if candidate.name not in baselines.QUADRATIC_MEMORY:
            return True
        matrices = 2 if attention_pass == "forward" else 4
        size = matrices * self.batches[length] * self.arguments.heads * length**2 * self.dtype.itemsize / 2**30
        if size <= MATRICES_GIB:
            return True
        self.skip(candidate.name, length, f"its N x N matrices take {size:.1f} GiB", attention_pass)
        return False

    # Measurement ------------------------------------------------------------------------------------------------------

    def run(self, _: Console, save: Callable[[], None]) -> None:
        """Measure everything; `save` is called whenever lengths are complete in a pass."""
        # before anything takes time: sizes that do not fit are found here
        candidates = {length: self.candidates(length) for length in self.arguments.lengths}
        for lengths in self.measured_together():
            counted = {length: [*self.with_other_seeds(length, candidates[length])] for length in lengths}
            for attention_pass in self.arguments.passes:
                rows = self.measure(counted, attention_pass)
                # all rows at once, whenever an interrupt comes
                self.results += rows
                complete = [f"{attention_pass} at N = {length}" for length in lengths]
                self.missing = [part for part in self.missing if part not in complete]
                save()

    def measured_together(self) -> list[tuple[int, ...]]:
        """The lengths, in groups that share their rounds.

        On CUDA each length is measured on its own, since the growth there is that of graph replays; on the CPU the
        growth is taken within rounds.
        """
        lengths = self.arguments.lengths
        return [(length,) for length in lengths] if self.device.type == "cuda" else [lengths]

    def measure(self, candidates: dict[int, list[Candidate]], attention_pass: str) -> list[dict[str, Any]]:
        """Rows of the candidates of some lengths in one pass."""
        inputs = functools.cache(self.inputs)  # one set in memory for all candidates
        entries = [
            Entry(item, length, attention_pass, self.call(item, inputs(length, item.seed), attention_pass))
            for length, items in candidates.items()
            for item in items
            if self.fits(item, length, attention_pass)
        ]
        where = f"{attention_pass}, N = {', '.join(map(str, candidates))}"
        running = [entry for entry in shown(entries, f"{where}: warming up") if self.warm_up(entry)]
        repeats = self.arguments.repeats
        for entry in shown(in_turn(running, repeats), where, len(running) * repeats):
            entry.milliseconds.append(1e3 * seconds_per_call(entry.call, entry.calls_per_sample, self.device))
        of_full = {entry.length: entry.milliseconds for entry in running if entry.candidate.name == BASELINE}
        return [entry.row(of_full[entry.length]) for entry in running]

    def warm_up(self, entry: Entry) -> bool:
        """First calls, memory, and the device's time on CUDA; whether the candidate runs at all."""
        item, call = entry.candidate, entry.call
        on_cuda = self.device.type == "cuda"
        try:
            with warnings.catch_warnings():
                # SDPA warns of each reason why a kernel does not fit; the error that follows says what matters
                warnings.simplefilter("ignore")
                for _ in range(3 if on_cuda else 1):
                    call()
        except RuntimeError as error:
            # a kernel that does not take these tensors, no memory: the others can still be measured
            if item.kind == "attention" or item.name == BASELINE:
                raise UserError(f"{item.name} fails at N = {entry.length} ({first_line(error)}).") from error
            self.skip(item.name, entry.length, first_line(error), entry.attention_pass)
            return False
        entry.calls_per_sample = max(1, math.ceil(MIN_SAMPLE_SECONDS / seconds_per_call(call, 1, self.device)))
        entry.temporary_bytes = peak_bytes(call, self.device)
        if on_cuda:
            repeats = range(self.arguments.repeats)
            if self.with_host_time:
                of_host = [seconds_per_call(call, HOST_CALLS, self.device, of_host=True) for _ in repeats]
                entry.host_microseconds = 1e6 * statistics.median(of_host)
            entry.device_milliseconds = graph_milliseconds(call, len(repeats))
        return True


def fallback_tiles(module: torch.nn.Module | None, tensors: Tensors) -> int | None:
    """Tiles that a module's kernels recompute exactly; None where it has no such kernels, or they do not run here."""
    if not isinstance(module, SBLocalAttention):
        return None
    query, key, value = (x.transpose(1, 2) for x in tensors)
    projection = module.projection_matrix
    if module.backend != "triton" and not (module.backend == "auto" and is_fast(query, value, projection, cosh=True)):
        return None
    if unsupported(query, value, projection, cosh=True) is not None:
        return None
    return count_fallback_tiles(query, key, value, projection, module.local_context, scale=module.softmax_temp)
