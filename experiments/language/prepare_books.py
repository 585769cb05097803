"""Make the texts that a language model is trained and tested on from books in plain text.

    git clone https://github.com/computationalstylistics/100_english_novels
    python experiments/language/prepare_books.py 100_english_novels/corpus

Of twenty books, in the order of their names, one is for validation and one for the test. What Project Gutenberg puts
around a book, and other editions of a book, are left out. The folder gets train.txt, validation.txt, test.txt, and
books.json with the names of the books and the SHA-256 of the texts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # src is not installed: find it from any folder

from src.analysis.tools import Parser, run_tool, say
from src.datamodules.sequences.books import split_books
from src.utils.files import atomic_write

BOOKS = Path(__file__).resolve().parents[2] / "data" / "books"
# two of the 100 English novels are of 1933 and 1937, and not in the public domain everywhere
EXCLUDED = ["Galsworthy_River_1933.txt", "Woolf_Years_1937.txt"]


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="folder of the books, files *.txt")
    add("--output", type=Path, default=BOOKS, metavar="DIR", help="folder of the texts (%(default)s)")
    add("--exclude", nargs="*", default=EXCLUDED, metavar="NAME", help="names of files, or patterns (%(default)s)")
    return parser


def prepare(arguments: argparse.Namespace) -> None:
    texts, books = split_books(arguments.source, arguments.exclude)
    arguments.output.mkdir(parents=True, exist_ok=True)
    description = {}
    for part, text in texts.items():
        with atomic_write(arguments.output / f"{part}.txt", "wb") as file:
            file.write(text)
        description[part] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest(), "books": books[part]}
        say(f"{part}: {len(books[part])} books, {len(text):,} bytes")
    if books["duplicates"]:
        say(f"left out, as editions of a book before: {', '.join(books['duplicates'])}")
    with atomic_write(arguments.output / "books.json") as file:
        file.write(json.dumps(description | {"duplicates": books["duplicates"]}, indent=1) + "\n")


main = partial(run_tool, build_parser, prepare)

if __name__ == "__main__":
    sys.exit(main())
