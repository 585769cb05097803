"""FIFOs, devices and circular links among the images, or in place of an archive or table, are not read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from src.datamodules.check import look_at
from src.datamodules.dataset import ImageError, load_rgb
from tests.src.datamodules import format_files as files
from tests.src.datamodules.setup import datamodule, write_images


def fifo(path):
    os.mkfifo(path)


def endless_device(path):
    path.symlink_to("/dev/zero")


def empty_device(path):
    path.symlink_to("/dev/null")


def circular_link(path):
    path.symlink_to(path.name)


SPECIAL = [fifo, endless_device, empty_device, circular_link]
# A process of its own with a time limit: what is tested would otherwise hang.
LIMITED = """
import signal, sys
from tests.src.datamodules.setup import datamodule
from scatterbrain.errors import UserError
for data_dir in sys.argv[1:]:
    signal.alarm(30)
    try:
        module = datamodule(data_dir, num_classes=1000)
        module.setup("test")
        print(len(module.test_dataset), "images", flush=True)
    except UserError as error:
        print(error, flush=True)
signal.alarm(0)
"""


@pytest.mark.parametrize("make", SPECIAL)
def test_among_the_images_they_are_damaged_images(tmp_path, make):
    write_images(tmp_path, "val/a/1.png", "val/a/3.png")
    path = tmp_path / "val/a/2.png"
    make(path)
    reason = "Too many levels of symbolic links" if make is circular_link else "not a regular file"
    with pytest.raises(ImageError, match=f"Cannot decode the image {path}: {reason}. Remove or replace the file."):
        load_rgb(path)
    module = datamodule(tmp_path, num_classes=1, on_error="skip")
    loader = module.test_dataloader()
    assert [len(targets) for _, targets, _ in loader] == [1, 1]
    assert loader.skipped[0] == {1: reason}
    assert look_at(module.test_dataset.listing, 1, decode=True) == (f"cannot be read: {reason}", [])


def test_a_circular_link_beside_the_class_folders_is_left_out(tmp_path, caplog):
    write_images(tmp_path, "val/a/1.png")
    circular_link(tmp_path / "val/loop")
    circular_link(tmp_path / "loop")
    (tmp_path / "val/a/up").symlink_to("..")
    module = datamodule(tmp_path, num_classes=1)
    module.setup("test")
    assert module.test_dataset.paths == ["a/1.png"]
    assert "loop" in caplog.text


def test_in_place_of_an_archive_or_table_they_are_one_message(tmp_path):
    names = ["val.tar", "ILSVRC2012_img_val.tar", "val.csv", "val/1.tar"]
    try:
        import pyarrow  # noqa: F401

        names.append("val.parquet")
    except ImportError:
        pass
    folders = []
    for name in names:
        for make in SPECIAL[:3]:
            folders.append(tmp_path / f"{name.replace('/', '_')}_{make.__name__}")
            path = folders[-1] / name
            path.parent.mkdir(parents=True)
            make(path)
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", LIMITED, *map(str, folders)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(folders)
    for line, folder in zip(lines, folders, strict=True):
        assert (
            "not a regular file" in line or "No split" in line or "No folder" in line or "no class folders" in line
        ), line
        assert str(folder) in line


def test_in_place_of_labels_they_are_not_read(tmp_path):
    files.flat(tmp_path, "val")
    kit = tmp_path / "ILSVRC2012_devkit_t12/data/meta.mat"
    kit.unlink()
    fifo(kit)
    fifo(tmp_path / "LOC_val_solution.csv")
    with pytest.raises(ValueError, match=r"has no data/meta\.mat"):
        datamodule(tmp_path, num_classes=1000).setup("test")
