import re

import pytest

from src.datamodules.sampling import ShardedSampler, TrainingSampler, derive_seed
from tests.src.datamodules.setup import message_of

# ---- evaluation -------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("make", [lambda *place: ShardedSampler(10, *place), lambda *p: TrainingSampler(10, 1, 0, *p)])
def test_rank_outside_the_world(make, rank):
    with pytest.raises(ValueError, match="rank"):
        make(rank, 2)


# ---- training ---------------------------------------------------------------------------------------------

SIZE = 23


def indices(**options):
    return [index for index, _ in TrainingSampler(**{"size": SIZE, "batch_size": 1, "seed": 0, **options})]


def test_every_pass_is_a_permutation_of_its_own():
    order = indices(passes=3)
    passes = [order[begin : begin + SIZE] for begin in range(0, 3 * SIZE, SIZE)]
    assert all(sorted(one) == list(range(SIZE)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    assert all(one != list(range(SIZE)) for one in passes)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (4, 1), (2, 3), (5, 4), (3, 7)])
def test_processes_share_the_passes_but_for_what_fills_no_batch(batch_size, world_size, passes):
    shards = [
        TrainingSampler(SIZE, batch_size, 0, rank=rank, world_size=world_size, passes=passes)
        for rank in range(world_size)
    ]
    shares = [list(shard) for shard in shards]
    step = batch_size * world_size
    kept = SIZE * passes // step * step
    assert {len(share) for share in shares} == {kept // world_size} == {len(shard) for shard in shards}
    # in the order of one process alone, of which the end is missing
    together = [item for items in zip(*shares, strict=True) for item in items]
    assert together == list(TrainingSampler(SIZE, 1, 0, passes=passes))[:kept]


def test_order_and_seeds_follow_from_the_seed_and_the_epoch():
    def order(seed, epoch):
        return tuple(TrainingSampler(SIZE, 4, seed, epoch=epoch))

    drawn = {(seed, epoch): order(seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)}
    assert len({tuple(index for index, _ in items) for items in drawn.values()}) == 9
    assert len({tuple(seed for _, seed in items) for items in drawn.values()}) == 9
    assert drawn == {place: order(*place) for place in drawn}


def test_an_epoch_can_be_set():
    sampler = TrainingSampler(SIZE, 4, seed=5)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(7)
    assert list(sampler) == list(TrainingSampler(SIZE, 4, seed=5, epoch=7)) != first


@pytest.mark.parametrize("rank", [0, 1])
def test_batches_are_skipped_once(rank):
    options = {"size": SIZE, "batch_size": 3, "seed": 5, "rank": rank, "world_size": 2, "passes": 2}
    sampler = TrainingSampler(**options, epoch=4, skip_batches=2)
    assert list(sampler) == list(TrainingSampler(**options, epoch=4))[2 * 3 :]
    sampler.set_epoch(5)
    assert list(sampler) == list(TrainingSampler(**options, epoch=5))
    assert len(sampler) == 2 * SIZE // 6 * 3


def test_each_image_has_a_seed_of_its_own_in_every_epoch_and_pass():
    seeds = [seed for epoch in range(20) for _, seed in TrainingSampler(SIZE, 1, 0, passes=2, epoch=epoch)]
    assert len(set(seeds)) == len(seeds) == 20 * 2 * SIZE
    assert all(0 <= seed < 2**62 for seed in seeds)
    assert max(seeds) > 2**61  # nearly sure of 920 numbers from all the range


@pytest.mark.parametrize(
    ("size", "passes", "world_size", "report"),
    [
        (7, 1, 1, "7 training images do not fill a batch of 8."),
        (7, 2, 2, "7 training images in 2 passes do not fill a batch of 8 on each of 2 processes."),
    ],
)
def test_too_few_images_name_a_batch_size_that_does(size, passes, world_size, report):
    options = {"size": size, "seed": 0, "passes": passes, "world_size": world_size}
    message = message_of(TrainingSampler, batch_size=8, **options)
    assert message.startswith(report)
    most = int(re.search(r"Lower datamodule\.batch_size, to (\d+) at most", message)[1])
    assert len(TrainingSampler(batch_size=most, **options)) == most
    message_of(TrainingSampler, batch_size=most + 1, **options)


def test_fewer_training_images_than_processes_name_a_number_that_does():
    message = message_of(TrainingSampler, 3, 8, 0, world_size=4)
    most = int(re.search(r"Lower trainer\.devices, to (\d+) processes at most", message)[1])
    assert len(TrainingSampler(3, 1, 0, world_size=most)) == 1


def test_seeds_derive_from_every_number():
    tuples = [(a, b) for a in (0, 1, 2, 2**61) for b in (0, 1, 2)]
    seeds = {derive_seed(*numbers) for numbers in tuples}
    assert len(seeds) == len(tuples)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(3, 4) == derive_seed(3, 4)
