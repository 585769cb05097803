"""Folders of images, datasets of them, and error messages."""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from scatterbrain.errors import UserError
from src.datamodules.dataset import ImageFolderDataset
from src.datamodules.image_folder import ImageFolderDataModule

# The first few of each class: a pass over all would take a second.
PHOTOGRAPHS = [
    path
    for name, number in (("daisy", 3), ("dandelion", 3), ("roses", 2), ("sunflowers", 2), ("tulips", 2))
    for path in sorted((Path(__file__).parents[3] / "data" / "flowers" / "val" / name).iterdir())[:number]
]


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
    # pytest.raises would keep the traceback, and with it loaders whose workers then take seconds to stop
    message = None
    try:
        call(*args, **kwargs)
    except UserError as error:
        message = str(error)
    assert message is not None, "no UserError"
    assert "\n" not in message
    return message
