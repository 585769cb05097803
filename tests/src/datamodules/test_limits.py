"""Compressed archives, and images over Pillow's limit."""

import subprocess
import tarfile
import zipfile

import pytest
from PIL import Image

from src.datamodules.dataset import ImageError, load_rgb
from tests.src.datamodules.setup import datamodule, message_of, write_images


@pytest.fixture
def images(tmp_path):
    """Two class folders; each image has 320 pixels."""
    write_images(tmp_path, "val/a/1.png", "val/b/1.png")
    return tmp_path


def pack(data_dir, name):
    """The split in an archive in place of its folder."""
    path = data_dir / name
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted((data_dir / "val").rglob("*.png")):
                archive.write(file, file.relative_to(data_dir))
    else:
        with tarfile.open(path, f"w:{'gz' if name.endswith('gz') else 'xz'}") as archive:
            archive.add(data_dir / "val", "val")
    subprocess.run(["rm", "-r", data_dir / "val"], check=True)
    return path


@pytest.mark.parametrize("name", ["val.zip", "val.tar.gz", "val.tgz", "validation.tar.xz"])
@pytest.mark.parametrize("format", ["auto", "tar", "class_folders"])
def test_a_compressed_archive_is_refused_with_the_command_that_unpacks_it(images, name, format):
    path = pack(images, name)
    module = datamodule(images, num_classes=2, format=format)
    message = message_of(module.setup, "test")
    assert message.startswith(f"{path} is a compressed archive")
    command = message.rpartition(": ")[2]
    assert command.split()[0] == ("unzip" if name.endswith("zip") else "tar")
    if command.startswith("tar") and format != "tar":
        subprocess.run(command, shell=True, check=True)
        module.setup("test")
        assert len(module.test_dataset) == 2


def test_a_compressed_archive_that_an_option_names(images):
    path = pack(images, "photographs.zip")
    assert f"unzip {path}" in message_of(datamodule(images, num_classes=2, test_split=path.name).setup, "test")
    message = message_of(datamodule(path, num_classes=2).setup, "test")
    assert message.startswith(f"The data folder {path} is a compressed archive. Unpack it")


def test_images_over_pillows_limit_name_the_option(images, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)
    message = message_of(lambda: list(datamodule(images, num_classes=2).test_dataloader()))
    assert "320 pixels) exceeds limit of 300 pixels." in message
    assert "datamodule.max_image_pixels=..." in message


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_limit_of_pixels_can_be_raised_and_lowered(images, monkeypatch, num_workers):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    options = {"num_classes": 2, "num_workers": num_workers, "on_error": "skip"}
    for limit, number in ((None, 0), (319, 0), (320, 2), (10**10, 2)):
        loader = datamodule(images, max_image_pixels=limit, **options).test_dataloader()
        assert sum(len(batch[1]) for batch in loader) == number


def test_the_limit_is_of_one_image_and_part_of_the_caches_key(images, tmp_path):
    with pytest.raises(ImageError, match="exceeds limit of 319 pixels"):
        load_rgb(images / "val/a/1.png", 319)
    cache = tmp_path / "cache"
    for limit in (319, None):
        module = datamodule(images, num_classes=2, max_image_pixels=limit, cache_dir=cache, on_error="skip")
        assert sum(len(batch[1]) for batch in module.test_dataloader()) == (0 if limit else 2)


def test_the_limit_is_checked():
    assert "datamodule.max_image_pixels" in message_of(datamodule, "x", max_image_pixels=0)
