"""Books in plain text as bytes, for a language model: whole files are held out, editions of one book count once.

`experiments/language/prepare_books.py` makes the three texts from the books, `read_text_files` reads them.
"""

from __future__ import annotations

import fnmatch
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from scatterbrain.errors import UserError, check_whole_number
from src.datamodules.formats.files import read_file
from src.datamodules.sequences.base import PARTS, TextData
from src.datamodules.sequences.text import as_tensor

HELD_OUT_FILES = 10  # of ten books, one is for validation or the test, in turn
SHINGLE_WORDS = 8
SKETCH_SHARE = 64  # one in 64 sequences of words is compared
SAME_BOOK = 0.2  # share of a book's sequences of words in an earlier book

# Project Gutenberg's marks around a book, of this and of the last century
_START = re.compile(rb"\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG[^\n]*\n|\*END[* ]+THE SMALL PRINT[^\n]*\n", re.I)
_END = re.compile(rb"\n[^\n]*\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG|\nEnd of (?:the )?Project Gutenberg", re.I)


def read_text_files(data_dir: str | Path, max_train_bytes: int | None = None) -> TextData:
    """The bytes of `train.txt`, `validation.txt` and `test.txt`.

    Args:
        data_dir: folder of the three files.
        max_train_bytes: take the first bytes of the training text alone; None takes all.

    Raises:
        UserError: a file is missing, or `max_train_bytes` is no number.
    """
    texts = {}
    for part in PARTS:
        path = Path(data_dir, f"{part}.txt")
        if not path.is_file():
            raise UserError(
                f"{path} does not exist. Make the three texts by experiments/language/prepare_books.py, or give their "
                "folder: datamodule.read.data_dir=..."
            )
        texts[part] = as_tensor(read_file(path))
    if max_train_bytes is not None:
        check_whole_number("max_train_bytes", max_train_bytes, 1)
        texts["train"] = texts["train"][:max_train_bytes]
    return TextData(**texts)


def read_wikitext(data_dir: str | Path) -> dict[str, torch.Tensor]:
    """The bytes of WikiText-2, `{"validation": ..., "test": ...}`, from `valid.txt` and `test.txt` as published.

    Args:
        data_dir: folder of the two files.

    Raises:
        UserError: one of them is missing.
    """
    files = {"validation": Path(data_dir, "valid.txt"), "test": Path(data_dir, "test.txt")}
    for path in files.values():
        if not path.is_file():
            raise UserError(f"{path} does not exist. Give the folder of WikiText-2, see docs/language.md.")
    return {name: as_tensor(read_file(path)) for name, path in files.items()}


# Preparation


def split_books(folder: Path, exclude: Sequence[str] = ()) -> tuple[dict[str, bytes], dict[str, list[str]]]:
    """The texts of the three parts, and the names of the books in each and of other editions, which are left out.

    Books are the files `*.txt` below the folder, in the order of their paths. Of twenty books, the tenth is for
    validation, the last for the test, and the others for training. One of which a fifth is in an earlier one is another
    edition of it.

    Args:
        folder: of the books.
        exclude: patterns of file names to leave out, as in `fnmatch`.

    Raises:
        UserError: there are fewer than 20 books.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.txt"))
    names = [name for name in names if not any(fnmatch.fnmatchcase(Path(name).name, pattern) for pattern in exclude)]
    texts: dict[str, list[bytes]] = {part: [] for part in PARTS}
    books: dict[str, list[str]] = {part: [] for part in (*PARTS, "duplicates")}
    known: set[int] = set()
    number = 0
    for name in names:
        text = clean_text(read_file(folder / name))
        sketch = sketch_text(text)
        if not text or len(sketch & known) > SAME_BOOK * len(sketch):
            books["duplicates"].append(name)
            continue
        known |= sketch
        number += 1
        part = "train" if number % HELD_OUT_FILES else "validation" if number % (2 * HELD_OUT_FILES) else "test"
        texts[part].append(text)
        books[part].append(name)
    if not texts["test"]:
        raise UserError(
            f"{folder} holds {number} different books (*.txt), fewer than the {2 * HELD_OUT_FILES} of which some can "
            "be held out. Give the folder of more books."
        )
    return {part: b"".join(each) for part, each in texts.items()}, books


def clean_text(text: bytes) -> bytes:
    """A book without Project Gutenberg's header and licence, lines ended by LF, with an empty line at its end."""
    text = text.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    starts = list(_START.finditer(text))
    if starts:
        text = text[starts[-1].end() :]
    end = _END.search(text)
    if end:
        text = text[: end.start()]
    text = text.strip()
    return text + b"\n\n" if text else text


def sketch_text(text: bytes) -> set[int]:
    """Hashes of one in 64 of a text's sequences of eight words, the same in any edition."""
    words = re.findall(rb"[a-z]+", text.lower())
    hashes = (zlib.crc32(b" ".join(words[i : i + SHINGLE_WORDS])) for i in range(len(words) - SHINGLE_WORDS + 1))
    return {each for each in hashes if each % SKETCH_SHARE == 0}
