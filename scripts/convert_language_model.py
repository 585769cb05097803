r"""Bits per byte of a trained language model, with other attentions in place of its own, and after a short fine-tune.

CHECKPOINT is last.ckpt of `python run.py experiment=language-books`. Each of --attentions gets the trained
weights as they are, and then as many --steps of training as the network's own attention, if it is among them.

    python scripts/convert_language_model.py CHECKPOINT --attentions full,local,sblocal,sbcluster --steps 200 \
        --wikitext data/wikitext-2 --output conversion.json
    python scripts/compare_conversions.py conversion.json
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.tools import Parser, positive, positive_number, result_file, run_tool


def build_parser() -> Parser:
    parser = Parser(
        __doc__, "attentions", "memory-fraction", "output", "device", attentions="full,local,sblocal,sbcluster"
    )
    parser.set_defaults(memory_fraction=1 / 8, figure=None)
    add = parser.add_argument
    add("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="of networks of one length")
    add("--books", default="data/books", metavar="DIR", help="of the texts (%(default)s)")
    add("--wikitext", metavar="DIR", help="folder of valid.txt and test.txt of WikiText-2, to evaluate on")
    add("--windows", type=positive, default=128, metavar="K", help="of a text, spread evenly (%(default)s)")
    add("--steps", type=int, default=0, metavar="N", help="of the fine-tune (0: none)")
    add("--lr", type=positive_number, default=1e-4, metavar="LR", help="highest learning rate (%(default)s)")
    add("--batch-size", type=positive, default=16, metavar="B", help="windows of a step (%(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="of the order of the text (%(default)s)")
    add(
        "--save-tensors",
        type=result_file,
        metavar="FILE",
        help="write queries, keys and values, .npz, for causal_error",
    )
    return parser


def convert(arguments: argparse.Namespace) -> int:
    from src.analysis.experiments.conversion import Conversion  # imports Lightning, which --help does not need

    return Conversion(arguments).main()


main = partial(run_tool, build_parser, convert)

if __name__ == "__main__":
    sys.exit(main())
