"""ImageNet's original archives, not extracted: `ILSVRC2012_img_val.tar`, and `ILSVRC2012_img_train.tar` of 1,000 tars.

Also archives of class folders, and a folder of the training set's 1,000 archives.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from src.datamodules.formats.archives import TarMember, members
from src.datamodules.formats.classes import DEFAULT_NUMBERING, ClassNumbering, imagenet_synsets
from src.datamodules.formats.files import files_matching, is_no_image, is_system_folder
from src.datamodules.formats.labels import image_labels, label_folders
from src.datamodules.formats.listing import Listing
from src.datamodules.formats.location import FoundSplit, SplitLocation
from src.utils.text import abbreviate

logger = logging.getLogger(__name__)

FORMAT = "tar"
SEARCHED_NAMES = "ILSVRC2012_img_{split}.tar or {split}.tar"


def find(location: SplitLocation) -> list[FoundSplit]:
    """Archives of the split, by their names."""
    names = {f"{start}{stem}.tar" for stem in location.stems for start in ("ILSVRC2012_img_", "")}
    # a folder of one tar per synset is the extracted ILSVRC2012_img_train.tar
    found = []
    for folder in location.folders:
        files = class_archives(folder)
        if files:
            found.append(FoundSplit(FORMAT, folder, tuple(files)))
    named = [path for path in location.named_files if path.suffix == ".tar"]
    if len(named) > 1:
        return found
    archives = named or files_matching(dict.fromkeys([location.data_dir, *location.folders]), names.__contains__)
    return found + [FoundSplit(FORMAT, path) for path in archives if not holds_samples(path)]


def class_archives(folder: Path) -> list[Path]:
    """The tars in a folder if all are named after synsets."""
    files = files_matching([folder], lambda name: name.endswith(".tar"))
    return files if all(path.stem in imagenet_synsets() for path in files) else []


def holds_samples(path: Path) -> bool:
    """Whether a tar is a WebDataset shard: one of the first members is a .cls file."""
    try:
        return any(member.path.endswith(".cls") for member in members(path, limit=8))
    except ValueError:  # reported when it is opened
        return False


class TarListing(Listing):
    """Images in tar files, in the order of their names.

    Args:
        root: file or folder that holds the split.
        names: see `Listing`; likewise `labels`, `num_classes` and `numbering`.
        sources: the archive members, in the order of `names`.
    """

    format = FORMAT

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        labels: Sequence[str] | Sequence[int],
        sources: Sequence[TarMember],
        num_classes: int,
        numbering: ClassNumbering = DEFAULT_NUMBERING,
    ) -> None:
        super().__init__(root, names, labels, num_classes, numbering=numbering)
        # arrays, not a million objects
        self._files = sorted({source.archive for source in sources})
        index_of = {path: index for index, path in enumerate(self._files)}
        self._file = np.array([index_of[source.archive] for source in sources], dtype=np.int32)
        self._offset = np.array([source.offset for source in sources], dtype=np.int64)
        self._size = np.array([source.size for source in sources], dtype=np.int64)
        # None if all names are the paths in the archives
        self._inside = (
            None
            if all(s.path == n for s, n in zip(sources, names, strict=True))
            else [source.path for source in sources]
        )

    def source(self, position: int) -> TarMember:
        """The archive member that is the image at `position`."""
        path = self.names[position] if self._inside is None else self._inside[position]
        return TarMember(
            self._files[self._file[position]], path, int(self._offset[position]), int(self._size[position])
        )

    def location(self, position: int) -> tuple[Path, tuple[int, ...]]:
        """The archive with the image at `position`; its offset and size in bytes."""
        offset_and_size = int(self._offset[position]), int(self._size[position])
        return self._files[self._file[position]], offset_and_size

    def shards(self) -> NDArray[np.int64]:
        """Index of the archive that holds each image."""
        return self._file.astype(np.int64)


def _is_no_image(path: str) -> bool:
    *folders, name = path.split("/")
    return is_no_image(name) or any(map(is_system_folder, folders))


def list_images(found: FoundSplit, location: SplitLocation, num_classes: int) -> TarListing:
    """List the images of one archive or of one archive per class.

    Raises:
        UserError: an archive is damaged, or see `image_labels` and `Listing`.
    """
    files = found.files or (found.root,)
    images: list[tuple[str, TarMember]] = []
    for path in files:
        prefix = f"{path.stem}/" if found.files else ""
        for member in members(path):
            if member.name.endswith(".tar"):
                synset = PurePosixPath(member.path).stem
                images += [(f"{synset}/{inner.path}", inner) for inner in members(path, member)]
            else:
                images.append((prefix + member.path, member))
    known = [name for name, _ in images if _is_no_image(name)]
    if known:
        logger.warning("%s: files that are no images are left out: %s", found.root, abbreviate(known))
        images = [image for image in images if not _is_no_image(image[0])]
    # the order of class folders: "a/b" comes before "a-b/a"
    images.sort(key=lambda image: image[0].split("/"))
    names = [name for name, _ in images]
    labels = image_labels(names, label_folders(location, found.root), found.root) if names else []
    return TarListing(found.root, names, labels, [member for _, member in images], num_classes, location.numbering)
