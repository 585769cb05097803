import pytest

from src.datamodules.sampling import ShardedSampler
from tests.datamodules.setup import message_of


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
