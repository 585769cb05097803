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
    with pytest.raises(UserError, match=r"3/train.txt does not exist"):  # as Hydra reads the name
        books.read_text_files(3)
    with pytest.raises(UserError, match=r"There is no text to read\. .*datamodule\.read\.data_dir"):
        books.read_text_files(None)


def test_the_home_folder_and_a_part_of_the_training_text(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for part in ("train", "validation", "test"):
        (tmp_path / f"{part}.txt").write_text("äöü")
    assert bytes(books.read_text_files("~", max_train_bytes=2).train.numpy()) == "ä".encode()
    with pytest.raises(UserError, match=r"datamodule\.read\.max_train_bytes=0 is not valid"):
        books.read_text_files("~", max_train_bytes=0)


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("src.datamodules.sequences.folders.read_file", refuse)
    (tmp_path / "train.txt").write_text("a")
    with pytest.raises(UserError, match=r"train\.txt cannot be read \(Permission denied\)"):
        books.read_text_files(tmp_path)
