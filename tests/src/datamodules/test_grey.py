"""Grey images with more than 8 bits."""

import io

import numpy as np
import pytest
from PIL import Image

from src.datamodules.dataset import ImageError, load_rgb
from tests.src.datamodules.setup import datamodule, write_images

GREY = np.linspace(0, 65535, 20 * 16).round().astype(np.uint16).reshape(16, 20)


def save(path, pixels, format, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, format, **options)
    return path


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bits_are_scaled_to_8(tmp_path, format):
    image = load_rgb(save(tmp_path / "image", GREY, format))
    assert image.mode == "RGB"
    expected = np.round(GREY / 257.0).astype(np.uint8)
    assert np.array_equal(np.asarray(image), np.stack([expected] * 3, axis=-1))


def test_16_bits_with_the_high_byte_first(tmp_path):
    buffer = io.BytesIO()
    Image.frombytes("I;16B", (20, 16), GREY.astype(">u2").tobytes()).save(buffer, "TIFF")
    (tmp_path / "image.tiff").write_bytes(buffer.getvalue())
    assert np.array_equal(np.asarray(load_rgb(tmp_path / "image.tiff"))[..., 0], np.round(GREY / 257.0))


def test_16_and_8_bits_give_the_same(tmp_path):
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    a = load_rgb(save(tmp_path / "8.png", eight, "PNG"))
    b = load_rgb(save(tmp_path / "16.png", eight.astype(np.uint16) * 257, "PNG"))
    assert np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_grey_values_of_unknown_range_are_refused_like_a_damaged_image(tmp_path, dtype):
    write_images(tmp_path, "val/a/1.png")
    path = save(tmp_path / "val/a/2.tiff", (GREY / 65535).astype(dtype), "TIFF")
    with pytest.raises(ImageError, match=f"Cannot decode the image {path}: its grey values are .*not 8 or 16 bits. "):
        load_rgb(path)
    loader = datamodule(tmp_path, num_classes=1, on_error="skip").test_dataloader()
    assert [len(targets) for _, targets, _ in loader] == [1]
    assert "unknown range" in loader.skipped[0][1]
