"""Reviews by byte, from folders and from a cache."""

import logging
import shutil

import pytest
import torch

from scatterbrain.errors import UserError
from src.datamodules.sequences.imdb import read_imdb
from tests.src.datamodules.sequences.setup import write_reviews


def texts(part):
    return [bytes(row[:length].tolist()).decode() for row, length in zip(part.tokens, part.lengths, strict=True)]


def test_reviews_are_bytes_with_lengths_and_classes(tmp_path):
    parts = read_imdb(write_reviews(tmp_path), length=100, holdout=0.2)
    assert {name: len(part) for name, part in parts.items()} == {"train": 16, "test": 8, "validation": 4}
    for part in parts.values():
        assert part.tokens.shape == (len(part), 100)
        assert part.tokens.dtype == torch.uint8
        assert part.targets.bincount().tolist() == [len(part) // 2] * 2
        assert [int("fine" in text) for text in texts(part)] == part.targets.tolist()
        behind = torch.arange(100) >= part.lengths[:, None]
        assert (part.tokens[behind] == 0).all()
        assert (part.tokens[~behind] > 0).all()
    assert texts(parts["test"])[:2] == ["test 0: dull", "test 1: dull, dull"]
    held_out, kept = (set(texts(parts[name])) for name in ("validation", "train"))
    assert len(held_out | kept) == 20


def test_long_reviews_are_cut_off(tmp_path):
    test = read_imdb(write_reviews(tmp_path), length=12)["test"]
    assert test.tokens.shape == (8, 12)
    assert test.lengths.tolist() == [12] * 8
    assert texts(test)[3] == "test 3: dull"


def test_the_seed_chooses_what_is_held_out(tmp_path):
    root = write_reviews(tmp_path, train=40)
    first, again, other = (set(texts(read_imdb(root, 60, seed=seed)["validation"])) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_folder_may_be_in_another_and_keep_training_reviews_in_val(tmp_path):
    write_reviews(tmp_path / "aclImdb", parts={"train": 6, "test": 4, "val": 4})
    parts = read_imdb(tmp_path, length=60, holdout=0.5)
    assert {name: len(part) for name, part in parts.items()} == {"train": 10, "test": 8, "validation": 10}
    everything = texts(parts["train"]) + texts(parts["validation"])
    assert sum(text.startswith("val") for text in everything) == 8


def test_an_incomplete_copy_is_reported(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        read_imdb(write_reviews(tmp_path), length=60)
    assert "holds 20 for the train part where the published data set has 25,000" in caplog.text


def test_a_cache_is_read_in_place_of_the_folders(tmp_path):
    root, cache = write_reviews(tmp_path / "reviews"), tmp_path / "new" / "imdb.safetensors"
    parts = read_imdb(root, length=30, cache=cache)
    for data_dir in (root, None):
        for length in (30, 20):
            cached = read_imdb(data_dir, length=length, cache=cache)
            for name, part in parts.items():
                assert torch.equal(cached[name].tokens, part.tokens[:, :length])
                assert torch.equal(cached[name].lengths, part.lengths.clamp(max=length))
                assert torch.equal(cached[name].targets, part.targets)
    assert [path.name for path in cache.parent.iterdir()] == ["imdb.safetensors"]
    review = root / "train" / "pos" / "0_10.txt"
    text = review.read_text()
    review.write_text(f"{text}, changed")
    with pytest.raises(UserError, match=r"was made of other files or options .* Delete it"):
        read_imdb(root, length=30, cache=cache)
    review.write_text(text)
    read_imdb(root, length=30, cache=cache)
    (root / "train" / "pos" / "new_9.txt").write_text("one more")
    with pytest.raises(UserError, match=r"was made of other files or options .* Delete it"):
        read_imdb(root, length=30, cache=cache)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root), r"does not exist\. Give the folder with train/ and test/"),
        (lambda root: shutil.rmtree(root / "test"), r"has no folder test/\. Give the folder with train/ and test/"),
        (lambda root: shutil.rmtree(root / "train" / "pos"), r"train/pos is missing: a class has no folder"),
        (lambda root: [path.unlink() for path in (root / "test" / "neg").iterdir()], r"test/neg holds no \.txt files"),
        (lambda root: (root / "train" / "neg" / "3_1.txt").write_text(""), r"train/neg/3_1\.txt is empty\. Replace"),
        (lambda root: (root / "train" / "neg" / "a.txt").symlink_to("nothing"), r"neg/a\.txt cannot be read \(No such"),
    ],
)
def test_what_is_wrong_with_the_folders_is_named(damage, message, tmp_path):
    root = write_reviews(tmp_path / "reviews")
    damage(root)
    with pytest.raises(UserError, match=message):
        read_imdb(root, length=60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"There is nothing to read the reviews from\. Give the folder"),
        ({"cache": "nothing.safetensors"}, r"nothing\.safetensors does not exist, and no folder to read is given"),
        ({"length": 0}, r"datamodule\.read\.length=0 is not valid"),
        ({"holdout": 1}, r"datamodule\.read\.holdout=1 is not valid"),
        ({"holdout": True}, r"datamodule\.read\.holdout=True is not valid"),
        ({"seed": -1}, r"datamodule\.read\.seed=-1 is not valid"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        read_imdb(None, **options)
