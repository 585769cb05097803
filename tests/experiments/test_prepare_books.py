"""Preparation of books: parts, other editions, what is cut off, and what is refused."""

import json

import numpy as np
import pytest
import torch

from experiments.language import prepare_books
from src.datamodules.sequences.books import read_text_files


def write_books(folder, number=21, length=600):
    """Books of random words, in the order of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    words = ["".join(map(chr, generator.integers(97, 123, 5))) for _ in range(500)]
    texts = []
    for i in range(number):
        texts.append(f"Book {i}.\n" + " ".join(generator.choice(words, length)))
        (folder / f"{i:02d}.txt").write_text(texts[-1])
    return texts


def test_parts_are_whole_books(tmp_path):
    texts = write_books(tmp_path / "books")
    assert prepare_books.main([str(tmp_path / "books"), "--output", str(tmp_path / "out")]) == 0
    data = read_text_files(tmp_path / "out")
    assert bytes(data.validation.numpy()).decode() == texts[9] + "\n\n"
    assert bytes(data.test.numpy()).decode() == texts[19] + "\n\n"
    train = "".join(f"{text}\n\n" for i, text in enumerate(texts) if i not in (9, 19))
    assert data.train.dtype == torch.uint8
    assert bytes(data.train.numpy()).decode() == train
    described = json.loads((tmp_path / "out" / "books.json").read_text())
    assert described["test"]["books"] == ["19.txt"]
    assert described["test"]["bytes"] == len(data.test)
    assert described["duplicates"] == []
    part = read_text_files(tmp_path / "out", max_train_bytes=1000)
    assert torch.equal(part.train, data.train[:1000])
    assert torch.equal(part.test, data.test)


def test_other_editions_are_left_out(tmp_path):
    texts = write_books(tmp_path, length=3000)
    # in a folder whose name comes last, with other punctuation and other ends of lines
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "edition.txt").write_text("Title\r\n\r\n" + texts[3].upper().replace(" ", ",\r\n"))
    (tmp_path / "others" / "half.txt").write_text(texts[4][:9000] + " new" * 3000)
    (tmp_path / "others" / "new.txt").write_text("entirely other words " * 50)
    parts, names = prepare_books.split_books(tmp_path)
    assert names["duplicates"] == ["others/edition.txt", "others/half.txt"]
    assert names["train"][-1] == "others/new.txt"
    assert parts["train"].endswith(b"other words\n\n")
    _, names = prepare_books.split_books(tmp_path, ["new*", "half.txt"])
    assert names["train"][-1] == "20.txt"


@pytest.mark.parametrize("which", ["THE", "THIS"])
def test_what_project_gutenberg_adds_is_cut_off(which):
    text = (
        f"\ufeffThe Project Gutenberg eBook\r\n*** START OF {which} PROJECT GUTENBERG EBOOK EMMA ***\r\n\r\n"
        f"Emma Woodhouse, handsome,\r\nclever\r\n\r\n*** END OF {which} PROJECT GUTENBERG EBOOK EMMA ***\r\nLicence"
    )
    assert prepare_books.clean_text(text.encode()) == b"Emma Woodhouse, handsome,\nclever\n\n"


def test_old_headers_of_project_gutenberg_are_cut_off():
    text = b"Etext\n*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29*END*\nIt was\n\nEnd of Project Gutenberg"
    assert prepare_books.clean_text(text) == b"It was\n\n"
    assert prepare_books.clean_text(b" \r\n") == b""


def test_what_is_refused(tmp_path, capsys):
    write_books(tmp_path / "books", 19)
    assert prepare_books.main([str(tmp_path / "books"), "--output", str(tmp_path / "out")]) == 1
    assert "holds 19 different books (*.txt), fewer than the 20" in " ".join(capsys.readouterr().err.split())

    def refused(source, output):
        assert prepare_books.main([str(source), "--output", str(output)]) == 1
        return " ".join(capsys.readouterr().err.split())

    books = tmp_path / "enough"
    write_books(books)
    assert "nowhere is no folder. Give the folder of the books." in refused(tmp_path / "nowhere", tmp_path / "out")
    # the second run would read the test text as a book
    assert "is in the folder of the books" in refused(books, books / "texts")
    assert "is in the folder of the books" in refused(books, books)
    (tmp_path / "file").write_text("mine")
    assert "file cannot be made (File exists). Give another --output." in refused(books, tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.txt").write_text("mine")
    assert "train.txt is there already, and not from this script" in refused(books, tmp_path / "mine")
    assert (tmp_path / "mine" / "train.txt").read_text() == "mine"
    (books / "folder.txt").mkdir()  # no book
    for _ in range(2):  # its own texts are made again
        assert prepare_books.main([str(books), "--output", str(tmp_path / "out")]) == 0
    (books / "link.txt").symlink_to(tmp_path / "gone")
    assert "link.txt cannot be read (No such file or directory)" in refused(books, tmp_path / "out")


@pytest.mark.parametrize("text", ["Однажды в студёную зимнюю пору " * 3, "吾輩は猫である。名前はまだ無い。" * 50])
def test_other_editions_in_other_alphabets_are_left_out(tmp_path, text):
    write_books(tmp_path)
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    (tmp_path / "y.txt").write_bytes(b"\xef\xbb\xbf" + text.replace(" ", "\r\n").encode())
    (tmp_path / "z.txt").write_text("Совсем другая книга, в ней другие слова.", encoding="utf-8")
    _, names = prepare_books.split_books(tmp_path)
    assert "y.txt" in names["duplicates"]
    assert {"x.txt", "z.txt"} <= {*names["train"], *names["validation"]}
