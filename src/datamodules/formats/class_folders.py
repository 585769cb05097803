"""Images in one folder per class: `val/n01440764/ILSVRC2012_val_00000293.JPEG`."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from scatterbrain.errors import UserError
from src.datamodules.formats.classes import DEFAULT_NUMBERING, ClassNumbering, class_index, imagenet_synsets
from src.datamodules.formats.files import is_no_image, is_system_folder, scan_folder
from src.datamodules.formats.labels import is_validation_image, synset_in_name
from src.datamodules.formats.listing import FileListing
from src.datamodules.formats.location import FoundSplit, SplitLocation
from src.utils.text import abbreviate

logger = logging.getLogger(__name__)

FORMAT = "class_folders"
SEARCHED_NAMES = "class folders in {folder}/"


def find(location: SplitLocation) -> list[FoundSplit]:
    """The split's folders that hold class folders."""
    found = []
    for folder in location.folders:
        folders, files = scan_folder(folder)
        flat = any(is_validation_image(name) or synset_in_name(name) for name in files)
        if any(name in imagenet_synsets() for name in folders) or (folders and not flat):
            found.append(FoundSplit(FORMAT, folder))
    return found


class ClassFolders(FileListing):
    """The images `root/<class folder>/<file>`, in sorted order of folder, then file name.

    Every file of a class folder that is not hidden counts as an image, whatever its extension (some of ImageNet's
    .JPEG files are PNG), unless it is known to be none (`Thumbs.db`, `README.txt`). Such files, files beside the class
    folders, folders inside them and class folders without images are skipped with a warning. Links are followed.

    Args:
        root: folder of the split, which holds the class folders; `~` is expanded.
        num_classes: outputs of the model, see `class_index`.
        numbering: of the classes, see `class_index`.

    Raises:
        UserError: no class folders, no images, or class folders that do not fit `num_classes`.
    """

    format = FORMAT

    def __init__(
        self, root: str | os.PathLike[str], num_classes: int = 1000, numbering: ClassNumbering = DEFAULT_NUMBERING
    ) -> None:
        root = Path(root).expanduser()
        if not root.is_dir():
            raise UserError(f"{root} is not a folder. Give the folder that holds the class folders.")
        classes, loose_files = scan_folder(root)
        if not classes:
            found = f"holds {len(loose_files)} files but no class folders" if loose_files else "is empty"
            raise UserError(
                f"{root} {found}. Put the images in one folder per class, such as "
                f"{root.name}/n01440764/ILSVRC2012_val_00000293.JPEG"
                + (", or evaluate them without labels by datamodule.labels=none." if loose_files else ".")
            )
        try:
            class_to_index = class_index(classes, num_classes, numbering=numbering)
        except UserError as error:
            raise UserError(f"{root}: {error}") from None

        names: list[str] = []
        labels: list[str] = []
        without_images, nested, no_images = [], [], []
        for name in classes:
            folders, files = scan_folder(root / name)
            no_images += [f"{name}/{file}" for file in files if is_no_image(file)]
            files = [file for file in files if not is_no_image(file)]
            names += [f"{name}/{file}" for file in files]
            labels += [name] * len(files)
            nested += [f"{name}/{folder}" for folder in folders]
            if not files:
                without_images.append(name)
        if not names:
            hint = f" (images further down, as in {abbreviate(nested, 1)}, are ignored)" if nested else ""
            raise UserError(
                f"No images in the {len(classes)} class folders of {root}{hint}. "
                "Put the images directly in their class folder."
            )
        if without_images:
            logger.warning("%s: class folders without images: %s", root, abbreviate(without_images))
        if nested:
            logger.warning("%s: folders inside class folders are left out: %s", root, abbreviate(nested))
        if no_images:
            logger.warning("%s: files that are no images are left out: %s", root, abbreviate(no_images))
        if system_folders := [name for name in os.listdir(root) if is_system_folder(name)]:
            logger.warning("%s: folders of the operating system are left out: %s", root, abbreviate(system_folders))
        if loose_files:
            logger.warning("%s: files outside class folders are left out: %s", root, abbreviate(loose_files))
        # not through `Listing.__init__`, which knows only classes that have images
        self.root = self.folder = root
        self.names = names
        self.classes, self.class_to_index = classes, class_to_index
        self.targets = [class_to_index[label] for label in labels]


def list_images(found: FoundSplit, location: SplitLocation, num_classes: int) -> ClassFolders:
    """List the images, see `ClassFolders`."""
    return ClassFolders(found.root, num_classes, location.numbering)
