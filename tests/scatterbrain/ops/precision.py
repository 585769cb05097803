"""Rounding errors of every attention, forward and gradients, in each floating-point type.

Each attention is compared with its own float64 specification (the naive implementation) on the same inputs, rounded to
the type under test: what is left is the error of the computation. Inputs are normal, once as they are and once scaled
so that the largest logit is --logits. A value that is not finite is counted, and makes the exit status 1.

    python -m tests.scatterbrain.ops.precision
"""

from __future__ import annotations

import argparse
import itertools
import sys
from functools import partial
from typing import Any

import torch

from scatterbrain.attention import create_attention
from scatterbrain.errors import UserError
from src.analysis.benchmark.report import DTYPES, header
from src.analysis.benchmark.tiles import TENSORS, outputs
from src.analysis.tools import (
    Parser,
    choose_device,
    comma_separated,
    fraction,
    new_table,
    positive,
    print_report,
    run_tool,
    shown,
    write_results,
)
from src.utils.text import first_line


def draw_inputs(arguments: argparse.Namespace, sharp: bool) -> tuple[list[torch.Tensor], float]:
    """Query, key, value and gradient of the output (B, N, 1, E), float32, and the largest logit."""
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch, arguments.length, 1, arguments.dim)
    query, key, value, gradient = (torch.randn(shape, generator=generator) for _ in range(4))
    logits = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * arguments.dim**-0.5
    largest = logits.abs().max().item()
    if sharp:
        factor = (arguments.logits / largest) ** 0.5
        query, key, largest = query * factor, key * factor, arguments.logits
    return [query, key, value, gradient], largest


def measure(
    arguments: argparse.Namespace, name: str, dtype: str, sharp: bool, device: torch.device
) -> list[dict[str, Any]]:
    """Errors of one attention in one type on one kind of inputs, a row for each of `TENSORS`.

    `max_abs` is the largest absolute error and `relative_l2` the L2 norm of the error over that of the specification;
    both are None if a value is not finite.
    """
    tensors, largest = draw_inputs(arguments, sharp)
    tensors = [x.to(device, DTYPES[dtype]) for x in tensors]
    options = {"memory_fraction": arguments.memory_fraction}
    # random projections stay float32, as the modules keep them
    fast, naive = (
        create_attention(name, arguments.length, arguments.dim, backend=backend, **options).to(device)
        for backend in ("auto", "naive")
    )
    expected = outputs(naive, [x.double() for x in tensors])
    try:
        results = outputs(fast, tensors)
    except RuntimeError as error:
        raise UserError(f"{name} fails in {dtype} on {device.type} ({first_line(error)}).") from error
    rows = []
    for tensor, result, exact in zip(TENSORS, results, expected, strict=True):
        non_finite = int((~torch.isfinite(result)).sum())
        error = result.double() - exact
        rows.append(
            {
                "attention": name,
                "dtype": dtype,
                "inputs": "sharp" if sharp else "ordinary",
                "largest_logit": largest,
                "tensor": tensor,
                "max_abs": None if non_finite else error.abs().max().item(),
                "relative_l2": None if non_finite else (error.norm() / exact.norm().clamp_min(1e-300)).item(),
                "non_finite": non_finite,
            }
        )
    return rows


def build_parser() -> Parser:
    parser = Parser(__doc__, "attentions", "device", "dim", "memory-fraction", "threads", "output")
    option, dtypes = parser.add_argument, ",".join(DTYPES)
    option("--dtypes", type=comma_separated(tuple(DTYPES)), default=dtypes, metavar="NAMES", help="(%(default)s)")
    option("--length", type=positive, default=784, metavar="N", help="(%(default)s)")
    option("--batch", type=positive, default=2, metavar="B", help="(%(default)s)")
    option("--logits", type=fraction, default=50.0, metavar="X", help="largest logit, sharp inputs (%(default)s)")
    return parser


def measure_all(arguments: argparse.Namespace) -> int:
    if not arguments.logits > 0:
        raise UserError(f"--logits {arguments.logits} has to be positive.")
    device = choose_device(arguments.device)
    cases = list(itertools.product(arguments.dtypes, arguments.attentions, (False, True)))
    rows, tables = [], {}
    for dtype in arguments.dtypes:
        title = f"{dtype}: error against float64, largest absolute / relative L2"
        tables[dtype] = new_table(title, ("attention", "inputs", *TENSORS), ("attention", "inputs"))
    for dtype, name, sharp in shown(cases, "Measuring"):
        found = measure(arguments, name, dtype, sharp, device)
        cells = (
            f"{row['non_finite']} not finite"
            if row["non_finite"]
            else f"{row['max_abs']:.1e} / {row['relative_l2']:.1e}"
            for row in found
        )
        tables[dtype].add_row(name, f"{found[0]['inputs']}, {found[0]['largest_logit']:.0f}", *cells)
        rows += found
    print_report(tables.values(), "inputs: with the largest |logit|; random projections in float32")
    write_results(arguments, {**header(arguments, device), "results": rows})
    bad = sorted({f"{row['attention']} in {row['dtype']}" for row in rows if row["non_finite"]})
    if bad:
        print(f"Error: values that are not finite: {', '.join(bad)}.", file=sys.stderr)
    return 1 if bad else 0


main = partial(run_tool, build_parser, measure_all)

if __name__ == "__main__":
    raise SystemExit(main())
