"""Whether every data format gives the same evaluation: the same photographs written in each, and evaluated from each.

    class_folders   val/<class folder>/<file>
    csv             images/<file>, and val.csv of paths and labels
    tar             val.tar of class folders
    webdataset      val-00.tar, ... of <name>.jpg and <name>.cls
    parquet         data/validation-00000-of-0000n.parquet, as Hugging Face writes them; needs PyArrow

The bytes of the photographs are read once, from class folders, and kept in memory. Each format is recognised and
evaluated as run.py does it, and compared with class folders image by image, by name: paths differ, and with them the
order of the images and the batches. Images that --damage cuts short are skipped. Exit status 1 if a format differs in
its images, labels or first predictions; differences of probabilities are only reported.

    python scripts/compare_formats.py --damage 5 --output formats.json
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from scatterbrain.attention import ATTENTIONS
from src.analysis.formats import run
from src.analysis.tools import Parser, positive, run_tool


def build_parser() -> Parser:
    parser = Parser(__doc__, "split", "variant", "image-size", "output", variant="t2t_vit_t_7")
    add = parser.add_argument
    checkpoint = "checkpoints/demo/t2t_vit_t_7_flowers.pth.tar"
    add("--data-dir", default="data/flowers", metavar="DIR", help="folder that holds the split's (data/flowers)")
    add("--checkpoint", default=checkpoint, metavar="FILE", help=f"({checkpoint})")
    add("--attention", choices=tuple(ATTENTIONS), default="sblocal", metavar="NAME", help="(sblocal)")
    add("--num-classes", type=positive, metavar="N", help="outputs of the model (as many as class folders)")
    add("--batch-size", type=positive, default=8, metavar="B", help="(8)")
    add("--num-workers", type=int, metavar="N", help="processes that decode (as many as there are CPUs, at most 16)")
    add("--damage", type=positive, default=0, metavar="K", help="cut K images, evenly spread, to a third (none)")
    add("--keep", metavar="DIR", help="new folder for the formats, and their evaluations in runs/ (a temporary one)")
    return parser


main = partial(run_tool, build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
