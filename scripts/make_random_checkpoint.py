"""Write a T2T-ViT checkpoint of reproducible random weights, in the published format.

It is for trying the pipeline (conversion, loading, evaluation, speed) without a download. The network has learnt
nothing: its accuracy is that of guessing and means nothing.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from scatterbrain.errors import UserError
from src.analysis.tools import Parser, run_tool, say
from src.checkpoints import read_checkpoint
from src.checkpoints.seeded_weights import save_seeded_checkpoint
from src.models.t2t_vit import T2T_VIT_VARIANTS
from src.utils.files import sha256_of_file


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("variant", metavar="VARIANT", help=f"one of {', '.join(T2T_VIT_VARIANTS)}")
    add("--num-classes", type=int, default=1000, metavar="N", help="number of classes (1000)")
    add("--image-size", type=int, default=224, metavar="PIXELS", help="height and width, a multiple of 16 (224)")
    add("--output", required=True, metavar="FILE", help="where the checkpoint goes; an existing file is an error")
    return parser


def make(arguments: argparse.Namespace) -> None:
    output = Path(arguments.output).expanduser()
    if output.exists() or output.is_symlink():
        raise UserError(f"{output} exists and is not overwritten. Move it or choose another output.")
    output.parent.mkdir(parents=True, exist_ok=True)
    save_seeded_checkpoint(arguments.variant, arguments.num_classes, arguments.image_size, output)
    summary = read_checkpoint(output).summary(variant=arguments.variant, sha256=sha256_of_file(output))
    say(f"{output}: random weights, accuracy means nothing\n{summary}")


main = partial(run_tool, build_parser, make)

if __name__ == "__main__":
    sys.exit(main())
