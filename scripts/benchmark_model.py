"""Images per second, time and memory of the implementations of a T2T-ViT, against each other in one run.

    published   computes as the published code does: full attention with its softmax written out, in both token stages
                and in the backbone
    module      T2TViT under each attention, as it is trained
    inference   the same weights as evaluations run them; on CUDA recorded as a CUDA graph
    baseline    timm's vit_small_patch16_224, a network of about the size of t2t_vit_t_14

--compile adds each of them under torch.compile; on CUDA those too are recorded as CUDA graphs, the published
implementation with and without. Each runs once in each round, in turn; the medians of the rounds are reported, and the
medians of the ratios within a round. Batches of images are on the device.

Memory is what PyTorch takes from the device for one implementation alone: images, weights, everything in between, and
what a CUDA graph keeps. It is counted on CUDA alone. --end-to-end adds whole evaluations, as run.py does them, of
images in memory.

Ctrl-C and SIGTERM end the run with the batches and evaluations that are complete by then. --output is written after
each of them, with "complete": false until all are done.

    python scripts/benchmark_model.py --variant t2t_vit_t_14 --attentions full,sblocal --compile
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.benchmark.model import ModelBench
from src.analysis.benchmark.networks import KINDS, PRECISIONS
from src.analysis.tools import Parser, comma_separated, positive_list, run_tool


def build_parser() -> Parser:
    shared = ("variant", "attentions", "image-size", "num-classes", "memory-fraction", "device", "threads", "repeats")
    parser = Parser(__doc__, *shared, "compile", "output", "figure", repeats="7")
    option = parser.add_argument
    kinds = {"type": comma_separated(KINDS), "default": ",".join(KINDS), "metavar": "NAMES", "help": "(%(default)s)"}
    option("--implementations", **kinds)
    batches = "the best one is reported (32,128,256,512 on CUDA, 8 on the CPU)"
    option("--batches", type=positive_list, metavar="B,...", help=batches)
    precision = "as trainer.precision (bf16-true on CUDA, 32-true on the CPU)"
    option("--precision", choices=tuple(PRECISIONS), help=precision)
    option("--end-to-end", action="store_true", help="also run whole evaluations")
    return parser


main = partial(run_tool, build_parser, lambda arguments: ModelBench(arguments).main())

if __name__ == "__main__":
    sys.exit(main())
