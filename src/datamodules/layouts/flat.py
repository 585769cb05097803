"""All images in one folder: `val/ILSVRC2012_val_00000293.JPEG`, or `train/n01440764_10026.JPEG`."""

from __future__ import annotations

import logging

from scatterbrain.errors import UserError
from src.datamodules.layouts.base import FileListing, Found, Place, listing, scan_folder
from src.datamodules.layouts.labels import (
    DEVKIT,
    KAGGLE_SOLUTION,
    SOURCES,
    image_labels,
    is_validation_image,
    label_folders,
    label_sources,
    synset_in_name,
)

logger = logging.getLogger(__name__)

FORMAT = "flat"
LOOKED_FOR = "{folder}/ILSVRC2012_val_*.JPEG with " + SOURCES


def find(place: Place, need_labels: bool = True) -> list[Found]:
    """The split's folders that hold ImageNet's images themselves, with labels unless they are not needed."""
    found = []
    for folder in place.folders:
        images = _images(scan_folder(folder)[1])
        told = any(synset_in_name(name) for name in images)
        if images and (told or not need_labels or label_sources(label_folders(place, folder))):
            found.append(Found(FORMAT, folder))
    return found


class Flat(FileListing):
    """ImageNet's images in one folder, by name; other files are left out with a warning."""

    format = FORMAT


def open_layout(found: Found, place: Place, num_classes: int) -> Flat:
    """List the images of a folder.

    Raises:
        UserError: no labels, or see `image_labels` and `Listing`.
    """
    files = scan_folder(found.root)[1]
    names = _images(files)
    kit = (DEVKIT, f"{DEVKIT}.tar.gz", KAGGLE_SOLUTION)
    others = [name for name in set(files) - set(names) if name not in kit]
    if not names:
        raise UserError(f"{found.root} holds no images named as ImageNet's are: ILSVRC2012_val_00000293.JPEG.")
    if others:
        logger.warning("%s: files that are not named as ImageNet's are left out: %s", found.root, listing(others))
    return Flat(found.root, names, image_labels(names, label_folders(place, found.root), found.root), num_classes)


def _images(files: list[str]) -> list[str]:
    return [name for name in files if is_validation_image(name) or synset_in_name(name)]
