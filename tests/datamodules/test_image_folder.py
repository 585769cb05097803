import os
import pickle
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from timm.data import ImageDataset, create_transform

from src.datamodules.image_folder import ImageFolderDataModule
from tests.datamodules.setup import PHOTOGRAPHS, datamodule, message_of, write_images

# ---- a split that is not as expected ----------------------------------------------------------------------


def test_images_without_class_folders_are_counted(tmp_path):
    write_images(tmp_path / "val", "1.jpg", "2.jpg", "3.jpg")
    message = message_of(datamodule(tmp_path).setup)
    assert f"{tmp_path / 'val'} holds 3 files but no class folders" in message
    assert "one folder per class" in message


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


# ---- sharing among processes ------------------------------------------------------------------------------


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
