"""Rounding errors of every attention, forward and gradients, in each floating-point type.

Each attention is compared with its own float64 specification (the naive implementation) on the same inputs, rounded to
the type under test: what is left is the error of the computation. Inputs are normal, once as they are and once scaled
so that the largest logit is --logits. A value that is not finite is counted, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.benchmark.precision import TENSORS, UserError, measure
from src.analysis.benchmark.report import DTYPES, header
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
    sys.exit(main())
