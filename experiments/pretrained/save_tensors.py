r"""Saves queries, keys and values of one head of a trained network's self-attention, as the tests have them.

    python experiments/pretrained/save_tensors.py dinov2 --wheels DIR --inputs imagenet-sample-images --layer 1 \
        --output tests/data/dinov2_qkv.npz
    python experiments/pretrained/save_tensors.py whisper --wheels DIR --inputs whisper/tests/jfk.flac --layer 2 \
        --max-tokens 1024 --output tests/data/whisper_qkv.npz

The file has q<layer>, k<layer> and v<layer>, float16 (1, N, 1, E); the softmax scale is E ** -0.5.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # src is not installed: find it from any folder

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from experiments.pretrained import networks
from experiments.pretrained.measure import TASKS
from scatterbrain.errors import UserError
from src.analysis.tools import Parser, positive, result_file, run_tool
from src.utils.files import atomic_write


class Recorder(TorchFunctionMode):
    """Context that keeps the tensors of calls of attention.

    Args:
        min_tokens: smallest number of queries of a call that is kept.
    """

    def __init__(self, min_tokens: int) -> None:
        super().__init__()
        self.min_tokens = min_tokens
        self.calls: list[tuple[torch.Tensor, ...]] = []

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        """The call."""
        if func is F.scaled_dot_product_attention and args[0].shape[2] >= self.min_tokens:
            self.calls.append(args[:3])
        return func(*args, **(kwargs or {}))


def build_parser() -> Parser:
    parser = Parser(__doc__, num_inputs=1, image_size=518, batch_size=1, device="cpu", dtype="float32", weights=None)
    add = parser.add_argument
    add("network", choices=tuple(TASKS))
    add("--wheels", required=True, metavar="DIR", help="folder of the downloaded wheels")
    add("--inputs", required=True, metavar="PATH", help="photographs, a recording or a text, of which the first counts")
    add("--layer", type=int, default=0, metavar="L", help="from 0 on (0)")
    add("--head", type=int, default=0, metavar="H", help="from 0 on (0)")
    add("--max-tokens", type=positive, metavar="N", help="keep the first N tokens (all)")
    add("--output", type=result_file, required=True, metavar="FILE", help="an .npz file")
    return parser


@networks.needed_packages()
def run(arguments: argparse.Namespace) -> None:
    """Record and write."""
    with torch.inference_mode():
        task = TASKS[arguments.network](arguments)
        with Recorder(task.min_tokens) as recorder:
            task.run(0)
    layer, head = arguments.layer, arguments.head
    if not 0 <= layer < len(recorder.calls) or not 0 <= head < recorder.calls[0][0].shape[1]:
        heads = recorder.calls[0][0].shape[1]
        raise UserError(f"--layer {layer} --head {head}: there are {len(recorder.calls)} layers of {heads} heads.")
    tensors = (each[:, head : head + 1, : arguments.max_tokens].transpose(1, 2) for each in recorder.calls[layer])
    named = {f"{kind}{layer}": each.half().numpy() for kind, each in zip("qkv", tensors, strict=True)}
    with atomic_write(arguments.output, "wb") as file:
        np.savez_compressed(file, **named)


main = partial(run_tool, build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
