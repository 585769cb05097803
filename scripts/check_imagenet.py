"""Check a copy of ImageNet, or other images, before hours are spent on it.

For each split: the format that is recognised, images in total and per class, missing classes, labels against what is
known of them, and images that are corrupt or odd. Every image is read, and its header checked; --decode decodes it too,
as an evaluation does, and finds whatever cannot be decoded.

The labels of validation images are compared with timm's "ReaL" labels (Beyer et al., 2020, "Are we done with
ImageNet?"): nine in ten of the original labels are among them, and one in a thousand of those in a wrong order. Labels
of training images are compared with the synset in the file's name.

    python scripts/check_imagenet.py /path/to/imagenet --split val --decode

Exit status 1 if something is wrong: an image is corrupt, labels are, or ImageNet is not complete (50 validation images
for each of 1,000 classes; --subset accepts fewer). What is merely odd (grayscale, CMYK, PNG in .JPEG, EXIF orientation,
which an evaluation ignores) occurs in ImageNet itself and is not wrong.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.tools import Parser, positive, run_tool
from src.datamodules.check import check
from src.datamodules.formats import FORMATS
from src.datamodules.formats.classes import LABELS
from src.utils.machine import usable_cpus


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("data_dir", metavar="DIR", help="folder that holds the splits, as datamodule.data_dir")
    add("--split", action="append", help="default: val, and train where it is there; may be repeated")
    add("--format", default="auto", choices=FORMATS, help="of the data (default: recognised)")
    add("--num-classes", type=positive, default=1000, help="outputs of the model (default: 1000)")
    add("--class-order", default="sorted", metavar="ORDER", help="sorted, natural or a file, as datamodule.class_order")
    add("--labels", default="auto", choices=LABELS, help="as datamodule.labels (default: auto)")
    add("--subset", action="store_true", help="accept that ImageNet is not complete")
    add("--decode", action="store_true", help="decode the images")
    add("--jobs", type=positive, default=usable_cpus(), help="threads (default: one per CPU)")
    parser.add("output", help="write the report as JSON")
    return parser


main = partial(run_tool, build_parser, lambda arguments: check(**vars(arguments)))

if __name__ == "__main__":
    sys.exit(main())
