"""All images in one folder: `val/ILSVRC2012_val_00000293.JPEG`, or `train/n01440764_10026.JPEG`."""

from __future__ import annotations

import logging

from scatterbrain.errors import UserError
from src.datamodules.formats.files import scan_folder
from src.datamodules.formats.labels import (
    DEVKIT,
    KAGGLE_SOLUTION,
    SOURCES,
    image_labels,
    is_validation_image,
    label_folders,
    label_sources,
    synset_in_name,
)
from src.datamodules.formats.listing import FileListing
from src.datamodules.formats.location import FoundSplit, SplitLocation
from src.utils.text import abbreviate

logger = logging.getLogger(__name__)

FORMAT = "flat"
SEARCHED_NAMES = "{folder}/ILSVRC2012_val_*.JPEG with " + SOURCES


def find(location: SplitLocation, need_labels: bool = True) -> list[FoundSplit]:
    """The split's folders that directly hold ImageNet's images; without `need_labels`, also those without labels."""
    found = []
    for folder in location.folders:
        images = _images(scan_folder(folder)[1])
        labelled = any(synset_in_name(name) for name in images)
        if images and (labelled or not need_labels or label_sources(label_folders(location, folder))):
            found.append(FoundSplit(FORMAT, folder))
    return found


class FlatListing(FileListing):
    """ImageNet's images in one folder, sorted by name; other files are skipped with a warning."""

    format = FORMAT


def list_images(found: FoundSplit, location: SplitLocation, num_classes: int) -> FlatListing:
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
        logger.warning("%s: files that are not named as ImageNet's are left out: %s", found.root, abbreviate(others))
    return FlatListing(
        found.root,
        names,
        image_labels(names, label_folders(location, found.root), found.root),
        num_classes,
        numbering=location.numbering,
    )


def _images(files: list[str]) -> list[str]:
    return [name for name in files if is_validation_image(name) or synset_in_name(name)]
