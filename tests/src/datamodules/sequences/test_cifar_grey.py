"""Grey images by pixel, from folders and from a cache."""

import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from scatterbrain.errors import UserError
from src.datamodules.sequences.cifar_grey import read_cifar_grey
from tests.src.datamodules.sequences.setup import write_images


def test_images_are_grey_values_row_by_row(tmp_path):
    parts = read_cifar_grey(write_images(tmp_path), holdout=0.2)
    assert {name: len(part) for name, part in parts.items()} == {"train": 16, "test": 8, "validation": 4}
    for part in parts.values():
        assert part.tokens.shape == (len(part), 1024)
        assert part.tokens.dtype == torch.uint8
        assert part.lengths is None
        assert part.targets.bincount().tolist() == [len(part) // 2] * 2
        assert ((part.tokens.double().mean(1) < 128) == part.targets.bool()).all()
    colours = np.asarray(Image.open(tmp_path / "test" / "bee" / "0002.png")).astype(float)
    grey = colours @ [0.299, 0.587, 0.114]
    assert abs(parts["test"].tokens[6].view(32, 32).numpy() - grey).max() < 0.51
    everything = torch.cat([parts["train"].tokens, parts["validation"].tokens])
    assert len(torch.unique(everything, dim=0)) == 20


def test_the_seed_chooses_what_is_held_out(tmp_path):
    root = write_images(tmp_path, train=30)
    first, again, other = (read_cifar_grey(root, seed=seed)["validation"].tokens for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_jpeg_files_are_read_too(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        parts = read_cifar_grey(write_images(tmp_path, suffix="jpg"))
    assert len(parts["train"]) == 18
    assert "holds 20 for the train part where the published data set has 50,000" in caplog.text


def test_a_cache_is_read_in_place_of_the_folders(tmp_path):
    root, cache = write_images(tmp_path / "images"), tmp_path / "grey.safetensors"
    parts = read_cifar_grey(root, cache=cache)
    for data_dir in (root, None):
        cached = read_cifar_grey(data_dir, cache=cache)
        assert all(torch.equal(cached[name].tokens, part.tokens) for name, part in parts.items())
        assert all(torch.equal(cached[name].targets, part.targets) for name, part in parts.items())


def add_class(root):
    (root / "train" / "cat").mkdir()


def write_other_size(root):
    Image.new("RGB", (28, 28)).save(root / "train" / "ant" / "0001.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root / "train"), r"has no folder train/\. Give the folder with train/ and test/"),
        (lambda root: [shutil.rmtree(path) for path in root.glob("*/*")], r"train has no folders of classes"),
        (add_class, r"train/ and test/ do not have the same classes: cat\. Complete"),
        (lambda root: [path.unlink() for path in (root / "test" / "bee").iterdir()], r"bee holds no \.jpg or \.jpeg"),
        (lambda root: (root / "test" / "bee" / "0001.png").write_bytes(b"no image"), r"Cannot decode .*bee/0001\.png"),
        (write_other_size, r"ant/0001\.png has 28 x 28 pixels, not 32 x 32\. Resize or remove"),
    ],
)
def test_what_is_wrong_with_the_folders_is_named(damage, message, tmp_path):
    root = write_images(tmp_path / "images")
    damage(root)
    with pytest.raises(UserError, match=message):
        read_cifar_grey(root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"There is nothing to read the images from\. Give the folder"),
        ({"holdout": 0}, r"datamodule\.read\.holdout=0 is not valid"),
        ({"seed": -1}, r"datamodule\.read\.seed=-1 is not valid"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        read_cifar_grey(None, **options)


def test_names_may_be_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^3 does not exist\. Give the folder"):
        read_cifar_grey(3)
    write_images(tmp_path / "3")
    read_cifar_grey(3, cache=4)
    assert (tmp_path / "4").is_file()
