"""`datamodule.on_error`: images that cannot be decoded are skipped, with and without the cache, and no others."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from scatterbrain.errors import UserError
from src.datamodules import dataset as dataset_module
from src.datamodules.cache import DecodedCache
from src.datamodules.cache import entry as entry_module
from src.datamodules.cache import writer as writer_module
from src.datamodules.cache.writer import CHECKSUMS_FILE, ENTRY_FILE, IMAGES_FILE
from src.datamodules.dataset import ImageDataset, ImageError
from src.datamodules.formats import listing as listing_module
from tests.src.datamodules.format_files import shards
from tests.src.datamodules.setup import datamodule, message_of, write_images

NAMES = [f"{'ab'[number // 5]}/{number:02}.png" for number in range(10)]
# one batch of 2 lacks one image, the next one both, and the last one the other
DAMAGED = {1: "the file is empty", 2: "not an image of a known format", 3: None, 8: "No such file or directory"}


def damage(val):
    (val / NAMES[1]).write_bytes(b"")
    (val / NAMES[2]).write_bytes(b"no image")
    (val / NAMES[3]).write_bytes((val / NAMES[3]).read_bytes()[:200])
    (val / NAMES[8]).unlink()
    (val / NAMES[8]).symlink_to("nowhere")


@pytest.fixture
def data_dir(tmp_path):
    """Ten images, of which four are damaged."""
    write_images(tmp_path / "data" / "val", *NAMES)
    damage(tmp_path / "data" / "val")
    return tmp_path / "data"


@pytest.fixture
def decoded(monkeypatch):
    """Names of the images that this process decodes, from here on."""
    names = []
    decode = ImageDataset.decode
    monkeypatch.setattr(
        ImageDataset, "decode", lambda self, index: names.append(self.paths[index]) or decode(self, index)
    )
    return names


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Three images are decoded at a time, and count as soon as they are written."""
    monkeypatch.setattr(entry_module, "BATCH_SIZE", 3)
    monkeypatch.setattr(writer_module, "FLUSH_BYTES", 1)


def module(data_dir, on_error="skip", **options):
    return datamodule(data_dir, num_classes=2, on_error=on_error, **options)


def cached(data_dir, on_error="skip", **options):
    return module(data_dir, on_error, cache_dir=data_dir.parent / "cache", **options)


def passed(datamodule):
    """The batches of a pass, and what each of them lacks."""
    loader = datamodule.test_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == len(loader.skipped)
    return batches, loader.skipped


def assert_right(datamodule, intact):
    """Fail unless the batches hold the images of `intact`, by name, at their places, and lack the others."""
    batches, skipped = passed(datamodule)
    assert [batch[-1].tolist() for batch in batches] == [[0], [], [4, 5], [6, 7], [9]]
    assert [list(lacking) for lacking in skipped] == [[1], [2, 3], [], [], [8]]
    reasons = {index: reason for lacking in skipped for index, reason in lacking.items()}
    assert {index: reasons[index] for index, reason in DAMAGED.items() if reason} == {
        index: reason for index, reason in DAMAGED.items() if reason
    }
    assert "truncated" in reasons[3].lower()
    for images, targets, indices in batches:
        assert (images.dtype, targets.dtype, indices.dtype) == (torch.uint8, torch.int64, torch.int64)
        assert targets.tolist() == [index // 5 for index in indices.tolist()]
        assert images.shape[:2] == (len(indices), 3)
        for image, index in zip(images, indices.tolist(), strict=True):
            assert torch.equal(image, intact[index])


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """What the ten images are where none is damaged."""
    folder = tmp_path_factory.mktemp("intact")
    write_images(folder / "val", *NAMES)
    images = torch.cat([batch[0] for batch in module(folder, "raise").test_dataloader()])
    assert len(images) == len(NAMES)
    return images


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_lacks_what_cannot_be_decoded(data_dir, intact, num_workers):
    assert_right(module(data_dir, num_workers=num_workers), intact)


@pytest.mark.parametrize("cache", [False, True])
def test_a_second_pass_begins_anew(data_dir, cache):
    loader = (cached if cache else module)(data_dir).test_dataloader()
    passes = [([batch[-1].tolist() for batch in loader], loader.skipped) for _ in range(2)]
    assert passes[0] == passes[1]
    assert len(loader.skipped) == 5


def test_an_error_by_default(data_dir):
    expected = f"Cannot decode the image {data_dir}/val/{NAMES[1]}: the file is empty. Remove or replace the file."
    for options in ({}, {"on_error": "raise"}, {"on_error": "raise", "cache_dir": data_dir.parent / "cache"}):
        loading = datamodule(data_dir, num_classes=2, **options)
        assert message_of(lambda loading=loading: list(loading.test_dataloader())) == expected


def test_a_batch_without_images_can_be_normalised(data_dir):
    batches, _ = passed(module(data_dir))
    loading = module(data_dir)
    images = loading.normalise(batches[1][0], torch.float32, torch.channels_last)
    assert len(images) == 0


@pytest.mark.parametrize(
    ("value", "words"),
    [("skpi", "datamodule.on_error='skpi' is not valid. Did you mean 'skip'?"), (None, "Choose one of: raise, skip.")],
)
def test_values(tmp_path, value, words):
    assert words in message_of(datamodule, tmp_path, on_error=value)


def test_training_is_refused(data_dir):
    shutil.copytree(data_dir / "val", data_dir / "train", symlinks=True)
    for use in (lambda: module(data_dir).setup("fit"), lambda: module(data_dir, on_device=True).train_dataloader()):
        message = message_of(use)
        assert message.startswith("datamodule.on_error=skip is for evaluation")
        assert "scripts/check_imagenet.py DIR --decode" in message
    module(data_dir, "raise").setup("fit")


# What is no matter of single images


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN])
def test_faults_of_the_machine_are_errors(data_dir, monkeypatch, number):
    def fail(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(listing_module, "read_file", fail)
    assert os.strerror(number) in message_of(lambda: list(module(data_dir).test_dataloader()))


def test_too_little_memory_is_an_error(data_dir, monkeypatch):
    def fail(file):
        raise MemoryError

    monkeypatch.setattr(dataset_module.Image, "open", fail)
    assert "MemoryError" in message_of(lambda: list(module(data_dir).test_dataloader()))


def test_a_disk_that_disappears_is_an_error(data_dir):
    loader = module(data_dir).test_dataloader()
    (data_dir / "val" / "b").rename(data_dir / "gone")
    assert f"{NAMES[5]}: No such file" in message_of(lambda: list(loader))


def test_a_folder_that_cannot_be_read_is_an_error(data_dir, monkeypatch):
    def fail(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(listing_module, "read_file", fail)
    monkeypatch.setattr(dataset_module.os, "access", lambda path, mode: Path(path).name != "a")
    with pytest.raises(UserError) as caught:
        list(module(data_dir).test_dataloader())
    assert not isinstance(caught.value, ImageError)


def test_archives(tmp_path):
    """One image of a shard is skipped; a shard that is cut off is an error, when it is listed and afterwards."""
    shards(tmp_path, "val")
    options = {"num_classes": 1000, "on_error": "skip", "batch_size": 3}
    loading = datamodule(tmp_path, **options)
    loading.setup("test")
    number = len(loading.test_dataset)
    member = loading.test_dataset.listing.source(1)
    with open(member.archive, "r+b") as file:
        file.seek(member.offset)
        file.write(bytes(member.size))
    loader = datamodule(tmp_path, **options).test_dataloader()
    assert sum(len(batch[0]) for batch in loader) == number - 1
    assert loader.skipped[0] == {1: "not an image of a known format"}

    last = loading.test_dataset.listing.source(number - 1)
    os.truncate(last.archive, last.offset + last.size // 2)
    assert "has become shorter" in message_of(lambda: list(loader))
    message_of(lambda: datamodule(tmp_path, **options).setup("test"))


# The cache


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_cache_gives_the_same(data_dir, intact, num_workers):
    for _ in range(2):
        assert_right(cached(data_dir, num_workers=num_workers), intact)
    (entry,) = (data_dir.parent / "cache").iterdir()
    assert json.loads((entry / ENTRY_FILE).read_text())["not_decoded"] == [NAMES[index] for index in DAMAGED]


def test_the_cache_remembers(data_dir, decoded):
    passed(cached(data_dir))
    decoded.clear()
    passed(cached(data_dir))
    assert decoded == [NAMES[index] for index in DAMAGED]


def test_a_black_image_is_an_image(data_dir, decoded):
    Image.new("RGB", (20, 16)).save(data_dir / "val" / NAMES[4])
    for _ in range(2):
        decoded.clear()
        batches, _ = passed(cached(data_dir))
        assert not batches[2][0][0].any()
    assert NAMES[4] not in decoded


def test_no_missing_image_counts_as_an_image(data_dir):
    passed(cached(data_dir))
    assert NAMES[1] in message_of(cached(data_dir, "raise").test_dataloader)
    images = cached(data_dir)._cached(cached_dataset(data_dir))
    with pytest.raises(ImageError, match=NAMES[3]):
        images[3]
    with pytest.raises(ImageError, match=NAMES[8]):
        images.batch([7, 8])


def cached_dataset(data_dir):
    loading = module(data_dir)
    loading.setup("test")
    return loading.test_dataset.subset(range(10), loading._test_pixels)


@pytest.mark.parametrize("on_error", ["skip", "raise"])
def test_a_file_that_was_repaired(data_dir, intact, on_error):
    """Under the key of the damaged one too: its size and time of change may be what they were."""
    write_images(data_dir.parent / "fresh", *NAMES)
    contents = {
        data_dir / "val" / NAMES[index]: (data_dir.parent / "fresh" / NAMES[index]).read_bytes() for index in DAMAGED
    }
    for path, content in contents.items():
        path.unlink()
        path.write_bytes(b"x" * len(content))
    passed(cached(data_dir))
    for path, content in contents.items():
        state = os.stat(path)
        path.write_bytes(content)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    batches = list(cached(data_dir, on_error).test_dataloader())
    assert torch.equal(torch.cat([batch[0] for batch in batches]), intact)
    assert len(list((data_dir.parent / "cache").iterdir())) == 1


def test_an_interrupted_entry_is_resumed(data_dir, intact, monkeypatch, decoded):
    decode = writer_module.Writer.add
    added = []

    def interrupt(self, *arguments):
        decode(self, *arguments)
        added.append(1)
        if len(added) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer_module.Writer, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cached(data_dir).test_dataloader()
    (folder,) = (data_dir.parent / "cache").iterdir()
    assert folder.name.endswith(".unfinished")
    # with on_error="raise", missing images are errors again
    assert NAMES[1] in message_of(cached(data_dir, "raise").test_dataloader)
    decoded.clear()
    loader = cached(data_dir).test_dataloader()
    assert decoded == NAMES[6:]
    assert_right(cached(data_dir), intact)
    assert len(loader.dataset) == 10


def test_an_altered_missing_image_ends_the_complete_ones(data_dir, monkeypatch):
    passed(cached(data_dir))
    (entry,) = (data_dir.parent / "cache").iterdir()
    unfinished = entry.rename(entry.with_name(f"{entry.name}.unfinished"))
    cache = DecodedCache(data_dir.parent / "cache", cached_dataset(data_dir), **module(data_dir)._pixel_options)
    assert cache._truncate_to_complete() == 10
    with open(unfinished / IMAGES_FILE, "r+b") as file:
        file.seek(3 * cache.bytes_per_image)
        file.write(b"\1")
    assert cache._truncate_to_complete() == 3


def test_an_entry_without_missing_images_is_unchanged(tmp_path):
    write_images(tmp_path / "data" / "val", *NAMES)
    contents = []
    for on_error in ("raise", "skip"):
        list(cached(tmp_path / "data", on_error).test_dataloader())
        (entry,) = (tmp_path / "cache").iterdir()
        contents.append({name: (entry / name).read_bytes() for name in (ENTRY_FILE, IMAGES_FILE, CHECKSUMS_FILE)})
        shutil.rmtree(entry)
    assert contents[0] == contents[1]
