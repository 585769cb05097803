"""Make the texts that a language model is trained and tested on from books in plain text.

    git clone https://github.com/computationalstylistics/100_english_novels
    python experiments/language/prepare_books.py 100_english_novels/corpus

Of twenty books, in the order of their names, one is for validation and one for the test. What Project Gutenberg puts
around a book, and other editions of a book, are left out. The folder gets train.txt, validation.txt, test.txt, and
books.json with the names of the books and the SHA-256 of the texts.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import re
import sys
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # src is not installed: find it from any folder

from scatterbrain.errors import UserError
from src.analysis.tools import Parser, run_tool, say
from src.datamodules.sequences.base import PARTS
from src.datamodules.sequences.folders import read_text
from src.utils.files import atomic_write

BOOKS = Path(__file__).resolve().parents[2] / "data" / "books"
# two of the 100 English novels are of 1933 and 1937, and not in the public domain everywhere
EXCLUDED = ["Galsworthy_River_1933.txt", "Woolf_Years_1937.txt"]
HELD_OUT_FILES = 10  # of ten books, one is for validation or the test, in turn
SHINGLE_WORDS = 8
SKETCH_SHARE = 64  # one in 64 sequences of words is compared
SAME_BOOK = 0.2  # share of a book's sequences of words in an earlier book

# Project Gutenberg's marks around a book, of this and of the last century
_START = re.compile(rb"\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG[^\n]*\n|\*END[* ]+THE SMALL PRINT[^\n]*\n", re.I)
_END = re.compile(rb"\n[^\n]*\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG|\nEnd of (?:the )?Project Gutenberg", re.I)


def split_books(folder: Path, exclude: Sequence[str] = ()) -> tuple[dict[str, bytes], dict[str, list[str]]]:
    """The texts of the three parts, and the names of the books in each and of other editions, which are left out.

    Books are the files `*.txt` below the folder, in the order of their paths. Of twenty books, the tenth is for
    validation, the last for the test, and the others for training. One of which a fifth is in an earlier one is another
    edition of it.

    Args:
        folder: of the books.
        exclude: patterns of file names to leave out, as in `fnmatch`.

    Raises:
        UserError: there are fewer than 20 books, or one cannot be read.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.txt") if not path.is_dir())
    names = [name for name in names if not any(fnmatch.fnmatchcase(Path(name).name, pattern) for pattern in exclude)]
    texts: dict[str, list[bytes]] = {part: [] for part in PARTS}
    books: dict[str, list[str]] = {part: [] for part in (*PARTS, "duplicates")}
    known: set[int] = set()
    number = 0
    for name in names:
        text = clean_text(read_text(folder / name))
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
    """Hashes of one in 64 of a text's sequences of eight words, the same in any edition; of a short text, of all."""
    words = re.findall(rb"[a-z]+", text.lower())
    if 2 * sum(map(len, words)) < len(text.replace(b" ", b"")):  # another alphabet
        words = text.split()
    hashes = {zlib.crc32(b" ".join(words[i : i + SHINGLE_WORDS])) for i in range(len(words) - SHINGLE_WORDS + 1)}
    # the whole where there are too few words, as where no spaces divide them
    return {each for each in hashes if each % SKETCH_SHARE == 0} or hashes or {zlib.crc32(text)}


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="folder of the books, files *.txt")
    add("--output", type=Path, default=BOOKS, metavar="DIR", help="folder of the texts (%(default)s)")
    add("--exclude", nargs="*", default=EXCLUDED, metavar="NAME", help="names of files, or patterns (%(default)s)")
    return parser


def prepare(arguments: argparse.Namespace) -> None:
    source, output = arguments.source, arguments.output
    if not source.is_dir():
        raise UserError(f"{source} is no folder. Give the folder of the books.")
    if output.resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"{output} is in the folder of the books, and its texts would be books too. Give another --output."
        )
    others = [name for name in (*(f"{part}.txt" for part in PARTS), "books.json") if (output / name).exists()]
    if others and not (output / "books.json").is_file():
        raise UserError(f"{output / others[0]} is there already, and not from this script. Give another --output.")
    texts, books = split_books(source, arguments.exclude)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output} cannot be made ({error.strerror}). Give another --output.") from error
    description = {}
    for part, text in texts.items():
        with atomic_write(output / f"{part}.txt", "wb") as file:
            file.write(text)
        description[part] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest(), "books": books[part]}
        say(f"{part}: {len(books[part])} books, {len(text):,} bytes")
    if books["duplicates"]:
        say(f"left out, as editions of a book before: {', '.join(books['duplicates'])}")
    with atomic_write(output / "books.json") as file:
        file.write(json.dumps(description | {"duplicates": books["duplicates"]}, indent=1) + "\n")


main = partial(run_tool, build_parser, prepare)

if __name__ == "__main__":
    sys.exit(main())
