"""Write the weights of a T2T-ViT checkpoint in the published layout: `{"state_dict_ema": ...}` with published keys.

What a training leaves (`checkpoints/last.ckpt`) is made for going on: it holds the optimizer's state and is six times
as large as its weights. This takes the weights alone, averaged ones where they were averaged, to ship or to share.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.utils.checkpoint import export_checkpoint_file
from src.utils.errors import UserError
from src.utils.files import sha256_of_file


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", metavar="FILE", help="checkpoint of any format that evaluation reads")
    parser.add_argument("--output", required=True, metavar="PATH", help="where to; an existing file is an error")
    parser.add_argument("--half", action="store_true", help="round the weights to float16, which halves the file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Export the file named in `argv`; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    output = Path(arguments.output).expanduser()
    try:
        contents = export_checkpoint_file(arguments.file, output, half=arguments.half)
        summary = contents.summary(bytes=f"{output.stat().st_size:,}", sha256=sha256_of_file(output))
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    Console().print(f"{arguments.file}: exported to {output}\n{summary}", markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted. Nothing was written.")
