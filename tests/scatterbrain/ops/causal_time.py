"""Device time and error of causal landmark attention beside other causal attention.

    python -m tests.scatterbrain.ops.causal_time --dtype bfloat16 --output causal.json --figure causal.png

Times are those of one call, forward and with both passes: on a GPU of a CUDA graph, without the host's part, and on a
CPU of the call. PyTorch's attention is cuDNN's kernel where it runs. `window` and `blocks` are FlexAttention's: the
last keys of a query, and for each block of 128 queries its own block of keys and those whose mean has the largest
product with the mean query, which the time includes; on a CPU it has no gradients, and they are left out. `sblocal` has
a window and random features. Each row is printed and written as it comes.

    python -m tests.scatterbrain.ops.causal_time --dtype bfloat16 --inputs tests/data/*_qkv.npz --heads 192

takes the queries, keys and values of files as those of `causal_error`, the heads of each layer repeated. Its rows also
hold the error: the L2 norm of the difference from causal full attention's output over that of the latter, the mean over
the heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from scatterbrain.attention import create_attention
from scatterbrain.errors import UserError
from scatterbrain.ops.clusters.causal import causal_landmark_attention
from scatterbrain.ops.sparse.naive import block_means
from src.analysis.benchmark.baselines import compiled_flex_attention
from src.analysis.benchmark.report import DTYPES, header, machine_line
from src.analysis.benchmark.timing import graph_milliseconds, seconds_per_call
from src.analysis.experiments.memory import set_ticks
from src.analysis.tools import (
    Parser,
    Run,
    choose_device,
    new_table,
    positive_sequence,
    run_tool,
)
from src.evaluation.figure_style import COLOURS, label_ends, new_figure, style

# what the others are compared with
BASELINE = "SDPA"
# names in `COLOURS` of what is not an attention there
FAMILY_COLOURS = {BASELINE: "full", "blocks": "topk-blocks", "window": "flex-window"}
Function = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention by PyTorch, with cuDNN's kernel where it can."""
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def flex_window(length: int, window: int, device: torch.device) -> Function:
    """The last `window` keys of each query, by FlexAttention; its mask is made once."""

    def inside(_batch: torch.Tensor, _head: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (j <= i) & (i - j < window)

    mask = create_block_mask(inside, None, None, length, length, device=device.type)
    return partial(compiled_flex_attention(), block_mask=mask)


def is_past(_batch: torch.Tensor, _head: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """Causal mask of FlexAttention."""
    return j <= i


def flex_blocks(num_blocks: int, block: int = 128) -> Function:
    """The own block of a block of queries and the best earlier ones, `num_blocks` in all, by FlexAttention."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scores = block_means(query, block) @ block_means(key, block).transpose(-2, -1)
            blocks = torch.arange(scores.shape[-1], device=query.device)
            scores = scores.float().masked_fill(blocks == blocks[:, None], torch.inf)
            scores = scores.masked_fill(blocks > blocks[:, None], -torch.inf)
            indices = scores.argsort(-1, descending=True).int()
            numbers = (blocks + 1).clamp_max(num_blocks).int().expand(scores.shape[:-1]).contiguous()
            options = {"BLOCK_SIZE": block, "mask_mod": is_past, "seq_lengths": (query.shape[2], key.shape[2])}
            mask = BlockMask.from_kv_blocks(numbers, indices, **options)
        return compiled_flex_attention()(query, key, value, block_mask=mask)

    return attend


def window_and_features(length: int, width: int, columns: int, device: torch.device) -> Function:
    """`sblocal` that spends half of the columns on the last keys, and half on random features."""
    half = columns // 2
    # half of a window lies before the query
    module = create_attention("sblocal", length, width, local_context=2 * half, nb_features=half, causal=True)
    module = module.to(device)
    return lambda *tensors: module(*(x.transpose(1, 2) for x in tensors))[0].transpose(1, 2)


def milliseconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Time of one call."""
    found = graph_milliseconds(call, repeats) if device.type == "cuda" else None
    if found is None:
        call()
        found = 1e3 * min(seconds_per_call(call, 1, device) for _ in range(repeats))
    return found


def measure(function: Function, tensors: list[torch.Tensor], repeats: int) -> tuple[float, float]:
    """Milliseconds of the forward pass, and of both passes."""
    *leaves, gradient = tensors
    leaves = [x.requires_grad_() for x in leaves]

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(function(*leaves), leaves, gradient)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return function(*leaves)

    device = tensors[0].device
    return milliseconds(forward, repeats, device), milliseconds(both, repeats, device)


def build_parser() -> Parser:
    parser = Parser(__doc__, "device", "dtype", "dim", "threads", "output", "figure")
    option = parser.add_argument
    lengths, heads = "4096,16384,65536", "192,48,8"
    option("--lengths", type=positive_sequence, default=lengths, metavar="N", help="separated by commas (%(default)s)")
    option("--heads", type=positive_sequence, default=heads, metavar="H", help="heads of each length (%(default)s)")
    option("--num-landmarks", type=positive_sequence, default="32,16", metavar="M", help="(%(default)s)")
    option("--windows", type=positive_sequence, default="1,128", metavar="W", help="of each M (%(default)s)")
    option("--value-weight", type=float, default=0.0, metavar="X", help="rows of it too, of each M (%(default)s)")
    option("--columns", type=positive_sequence, default="64,256", metavar="N", help="of sblocal (%(default)s)")
    option("--blocks", type=positive_sequence, default="2,4", metavar="N", help="chosen ones (%(default)s)")
    option("--inputs", nargs="+", type=Path, default=None, metavar="FILE", help="q, k, v of layers, npz (random)")
    option("--local-windows", type=positive_sequence, default="512", metavar="W", help="of FlexAttention (%(default)s)")
    option("--repeats", type=int, default=7, metavar="R", help="(%(default)s)")
    return parser


class CausalTime(Run):
    """One run, with the options of the tool."""

    def __init__(self, arguments: Any) -> None:
        counts = [] if arguments.inputs else [(arguments.lengths, arguments.heads)]
        counts.append((arguments.num_landmarks, arguments.windows))
        if any(len(one) != len(other) for one, other in counts):
            raise UserError("Give as many --heads as --lengths, and as many --windows as --num-landmarks.")
        self.arguments, self.device = arguments, choose_device(arguments.device)
        self.results: list[dict[str, Any]] = []
        self.missing = [name for name, _, _ in self.workloads()]

    def workloads(self) -> Iterator[tuple[str, int, Callable[[], list[torch.Tensor]]]]:
        """Name of the layer, heads, and queries, keys, values and gradients (heads, 1, N, width), of each workload."""
        arguments = self.arguments
        kind = {"device": self.device, "dtype": DTYPES[arguments.dtype]}
        if arguments.inputs is None:
            for length, heads in zip(arguments.lengths, arguments.heads, strict=True):
                shape = (heads, 1, length, arguments.dim)
                yield f"{length} tokens", heads, lambda shape=shape: [torch.randn(shape, **kind) for _ in range(4)]
            return
        heads = arguments.heads[0]
        for path in arguments.inputs:
            arrays = np.load(path)
            for layer in sorted(name[1:] for name in arrays.files if name[0] == "q"):

                def tensors(arrays=arrays, layer=layer) -> list[torch.Tensor]:
                    found = [torch.from_numpy(arrays[name + layer]).transpose(1, 2).to(**kind) for name in "qkv"]
                    found = [x.transpose(0, 1).repeat(-(-heads // x.shape[1]), 1, 1, 1)[:heads] for x in found]
                    return [*found, torch.randn_like(found[2])]

                yield f"{path.stem.split('_')[0]} {layer}", heads, tensors

    def functions(self, length: int, width: int) -> Iterator[tuple[str, Function]]:
        """What is timed at a length, by name."""
        arguments = self.arguments
        yield BASELINE, sdpa
        for number, window in zip(arguments.num_landmarks, arguments.windows, strict=True):
            for weight in dict.fromkeys((0.0, arguments.value_weight)):
                options = {"num_landmarks": number, "window": window, "value_weight": weight}
                name = f"sbcluster M {number} W {window}" + (f" value_weight {weight:g}" if weight else "")
                yield name, partial(causal_landmark_attention, **options)
        for columns in arguments.columns:
            yield f"sblocal, {columns} columns", window_and_features(length, width, columns, self.device)
        if self.device.type == "cpu":
            return
        for number in arguments.blocks:
            torch._dynamo.reset()
            yield f"blocks {number}", flex_blocks(number)
        for window in arguments.local_windows:  # compiled for each length, so last
            torch._dynamo.reset()
            yield f"window {window}", flex_window(length, window, self.device)

    def run(self, console: Console, save: Callable[[], None]) -> None:
        """Measure; `save` is called after each row."""
        arguments = self.arguments
        for workload, heads, draw in self.workloads():
            tensors = draw()
            length, width = tensors[0].shape[2:]
            expected = sdpa(*(x.float() for x in tensors[:3])) if arguments.inputs else None
            for name, function in self.functions(length, width):
                found = measure(function, tensors, arguments.repeats)
                times = dict(zip(("forward", "both"), found, strict=True))
                row = {"attention": name, "length": length, "heads": heads, "milliseconds": times}
                if expected is not None:
                    with torch.no_grad():
                        difference = function(*(x.detach() for x in tensors[:3])).float() - expected
                    error = difference.flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
                    row |= {"layer": workload, "error": error.mean().item()}
                self.results.append(row)
                save()
                text = f"{heads} x {length}, {name}: forward {found[0]:.3f} ms, both passes {found[1]:.3f} ms"
                text += f", {row['layer']}: error {row['error']:.3f}" if "error" in row else ""
                console.print(text, highlight=False, soft_wrap=True)
            self.missing.remove(workload)

    def report(self) -> dict[str, Any]:
        """Machine, settings and rows, for JSON."""
        content = header(self.arguments, self.device, "inputs")
        return {"complete": not self.missing, **content, "results": self.results}

    def tables(self) -> Iterator[Table]:
        """The rows as a table."""
        baselines = {
            (row["length"], row.get("layer")): row["milliseconds"]
            for row in self.results
            if row["attention"] == BASELINE
        }
        table = new_table(
            f"Milliseconds, and how many times as fast as {BASELINE}",
            ("heads", "tokens", "attention", "forward", "", "both passes", "", "error"),
            ("attention",),
        )
        for row in self.results:
            cells = []
            for name, time in row["milliseconds"].items():
                baseline = baselines[row["length"], row.get("layer")][name]
                cells += [f"{time:.3f}", f"{baseline / time:.2f}"]
            cells.append(f"{row['layer']}: {row['error']:.3f}" if "error" in row else "")
            table.add_row(str(row["heads"]), str(row["length"]), row["attention"], *cells)
        yield table

    def notes(self) -> list[str]:
        """The machine."""
        return [machine_line(self.device)]

    def draw(self) -> Figure:
        """Time of a token and head against the length."""
        figure = new_figure(9, 3.4)
        passes = (("forward", "forward"), ("both", "both passes"))
        names = list(dict.fromkeys(row["attention"] for row in self.results))
        families = [name.split()[0].rstrip(",") for name in names]
        for axes, (which, title) in zip(figure.subplots(1, 2), passes, strict=True):
            ends, lengths = [], sorted({row["length"] for row in self.results})
            for number, (name, family) in enumerate(zip(names, families, strict=True)):
                points = [
                    (row["length"], 1e6 * row["milliseconds"][which] / row["length"] / row["heads"])
                    for row in self.results
                    if row["attention"] == name
                ]
                colour = COLOURS[FAMILY_COLOURS.get(family, family)]
                dashes = "--" if family in families[:number] else "-"  # the second of its family
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, linestyle=dashes)
                ends.append((*points[-1], name, colour))
            axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ns for a token and head", title=title)
            style(axes)
            set_ticks(axes.xaxis, lengths, "{:,}".format)
            set_ticks(axes.yaxis, (0.5, 1, 2, 5, 10, 20, 50, 100))
            figure.canvas.draw()  # limits and sizes of the panel are known then
            label_ends(axes, ends)
        return figure


main = partial(run_tool, build_parser, lambda arguments: CausalTime(arguments).main())

if __name__ == "__main__":
    raise SystemExit(main())
