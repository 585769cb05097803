"""Training order by shards: each image once per pass, near others of its file, and exactly as before without."""

from __future__ import annotations

import importlib.util
from itertools import pairwise

import numpy as np
import pytest
import torch

from src.datamodules.formats import SplitLocation, open_split
from src.datamodules.sampling import TrainingSampler, derive_seed
from tests.src.datamodules import format_files as files
from tests.src.datamodules.setup import datamodule, message_of, write_images

needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow")
# of unequal sizes, one of them empty: numbers without images are no shards
SIZES = (5, 1, 7, 0, 4, 6, 3, 2)
SHARDS = np.repeat(np.arange(len(SIZES)), SIZES)
SIZE = len(SHARDS)


def order(world_size=1, batch_size=1, shuffle_shards=2, shards=SHARDS, **options):
    """Indices in the order in which the processes get them, each step's together."""
    samplers = [
        TrainingSampler(
            len(shards),
            batch_size,
            rank=rank,
            world_size=world_size,
            shards=shards,
            shuffle_shards=shuffle_shards,
            **{"seed": 0, **options},
        )
        for rank in range(world_size)
    ]
    shares = [[index for index, _ in sampler] for sampler in samplers]
    return [index for step in zip(*shares, strict=True) for index in step]


@pytest.mark.parametrize("shuffle_shards", [1, 2, 3, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_each_image_comes_once_per_pass(world_size, shuffle_shards):
    passes = 12  # a multiple of each number of processes, so that nothing is left out
    indices = order(world_size, shuffle_shards=shuffle_shards, passes=passes)
    together = np.reshape(indices, (passes, SIZE))
    np.testing.assert_array_equal(np.sort(together), np.tile(np.arange(SIZE), (passes, 1)))
    assert len({tuple(one) for one in together}) == passes


@pytest.mark.parametrize("shuffle_shards", [1, 2, 3])
def test_so_many_shards_are_read_at_a_time(shuffle_shards):
    visited = SHARDS[order(world_size=2, shuffle_shards=shuffle_shards, passes=2)]
    for one in (visited[:SIZE], visited[SIZE:]):
        turns = []
        for shard in dict.fromkeys(one.tolist()):  # by their first image
            if not turns or len(turns[-1]) == shuffle_shards:
                turns.append([])
            turns[-1].append(shard)
        # no image of a turn's shards before or after the turn
        begin = 0
        for turn in turns:
            end = begin + sum(SIZES[shard] for shard in turn)
            assert set(one[begin:end]) == set(turn)
            begin = end
        assert begin == SIZE


def test_images_are_mixed_over_the_shards_of_a_turn_and_within_them():
    shards = np.repeat(np.arange(2), 500)
    indices = np.array(order(shards=shards, shuffle_shards=2))
    # 500 images in a first half of 500 + 500: 11 is one standard deviation
    assert abs(int((shards[indices[:500]] == 0).sum()) - 250) < 80
    alone = np.array(order(shards=shards, shuffle_shards=1))
    for half in (alone[:500], alone[500:]):
        assert len(set(shards[half])) == 1
        assert abs(np.corrcoef(np.arange(500), half)[0, 1]) < 0.25  # 5 standard deviations


def test_the_order_follows_from_the_seed_and_the_epoch():
    drawn = {(seed, epoch): tuple(order(seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(set(drawn.values())) == 6
    assert drawn == {(seed, epoch): tuple(order(seed=seed, epoch=epoch)) for seed, epoch in drawn}
    first_shards = {SHARDS[indices[0]] for indices in drawn.values()}
    assert len(first_shards) > 1


@pytest.mark.parametrize("skip_batches", [1, 3])
def test_batches_are_skipped(skip_batches):
    whole = order(world_size=2, batch_size=3, epoch=1)
    assert order(world_size=2, batch_size=3, epoch=1, skip_batches=skip_batches) == whole[2 * 3 * skip_batches :]


def test_without_shards_the_order_is_the_one_it_was():
    generator = torch.Generator().manual_seed(derive_seed(3, 5))
    permutations = torch.cat([torch.randperm(SIZE, generator=generator) for _ in range(2)])
    seeds = torch.randint(2**62, permutations.shape, generator=generator)
    expected = list(zip(permutations.tolist(), seeds.tolist(), strict=True))
    assert list(TrainingSampler(SIZE, 1, seed=3, passes=2, epoch=5)) == expected


# ---- formats ----------------------------------------------------------------------------------------------

WRITERS = [files.tars_of_classes, files.shards, pytest.param(files.parquet, marks=needs_pyarrow)]


@pytest.mark.parametrize("write", WRITERS)
def test_a_shard_is_an_archive_or_a_row_group(tmp_path, write):
    write(tmp_path, "val")
    images = open_split(SplitLocation(tmp_path, "val"))
    shards = images.shards()
    assert shards.dtype == np.int64
    assert sorted(shards) == list(shards)  # in the order of files
    assert 1 < len(set(shards)) < len(images)
    places = [images.location(position) for position in range(len(images))]
    inside = [(path, where[0] if write is files.parquet else None) for path, where in places]
    assert len(set(zip(shards.tolist(), inside, strict=True))) == len(set(shards)) == len(set(inside))


def test_separate_files_have_no_shards(tmp_path):
    write_images(tmp_path, "train/a/0.jpg", "train/b/0.jpg", "val/a/0.jpg", "val/b/0.jpg")
    data = datamodule(tmp_path, num_classes=2, shuffle_shards=2)
    data.setup("fit")
    message = message_of(data.train_dataloader)
    assert message.startswith(
        f"datamodule.shuffle_shards=2, but {tmp_path / 'train'} holds its images as separate files"
    )
    assert "Leave it out" in message


@pytest.mark.parametrize("value", [0, 1.5, True, "all"])
def test_numbers_of_shards_that_are_none(value):
    message = message_of(datamodule, None, shuffle_shards=value)
    assert message == f"datamodule.shuffle_shards={value} is not valid. Give a whole number of at least 1."


def trained_on(data):
    """Targets and names of an epoch's images, through the loader; the names tell the images."""
    loader = data.train_dataloader()
    indices = [index for index, _ in loader.sampler]
    loaded = torch.cat([targets for _, targets, _ in loader]).tolist()
    assert loaded == [data.train_dataset.targets[index] for index in indices]
    return [data.train_dataset.paths[index] for index in indices]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_reads_shard_by_shard(tmp_path, num_workers):
    for split in ("train", "val"):
        files.shards(tmp_path, split)
    options = {"batch_size": 1, "num_workers": num_workers, "augmentation": {"mixup_prob": 0}}
    data = datamodule(tmp_path, shuffle_shards=1, **options)
    names = trained_on(data)
    assert sorted(names) == sorted(data.train_dataset.paths)
    tars = [name.split("/")[0] for name in names]
    assert len(set(tars)) == 1 + sum(a != b for a, b in pairwise(tars)) > 1


def test_held_out_images_leave_the_others_in_their_shards(tmp_path):
    for split in ("train", "val"):
        files.shards(tmp_path, split)
    data = datamodule(tmp_path, shuffle_shards=1, batch_size=1, holdout=0.5, augmentation={"mixup_prob": 0})
    names = trained_on(data)
    whole = open_split(SplitLocation(tmp_path, "train", "train_split"))
    assert 0 < len(names) < len(whole)
    tars = [name.split("/")[0] for name in names]
    assert len(set(tars)) == 1 + sum(a != b for a, b in pairwise(tars)) > 1


@needs_pyarrow
def test_row_groups_are_kept_as_long_as_they_are_needed(tmp_path, monkeypatch):
    from src.datamodules.formats import parquet

    for split in ("train", "val"):
        files.parquet(tmp_path, split, group=2)
    read = []
    read_group = parquet._read_group
    monkeypatch.setattr(parquet, "_read_group", lambda *where: read.append(where) or read_group(*where))
    data = datamodule(tmp_path, shuffle_shards=2, batch_size=1, augmentation={"mixup_prob": 0})
    trained_on(data)
    assert len(read) == len(set(read)) == len(set(data.train_dataset.listing.shards())) > 2
