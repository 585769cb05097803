"""Write the weights of a T2T-ViT checkpoint in the published format: `{"state_dict_ema": ...}` with published keys.

A training's checkpoint (`checkpoints/last.ckpt`) is made to be resumed: it holds the optimizer's state and is six times
as large as its weights. This takes the weights alone, averaged ones where they were averaged, to ship or to share.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.tools import Parser, run_tool, say
from src.checkpoints import export_checkpoint_file
from src.utils.files import sha256_of_file


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("file", metavar="FILE", help="checkpoint of any format that evaluation reads")
    parser.add_argument("--output", required=True, metavar="PATH", help="where to; an existing file is an error")
    parser.add_argument("--half", action="store_true", help="round the weights to float16, which halves the file")
    return parser


def export(arguments: argparse.Namespace) -> None:
    output = Path(arguments.output).expanduser()
    contents = export_checkpoint_file(arguments.file, output, half=arguments.half)
    summary = contents.summary(bytes=f"{output.stat().st_size:,}", sha256=sha256_of_file(output))
    say(f"{arguments.file}: exported to {output}\n{summary}")


main = partial(run_tool, build_parser, export)

if __name__ == "__main__":
    sys.exit(main())
