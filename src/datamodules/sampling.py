"""Samplers: every image exactly once in evaluation, a reproducible order in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from scatterbrain.errors import UserError


def derive_seed(*numbers: int) -> int:
    """One seed in [0, 2^63) from several whole numbers, such as a run's seed, an epoch and a rank."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def spread(size: int, number: int) -> list[int]:
    """Positions of `number` items, all of them where they are fewer, spread evenly over `size`."""
    number = min(size, number)
    return [(2 * i + 1) * size // (2 * number) for i in range(number)]


def hold_out(targets: Sequence[int], part: float, seed: int) -> tuple[list[int], list[int]]:
    """Positions to train on and positions held out, both ascending: a random `part` of each class, rounded."""
    generator = np.random.default_rng(seed)
    targets = np.asarray(targets)
    held = np.zeros(len(targets), dtype=bool)
    for target in np.unique(targets):
        members = np.flatnonzero(targets == target)
        held[generator.permutation(members)[: round(part * len(members))]] = True
    return np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist()


class ShardedSampler(Sampler[int]):
    """The indices rank, rank + world_size, rank + 2 world_size, ... below `size`.

    Over all ranks each index comes exactly once: no index is repeated as padding, which would count an image twice, and
    none is dropped. Ranks may therefore differ by one index, and so in their number of batches: run collectives at the
    end of the epoch, not in a step.

    Args:
        size: number of images.
        rank: this process, in [0, world_size).
        world_size: number of processes.

    Raises:
        UserError: fewer images than processes.
        ValueError: rank outside [0, world_size).
    """

    def __init__(self, size: int, rank: int = 0, world_size: int = 1) -> None:
        _check_rank(rank, world_size)
        if size < world_size:
            raise UserError(
                f"{size} images cannot be shared among {world_size} processes. Lower trainer.devices, to {size} "
                "processes at most."
            )
        self._indices = range(rank, size, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


class TrainingSampler(Sampler[tuple[int, int]]):
    """A new random order each epoch, with a seed for each image's augmentation.

    Order and seeds depend only on `seed` and the epoch, not on the number of workers or on interruptions. Every epoch
    has `passes` passes over the images, each in another random order; the last incomplete batch is dropped.

    With `shards`, each pass permutes the shards, takes `shuffle_shards` of them at a time and permutes their images:
    all processes and workers read only these shards, each image once, before the next ones. If the shards themselves
    are not shuffled, a small number makes the images of a batch similar.

    Args:
        size: number of images.
        batch_size: images per batch and process.
        seed: of the run.
        rank: this process, in [0, world_size).
        world_size: number of processes.
        passes: passes over the images in an epoch.
        epoch: first epoch; Lightning sets the following ones.
        skip_batches: batches of the first epoch that are already trained on.
        shards: (size,) index of the shard that holds each image; None permutes all images.
        shuffle_shards: number of shards whose images are shuffled together.

    Yields:
        Index in [0, size), and the seed of its augmentation, in [0, 2^62).

    Raises:
        UserError: too few images for one batch on every process.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        passes: int = 1,
        epoch: int = 0,
        skip_batches: int = 0,
        shards: Sequence[int] | NDArray[np.integer] | None = None,
        shuffle_shards: int = 1,
    ) -> None:
        _check_rank(rank, world_size)
        self._size, self._batch_size, self._seed, self._passes = size, batch_size, seed, passes
        self._rank, self._world_size = rank, world_size
        self._epoch = epoch
        self._skip_batches = skip_batches
        self._shuffle_shards = shuffle_shards
        # renumbered without gaps, which a subset of the images may have
        self._shards = None if shards is None else torch.from_numpy(np.unique(shards, return_inverse=True)[1])
        self._num_batches = size * passes // (batch_size * world_size)
        if self._num_batches == 0:
            images = size * passes
            remedy = f"datamodule.batch_size, to {images // world_size} at most"
            if images < world_size:
                remedy = f"trainer.devices, to {images} processes at most, and datamodule.batch_size"
            raise UserError(
                f"{size} training images"
                + (f" in {passes} passes" if passes > 1 else "")
                + f" do not fill a batch of {batch_size}"
                + (f" on each of {world_size} processes" if world_size > 1 else "")
                + f". Lower {remedy}."
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(derive_seed(self._seed, self._epoch))
        order = torch.cat([self._permutation(generator) for _ in range(self._passes)])
        seeds = torch.randint(2**62, order.shape, generator=generator)
        begin = self._skip_batches * self._batch_size * self._world_size + self._rank
        end = self._num_batches * self._batch_size * self._world_size
        self._skip_batches = 0
        mine = slice(begin, end, self._world_size)
        return iter(zip(order[mine].tolist(), seeds[mine].tolist(), strict=True))

    def _permutation(self, generator: torch.Generator) -> torch.Tensor:
        """The order (size,) of one pass."""
        order = torch.randperm(self._size, generator=generator)
        if self._shards is None:
            return order
        groups = torch.randperm(int(self._shards.max()) + 1, generator=generator) // self._shuffle_shards
        # stable: within a group of shards, the images keep their random order
        return order[torch.argsort(groups[self._shards[order]], stable=True)]

    def __len__(self) -> int:
        """Images of a whole epoch on this process."""
        return self._num_batches * self._batch_size


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"Expected a rank in [0, {world_size}), got {rank}.")
