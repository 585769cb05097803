"""Images without classes in a folder: `datamodule.labels=none`."""

import pytest

from src.datamodules.formats.unlabelled import list_unlabelled
from src.utils.labels import NO_LABEL
from tests.src.datamodules.setup import datamodule, message_of, write_images


def test_all_images_below_a_folder(tmp_path, caplog):
    write_images(tmp_path / "mine", "b.jpg", "a.PNG", "trip/day 1/c.jpeg", "trip/b.webp", ".hidden.jpg", "@eaDir/x.jpg")
    (tmp_path / "mine" / "movie.mov").touch()
    module = datamodule(tmp_path, test_split="mine", labels="none", num_classes=7)
    module.setup("test")
    images = module.test_dataset
    assert images.paths == ["a.PNG", "b.jpg", "trip/b.webp", "trip/day 1/c.jpeg"]
    assert images.targets == 4 * [NO_LABEL]
    assert (images.classes, images.class_to_index) == ([], {})
    assert "left out: movie.mov" in caplog.text
    assert [len(batch[0]) for batch in module.test_dataloader()] == [2, 2]
    assert [target for batch in module.test_dataloader() for target in batch[1].tolist()] == 4 * [NO_LABEL]


def test_classes_are_ignored(tmp_path):
    write_images(tmp_path / "val", "n01440764/1.jpg", "other/2.jpg")
    module = datamodule(tmp_path, labels="none")
    module.setup("test")
    assert module.test_dataset.paths == ["n01440764/1.jpg", "other/2.jpg"]
    assert module.test_dataset.targets == 2 * [NO_LABEL]


def test_images_of_imagenet_without_labels(tmp_path):
    write_images(tmp_path / "test", "ILSVRC2012_test_00000001.JPEG", "ILSVRC2012_test_00000002.JPEG")
    module = datamodule(tmp_path, test_split="test", labels="none")
    module.setup("test")
    assert len(module.test_dataset) == 2


def test_the_cache_keeps_that_there_are_no_labels(tmp_path):
    write_images(tmp_path / "val", "1.jpg", "2.jpg", "3.jpg")
    module = datamodule(tmp_path, labels="none", cache_dir=tmp_path / "cache")
    assert [target for batch in module.test_dataloader() for target in batch[1].tolist()] == 3 * [NO_LABEL]


def test_links_are_followed_once(tmp_path):
    write_images(tmp_path, "mine/1.jpg", "mine/2024/2.jpg", "elsewhere/3.jpg")
    (tmp_path / "mine" / "2024" / "above").symlink_to(tmp_path / "mine")
    (tmp_path / "mine" / "link").symlink_to(tmp_path / "elsewhere")
    assert list_unlabelled(tmp_path / "mine").names == ["1.jpg", "2024/2.jpg", "link/3.jpg"]


@pytest.mark.parametrize(("files", "found"), [((), "no files at all"), (("a.txt", "b.mov"), "among its 2 files")])
def test_no_images(tmp_path, files, found):
    (tmp_path / "val").mkdir()
    for name in files:
        (tmp_path / "val" / name).touch()
    message = message_of(datamodule(tmp_path, labels="none").setup)
    assert f"{tmp_path / 'val'} holds no images" in message
    assert found in message
    assert ".jpeg, .jpg" in message


@pytest.mark.parametrize("labels", ["auto", "none"])
def test_a_folder_of_photographs_as_data_dir_is_told_the_options(tmp_path, labels):
    write_images(tmp_path / "photos", "me.jpg")
    message = message_of(datamodule(tmp_path / "photos", labels=labels).setup)
    options = f"datamodule.data_dir={tmp_path} datamodule.test_split=photos datamodule.labels=none"
    assert message.endswith(options)
    module = datamodule(tmp_path, test_split="photos", labels="none")
    module.setup("test")
    assert module.test_dataset.paths == ["me.jpg"]


def test_a_split_without_class_folders_is_told_the_option(tmp_path):
    write_images(tmp_path / "val", "me.jpg")
    assert "without labels by datamodule.labels=none." in message_of(datamodule(tmp_path).setup)


def test_training_needs_labels(tmp_path):
    write_images(tmp_path, "train/1.jpg", "val/1.jpg")
    message = message_of(datamodule(tmp_path, labels="none").setup, "fit")
    assert "datamodule.labels=none is for evaluation: training needs labels" in message


@pytest.mark.parametrize("options", [{"format": "tar"}, {"class_order": "natural"}, {"class_order": "names.txt"}])
def test_options_that_contradict_it(tmp_path, options):
    write_images(tmp_path, "val/1.jpg")
    message = message_of(lambda: datamodule(tmp_path, labels="none", **options).setup("test"))
    ((name, value),) = options.items()
    assert "datamodule.labels=none" in message
    assert f"datamodule.{name}={value}" in message
    assert "Leave one of them out." in message
