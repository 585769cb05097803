"""The error of every attention against its time, over its budgets: `scripts/benchmark_frontier.py`."""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from scatterbrain.attention import ATTENTIONS, create_attention
from scatterbrain.errors import UserError
from scatterbrain.ops.adaptive.plan import exact_keys
from scatterbrain.ops.full import naive_full_attention
from scatterbrain.ops.sparse.naive import naive_block_attention
from src.analysis.approximation import load_model, open_split, relative_error
from src.analysis.benchmark.attention import AttentionBench, Candidate, Entry, Tensors
from src.analysis.benchmark.baselines import Function, flex_blocks, flex_window, heads_first, load_pisa
from src.analysis.benchmark.report import BASELINE, header, sizes_text
from src.analysis.benchmark.timing import in_turn, median_ratio, seconds_per_call
from src.analysis.experiments.memory import LOG_TICKS, set_ticks
from src.analysis.tools import digits, new_table, print_report, write_results
from src.datamodules.sampling import spread
from src.evaluation.colours import ATTENTION_MARKERS
from src.evaluation.figure_style import COLOURS, DOTTED, label_ends, new_figure, style
from src.evaluation.result_rows import read_rows
from src.models.attention_inputs import StageInputs, capture_stage_inputs
from src.utils.text import first_line

Sizes = dict[str, Any]

DENSITIES: tuple[Sizes, ...] = tuple({"density": density} for density in (0.05, 0.15, 0.3))
WINDOWS: tuple[Sizes, ...] = tuple({"local_context": window} for window in (64, 128, 256))
LANDMARKS: tuple[Sizes, ...] = tuple({"num_landmarks": number} for number in (32, 64, 128, 256))
# From the cheapest on, the same at every length.
BUDGETS: dict[str, tuple[Sizes, ...]] = {
    "full": ({},),
    "local": WINDOWS,
    "performer": tuple({"nb_features": number} for number in (64, 128, 256)),
    "sblocal": tuple({"local_context": 2 * number, "nb_features": number} for number in (16, 32, 64, 128)),
    "smyrf": tuple({"cluster_size": size} for size in (16, 32, 64)),
    "cluster": LANDMARKS,
    "sbcluster": tuple({"local_context": 64} | sizes for sizes in LANDMARKS),
    "pairedcluster": tuple({"num_landmarks": 4 * number, "num_query_landmarks": number} for number in (8, 16, 32)),
    "sbadaptive": tuple(
        {"local_context": 64, "num_landmarks": number, "num_query_landmarks": 48, "density": density}
        for number in (64, 128, 256)
        for density in (0.0, 0.03, 0.08, 0.15)
    )
    + tuple(
        {"local_context": 32, "num_landmarks": 64, "num_query_landmarks": 24, "density": density}
        for density in (0.03, 0.08)
    ),
    "pisa": DENSITIES,
    "topk-blocks": DENSITIES,
    "flex-window": WINDOWS,
}
BLOCK_BASELINES = ("pisa", "topk-blocks")
BLOCK = 64
MATRIX_ENTRIES = 2**26  # of the N x N matrices of dense definitions, which bound the samples of a call
NUM_SEEDS = 3  # of random projections and hashes, over which an error is averaged


Layer = tuple[str, str, StageInputs]  # network, name in it, and inputs


def all_layers(arguments: argparse.Namespace) -> list[Layer]:
    """Those of `--tensors`, after both token stages of `--checkpoint` on photographs spread evenly over the split."""
    layers = []
    if (arguments.checkpoint is None) != (arguments.data_dir is None):
        raise UserError("--checkpoint and --data-dir belong together: give both or none.")
    if arguments.checkpoint is not None:
        _, model = load_model(arguments.checkpoint)
        dataset = open_split(arguments.data_dir, arguments.split, model)
        images = torch.stack([dataset[position][0] for position in spread(len(dataset), arguments.num_images)])
        stages = enumerate(capture_stage_inputs(model, images), start=1)
        layers = [(f"demo stage {stage}", str(stage), inputs) for stage, inputs in stages]
    layers += [layer for path in arguments.tensors for layer in file_layers(path)]
    if not layers:
        raise UserError("There is nothing to measure the error on. Give --checkpoint and --data-dir, or --tensors.")
    return layers


def file_layers(path: str) -> Iterator[Layer]:
    """Layers of an .npz file: q<layer>, k<layer>, v<layer> (B, N, H, E), softmax scale E ** -0.5."""
    try:
        with np.load(path) as file:
            for layer in sorted(name[1:] for name in file.files if name.startswith("q")):
                tensors = (torch.from_numpy(file[kind + layer]).float() for kind in "qkv")
                # a sample for each head
                query, key, value = (x.transpose(1, 2).flatten(0, 1).unsqueeze(2) for x in tensors)
                inputs = StageInputs(query, key, value, query.shape[-1] ** -0.5)
                yield Path(path).stem.removesuffix("_qkv"), layer, inputs
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"--tensors {path} holds no q<layer>, k<layer>, v<layer> ({first_line(error)}).") from error


def chosen_blocks(density: float, length: int) -> int:
    """Number of blocks of keys that are exact at a density, as PISA rounds it."""
    return max(1, int(density * -(-length // BLOCK)))


def columns_and_operations(name: str, sizes: Sizes, length: int, dim: int) -> tuple[float, float]:
    """Columns of the attention matrix that a query takes, and operations of the matrix products of one sequence.

    Two operations for each multiply-add of the definition, values as wide as keys; sums over clusters count as none.
    """
    module = create_attention(name, length, dim, **sizes) if name in ATTENTIONS else None
    columns = length if name == "full" else module.memory_columns(length) if module else sizes.get("local_context", 0)
    window, features, landmarks, queries = (
        sizes.get(key, 0) for key in ("local_context", "nb_features", "num_landmarks", "num_query_landmarks")
    )
    # multiply-adds over `dim` for each query: weights and averages of exact keys, then what else there is
    products = 2.0 * (length if name == "full" else window)
    if features:  # projections (one for two features beside a window), sums over keys, averages
        products += (3 if window else 4) * features + window * features / dim
    rounds = module.num_steps + 1 if landmarks else 0
    if name == "sbadaptive":  # the choice of clusters takes a product of every key and query cluster
        exact = exact_keys(sizes["density"], length)
        products += 2 * (landmarks + exact) + rounds * (landmarks + queries) + queries
    elif landmarks:
        products += 2 * landmarks + rounds * landmarks * (2 if queries else 1) + queries * (rounds + 3)
    if "cluster_size" in sizes:
        products += 2 * columns
    if name in BLOCK_BASELINES:
        num_blocks = -(-length // BLOCK)
        columns = min(length, BLOCK * chosen_blocks(sizes["density"], length))
        products += 2 * columns + num_blocks**2 / length
        if name == "pisa":
            columns, products = columns + num_blocks, products + 2 * num_blocks + 2 * dim
    return columns, 2 * products * length * dim


class FrontierBench(AttentionBench):
    """One run, with the options of `scripts/benchmark_frontier.py`."""

    with_host_time = False

    def __init__(self, arguments: argparse.Namespace) -> None:
        options = vars(arguments)
        pisa, file, self.errors_only = (options.pop(name) for name in ("pisa", "errors", "errors_only"))
        if file is not None and (arguments.checkpoint or arguments.data_dir or arguments.tensors or self.errors_only):
            raise UserError("--errors replaces --checkpoint, --data-dir, --tensors and --errors-only: leave them out.")
        self.layers = all_layers(arguments) if file is None else []
        for name in ("checkpoint", "data_dir", "split", "num_images", "tensors"):
            del options[name]
        arguments.methods = ["full", *(name for name in arguments.methods if name != "full")]
        super().__init__(arguments)
        self.pisa = load_pisa(pisa) if pisa and self.device.type == "cuda" else None
        self.points = [(name, sizes) for name in arguments.methods for sizes in BUDGETS[name]]
        self.errors: list[dict[str, Any]] = [] if file is None else self.read_errors(file)
        if self.errors_only:
            self.missing = []
        if file is None:
            self.missing.append("errors")

    def read_errors(self, path: str) -> list[dict[str, Any]]:
        """Errors that another run has written; `UserError` where they are not those of these points and this dtype."""
        remedy = "Give --errors a file that --output has written with the same methods, budgets and --dtype."
        content = read_rows(path, ("settings", "errors"), remedy)
        dtype, errors = content["settings"].get("dtype"), content["errors"]
        if dtype != self.arguments.dtype:
            raise UserError(f"--errors {path} has errors in {dtype}, not in {self.arguments.dtype}. {remedy}")
        layers = dict.fromkeys((row["network"], row["layer"]) for row in errors)
        for name, sizes in self.points:
            for network, layer in layers or [("any network", "any")]:
                if not select(errors, method=name, sizes=sizes, network=network, layer=layer):
                    where = f"{name} {sizes_text(sizes)} of {network}, layer {layer}"
                    raise UserError(f"--errors {path} lacks {where}. {remedy}")
        return [row for row in errors if (row["method"], row["sizes"]) in self.points]

    def more(self) -> dict[str, Any]:
        """Rows of times, each with the mean error over the networks once it is known, and the errors, for JSON."""
        means = self.mean_errors()
        rows = [row | {"error": means.get(point_label(row["method"], row["sizes"]))} for row in self.results]
        return {"results": rows, "errors": self.errors}

    def run(self, console: Console, save: Callable[[], None]) -> None:
        """Measure all times, then all errors, less what an interrupted run with the same settings has left in the file.

        `save` is called after each of them.
        """
        if self.arguments.output is not None and Path(self.arguments.output).exists():
            before = read_rows(self.arguments.output, ("complete", "results", "errors"), "Give --output another file.")
            same = json.loads(json.dumps(header(self.arguments, self.device))).items() <= before.items()
            if same and not before["complete"]:
                self.results, self.errors = before["results"], self.errors or before["errors"]
        if not self.errors_only:
            self.measure_times(console, save)
        for network, layer, inputs in self.layers:
            console.print(f"{network}, layer {layer}: errors", highlight=False)
            for row in self.layer_errors(network, layer, inputs):
                self.errors.append(row)
                save()
        self.missing = [part for part in self.missing if part != "errors"]

    def measure_times(self, console: Console, save: Callable[[], None]) -> None:
        """Append the rows of all points at all lengths."""
        attend = F.scaled_dot_product_attention
        if self.device.type == "cuda":  # the fastest there is
            kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
            attend = sdpa_kernel(kernels, set_priority=True)(attend)
        for length in self.arguments.lengths:
            torch._dynamo.reset()  # FlexAttention is compiled for each length
            tensors = self.inputs(length)
            full = self.entry(Candidate(BASELINE, "baseline", heads_first(attend)), tensors)
            self.warm_up(full)
            for name, sizes in self.points:
                if not select(self.results, method=name, sizes=sizes, length=length):
                    self.measure_point(name, sizes, full, tensors, console)
                    save()
            self.missing.remove(f"forward at N = {length}")

    @torch.no_grad()
    def layer_errors(self, network: str, layer: str, inputs: StageInputs) -> Iterator[dict[str, Any]]:
        """Rows of one layer that are not there yet: the relative error of each output.

        That is the mean over samples, and over seeds where there are.
        """
        exact = [x.to(self.device).double() for x in (inputs.query, inputs.key, inputs.value)]
        tensors = [x.to(self.device, self.dtype) for x in (inputs.query, inputs.key, inputs.value)]
        batch, length, _, dim = exact[0].shape
        together = max(1, MATRIX_ENTRIES // length**2)

        def in_chunks(function: Function, tensors: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat([function(*(x[n : n + together] for x in tensors)) for n in range(0, batch, together)])

        @functools.cache
        def reference() -> torch.Tensor:
            return in_chunks(heads_first(lambda *x: naive_full_attention(*x, scale=inputs.scale)[0]), exact)

        for name, sizes in self.points:
            case = {"method": name, "sizes": sizes, "network": network, "layer": layer}
            if select(self.errors, **case):
                continue
            if name in BLOCK_BASELINES:
                options = {"num_blocks": chosen_blocks(sizes["density"], length), "scale": inputs.scale}
                options["taylor"] = name == "pisa"
                outputs = [in_chunks(heads_first(functools.partial(naive_block_attention, **options)), exact)]
            else:
                operator = "local" if name == "flex-window" else name
                num_seeds = NUM_SEEDS if hasattr(ATTENTIONS[operator].module, "redraw_projection") else 1
                options = {"softmax_temp": inputs.scale, **sizes}
                modules = (create_attention(operator, length, dim, seed=seed, **options) for seed in range(num_seeds))
                modules = (module.to(self.device).eval() for module in modules)
                outputs = [in_chunks(lambda *x, module=module: module(*x)[0], tensors) for module in modules]
            error = torch.stack([relative_error(out, reference()).mean() for out in outputs]).mean().item()
            columns = columns_and_operations(name, sizes, length, dim)[0]
            yield case | {"length": length, "columns": columns, "error": error}

    def function(self, name: str, sizes: Sizes, length: int) -> Function:
        """The implementation that is timed, (B, N, 1, E); `UserError` where there is none."""
        if name == "pisa":
            if self.pisa is None:
                raise UserError("its kernel needs CUDA and --pisa")
            return self.pisa(sizes["density"])
        if name == "topk-blocks":
            return flex_blocks(chosen_blocks(sizes["density"], length), BLOCK)
        if name == "flex-window":
            return flex_window(length, sizes["local_context"], self.device)
        module = create_attention(name, length, self.arguments.dim, **sizes).to(self.device).eval()
        return lambda *tensors: module(*tensors)[0]

    def entry(self, candidate: Candidate, tensors: Tensors) -> Entry:
        """A candidate before it is measured."""
        return Entry(candidate, tensors[0].shape[1], "forward", self.call(candidate, tensors, "forward"))

    def measure_point(self, name: str, sizes: Sizes, full: Entry, tensors: Tensors, console: Console) -> None:
        """Append the row of one point, its time beside that of full attention in the same rounds."""
        entry, length, repeats = full, full.length, self.arguments.repeats
        try:
            if name != "full":
                entry = self.entry(Candidate(name, "baseline", self.function(name, sizes, length), sizes), tensors)
                if not self.warm_up(entry):  # it has noted why
                    return
        except Exception as error:  # compilers raise many kinds, and the others are still to be measured
            self.skip(name, length, first_line(error), "forward")
            return
        if entry.device_milliseconds is not None and full.device_milliseconds is not None:
            clock, milliseconds = "device", entry.device_milliseconds
            ratio = milliseconds / full.device_milliseconds
        else:
            full.milliseconds, clock = [], "call"
            for each in in_turn([full] if entry is full else [full, entry], repeats):
                each.milliseconds.append(1e3 * seconds_per_call(each.call, each.calls_per_sample, self.device))
            milliseconds = statistics.median(entry.milliseconds)
            ratio = median_ratio(entry.milliseconds, full.milliseconds)
        columns, operations = columns_and_operations(name, sizes, length, self.arguments.dim)
        batch = self.batches[length]
        case = {"method": name, "sizes": sizes, "batch": batch, "length": length, "milliseconds": milliseconds}
        case |= {"ratio_to_full": ratio, "clock": clock, "columns": columns}
        case |= {"mebibytes": entry.temporary_bytes / 2**20, "gigaoperations": batch * operations / 1e9}
        self.results.append(case)
        label = f"{batch} x {length}, {point_label(name, sizes)}"
        console.print(f"{label}: {digits(milliseconds)} ms, full attention's times {ratio:.3f}", highlight=False)

    # Report -----------------------------------------------------------------------------------------------------------

    def finish(self) -> int:
        """As `Run.finish`; with --errors-only there are no times, and no figure."""
        if not self.errors_only:
            return super().finish()
        print_report(self.tables(), *self.notes())
        write_results(self.arguments, self.report())
        return 1 if self.missing else 0

    def mean_errors(self, network: str | None = None) -> dict[str, float]:
        """Mean error of each point over the layers of a network; None: over the networks, where all are known."""
        if network is None:
            means = [self.mean_errors(each) for each in self.networks()]
            labels = set.intersection(*map(set, means)) if means else set()
            return {label: statistics.fmean(each[label] for each in means) for label in labels}
        errors: dict[str, list[float]] = {}
        for row in select(self.errors, network=network):
            errors.setdefault(point_label(row["method"], row["sizes"]), []).append(row["error"])
        return {label: statistics.fmean(each) for label, each in errors.items()}

    def networks(self) -> dict[str, int]:
        """Names of what errors were measured on, and numbers of tokens."""
        return {row["network"]: row["length"] for row in self.errors}

    def tables(self) -> Iterator[Table]:
        """One row for each point: errors by network, and how many times as fast as full attention at each length."""
        networks, batches = self.networks(), self.batches.items()
        headers = ["method", "sizes", *("\n".join(name.replace("_", " ").split()) for name in networks)]
        headers += [f"{batch}\nx {length:,}" for length, batch in batches]
        table = new_table("Relative error by network; speed, full attention = 1, by size", headers, headers[:2])
        means = [self.mean_errors(network) for network in networks]
        for name, sizes in self.points:
            label = point_label(name, sizes)
            cells = [f"{each[label]:.3f}" if label in each else "-" for each in means]
            for length, _ in batches:
                rows = select(self.results, method=name, sizes=sizes, length=length)
                cells.append(f"{1 / rows[0]['ratio_to_full']:.2f}" if rows else "-")
            table.add_row(name, sizes_text(sizes), *cells)
        yield table

    def draw(self) -> Figure:
        """Error against time: a panel for each network at the nearest length, and below them one for each length."""
        lengths = list(dict.fromkeys(row["length"] for row in self.results))
        above: list[tuple[int, str | None, str]] = [
            (min(lengths, key=lambda each: abs(np.log(each / tokens))), network, f"{network}, {tokens:,} tokens")
            for network, tokens in self.networks().items()
        ]
        below = [(length, None, "mean of the networks") for length in lengths]
        width = max(len(above), len(below))
        figure = new_figure(3.6 * width, 6.4)
        for panels, row in zip((above, below), figure.subplots(2, width, squeeze=False), strict=True):
            for axes, (length, network, title) in zip(row, panels, strict=False):
                axes.set_title(f"{title}\ntime at {self.batches[length]} \N{MULTIPLICATION SIGN} {length:,}")
                self.draw_panel(axes, length, network)
            for axes in row[len(panels) :]:
                axes.remove()
        return figure

    def draw_panel(self, axes: Axes, length: int, network: str | None) -> None:
        """Draw the curves at one length, with the errors on one network or the means over all."""
        ends, means = [], self.mean_errors(network)
        for name in self.arguments.methods[1:]:
            rows = select(self.results, method=name, length=length)
            labelled = ((row["ratio_to_full"], point_label(name, row["sizes"])) for row in rows)
            points = [(ratio, means[label]) for ratio, label in labelled if label in means]
            if len(BUDGETS[name][0]) > 2:  # several sizes vary: the points that no other is better than
                points = sorted(x for x in points if all(other[1] > x[1] for other in points if other < x))
            if points:
                line = {"color": COLOURS[name], "linestyle": "-" if name in ATTENTIONS else "--", "markersize": 4}
                line |= {"marker": ATTENTION_MARKERS.get(name, "X"), "linewidth": 2.4 if name == "sbcluster" else 1.2}
                axes.plot(*zip(*points, strict=True), **line)
                ends.append((*points[-1], name, COLOURS[name]))
        axes.axvline(1, color=COLOURS["full"], linestyle=DOTTED)
        axes.set(xscale="log", yscale="log", xlabel="time, full attention = 1", ylabel="relative error of the output")
        style(axes)
        set_ticks(axes.yaxis, LOG_TICKS)
        set_ticks(axes.xaxis, LOG_TICKS)
        axes.figure.canvas.draw()  # limits and sizes of the panel are known then
        label_ends(axes, ends)


def point_label(name: str, sizes: Sizes) -> str:
    """Name and sizes of a point as text."""
    return f"{name} {sizes_text(sizes)}"


def select(rows: list[dict[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    """The rows that have these entries."""
    return [row for row in rows if wanted.items() <= row.items()]
