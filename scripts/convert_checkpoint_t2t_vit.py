"""Convert T2T-ViT checkpoints to bare state dicts in the keys of this project.

Conversion is optional: evaluation reads published files as they are. In place, the original is kept beside the
converted file, under the same name with `.og` at its end.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from scatterbrain.errors import UserError
from src.analysis.tools import Parser, run_tool, say
from src.checkpoints import convert_checkpoint_file
from src.utils.files import sha256_of_file


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    files = "checkpoint: as published, of a training run, or safetensors; one that is converted already is left alone"
    add("files", metavar="FILE", nargs="+", help=files)
    output = "write the converted checkpoint here, .safetensors or other, and leave FILE alone (one FILE only)"
    add("--output", metavar="PATH", help=output)
    return parser


def convert(arguments: argparse.Namespace) -> int:
    """Convert the files one by one; one that fails does not stop the others."""
    if arguments.output is not None and len(arguments.files) > 1:
        raise UserError(f"--output takes one FILE, not {len(arguments.files)}. Convert them one at a time.")
    failed = False
    for file in arguments.files:
        try:
            conversion = convert_checkpoint_file(file, arguments.output)
        except UserError as error:
            failed = True
            print(f"Error: {error}", file=sys.stderr)
            continue
        if not conversion.written:
            say(f"{file}: converted already, nothing to do")
            continue
        more = {} if conversion.backup is None else {"original_kept_at": str(conversion.backup)}
        summary = conversion.contents.summary(sha256=sha256_of_file(conversion.path), **more)
        say(f"{file}: converted to {conversion.path}\n{summary}")
    return int(failed)


main = partial(run_tool, build_parser, convert, interrupted="The originals are whole; run the same command again.")

if __name__ == "__main__":
    sys.exit(main())
