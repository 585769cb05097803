"""Convert T2T-ViT checkpoints to bare state dicts in the keys of this project.

Conversion is optional: evaluation reads published files as they are. In place, the original is kept beside the
converted file, under the same name with `.og` at its end.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from scatterbrain.errors import UserError
from src.checkpoints import Conversion, convert_checkpoint_file
from src.utils.files import sha256_of_file
from src.utils.scripts import Parser, run_tool, say


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="checkpoint: as published, of a training run, or safetensors; one that is converted already is left alone",
    )
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="write the converted checkpoint here and leave FILE alone (one FILE only; an existing PATH is an error; "
        "a name in .safetensors makes a safetensors file)",
    )
    return parser


def describe(file: str, conversion: Conversion) -> str:
    """Facts about a conversion, one a line."""
    if not conversion.written:
        return f"{file}: converted already, nothing to do"
    more = {"sha256": sha256_of_file(conversion.path)}
    if conversion.backup is not None:
        more["original_kept_at"] = str(conversion.backup)
    return f"{file}: converted to {conversion.path}\n{conversion.contents.summary(**more)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Convert the files named in `argv`; returns the exit status, 1 if any failed."""
    return run_tool(build_parser(), convert, argv)


def convert(arguments: argparse.Namespace) -> int:
    """Convert the files one by one; one that fails does not stop the others."""
    if arguments.output is not None and len(arguments.files) > 1:
        raise UserError(f"--output takes one FILE, not {len(arguments.files)}. Convert them one at a time.")
    errors = Console(stderr=True)
    failed = False
    files = arguments.files
    # A bar for one file would only flicker.
    for file in track(files, "Converting", console=errors, transient=True) if len(files) > 1 else files:
        try:
            text = describe(file, convert_checkpoint_file(file, arguments.output))
        except UserError as error:
            failed = True
            errors.print(f"Error: {error}", markup=False, highlight=False, soft_wrap=True)
        else:
            say(text)
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted. The originals are whole; run the same command again.")
