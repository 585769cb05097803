"""ImageNet's original archives, not extracted: `ILSVRC2012_img_val.tar`, and `ILSVRC2012_img_train.tar` of 1,000 tars.

Besides, archives of class folders, and a folder of the training set's 1,000 archives.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from src.datamodules.layouts.archives import Member, members
from src.datamodules.layouts.base import Found, Listing, Place, files_matching, imagenet_synsets
from src.datamodules.layouts.labels import image_labels, label_folders

FORMAT = "tar"
LOOKED_FOR = "ILSVRC2012_img_{split}.tar or {split}.tar"


def find(place: Place) -> list[Found]:
    """Archives of the split, by their names."""
    names = {f"{start}{stem}.tar" for stem in place.stems for start in ("ILSVRC2012_img_", "")}
    # a folder of tars with a name of its own for each class is the extracted ILSVRC2012_img_train.tar
    found = []
    for folder in place.folders:
        files = class_archives(folder)
        if files:
            found.append(Found(FORMAT, folder, tuple(files)))
    named = [path for path in place.named_files if path.suffix == ".tar"]
    if len(named) > 1:
        return found
    archives = named or files_matching(dict.fromkeys([place.data_dir, *place.folders]), names.__contains__)
    return found + [Found(FORMAT, path) for path in archives if not holds_samples(path)]


def class_archives(folder: Path) -> list[Path]:
    """The tars of a folder if all are named after synsets."""
    files = files_matching([folder], lambda name: name.endswith(".tar"))
    return files if all(path.stem in imagenet_synsets() for path in files) else []


def holds_samples(path: Path) -> bool:
    """Whether a tar is a shard of WebDataset: the first image is beside a file of its class."""
    try:
        return any(member.path.endswith(".cls") for member in members(path, limit=8))
    except ValueError:  # told when it is opened
        return False


class Archives(Listing):
    """Images inside of tar files, in the order of their names.

    Args:
        root: file or folder that stands for the split.
        names: see `Listing`; likewise `labels`, `num_classes` and `what`.
        sources: where the images are, in the order of `names`.
    """

    format = FORMAT

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        labels: Sequence[str] | Sequence[int],
        sources: Sequence[Member],
        num_classes: int,
    ) -> None:
        super().__init__(root, names, labels, num_classes)
        # columns, not a million objects
        self._files = sorted({source.archive for source in sources})
        place = {path: index for index, path in enumerate(self._files)}
        self._file = np.array([place[source.archive] for source in sources], dtype=np.int32)
        self._offset = np.array([source.offset for source in sources], dtype=np.int64)
        self._size = np.array([source.size for source in sources], dtype=np.int64)
        # the last part of a name is that in the archive
        self._inside = (
            None
            if all(s.path == n for s, n in zip(sources, names, strict=True))
            else [source.path for source in sources]
        )

    def source(self, position: int) -> Member:
        """The place of the image at `position`."""
        path = self.names[position] if self._inside is None else self._inside[position]
        return Member(self._files[self._file[position]], path, int(self._offset[position]), int(self._size[position]))

    def location(self, position: int) -> tuple[Path, tuple[int, ...]]:
        """The archive with the image at `position`; its first byte there and its bytes."""
        place = int(self._offset[position]), int(self._size[position])
        return self._files[self._file[position]], place

    def shards(self) -> NDArray[np.int64]:
        """Number of the archive that holds each image."""
        return self._file.astype(np.int64)


def open_layout(found: Found, place: Place, num_classes: int) -> Archives:
    """List the images of one archive or of one archive per class.

    Raises:
        UserError: an archive is damaged, or see `image_labels` and `Listing`.
    """
    files = found.files or (found.root,)
    images: list[tuple[str, Member]] = []
    for path in files:
        prefix = f"{path.stem}/" if found.files else ""
        for member in members(path):
            if member.name.endswith(".tar"):
                synset = PurePosixPath(member.path).stem
                images += [(f"{synset}/{inner.path}", inner) for inner in members(path, member)]
            else:
                images.append((prefix + member.path, member))
    # as class folders are walked: "a/b" comes before "a-b/a"
    images.sort(key=lambda image: image[0].split("/"))
    names = [name for name, _ in images]
    labels = image_labels(names, label_folders(place, found.root), found.root) if names else []
    return Archives(found.root, names, labels, [member for _, member in images], num_classes)
