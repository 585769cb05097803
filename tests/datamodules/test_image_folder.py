import io
import logging
import os
import pickle
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from timm.data import ImageDataset, create_transform
from torchvision.transforms.functional import pil_to_tensor

from src.datamodules.dataset import ImageFolderDataset, ImageLoader, class_index
from src.datamodules.image_folder import ImageFolderDataModule
from src.datamodules.sampling import ShardedSampler
from src.utils.errors import UserError

# The first few of each class: a pass over all would take a second.
PHOTOGRAPHS = [
    path
    for name, number in (("daisy", 3), ("dandelion", 3), ("roses", 2), ("sunflowers", 2), ("tulips", 2))
    for path in sorted((Path(__file__).parents[2] / "data" / "flowers" / "val" / name).iterdir())[:number]
]


@pytest.fixture(scope="session")
def flowers(tmp_path_factory):
    """Data folder that holds `PHOTOGRAPHS`; tests leave it as it is."""
    data_dir = tmp_path_factory.mktemp("flowers")
    for path in PHOTOGRAPHS:
        folder = data_dir / "val" / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    return data_dir


def encoded(format="JPEG", mode="RGB", size=(20, 16), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format)
    return buffer.getvalue()


def write_images(root, *paths):
    """An image of its own for each path; the bytes differ, so that a wrong order shows."""
    for seed, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(encoded(seed=seed))


def dataset(root, num_classes, transform=pil_to_tensor):
    return ImageFolderDataset(root, transform, num_classes)


def datamodule(data_dir, **options):
    options = {"image_size": 16, "batch_size": 2, "num_workers": 0, "pin_memory": False, **options}
    return ImageFolderDataModule(data_dir, **options)


def message_of(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


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
    ("extra", "folder", "told"),
    [
        ("valprep.sh", False, "outside class folders are left out: valprep.sh"),
        ("a/deeper/9.jpg", False, "inside class folders are left out: a/deeper"),
        ("empty", True, "class folders without images: empty"),
    ],
)
def test_what_is_left_out_is_logged(tmp_path, caplog, extra, folder, told):
    write_images(tmp_path, "a/1.jpg", "b/1.jpg")
    if folder:
        (tmp_path / extra).mkdir()
    else:
        write_images(tmp_path, extra)
    with caplog.at_level(logging.WARNING):
        data = dataset(tmp_path, 3 if folder else 2)
    assert data.paths == ["a/1.jpg", "b/1.jpg"]
    assert told in caplog.text
    assert str(tmp_path) in caplog.text


def test_nothing_is_logged_for_a_clean_folder(flowers, caplog):
    dataset(flowers / "val", 5)
    assert not caplog.records


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
    message = message_of(class_index, ["n01440764", "n02123045"], 2)
    assert "n01440764, n02123045" in message
    assert "the model has 2" in message
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


# ---- a split that is not as expected ----------------------------------------------------------------------


def test_images_without_class_folders_are_counted(tmp_path):
    write_images(tmp_path / "val", "1.jpg", "2.jpg", "3.jpg")
    message = message_of(datamodule(tmp_path).setup)
    assert f"{tmp_path / 'val'} holds 3 files but no class folders" in message
    assert "one folder per class" in message


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


@pytest.mark.parametrize("value", [None, "", "???"])
def test_no_data_dir(value):
    message = message_of(datamodule(value).setup)
    assert "datamodule.data_dir=/path" in message
    assert "DATA_DIR" in message
    assert ".env" in message


def test_missing_data_dir(tmp_path):
    message = message_of(datamodule(tmp_path / "nowhere").setup)
    assert f"{tmp_path / 'nowhere'} does not exist" in message
    assert "datamodule.data_dir" in message


def test_data_dir_is_a_file(tmp_path):
    (tmp_path / "imagenet.tar").touch()
    assert "imagenet.tar is a file, not a folder" in message_of(datamodule(tmp_path / "imagenet.tar").setup)


def test_missing_split_lists_what_is_there(tmp_path):
    write_images(tmp_path, "train/a/1.jpg", "validation/a/1.jpg")
    message = message_of(datamodule(tmp_path).setup)
    assert f"No folder 'val' in {tmp_path}" in message
    assert "train, validation" in message
    assert "datamodule.test_split" in message
    assert "parent" not in message


def test_missing_split_in_an_empty_folder(tmp_path):
    assert "the folders there: none" in message_of(datamodule(tmp_path).setup)


@pytest.mark.parametrize("classes", [("n01440764",), ("daisy", "roses")])
def test_split_given_for_data_dir_suggests_its_parent(tmp_path, classes):
    write_images(tmp_path / "val", *[f"{name}/1.jpg" for name in classes])
    message = message_of(datamodule(tmp_path / "val").setup)
    assert message.endswith(f"Give its parent: datamodule.data_dir={tmp_path}")
    message = message_of(datamodule(tmp_path / "val", test_split="test").setup)
    assert message.endswith(f"datamodule.data_dir={tmp_path} datamodule.test_split=val")


# ---- decoding and the transform ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_size": 384, "crop_pct": 1.0},
        {
            "image_size": 96,
            "interpolation": "bilinear",
            "crop_pct": 0.875,
            "mean": (0.5, 0.4, 0.3),
            "std": [0.1, 0.2, 0.3],
        },
    ],
)
def test_transform_is_timms_bit_for_bit(flowers, options):
    module = ImageFolderDataModule(flowers, num_classes=5, num_workers=0, **options)
    module.setup("test")
    given = {"input_size": options.get("image_size", 224), "interpolation": "bicubic", "crop_pct": 0.9}
    given |= {name: value for name, value in options.items() if name != "image_size"}
    theirs = ImageDataset(str(flowers / "val"), transform=create_transform(**given, is_training=False))
    assert len(theirs) == len(module.test_dataset) == 12
    by_path = {theirs.filename(i): i for i in range(12)}
    for i in (0, 5, 11):
        image, target, _ = module.test_dataset[i]
        expected, expected_target = theirs[by_path[module.test_dataset.paths[i]]]
        assert image.shape == (3, given["input_size"], given["input_size"])
        assert image.dtype == torch.float32
        assert torch.equal(image, expected)
        assert target == expected_target


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


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_first_broken_file_reaches_the_main_process_as_it_was_told(tmp_path, num_workers):
    write_images(tmp_path, *[f"val/a/{i}.jpg" for i in range(8)])
    for i in (3, 4, 6):
        (tmp_path / f"val/a/{i}.jpg").write_bytes(b"broken")
    module = datamodule(tmp_path, num_classes=1, num_workers=num_workers)
    batches = iter(module.test_dataloader())
    assert next(batches)[2].tolist() == [0, 1]
    message = message_of(next, batches)
    path = tmp_path / "val/a/3.jpg"
    assert message == f"Cannot decode the image {path}: not an image of a known format. Remove or replace the file."


def test_other_exceptions_are_not_swallowed(tmp_path):
    write_images(tmp_path, "a/1.jpg")

    def transform(image):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(ImageLoader(dataset(tmp_path, 1, transform)))


# ---- sharing among processes ------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("size", [8, 9, 13, 50, 1001])
def test_each_index_is_seen_exactly_once(size, world_size):
    shards = [ShardedSampler(size, rank, world_size) for rank in range(world_size)]
    assert sorted(index for shard in shards for index in shard) == list(range(size))
    assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert all(list(shard) == sorted(shard) for shard in shards)


def test_fewer_images_than_processes():
    message = message_of(ShardedSampler, 3, 0, 4)
    assert "3 images" in message
    assert "4 processes" in message
    assert "trainer.devices" in message


@pytest.mark.parametrize("rank", [-1, 2])
def test_rank_outside_the_world(rank):
    with pytest.raises(ValueError, match="rank"):
        ShardedSampler(10, rank, 2)


def test_the_trainers_ranks_share_the_photographs(flowers):
    seen = []
    for rank in range(5):
        module = datamodule(flowers, num_classes=5)
        module.trainer = SimpleNamespace(global_rank=rank, world_size=5)
        seen.append([i for _, _, indices in module.test_dataloader() for i in indices.tolist()])
    assert seen == [[0, 5, 10], [1, 6, 11], [2, 7], [3, 8], [4, 9]]


def test_more_processes_than_photographs(flowers):
    module = datamodule(flowers, num_classes=5)
    module.trainer = SimpleNamespace(global_rank=0, world_size=13)
    assert "12 images" in message_of(module.test_dataloader)


# ---- the data module --------------------------------------------------------------------------------------


def test_batches_are_in_path_order_and_complete(flowers):
    module = datamodule(flowers, num_classes=5, batch_size=5)
    batches = list(module.test_dataloader())
    assert [tuple(images.shape) for images, _, _ in batches] == [(5, 3, 16, 16), (5, 3, 16, 16), (2, 3, 16, 16)]
    images, targets, indices = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert indices.tolist() == list(range(12))
    assert targets.dtype == torch.int64
    assert targets.tolist() == module.test_dataset.targets == [0] * 3 + [1] * 3 + [2] * 2 + [3] * 2 + [4] * 2
    assert module.test_dataset.paths == [f"{path.parent.name}/{path.name}" for path in PHOTOGRAPHS]
    assert torch.equal(images[7], module.test_dataset[7][0])


def test_workers_change_nothing(flowers):
    alone, shared = (list(datamodule(flowers, num_classes=5, num_workers=n).test_dataloader()) for n in (0, 2))
    assert len(alone) == len(shared) == 6
    for expected, batch in zip(alone, shared, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, batch, strict=True))


def test_the_loader_can_be_sent_to_spawned_workers(flowers):
    module = datamodule(flowers, num_classes=5)
    loader = module.test_dataloader()
    copy, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    assert torch.equal(collate([copy[3]])[0][0], module.test_dataset[3][0])


def test_setup_lists_the_images_once(flowers):
    module = datamodule(flowers, num_classes=5)
    assert module.test_dataset is None
    module.setup("test")
    first = module.test_dataset
    module.setup("test")
    module.test_dataloader()
    assert module.test_dataset is first


def test_split_and_home_are_options(tmp_path, monkeypatch):
    write_images(tmp_path, "imagenet/held_out/a/1.jpg", "imagenet/val/a/2.jpg")
    monkeypatch.setenv("HOME", str(tmp_path))
    module = datamodule("~/imagenet", num_classes=1, test_split="held_out")
    module.setup()
    assert module.test_dataset.paths == ["a/1.jpg"]
    assert module.test_dataset.root == tmp_path / "imagenet" / "held_out"


def test_defaults():
    module = ImageFolderDataModule()
    assert module.batch_size == 128
    assert 1 <= module.num_workers <= 16
    assert module.pin_memory is torch.cuda.is_available()


def test_workers_default_to_the_cpus_of_the_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert ImageFolderDataModule().num_workers == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert ImageFolderDataModule().num_workers == 16
    assert ImageFolderDataModule(num_workers=24).num_workers == 24


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("batch_size", 0, "at least 1"),
        ("batch_size", 2.5, "whole number"),
        ("batch_size", True, "whole number"),
        ("num_workers", -1, "at least 0"),
        ("image_size", 0, "at least 1"),
        ("image_size", "224", "whole number"),
        ("num_classes", 0, "at least 1"),
        ("crop_pct", 0, "above 0 and at most 1"),
        ("crop_pct", 1.01, "above 0 and at most 1"),
        ("crop_pct", "90", "above 0 and at most 1"),
        ("crop_pct", float("nan"), "above 0 and at most 1"),
        ("interpolation", "bicubik", "Did you mean 'bicubic'"),
        ("interpolation", "random", "bilinear"),
        ("mean", (0.5, 0.5), "three numbers"),
        ("mean", 0.5, "three numbers"),
        ("std", (0.1, 0.0, 0.1), "above 0"),
        ("test_split", "", "folder's name"),
    ],
)
def test_values_that_are_not_valid_name_the_option(option, value, remedy):
    message = message_of(ImageFolderDataModule, **{option: value})
    assert message.startswith(f"datamodule.{option}=")
    assert remedy in message


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "box", "hamming", "lanczos", "nearest"])
def test_each_interpolation_gives_its_own_image(flowers, interpolation):
    module = ImageFolderDataModule(flowers, image_size=32, num_classes=5, interpolation=interpolation)
    module.setup()
    bicubic = create_transform(32, interpolation="bicubic", crop_pct=0.9)(Image.open(PHOTOGRAPHS[0]))
    assert torch.equal(module.test_dataset[0][0], bicubic) is (interpolation == "bicubic")


class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.seen = []

    def test_step(self, batch, batch_idx):
        self.seen += batch[2].tolist()


def trainer():
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


@pytest.mark.filterwarnings("ignore:The 'test_dataloader' does not have many workers")
def test_in_a_trainer(flowers):
    recorder = Recorder()
    trainer().test(recorder, datamodule(flowers, num_classes=5), verbose=False)
    assert recorder.seen == list(range(12))


@pytest.mark.filterwarnings("ignore:The 'test_dataloader' does not have many workers")
def test_a_broken_file_in_a_trainer(tmp_path):
    write_images(tmp_path, *[f"val/a/{i}.jpg" for i in range(5)])
    (tmp_path / "val/a/4.jpg").write_bytes(b"")
    module = datamodule(tmp_path, num_classes=1, num_workers=2)
    message = message_of(trainer().test, Recorder(), module, verbose=False)
    assert message.startswith(f"Cannot decode the image {tmp_path / 'val/a/4.jpg'}: the file is empty.")
