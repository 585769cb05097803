"""Time and memory of a training step of a T2T-ViT under each attention, beside full attention in the same run.

A step is forward, cross-entropy with soft targets, backward and update by AdamW, of a batch that is on the device. In
each round every attention runs in turn, alone on the device; the median of the rounds is reported. Memory is the peak
of PyTorch's allocator during the steps, on CUDA.

    python scripts/benchmark_training.py --variant t2t_vit_t_14 --batch-size 256
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.benchmark.report import header, machine_line
from src.analysis.benchmark.training import PRECISIONS, TrainingBench
from src.analysis.tools import Parser, positive, print_report, run_tool, write_results
from src.distributed.launch import quiet_libraries


def build_parser() -> Parser:
    shared = ("variant", "attentions", "image-size", "num-classes", "memory-fraction", "device", "threads", "rounds")
    parser = Parser(__doc__, *shared, "output", variant="t2t_vit_t_7")
    option = parser.add_argument
    option("--batch-size", type=positive, metavar="B", help="(256 on CUDA, 8 on the CPU)")
    option("--precision", choices=PRECISIONS, help="(bf16-mixed on CUDA, 32 on the CPU)")
    option("--steps-per-round", type=positive, default=5, metavar="S", help="(%(default)s)")
    return parser


def benchmark(arguments: argparse.Namespace) -> None:
    quiet_libraries()
    bench = TrainingBench(arguments)
    bench.run()
    note = (
        "A step is forward, cross-entropy, backward and AdamW's update, on images that are on the device. ms: median "
        f"of {arguments.rounds} rounds of {arguments.steps_per_round} steps, the attentions in turn; MiB: peak with "
        "that network alone on the device, on CUDA."
    )
    print_report([bench.table()], note, machine_line(bench.device))
    write_results(arguments, {**header(arguments, bench.device), "results": bench.results()})


main = partial(run_tool, build_parser, benchmark)

if __name__ == "__main__":
    sys.exit(main())
