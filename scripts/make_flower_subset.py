"""Make the demo's photographs, data/flowers, from the originals.

SOURCE is the folder `dataset/val` of https://github.com/Oldpel/flower_photos: one folder per class. Of each class the
photographs whose file names have the smallest SHA-256 are taken, turned upright, resized and written as JPEG without
metadata to OUTPUT/val/<class>/. OUTPUT/ATTRIBUTION.md says where they come from and what was changed.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.tools import Parser, run_tool, say
from src.datamodules.flowers import make_subset

FLOWERS = Path(__file__).resolve().parents[1] / "data" / "flowers"


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder of class folders with the original photographs")
    add("--output", default=str(FLOWERS), metavar="DIR", help="to make; an existing one is an error (%(default)s)")
    add("--per-class", type=int, default=40, metavar="N", help="photographs a class (%(default)s)")
    add("--side", type=int, default=256, metavar="PIXELS", help="shorter side, up to 4096 (%(default)s)")
    add("--quality", type=int, default=80, metavar="Q", help="of the JPEG files, 1 to 95 (%(default)s)")
    add("--force", action="store_true", help="move an existing DIR to DIR.og and make a new one")
    return parser


LEFT = "No half-made folder was left."
main = partial(run_tool, build_parser, lambda arguments: say(make_subset(**vars(arguments))), interrupted=LEFT)

if __name__ == "__main__":
    sys.exit(main())
