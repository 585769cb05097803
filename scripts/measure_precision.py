"""Rounding errors of every attention, forward and gradients, in each floating-point type.

Each attention is compared with its own float64 specification (the naive form) on the same inputs, rounded to the type
under test: what is left is the error of the computation. Inputs are normal, once as they are and once scaled so that
the largest logit is --logits. A figure that is not finite is counted, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from scatterbrain.attention import ATTENTIONS, COMPARED, create_attention
from scatterbrain.errors import UserError
from scripts.benchmark_attention import DTYPES
from src.utils.files import write_json
from src.utils.machine import machine_info
from src.utils.scripts import (
    Parser,
    check_writable,
    choose_device,
    comma_separated,
    first_line,
    fraction,
    positive,
    run_tool,
)

TENSORS = ("output", "gradient of query", "gradient of key", "gradient of value")


@dataclass
class Precision:
    """Errors of one tensor of one attention.

    Attributes:
        attention: its name.
        dtype: type under test.
        inputs: `ordinary` or `sharp`.
        largest_logit: largest |s q.k| of the inputs.
        tensor: one of `TENSORS`.
        max_abs: largest absolute error; None if a figure is not finite.
        relative_l2: L2 norm of the error over that of the reference; None if a figure is not finite.
        non_finite: number of figures that are not finite.
    """

    attention: str
    dtype: str
    inputs: str
    largest_logit: float
    tensor: str
    max_abs: float | None
    relative_l2: float | None
    non_finite: int


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    dtypes = tuple(DTYPES)
    parser.add_argument(
        "--attentions",
        type=comma_separated(tuple(ATTENTIONS)),
        default=COMPARED,
        metavar="NAMES",
        help=f"separated by commas ({','.join(COMPARED)})",
    )
    parser.add_argument(
        "--dtypes", type=comma_separated(dtypes), default=dtypes, metavar="NAMES", help=f"({','.join(dtypes)})"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto: CUDA where it is)")
    parser.add_argument("--length", type=positive, default=784, metavar="N", help="(784)")
    parser.add_argument("--batch", type=positive, default=2, metavar="B", help="(2)")
    parser.add_argument("--heads", type=positive, default=1, metavar="H", help="(1)")
    parser.add_argument("--dim", type=positive, default=64, metavar="E", help="width of a head (64)")
    parser.add_argument("--memory-fraction", type=fraction, default=1 / 32, metavar="F", help="budget (1/32)")
    parser.add_argument("--logits", type=fraction, default=50.0, metavar="X", help="largest logit, sharp inputs (50)")
    parser.add_argument("--causal", action="store_true", help="hide the keys that follow a query")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs (0)")
    parser.add_argument("--threads", type=positive, metavar="T", help="CPU threads (PyTorch's choice)")
    parser.add_argument("--output", metavar="FILE", help="write the figures as JSON")
    return parser


def draw_inputs(arguments: argparse.Namespace, sharp: bool) -> tuple[list[torch.Tensor], float]:
    """Query, key, value and gradient of the output (B, N, H, E), float32, and the largest logit."""
    generator = torch.Generator().manual_seed(arguments.seed)
    shape = (arguments.batch, arguments.length, arguments.heads, arguments.dim)
    query, key, value, gradient = (torch.randn(shape, generator=generator) for _ in range(4))
    logits = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * arguments.dim**-0.5
    largest = logits.abs().max().item()
    if sharp:
        factor = (arguments.logits / largest) ** 0.5
        query, key, largest = query * factor, key * factor, arguments.logits
    return [query, key, value, gradient], largest


def outputs(module: torch.nn.Module, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients of a module, in the order of `TENSORS`."""
    *leaves, gradient = (x.detach() for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    out = module(*leaves)[0]
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def measure(arguments: argparse.Namespace, name: str, dtype: str, sharp: bool, device: torch.device) -> list[Precision]:
    """Errors of one attention in one type on one kind of inputs."""
    tensors, largest = draw_inputs(arguments, sharp)
    tensors = [x.to(device, DTYPES[dtype]) for x in tensors]
    # random-feature rows stay float32, as the modules keep them
    fast, naive = (
        create_attention(
            name,
            arguments.length,
            arguments.dim,
            memory_fraction=arguments.memory_fraction,
            causal=arguments.causal,
            backend=backend,
        ).to(device)
        for backend in ("auto", "naive")
    )
    references = outputs(naive, [x.double() for x in tensors])
    try:
        results = outputs(fast, tensors)
    except RuntimeError as error:
        raise UserError(f"{name} fails in {dtype} on {device.type} ({first_line(error)}).") from error
    found = []
    for tensor, result, reference in zip(TENSORS, results, references, strict=True):
        non_finite = int((~torch.isfinite(result)).sum())
        error = result.double() - reference
        max_abs, relative = error.abs().max().item(), (error.norm() / reference.norm().clamp_min(1e-300)).item()
        if non_finite:
            max_abs = relative = None
        kind = "sharp" if sharp else "ordinary"
        found.append(Precision(name, dtype, kind, largest, tensor, max_abs, relative, non_finite))
    return found


def tables(results: Sequence[Precision]) -> Iterator[Table]:
    """One table for each type."""
    for dtype in dict.fromkeys(item.dtype for item in results):
        table = Table(
            title=f"{dtype}: error against float64, largest absolute / relative L2",
            title_justify="left",
        )
        table.add_column("attention", no_wrap=True)
        table.add_column("inputs", no_wrap=True)
        for tensor in TENSORS:
            table.add_column(tensor, justify="right")
        rows = [item for item in results if item.dtype == dtype]
        for name, kind in dict.fromkeys((item.attention, item.inputs) for item in rows):
            row = [item for item in rows if (item.attention, item.inputs) == (name, kind)]
            table.add_row(name, f"{kind}, {row[0].largest_logit:.0f}", *(cell(item) for item in row))
        yield table


def cell(item: Precision) -> str:
    """The errors of one tensor."""
    if item.non_finite:
        return f"{item.non_finite} not finite"
    return f"{item.max_abs:.1e} / {item.relative_l2:.1e}"


def measure_all(arguments: argparse.Namespace) -> int:
    """Measure, print, write; returns the exit status."""
    check_writable(arguments.output)
    if not arguments.logits > 0:
        raise UserError(f"--logits {arguments.logits} has to be positive.")
    device = choose_device(arguments.device)
    cases = list(itertools.product(arguments.dtypes, arguments.attentions, (False, True)))
    results: list[Precision] = []
    for dtype, name, sharp in track(cases, "Measuring", console=Console(stderr=True), transient=True):
        results += measure(arguments, name, dtype, sharp, device)
    console = Console()
    for table in tables(results):
        console.print(table)
    console.print("inputs: with the largest |logit|; rows of random features in float32", highlight=False)
    if arguments.output is not None:
        settings = {**vars(arguments), "device": device.type}
        content = {"machine": machine_info(device), "settings": settings}
        write_json(arguments.output, {**content, "results": [asdict(item) for item in results]})
    bad = sorted({f"{item.attention} in {item.dtype}" for item in results if item.non_finite})
    if bad:
        print(f"Error: figures that are not finite: {', '.join(bad)}.", file=sys.stderr)
    return 1 if bad else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Take the measurements that `argv` asks for; returns the exit status."""
    return run_tool(build_parser(), measure_all, argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted. Nothing was written.")
