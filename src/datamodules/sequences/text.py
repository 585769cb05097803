"""Text as bytes: the sources of Python's standard library, which every machine has, and baselines of bits per byte."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import torch

from scatterbrain.errors import UserError, check_whole_number
from src.datamodules.sequences.base import TextData
from src.datamodules.sequences.folders import read_text

HELD_OUT_FILES = 10  # each tenth file


def read_python_sources(data_dir: str | os.PathLike[str] | None = None, limit: int = 8_000_000) -> TextData:
    """The sources of Python's standard library, split by file: of each ten, one is for validation and one for the test.

    They are in the order of their names; tests, installed packages and files that building Python writes are left out.
    Another version of Python has another text.

    Args:
        data_dir: folder of sources; None is that of the standard library.
        limit: bytes after which no other file is begun.

    Raises:
        UserError: there are fewer than ten files, one cannot be read, or `limit` is no number of bytes.
    """
    check_whole_number("datamodule.read.limit", limit, 1)
    folder = Path(str(data_dir or sysconfig.get_paths()["stdlib"])).expanduser()
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = {}
    for path in folder.rglob("*.py"):
        name = path.relative_to(folder)
        if not left_out & set(name.parts) and not name.parts[0].startswith(("config-", "_sysconfigdata")):
            paths[name.as_posix()] = path
    if len(paths) < HELD_OUT_FILES:
        raise UserError(
            f"{folder} has {len(paths)} Python files, fewer than {HELD_OUT_FILES}. Give another "
            "datamodule.read.data_dir."
        )
    parts: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    size = 0
    for number, name in enumerate(sorted(paths), start=1):
        text = read_text(paths[name])
        size += len(text)
        place = number % HELD_OUT_FILES
        parts["test" if place == 0 else "validation" if place == HELD_OUT_FILES // 2 else "train"].append(text)
        if size >= limit:
            break
    return TextData(**{name: as_tensor(b"".join(texts)) for name, texts in parts.items()})


def as_tensor(text: bytes) -> torch.Tensor:
    """The bytes (N,) as uint8."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def byte_frequencies(train: torch.Tensor, held_out: torch.Tensor) -> float:
    """Bits per byte of held-out text under the frequencies of bytes in training.

    Each byte counts once more than it occurs, so that none is impossible.
    """
    single = torch.bincount(train.long(), minlength=256).double() + 1
    return -(single / single.sum()).log2()[held_out.long()].mean().item()


def byte_after_byte(train: torch.Tensor, held_out: torch.Tensor) -> float:
    """Bits per byte of held-out text under the frequencies of bytes after each byte in training.

    Each pair counts once more than it occurs, so that none is impossible.
    """
    pairs = torch.bincount(train[:-1].long() * 256 + train[1:].long(), minlength=256**2).view(256, 256).double() + 1
    before, after = held_out[:-1].long(), held_out[1:].long()
    return -(pairs / pairs.sum(1, keepdim=True)).log2()[before, after].mean().item()
