"""Normalisation on the device, against its formula in float64 and torchvision's."""

from __future__ import annotations

import pytest
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms import Normalize

from src.datamodules.normalise import Normalise


@pytest.fixture
def images():
    values = torch.arange(256, dtype=torch.uint8)
    return torch.stack([values.roll(7 * colour) for colour in range(6)]).view(2, 3, 16, 16)


def exact(images):
    mean, std = (
        torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    return (images.double() / 255 - mean) / std


@pytest.mark.parametrize("given", [torch.uint8, torch.float32])
# numbers below 4; half precision is rounded once: half a unit of its last place
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 5e-7), (torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float64, 5e-7)]
)
def test_values(images, given, dtype, error):
    normalise = Normalise(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    result = normalise(images.to(given), dtype)
    assert (result.dtype, result.shape) == (dtype, images.shape)
    assert ((result.double() - exact(images)).abs() <= error * exact(images).abs().clamp(min=1)).all()


def test_it_is_torchvisions_of_the_same_images(images):
    theirs = Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)(images.float() / 255)
    ours = Normalise(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)(images)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.preserve_format, torch.channels_last])
def test_order_of_memory(images, memory_format):
    normalise = Normalise((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    result = normalise(images, memory_format=memory_format)
    assert result.is_contiguous(memory_format=torch.channels_last) == (memory_format == torch.channels_last)
    assert torch.equal(result, normalise(images))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_without_waiting(images):
    normalise = Normalise(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    on_device = images.cuda()
    first = normalise(on_device, torch.bfloat16, torch.channels_last)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = normalise(on_device, torch.bfloat16, torch.channels_last)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)
    assert second.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(second.double().cpu(), exact(images), rtol=2**-8, atol=2**-8)
