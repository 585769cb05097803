import io
import logging
import os
import random
import weakref

import pytest
import timm.data
import torch
from PIL import ExifTags, Image
from torchvision.transforms.functional import pil_to_tensor

from src.datamodules.dataset import ImageLoader
from src.datamodules.formats.classes import class_index
from tests.src.datamodules.setup import dataset, encoded, message_of, write_images

# ---- which images, in which order -------------------------------------------------------------------------


def test_paths_are_sorted_by_folder_then_file(tmp_path):
    paths = ["b/1.jpg", "b/10.jpg", "b/2.jpg", "a-b/z.jpg", "a/z.jpg", "C/y.jpg", "b/A.jpg"]
    shuffled = random.Random(0).sample(paths, len(paths))
    write_images(tmp_path, *shuffled)
    data = dataset(tmp_path, 4)
    # Folder first: as whole strings, "a-b/z.jpg" would come before "a/z.jpg".
    assert data.paths == ["C/y.jpg", "a/z.jpg", "a-b/z.jpg", "b/1.jpg", "b/10.jpg", "b/2.jpg", "b/A.jpg"]
    assert data.classes == ["C", "a", "a-b", "b"]
    assert data.targets == [0, 1, 2, 3, 3, 3, 3]
    assert data.class_to_index == {"C": 0, "a": 1, "a-b": 2, "b": 3}
    assert len(data) == 7


def test_items_are_the_image_at_their_path_its_target_and_index(tmp_path):
    write_images(tmp_path, "b/1.png", "a/1.png", "a/0.png")
    data = dataset(tmp_path, 2)
    for i, (path, target) in enumerate([("a/0.png", 0), ("a/1.png", 0), ("b/1.png", 1)]):
        image, item_target, index = data[i]
        assert torch.equal(image, pil_to_tensor(Image.open(tmp_path / path).convert("RGB")))
        assert (item_target, index) == (target, i)
        assert type(item_target) is int


def test_hidden_files_and_folders_are_left_out(tmp_path):
    write_images(tmp_path, "a/1.jpg", "a/.hidden.jpg", ".cache/1.jpg", ".DS_Store")
    assert dataset(tmp_path, 1).paths == ["a/1.jpg"]


def test_links_are_followed(tmp_path):
    write_images(tmp_path / "store", "x/1.jpg", "2.jpg")
    root = tmp_path / "val"
    (root / "b").mkdir(parents=True)
    os.symlink(tmp_path / "store" / "x", root / "a")
    os.symlink(tmp_path / "store" / "2.jpg", root / "b" / "2.jpg")
    data = dataset(root, 2)
    assert data.paths == ["a/1.jpg", "b/2.jpg"]
    assert data[1][1] == 1


@pytest.mark.parametrize(
    ("extra", "folder", "report"),
    [
        ("valprep.sh", False, "outside class folders are left out: valprep.sh"),
        ("a/deeper/9.jpg", False, "inside class folders are left out: a/deeper"),
        ("empty", True, "class folders without images: empty"),
    ],
)
def test_what_is_left_out_is_logged(tmp_path, caplog, extra, folder, report):
    write_images(tmp_path, "a/1.jpg", "b/1.jpg")
    if folder:
        (tmp_path / extra).mkdir()
    else:
        write_images(tmp_path, extra)
    with caplog.at_level(logging.WARNING):
        data = dataset(tmp_path, 3 if folder else 2)
    assert data.paths == ["a/1.jpg", "b/1.jpg"]
    assert report in caplog.text
    assert str(tmp_path) in caplog.text


def test_nothing_is_logged_for_a_clean_folder(flowers, caplog):
    dataset(flowers / "val", 5)
    assert not caplog.records


@pytest.mark.parametrize("kind", [list, iter])
def test_a_subset_has_the_images_asked_for_in_that_order(tmp_path, kind):
    write_images(tmp_path, "a/0.png", "a/1.png", "b/0.png", "b/1.png")
    data = dataset(tmp_path, 2)
    part = data.subset(kind([3, 0, 2]))
    assert part.paths == ["b/1.png", "a/0.png", "b/0.png"]
    assert part.targets == [1, 0, 1]
    assert (part.classes, part.class_to_index, part.root) == (data.classes, data.class_to_index, data.root)
    image, target, index = part[1]
    assert torch.equal(image, data[0][0])
    assert (target, index) == (0, 1)
    assert len(data) == 4


def test_a_subset_may_have_a_transform_of_its_own(tmp_path):
    write_images(tmp_path, "a/0.png", "a/1.png")
    data = dataset(tmp_path, 1)
    part = data.subset([1], lambda image: image.size)
    assert part[0] == ((20, 16), 0, 0)
    assert torch.equal(data[1][0], pil_to_tensor(part.decode(0)))


# ---- labels -----------------------------------------------------------------------------------------------


def test_synsets_have_the_standard_indices_in_any_subset():
    # Tench, tabby cat, daisy, toilet tissue: known positions of the 1,000 outputs.
    expected = {"n01440764": 0, "n02123045": 281, "n11939491": 985, "n15075141": 999}
    assert class_index(expected) == expected
    assert class_index(["n11939491"]) == {"n11939491": 985}


def test_the_thousand_synsets_are_numbered_in_sorted_order():
    from timm.data import ImageNetInfo

    names = ImageNetInfo().label_names()
    shuffled = random.Random(0).sample(names, 1000)
    assert list(class_index(shuffled).items()) == [(name, i) for i, name in enumerate(sorted(names))]


def test_synset_folders_set_the_targets(tmp_path):
    write_images(tmp_path, "n02123045/1.jpg", "n11939491/1.jpg", "n11939491/2.jpg")
    data = dataset(tmp_path, 1000)
    assert data.targets == [281, 985, 985]
    assert data.classes == ["n02123045", "n11939491"]


def test_other_names_are_numbered_in_sorted_order():
    assert class_index(["roses", "daisy", "tulips"], 3) == {"daisy": 0, "roses": 1, "tulips": 2}


def test_synsets_need_a_thousand_classes():
    message = message_of(class_index, ["n01440764", "n02123045"], 3)
    assert "n01440764, n02123045" in message
    assert "the model has 3" in message
    assert "model.num_classes=1000" in message


def test_wrong_number_of_classes_names_both_and_the_option(tmp_path):
    write_images(tmp_path, *[f"c{i}/1.jpg" for i in range(7)])
    message = message_of(dataset, tmp_path, 1000)
    assert str(tmp_path) in message
    assert "7 class folders (c0, c1, c2, c3, c4 and 2 more)" in message
    assert "1000 classes" in message
    assert "model.num_classes=7" in message


def test_mixed_names_name_the_odd_ones():
    message = message_of(class_index, ["n01440764", "n02123045", "kitten", "old"], 1000)
    assert "2 of 4" in message
    assert "kitten, old" in message
    assert "n02123045" not in message
    assert "Remove or rename" in message


# ---- a folder that is not as expected ---------------------------------------------------------------------


def test_empty_split(tmp_path):
    message = message_of(dataset, tmp_path, 1)
    assert message.startswith(f"{tmp_path} is empty.")
    assert "one folder per class" in message


def test_class_folders_without_any_image(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    message = message_of(dataset, tmp_path, 2)
    assert f"No images in the 2 class folders of {tmp_path}" in message
    assert "further down" not in message
    write_images(tmp_path, "a/images/1.jpg")
    assert "as in a/images" in message_of(dataset, tmp_path, 2)


def test_split_that_is_not_a_folder(tmp_path):
    assert f"{tmp_path / 'none'} is not a folder" in message_of(dataset, tmp_path / "none", 1)


def test_folder_without_permission(tmp_path, monkeypatch):
    write_images(tmp_path, "a/1.jpg", "b/1.jpg")
    scandir = os.scandir

    def refusing(folder):  # root may read anything, so that permissions alone would not do
        if folder == tmp_path / "b":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    message = message_of(dataset, tmp_path, 2)
    assert message.startswith(f"{tmp_path / 'b'} cannot be read: permission denied.")


# ---- decoding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "format", "mode"),
    [
        ("grey.jpg", "JPEG", "L"),
        ("cmyk.JPEG", "JPEG", "CMYK"),
        ("rgba.png", "PNG", "RGBA"),
        ("palette.gif", "GIF", "P"),
        ("bilevel.png", "PNG", "1"),
        ("png_in_disguise.JPEG", "PNG", "RGB"),
        ("no_extension", "JPEG", "RGB"),
    ],
)
def test_any_mode_and_format_is_decoded_to_rgb(tmp_path, name, format, mode):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_bytes(encoded(format, mode))
    image, _, _ = dataset(tmp_path, 1)[0]
    assert image.shape == (3, 16, 20)
    assert torch.equal(image, pil_to_tensor(Image.open(tmp_path / "a" / name).convert("RGB")))


def test_rotations_that_a_camera_noted_are_ignored(tmp_path):
    """As in timm, and so in the published evaluation."""
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    with Image.open(io.BytesIO(encoded())) as image:
        image.save(tmp_path / "a" / "1.jpg", exif=exif)
    image, _, _ = dataset(tmp_path, 1)[0]
    assert image.shape == (3, 16, 20)
    assert torch.equal(image, pil_to_tensor(timm_image(tmp_path / "a" / "1.jpg")))


def timm_image(path):
    reader = timm.data.ImageDataset(str(path.parents[1]))
    return next(image for image, _ in reader)


def test_an_absurdly_large_image_is_named(tmp_path, monkeypatch):
    write_images(tmp_path, "a/1.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # of 320
    message = message_of(dataset(tmp_path, 1).__getitem__, 0)
    assert message.startswith(
        f"Cannot decode the image {tmp_path / 'a' / '1.png'}: Image size (320 pixels) exceeds limit"
    )


def test_names_that_are_not_ascii(tmp_path):
    names = ["ä/夜.jpg", "ä/a b,c.jpg", os.fsdecode(b"\xff/1.jpg")]
    write_images(tmp_path, *names)
    data = dataset(tmp_path, 2)
    assert sorted(data.paths) == sorted(names)
    assert all(data[index][0].shape == (3, 16, 20) for index in range(3))


BROKEN = {
    "truncated.jpg": (encoded()[:-40], "truncated"),
    "truncated.png": (encoded("PNG")[:-200], ""),
    "header_only.jpg": (encoded()[:30], ""),
    "notes.txt": (b"not an image", "not an image of a known format"),
    "zero.jpg": (b"", "the file is empty"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(tmp_path, name):
    content, reason = BROKEN[name]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_bytes(content)
    message = message_of(dataset(tmp_path, 1).__getitem__, 0)
    assert message.startswith(f"Cannot decode the image {tmp_path / 'a' / name}: ")
    assert reason in message
    assert message.endswith("Remove or replace the file.")
    assert "0x" not in message


def test_a_link_to_nothing_is_an_error_not_a_smaller_dataset(tmp_path):
    write_images(tmp_path, "a/1.jpg")
    os.symlink(tmp_path / "gone.jpg", tmp_path / "a" / "2.jpg")
    data = dataset(tmp_path, 1)
    assert data.paths == ["a/1.jpg", "a/2.jpg"]
    assert "a/2.jpg: No such file" in message_of(data.__getitem__, 1)


def test_other_exceptions_are_not_swallowed(tmp_path):
    write_images(tmp_path, "a/1.jpg")

    def transform(image):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(ImageLoader(dataset(tmp_path, 1, transform)))


def test_an_error_does_not_keep_its_loader_and_workers(tmp_path):
    write_images(tmp_path, "a/1.jpg")
    (tmp_path / "a/1.jpg").write_bytes(b"")
    loader = ImageLoader(dataset(tmp_path, 1), num_workers=1, persistent_workers=True)
    kept = weakref.ref(loader)
    message_of(list, loader)
    del loader
    assert kept() is None
