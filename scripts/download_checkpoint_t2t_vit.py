"""Fetch a published T2T-ViT checkpoint and check it.

The file takes its name only once it is complete and holds the weights it should. One that is there already is checked
and kept.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.tools import Parser, run_tool, say
from src.checkpoints import PUBLISHED_CHECKPOINTS, PUBLISHED_URL
from src.checkpoints.download import download_published

FOLDER = Path(__file__).resolve().parents[1] / "checkpoints" / "t2tvit"


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("name", metavar="VARIANT", help=f"one of {', '.join(PUBLISHED_CHECKPOINTS)}")
    add("--output-dir", default=str(FOLDER), metavar="DIR", help="folder for the file, made if need be (%(default)s)")
    add("--url", default=PUBLISHED_URL, help="folder of the file, for a mirror: http, https or file (%(default)s)")
    add("--convert", action="store_true", help="convert the file afterwards (convert_checkpoint_t2t_vit.py)")
    return parser


LEFT = "No half-written file was left."
main = partial(run_tool, build_parser, lambda arguments: say(download_published(**vars(arguments))), interrupted=LEFT)

if __name__ == "__main__":
    sys.exit(main())
