"""Files and folders that operating systems put beside images are neither images nor classes."""

import pytest

from tests.src.datamodules import format_files as files
from tests.src.datamodules.setup import datamodule, encoded

IMAGES = ["daisy/1.png", "roses/readme.png"]
FILES = ["daisy/Thumbs.db", "daisy/desktop.ini", "roses/README.txt", "roses/LICENSE", "roses/ehthumbs.db"]
FOLDERS = ["@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN"]


def contents():
    names = [*FILES, *[f"{name}/1.png" for name in FOLDERS], "daisy/@eaDir/1.png"]
    return [(name, encoded("PNG")) for name in IMAGES] + [(name, b"no image") for name in names]


def folders(data_dir):
    for name, content in contents():
        files.write(data_dir / "val" / name, content)


def tar(data_dir):
    files.write_tar(data_dir / "val.tar", contents())


@pytest.mark.parametrize("writer", [folders, tar])
def test_system_files_are_left_out_once_with_a_warning(tmp_path, writer, caplog):
    writer(tmp_path)
    module = datamodule(tmp_path, num_classes=2)
    module.setup("test")
    assert module.test_dataset.paths == IMAGES
    assert module.test_dataset.class_to_index == {"daisy": 0, "roses": 1}
    assert [len(targets) for _, targets, _ in module.test_dataloader()] == [2]
    for name in ("Thumbs.db", "@eaDir"):
        assert sum(name in record.getMessage() for record in caplog.records) == 1


def test_a_class_folder_of_system_files_has_no_images(tmp_path, caplog):
    files.write(tmp_path / "val/a/1.png", encoded("PNG"))
    files.write(tmp_path / "val/b/Thumbs.db", b"")
    module = datamodule(tmp_path, num_classes=2)
    module.setup("test")
    assert module.test_dataset.paths == ["a/1.png"]
    assert "class folders without images: b" in caplog.text
