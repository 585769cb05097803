"""Device time of causal landmark attention beside PyTorch's causal attention and FlexAttention's causal window.

    python -m tests.scatterbrain.ops.causal_time --dtype bfloat16 --output causal.json --figure causal.png

Times are those of one call, forward and with both passes: on a GPU of a CUDA graph, without the host's part, and on a
CPU of the call. PyTorch's attention is cuDNN's kernel where it runs. Each row is printed and written as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask

from scatterbrain.errors import UserError
from scatterbrain.ops.clusters.causal import causal_landmark_attention
from src.analysis.benchmark.baselines import compiled_flex_attention
from src.analysis.benchmark.report import DTYPES, header, machine_line
from src.analysis.benchmark.timing import graph_milliseconds, seconds_per_call
from src.analysis.tools import (
    Parser,
    Run,
    choose_device,
    new_table,
    positive_sequence,
    run_tool,
)

# what the others are compared with
BASELINE = "SDPA"
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
    option("--local-window", type=int, default=512, metavar="W", help="of FlexAttention, 0 for none (%(default)s)")
    option("--repeats", type=int, default=7, metavar="R", help="(%(default)s)")
    return parser


class CausalTime(Run):
    """One run, with the options of the tool."""

    def __init__(self, arguments: Any) -> None:
        if len(arguments.lengths) != len(arguments.heads) or len(arguments.num_landmarks) != len(arguments.windows):
            raise UserError("Give as many --heads as --lengths, and as many --windows as --num-landmarks.")
        self.arguments, self.device = arguments, choose_device(arguments.device)
        self.results: list[dict[str, Any]] = []
        self.missing = [f"{length} tokens" for length in arguments.lengths]

    def functions(self, length: int) -> Iterator[tuple[str, Function]]:
        """What is timed at a length, by name."""
        arguments = self.arguments
        yield BASELINE, sdpa
        for number, window in zip(arguments.num_landmarks, arguments.windows, strict=True):
            options = {"num_landmarks": number, "window": window}
            yield f"sbcluster M {number} W {window}", partial(causal_landmark_attention, **options)
        if arguments.local_window:  # compiled for each length, so last
            torch._dynamo.reset()
            yield f"window {arguments.local_window}", flex_window(length, arguments.local_window, self.device)

    def run(self, console: Console, save: Callable[[], None]) -> None:
        """Measure; `save` is called after each row."""
        arguments = self.arguments
        for length, heads in zip(arguments.lengths, arguments.heads, strict=True):
            for name, function in self.functions(length):
                shape = (heads, 1, length, arguments.dim)
                tensors = [torch.randn(shape, device=self.device, dtype=DTYPES[arguments.dtype]) for _ in range(4)]
                found = measure(function, tensors, arguments.repeats)
                times = dict(zip(("forward", "both"), found, strict=True))
                row = {"attention": name, "length": length, "heads": heads, "milliseconds": times}
                self.results.append(row)
                save()
                text = f"{heads} x {length}, {name}: forward {found[0]:.3f} ms, both passes {found[1]:.3f} ms"
                console.print(text, highlight=False)
            self.missing.remove(f"{length} tokens")

    def report(self) -> dict[str, Any]:
        """Machine, settings and rows, for JSON."""
        return {"complete": not self.missing, **header(self.arguments, self.device), "results": self.results}

    def tables(self) -> Iterator[Table]:
        """The rows as a table."""
        baselines = {row["length"]: row["milliseconds"] for row in self.results if row["attention"] == BASELINE}
        table = new_table(
            f"Milliseconds, and how many times as fast as {BASELINE}",
            ("heads", "tokens", "attention", "forward", "", "both passes", ""),
            ("attention",),
        )
        for row in self.results:
            cells = []
            for name, time in row["milliseconds"].items():
                cells += [f"{time:.3f}", f"{baselines[row['length']][name] / time:.2f}"]
            table.add_row(str(row["heads"]), str(row["length"]), row["attention"], *cells)
        yield table

    def notes(self) -> list[str]:
        """The machine."""
        return [machine_line(self.device)]

    def draw(self) -> Figure:
        """Time of a token and head against the length."""
        figure = Figure(figsize=(8, 3.5), layout="constrained")
        passes = (("forward", "forward"), ("both", "both passes"))
        for axes, (name, title) in zip(figure.subplots(1, 2), passes, strict=True):
            for attention in dict.fromkeys(row["attention"] for row in self.results):
                points = [
                    (row["length"], 1e6 * row["milliseconds"][name] / row["length"] / row["heads"])
                    for row in self.results
                    if row["attention"] == attention
                ]
                axes.plot(*zip(*points, strict=True), marker="o", label=attention)
            axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ns for a token and head", title=title)
        axes.legend(fontsize="small")
        return figure


main = partial(run_tool, build_parser, lambda arguments: CausalTime(arguments).main())

if __name__ == "__main__":
    raise SystemExit(main())
