"""Readers of texts of books, made by `experiments/language/prepare_books.py`, and of WikiText-2, as bytes."""

from __future__ import annotations

from pathlib import Path

import torch

from scatterbrain.errors import UserError, check_whole_number
from src.datamodules.sequences.base import PARTS, TextData
from src.datamodules.sequences.folders import read_text
from src.datamodules.sequences.text import as_tensor


def read_text_files(data_dir: str | Path, max_train_bytes: int | None = None) -> TextData:
    """The bytes of `train.txt`, `validation.txt` and `test.txt`.

    Args:
        data_dir: folder of the three files.
        max_train_bytes: take the first bytes of the training text alone; None takes all.

    Raises:
        UserError: a file is missing or cannot be read, or `max_train_bytes` is no number.
    """
    if data_dir is None:
        raise UserError("There is no text to read. Give the folder of the three texts: datamodule.read.data_dir=...")
    if max_train_bytes is not None:
        check_whole_number("datamodule.read.max_train_bytes", max_train_bytes, 1)
    texts = {}
    for part in PARTS:
        path = Path(str(data_dir), f"{part}.txt").expanduser()
        if not path.is_file():
            raise UserError(
                f"{path} does not exist. Make the three texts by experiments/language/prepare_books.py, or give their "
                "folder: datamodule.read.data_dir=..."
            )
        texts[part] = as_tensor(read_text(path))
    if max_train_bytes is not None:
        texts["train"] = texts["train"][:max_train_bytes]
    return TextData(**texts)


def read_wikitext(data_dir: str | Path) -> dict[str, torch.Tensor]:
    """The bytes of WikiText-2, `{"validation": ..., "test": ...}`, from `valid.txt` and `test.txt` as published.

    Args:
        data_dir: folder of the two files.

    Raises:
        UserError: one of them is missing or cannot be read.
    """
    files = {"validation": Path(data_dir, "valid.txt"), "test": Path(data_dir, "test.txt")}
    for path in files.values():
        if not path.is_file():
            raise UserError(f"{path} does not exist. Give the folder of WikiText-2, see docs/language.md.")
    return {name: as_tensor(read_text(path)) for name, path in files.items()}
