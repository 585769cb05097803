"""Images in memory: the same for a seed however they are batched and shared, and each exactly once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from scatterbrain.errors import UserError
from src.datamodules.synthetic import SyntheticDataModule

OPTIONS = {"num_images": 11, "num_distinct": 4, "image_size": 16, "num_classes": 5, "pin_memory": False}


def module_of(rank=0, world_size=1, **options):
    module = SyntheticDataModule(**{**OPTIONS, "batch_size": 3, **options})
    module.trainer = SimpleNamespace(
        global_rank=rank, world_size=world_size, lightning_module=SimpleNamespace(dtype=torch.bfloat16)
    )
    return module


def all_of(module):
    return [torch.cat(parts) for parts in zip(*module.test_dataloader(), strict=True)]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 11, 20])
def test_images_are_the_distinct_ones_in_turn(batch_size):
    module = module_of(batch_size=batch_size)
    images, targets, indices = all_of(module)
    data = module.test_dataset
    assert data.pixels.shape == (4, 3, 16, 16)
    assert len({image.numpy().tobytes() for image in data.pixels}) == 4
    assert images.dtype == torch.uint8
    assert torch.equal(images, data.pixels[torch.arange(11) % 4])
    assert torch.equal(targets, data.targets)
    assert indices.tolist() == list(range(11))
    sizes = [len(batch[0]) for batch in module.test_dataloader()]
    assert len(module.test_dataloader()) == len(sizes) == -(-11 // batch_size)
    assert set(sizes[:-1]) <= {batch_size}
    assert data.paths[0] == "synthetic/00000000"
    assert data.paths[10] == "synthetic/00000010"
    assert len(data) == len(data.paths) == 11


def test_batches_are_views():
    batches = list(module_of().test_dataloader())
    storages = {batch[0].untyped_storage().data_ptr() for batch in batches}
    assert len(storages) == 1


@pytest.mark.parametrize("world_size", [2, 3, 11])
def test_processes_share_the_images(world_size):
    parts = [all_of(module_of(rank, world_size)) for rank in range(world_size)]
    whole = all_of(module_of())
    for part, expected in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(part), expected)
    assert max(len(part[0]) for part in parts) - min(len(part[0]) for part in parts) <= 1


def test_more_processes_than_images():
    with pytest.raises(UserError, match=r"datamodule\.num_images=11 cannot be shared among 12 processes"):
        module_of(0, 12).test_dataloader()


def test_the_seed_decides():
    first, same, other = (all_of(module_of(seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])
    assert set(first[1].tolist()) <= set(range(5))


def test_no_more_distinct_images_than_images():
    module = module_of(num_distinct=100)
    module.setup("test")
    assert len(module.test_dataset.pixels) == 11


def test_setup_keeps_the_images():
    module = module_of()
    module.setup("test")
    before = module.test_dataset
    module.setup("test")
    assert module.test_dataset is before


def test_batches_are_normalised_in_the_dtype_of_the_model():
    module = module_of()
    batch = next(iter(module.test_dataloader()))
    images, targets, indices = module.on_after_batch_transfer(batch, 0)
    assert images.dtype == torch.bfloat16
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, module.normalise(batch[0], torch.bfloat16))
    assert torch.equal(targets, batch[1])
    assert torch.equal(indices, batch[2])


def test_it_is_for_evaluation_only():
    with pytest.raises(UserError, match="evaluation only"):
        module_of().setup("fit")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_images", 0, "datamodule.num_images=0 is not valid"),
        ("num_distinct", 1.5, "datamodule.num_distinct=1.5 is not valid"),
        ("batch_size", 0, "datamodule.batch_size=0 is not valid"),
        ("image_size", "x", "datamodule.image_size=x is not valid"),
        ("num_classes", -1, "datamodule.num_classes=-1 is not valid"),
        ("seed", -1, "datamodule.seed=-1 is not valid"),
        ("std", (0, 1, 1), "datamodule.std"),
        ("mean", 3, "datamodule.mean=3 is not valid"),
    ],
)
def test_options_that_are_not_valid(option, value, message):
    with pytest.raises(UserError, match=message):
        module_of(**{option: value})


def test_images_that_do_not_fit_in_memory():
    with pytest.raises(UserError, match=r"datamodule.num_distinct=1000000 images do not fit in memory. Lower it"):
        module_of(num_images=10**6, num_distinct=10**6, image_size=10**4).setup("test")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_page_locked_where_there_is_cuda():
    images, targets, indices = next(iter(module_of(pin_memory=None).test_dataloader()))
    assert images.is_pinned()
    assert targets.is_pinned()
    assert indices.is_pinned()
