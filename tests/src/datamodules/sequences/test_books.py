"""Readers of texts of books and of WikiText-2."""

import pytest

from scatterbrain.errors import UserError
from src.datamodules.sequences import books


def test_wikitext(tmp_path):
    (tmp_path / "valid.txt").write_text(" = A = \n")
    (tmp_path / "test.txt").write_text("b")
    texts = books.read_wikitext(tmp_path)
    assert {name: bytes(text.numpy()) for name, text in texts.items()} == {"validation": b" = A = \n", "test": b"b"}


def test_files_that_are_missing(tmp_path):
    with pytest.raises(UserError, match=r"train.txt does not exist. .* by experiments/language/prepare_books.py"):
        books.read_text_files(tmp_path)
    with pytest.raises(UserError, match=r"valid.txt does not exist"):
        books.read_wikitext(tmp_path)
