import os
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from timm.data import ImageDataset, create_transform

from src.datamodules.image_folder import ImageFolderDataModule
from tests.src.datamodules.setup import PHOTOGRAPHS, datamodule, message_of, write_images

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
def test_the_first_broken_file_reaches_the_main_process_as_it_was_raised(tmp_path, num_workers):
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
    assert images.dtype == torch.uint8
    torch.testing.assert_close(module.normalise(images)[7], module.test_dataset[7][0], rtol=0, atol=1e-6)


def test_workers_change_nothing(flowers):
    alone, shared = (list(datamodule(flowers, num_classes=5, num_workers=n).test_dataloader()) for n in (0, 2))
    assert len(alone) == len(shared) == 6
    for expected, batch in zip(alone, shared, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, batch, strict=True))


def test_the_loader_can_be_sent_to_spawned_workers(flowers):
    module = datamodule(flowers, num_classes=5)
    loader = module.test_dataloader()
    copy, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    assert torch.equal(collate([copy[3]])[0][0], loader.dataset[3][0])


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
        ("train_split", None, "folder's name"),
        ("holdout", 1, "at least 0 and below 1"),
        ("holdout", -0.1, "at least 0 and below 1"),
        ("holdout", False, "at least 0 and below 1"),
        ("holdout", float("nan"), "at least 0 and below 1"),
        ("passes_per_epoch", 0, "at least 1"),
        ("seed", -1, "at least 0"),
        ("seed", 1.5, "whole number"),
        ("on_device", "yes", "true or false"),
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


def trainer(**options):
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
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


# ---- training: which images -------------------------------------------------------------------------------

NUM_TRAIN = {"a": 9, "b": 6, "c": 5}
# No policy, so that these options hold with on_device too; all the rest is random.
AUGMENTATION = {"auto_augment": None, "vflip": 0.5}
SAME_EVERY_TIME = {
    **{"auto_augment": None, "scale": (1, 1), "hflip": 0, "color_jitter": 0},
    **{"re_prob": 0, "mixup_prob": 0, "label_smoothing": 0},
}


@pytest.fixture(scope="session")
def train_data(tmp_path_factory):
    """Data folder of 20 images to train on, one colour each and square, and 6 others; tests leave it as it is."""
    data_dir = tmp_path_factory.mktemp("train_data")
    colours = iter(range(0, 26 * 9, 9))
    for split, numbers in (("train", NUM_TRAIN), ("val", dict.fromkeys(NUM_TRAIN, 2))):
        for name, number in numbers.items():
            (data_dir / split / name).mkdir(parents=True)
            for index in range(number):
                Image.new("RGB", (20, 20), (next(colours), 100, 0)).save(data_dir / split / name / f"{index}.png")
    return data_dir


def place(rank=0, world_size=1, step=0, accumulate=1, training=True, dtype=torch.float32):
    """The attributes of a trainer that the data module uses."""
    return SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        global_step=step,
        accumulate_grad_batches=accumulate,
        training=training,
        lightning_module=SimpleNamespace(dtype=dtype),
    )


def train_module(data_dir, trainer=None, **options):
    options = {"num_classes": 3, "batch_size": 4, "augmentation": AUGMENTATION, **options}
    module = datamodule(data_dir, **options)
    module.trainer = trainer
    return module


def finish(module, batch):
    """A batch as the trainer's step sees it."""
    return module.on_after_batch_transfer(module.on_before_batch_transfer(batch, 0), 0)


def paths_of(module):
    module.setup("fit")
    return module.train_dataset.paths, module.val_dataset.paths


def test_training_is_watched_on_the_test_split(train_data):
    module = train_module(train_data)
    assert [len(paths) for paths in paths_of(module)] == [20, 6]
    assert module.train_dataset.root == train_data / "train"
    assert module.val_dataset.root == train_data / "val"
    assert module.train_dataset.targets == [0] * 9 + [1] * 6 + [2] * 5
    assert module.test_dataset is None


def test_a_part_of_each_class_is_held_out(train_data):
    whole, _ = paths_of(train_module(train_data))
    module = train_module(train_data, holdout=0.3)
    kept, held = paths_of(module)
    assert sorted(kept + held) == whole
    assert (kept, held) == (sorted(kept), sorted(held))
    # 2.7, 1.8 and 1.5 rounded
    assert [sum(path.startswith(name) for path in held) for name in NUM_TRAIN] == [3, 2, 2]
    for data in (module.train_dataset, module.val_dataset):
        assert data.root == train_data / "train"
        assert data.targets == ["abc".index(path[0]) for path in data.paths]


def test_what_is_held_out_follows_from_the_seed(train_data):
    held = [paths_of(train_module(train_data, holdout=0.3, seed=seed))[1] for seed in (0, 0, 1, 2)]
    assert held[0] == held[1]
    assert len({tuple(paths) for paths in held}) == 3


def test_held_out_images_are_transformed_as_in_evaluation(train_data):
    module = train_module(train_data, holdout=0.3)
    module.setup("fit")
    image, target, index = module.val_dataset[2]
    assert torch.equal(image, module.test_transform(module.val_dataset.decode(2)))
    assert (target, index) == (module.val_dataset.targets[2], 2)
    assert module.train_dataset.transform is module.augmentation.transform


def test_the_test_images_are_left_alone_by_a_holdout(train_data):
    module = train_module(train_data, holdout=0.3)
    module.setup("fit")
    assert module.test_dataset is None
    expected = list(train_module(train_data).test_dataloader())
    for batch, expected_batch in zip(module.test_dataloader(), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, expected_batch, strict=True))


@pytest.mark.parametrize(("holdout", "left"), [(0.001, "nothing to validate on"), (0.999, "nothing to train on")])
def test_a_holdout_that_leaves_nothing(train_data, holdout, left):
    message = message_of(train_module(train_data, holdout=holdout).setup, "fit")
    assert message.startswith(f"datamodule.holdout={holdout} of 20 images leaves {left}")


def test_splits_of_different_classes(tmp_path):
    write_images(tmp_path, *[f"train/{name}/1.jpg" for name in "abc"], *[f"val/{name}/1.jpg" for name in "abd"])
    message = message_of(train_module(tmp_path).setup, "fit")
    assert message.startswith(f"{tmp_path / 'train'} and {tmp_path / 'val'} do not hold the same class folders: c, d.")
    message = message_of(train_module(tmp_path, num_classes=2).setup, "fit")
    assert "model.num_classes=3" in message


def test_a_holdout_needs_no_other_split(tmp_path):
    write_images(tmp_path, *[f"train/{name}/{i}.jpg" for name in "abc" for i in range(2)])
    assert [len(paths) for paths in paths_of(train_module(tmp_path, holdout=0.5))] == [3, 3]


def test_splits_may_hold_different_synsets(tmp_path):
    write_images(
        tmp_path, "train/n01440764/1.jpg", "train/n02123045/1.jpg", "val/n11939491/1.jpg", "val/n01440764/1.jpg"
    )
    module = train_module(tmp_path, num_classes=1000)
    module.setup("fit")
    assert module.train_dataset.targets == [0, 281]
    assert module.val_dataset.targets == [0, 985]


def test_setup_for_training_lists_the_images_once(train_data):
    module = train_module(train_data, holdout=0.3)
    module.setup("fit")
    first = module.train_dataset, module.val_dataset, module.augmentation
    module.setup("fit")
    module.train_dataloader()
    module.val_dataloader()
    assert all(
        a is b for a, b in zip((module.train_dataset, module.val_dataset, module.augmentation), first, strict=True)
    )


def test_training_needs_its_split(tmp_path):
    write_images(tmp_path, "val/a/1.jpg")
    message = message_of(train_module(tmp_path, num_classes=1).setup, "fit")
    assert f"No folder 'train' in {tmp_path}" in message
    assert "datamodule.train_split" in message
    write_images(tmp_path, "mine/a/1.jpg")
    module = train_module(tmp_path, num_classes=1, train_split="mine")
    assert paths_of(module)[0] == ["a/1.jpg"]


# ---- training: options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("hflp", "Did you mean 'hflip'"),
        ("mixup", "'mixup_alpha'"),
        ("brightness", "Choose one of: auto_augment, "),
        ("mean", "Choose one of: auto_augment, "),
        ("image_size", "Choose one of: auto_augment, "),
        ("on_device", "Choose one of: auto_augment, "),
    ],
)
def test_unknown_options_of_the_augmentation(train_data, name, hint):
    message = message_of(train_module(train_data, augmentation={"hflip": 0.1, name: 0.5}).setup, "fit")
    assert message.startswith(f"There is no option datamodule.augmentation.{name}. ")
    assert hint in message
    assert "num_classes" not in message


def test_options_reach_the_augmentation(train_data):
    message = message_of(train_module(train_data, augmentation={"hflip": 2}).setup, "fit")
    assert message.startswith("datamodule.augmentation.hflip=2 is not valid")


def test_the_augmentation_has_the_interpolation_of_the_evaluation_unless_given(train_data):
    message = message_of(train_module(train_data, interpolation="lanczos", augmentation=None).setup, "fit")
    assert message.startswith("datamodule.augmentation.interpolation=lanczos ")
    module = train_module(train_data, interpolation="lanczos", augmentation={"interpolation": "bicubic"})
    module.setup("fit")
    assert module.augmentation.transform is not None


def test_evaluation_does_not_mind_the_augmentation(train_data):
    module = train_module(train_data, augmentation={"nonsense": 1}, batch_size=3)
    assert len(list(module.test_dataloader())) == 2


def test_images_are_mixed_in_pairs(train_data):
    message = message_of(train_module(train_data, batch_size=5).setup, "fit")
    assert message.startswith("datamodule.batch_size=5 has to be even")
    remedy, _, value = message.rpartition(" ")[2].removeprefix("datamodule.augmentation.").partition("=")
    module = train_module(train_data, batch_size=5, augmentation={**AUGMENTATION, remedy: float(value)})
    module.trainer = place()
    images, targets = finish(module, next(iter(module.train_dataloader())))
    assert (len(images), targets.shape) == (5, (5, 3))


def test_too_few_images_to_train_on(train_data):
    message = message_of(train_module(train_data, batch_size=22).train_dataloader)
    assert "20 training images do not fill a batch of 22" in message
    assert "datamodule.batch_size, to 20 at most" in message
    assert train_module(train_data, batch_size=22, passes_per_epoch=2).train_dataloader() is not None


# ---- training: batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("passes", "world_size", "number"), [(1, 1, 5), (1, 2, 2), (3, 1, 15), (3, 2, 7)])
def test_batches_of_an_epoch(train_data, passes, world_size, number):
    for rank in range(world_size):
        module = train_module(train_data, place(rank, world_size), passes_per_epoch=passes)
        loader = module.train_dataloader()
        assert len(list(loader)) == len(loader) == module.num_train_batches(world_size) == number


@pytest.mark.parametrize("on_device", [False, True])
def test_training_batches(train_data, on_device):
    module = train_module(train_data, place(), on_device=on_device)
    for batch in module.train_dataloader():
        images, targets = finish(module, batch)
        assert (images.shape, images.dtype) == ((4, 3, 16, 16), torch.float32)
        assert (targets.shape, targets.dtype) == ((4, 3), torch.float32)
        # sums of a few float32 numbers
        torch.testing.assert_close(targets.sum(1), torch.ones(4), rtol=0, atol=1e-6)
    assert targets.unique().numel() > 3  # mixed and smoothed


@pytest.mark.parametrize("on_device", [False, True])
def test_training_batches_hold_the_images_and_their_classes(train_data, on_device):
    options = {"augmentation": SAME_EVERY_TIME, "crop_pct": 1.0, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    module = train_module(train_data, place(), on_device=on_device, **options)
    batches = [finish(module, batch) for batch in module.train_dataloader()]
    images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    data = module.train_dataset
    expected = torch.stack([module.test_transform(data.decode(index)) for index in range(20)])
    order = images[:, 0, 0, 0].argsort()  # as written: from the darkest to the brightest
    # float32 after a division by 0.4
    torch.testing.assert_close(images[order], expected, rtol=0, atol=1e-5)
    assert targets[order].argmax(1).tolist() == data.targets
    assert order.tolist() != sorted(order.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_batches_are_normalised_alone(train_data, dtype):
    module = train_module(train_data, place(training=False, dtype=dtype))
    for loader in (module.val_dataloader(), module.test_dataloader()):
        for batch in loader:
            given = [part.clone() for part in batch]
            state = torch.get_rng_state()
            images, *others = finish(module, batch)
            assert torch.equal(torch.get_rng_state(), state)
            assert torch.equal(images, module.normalise(given[0]).to(dtype))
            assert images.dtype == dtype
            assert len(others) == 2
            assert all(torch.equal(a, b) for a, b in zip(others, given[1:], strict=True))


def test_workers_change_nothing_in_training(train_data):
    def epochs(num_workers):
        module = train_module(train_data, place(), num_workers=num_workers, augmentation=None)
        loader = module.train_dataloader()
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                yield [batch[2], *finish(module, batch)]

    alone, shared = list(epochs(0)), list(epochs(2))
    assert len(alone) == len(shared) == 10
    for expected, batch in zip(alone, shared, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, batch, strict=True))
    assert not torch.equal(alone[0][1], alone[5][1])


def test_batches_follow_from_the_seed(train_data):
    def first(seed):
        module = train_module(train_data, place(), seed=seed)
        return finish(module, next(iter(module.train_dataloader())))

    torch.manual_seed(1)
    expected = first(3)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first(3), expected, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(first(4), expected, strict=True))


def test_the_training_loader_can_be_sent_to_spawned_workers(train_data):
    module = train_module(train_data, augmentation=None)
    loader = module.train_dataloader()
    copy, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    for copied, original in zip(collate([copy[3, 17]]), collate([loader.dataset[3, 17]]), strict=True):
        assert torch.equal(copied, original)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_file_to_train_on(tmp_path, num_workers):
    write_images(tmp_path, *[f"train/a/{i}.jpg" for i in range(4)], "val/a/1.jpg")
    (tmp_path / "train/a/2.jpg").write_bytes(b"")
    module = train_module(tmp_path, num_classes=1, num_workers=num_workers)
    message = message_of(lambda: list(module.train_dataloader()))
    assert message.startswith(f"Cannot decode the image {tmp_path / 'train/a/2.jpg'}: the file is empty.")
    on_device = train_module(tmp_path, num_classes=1, on_device=True)
    assert message_of(on_device.train_dataloader) == message


# ---- training: several processes, and what is random on the device ------------------------------------------


def test_processes_train_on_different_images(train_data):
    seen = []
    for rank in range(2):
        module = train_module(train_data, place(rank, 2), on_device=True, batch_size=2)
        seen.append(torch.cat([indices for indices, _, _ in module.train_dataloader()]).tolist())
    assert len(seen[0]) == len(seen[1]) == 10
    assert sorted(seen[0] + seen[1]) == list(range(20))


def test_what_is_random_after_the_workers_differs_between_processes_and_batches(train_data):
    module = train_module(train_data)
    batches = list(module.train_dataloader())

    def draws(rank):
        module.trainer = place(rank, 2)
        for batch in batches:
            module.on_before_batch_transfer(batch, 0)
            yield torch.rand(1).item(), np.random.rand(), random.random()

    # even of the same images
    first, again, other = (list(draws(rank)) for rank in (0, 0, 1))
    assert first == again
    for numbers in zip(*(first + other), strict=True):
        assert len(set(numbers)) == 2 * len(batches)


def test_the_generators_of_devices_are_seeded_too(train_data, monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    module = train_module(train_data, place())
    batches = list(module.train_dataloader())
    assert not seeds
    for batch in batches:
        module.on_before_batch_transfer(batch, 0)
    assert len(set(seeds)) == len(batches)


def test_crops_on_the_device_know_the_shape_of_the_images(flowers):
    # the largest square is the only crop of that shape that is tried in the end, from the middle
    augmentation = {**SAME_EVERY_TIME, "ratio": (1, 1)}
    module = train_module(flowers, place(), train_split="val", num_classes=5, on_device=True, augmentation=augmentation)
    aspects = []
    for batch in module.train_dataloader():
        indices, maps, _, _ = module.on_before_batch_transfer(batch, 0)
        for index, matrix in zip(indices.tolist(), maps, strict=True):
            image = module.train_dataset.decode(index)
            side = min(image.size)
            expected = torch.tensor([[side / image.width, 0, 0], [0, side / image.height, 0]])
            torch.testing.assert_close(matrix, expected, rtol=0, atol=2**-22)  # a root and a quotient in float32
            aspects.append(image.width / image.height)
    assert min(aspects) < 1 < max(aspects)


def test_images_are_decoded_and_moved_to_the_device_once(train_data, monkeypatch):
    module = train_module(train_data, place(), on_device=True, num_workers=2)
    loader = module.train_dataloader()
    decoded = module._images
    assert (decoded.shape, decoded.dtype) == ((20, 3, 18, 18), torch.uint8)
    assert module.train_dataloader() is not loader
    assert module._images is decoded
    assert loader.num_workers == 0  # there is nothing for them to do

    def on_meta(batch):  # a device with shapes and no values
        return module.on_after_batch_transfer([x.to("meta") for x in module.on_before_batch_transfer(batch, 0)], 0)

    batches = iter(loader)
    images, targets = on_meta(next(batches))
    assert images.device.type == targets.device.type == "meta"
    moved = module._images
    assert moved.device.type == "meta"
    on_meta(next(batches))
    assert module._images is moved


# ---- training: going on in the middle ---------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_the_loader_begins_where_the_trainer_stands(train_data, accumulate, world_size):
    options = {"on_device": True, "batch_size": 2, "passes_per_epoch": 1}
    rank = world_size - 1
    whole = train_module(train_data, place(rank, world_size), **options).train_dataloader()

    def batches(loader):
        return [torch.stack(batch).tolist() for batch in loader]

    def batches_of(loader, epoch):
        loader.sampler.set_epoch(epoch)  # as Lightning does
        return batches(loader)

    epochs = [batches_of(whole, epoch) for epoch in range(4)]
    # 10 or 5 batches; an update of 4 does not divide them, nor one of 2 the 5
    updates = [list(range(0, len(whole), accumulate)) for _ in epochs]
    places = [(epoch, begin) for epoch, begins in enumerate(updates) for begin in begins]
    for step, (epoch, begin) in enumerate(places[: -len(updates[0])]):
        loader = train_module(train_data, place(rank, world_size, step, accumulate), **options).train_dataloader()
        assert batches(loader) == epochs[epoch][begin:]
        assert batches_of(loader, epoch + 1) == epochs[epoch + 1]
        assert len(loader) == len(whole)
    assert len({str(epoch) for epoch in epochs}) == 4


class Interruption(Exception):  # noqa: N818 - as KeyboardInterrupt
    pass


class SaveAndStop(pl.Callback):
    def __init__(self, step, path, at_epoch_end):
        self.step, self.path, self.at_epoch_end = step, path, at_epoch_end

    def act(self, trainer):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise Interruption

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if not self.at_epoch_end:
            self.act(trainer)

    def on_train_epoch_end(self, trainer, module):
        if self.at_epoch_end:
            self.act(trainer)


class Learner(pl.LightningModule):
    """Remembers sums of what it sees, which tell the batches apart, and what dropout would draw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.seen, self.watched = [], []

    def training_step(self, batch, batch_idx):
        images, targets = batch
        self.seen.append((self.current_epoch, images.double().sum().item(), targets.tolist(), torch.rand(1).item()))
        return ((targets - self.weight) ** 2).mean()

    def validation_step(self, batch, batch_idx):
        images, targets, indices = batch
        assert images.dtype == torch.float32
        assert targets.dtype == torch.int64
        self.watched += indices.tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize(("accumulate", "per_epoch"), [(1, 5), (2, 3)])
@pytest.mark.parametrize("on_device", [False, True])
def test_an_interrupted_training_resumes_exactly(train_data, tmp_path, accumulate, per_epoch, on_device):
    def fit(*callbacks, **options):
        learner = Learner()
        module = train_module(train_data, on_device=on_device)
        fitting = trainer(max_epochs=3, accumulate_grad_batches=accumulate, callbacks=list(callbacks))
        try:
            fitting.fit(learner, module, **options)
        except Interruption:
            return learner, False
        return learner, True

    whole, finished = fit()
    assert finished
    assert [epoch for epoch, *_ in whole.seen] == [0] * 5 + [1] * 5 + [2] * 5
    assert len({total for _, total, *_ in whole.seen}) == 15
    assert whole.watched == [0, 1, 2, 3, 4, 5] * 4  # before the training too
    for step, at_epoch_end in ((1, False), (per_epoch + 2, False), (per_epoch, True), (2 * per_epoch, True)):
        path = tmp_path / f"{step}.ckpt"
        before, finished = fit(SaveAndStop(step, path, at_epoch_end))
        assert not finished
        after, finished = fit(ckpt_path=path)
        assert finished
        assert before.seen + after.seen == whole.seen
        assert torch.equal(after.weight, whole.weight)
