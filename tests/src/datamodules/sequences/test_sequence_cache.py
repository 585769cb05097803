"""A file of tensors: what is in it is checked, and nothing is overwritten."""

import os

import pytest
import safetensors.torch
import torch

from scatterbrain.errors import UserError
from src.datamodules.sequences.cache import read_cached


def read():
    return {"a": torch.arange(6, dtype=torch.uint8).view(2, 3), "b": torch.tensor([1, -2])}


def never():
    raise AssertionError("the data is in the cache")


@pytest.fixture
def cache(tmp_path):
    """A cache of `read`."""
    path = tmp_path / "cache.safetensors"
    read_cached(path, "source", read, "description")
    return path


def test_tensors_are_kept(cache):
    for description in ("description", None):
        tensors = read_cached(cache, "source", never, description)
        assert tensors.keys() == read().keys()
        for name, tensor in read().items():
            assert tensors[name].dtype == tensor.dtype
            assert torch.equal(tensors[name], tensor)


def test_a_folder_in_place_of_a_cache(tmp_path):
    """It is not to be deleted."""
    with pytest.raises(UserError, match=rf"{tmp_path} cannot be read .* it is a folder\. Give a file by [\w.]+$"):
        read_cached(tmp_path, "source", never, "description")


def test_without_a_cache_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert torch.equal(read_cached(None, "source", read, "description")["b"], read()["b"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "description", "message"),
    [
        ("other", "description", r"holds the data of 'source', not of 'other'\. Delete it"),
        ("source", "other", r"was made of other files or options than those given\. Delete it"),
    ],
)
def test_other_data_is_refused(source, description, message, cache):
    before = cache.read_bytes()
    with pytest.raises(UserError, match=message):
        read_cached(cache, source, never, description)
    assert cache.read_bytes() == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1] + b"\x07", r"is damaged: its checksum is wrong\. Delete it"),
        (lambda content: content[:-1], r"cannot be read as a cache of sequences: .* Delete it"),
        (lambda content: b"", r"cannot be read as a cache of sequences: .* Delete it"),
        (lambda content: b"something of the user's", r"cannot be read as a cache of sequences: .* Delete it"),
        (lambda content: safetensors.torch.save(read()), r"is not a cache of sequences of this version\. Delete it"),
    ],
)
def test_damaged_files_are_refused_and_stay(damage, message, cache):
    content = damage(cache.read_bytes())
    cache.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_cached(cache, "source", never, "description")
    assert cache.read_bytes() == content


def test_a_folder_that_cannot_be_written_is_reported_before_reading(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written\. Give another datamodule\.read\.cache"):
        read_cached(tmp_path / "file" / "cache.safetensors", "source", never, "description")
    os.mkdir(tmp_path / "folder")
    with pytest.raises(UserError, match=r"folder cannot be read as a cache of sequences"):
        read_cached(tmp_path / "folder", "source", never, "description")


def test_an_interrupted_reading_leaves_nothing(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_cached(tmp_path / "cache.safetensors", "source", interrupted, "description")
    assert list(tmp_path.iterdir()) == []
