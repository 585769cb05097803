"""Tiny data in the folders of the published data sets: all of it is made here, none is other people's."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_reviews(root: Path, train: int = 10, test: int = 4, parts: dict[str, int] | None = None) -> Path:
    """Folder of reviews, so many of each class: the number of the review, and words that tell the class."""
    for part, num in (parts or {"train": train, "test": test}).items():
        for name, word in (("neg", "dull"), ("pos", "fine")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(num):
                text = f"{part} {number}: {word}" + f", {word}" * number
                (folder / f"{number}_{1 if name == 'neg' else 10}.txt").write_text(text, encoding="utf-8")
    return root


def write_images(root: Path, train: int = 10, test: int = 4, suffix: str = "png") -> Path:
    """Folder of images, so many of each of two classes: bright ones of `ant`, dark ones of `bee`."""
    generator = np.random.default_rng(0)
    for part, num in {"train": train, "test": test}.items():
        for name, low in (("ant", 128), ("bee", 0)):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(num):
                pixels = generator.integers(low, low + 128, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:04}.{suffix}")
    return root
