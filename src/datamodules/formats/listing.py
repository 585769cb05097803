"""A listing: the images of one split, their names and labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from scatterbrain.errors import UserError
from src.datamodules.formats.classes import DEFAULT_NUMBERING, ClassNumbering, index_of_labels
from src.datamodules.formats.files import read_file
from src.utils.labels import NO_LABEL
from src.utils.text import abbreviate


class ImageSource(Protocol):
    """Where the bytes of one image are: a `Path`, or a position inside a file. `str()` of it names it in messages."""

    name: str

    def read_bytes(self) -> bytes:
        """The encoded bytes of the image."""


def read_source(source: ImageSource) -> bytes:
    """The encoded bytes of an image.

    Raises:
        UserError: bytes are missing.
        OSError: the file cannot be read, or is no regular file.
    """
    return read_file(source) if isinstance(source, Path) else source.read_bytes()


class Listing:
    """The images of one split, in an order that depends only on their names.

    A listing holds no open file and can be pickled for worker processes.

    Args:
        root: file or folder that the images are in.
        names: of the images, relative, with forward slashes.
        labels: class of each image: names of classes, see `class_index`, or indices; None for images without classes.
        num_classes: outputs of the model.
        what: what the classes are (`classes`, `class folders`), for messages.
        numbering: of the classes, see `class_index`.

    Attributes:
        root: as given.
        names: as given.
        targets: index of each image's class, `NO_LABEL` without classes.
        classes: names of the classes that occur, sorted by name or, where labels are indices, by index.
        class_to_index: class to target, in the order of `classes`.

    Raises:
        UserError: no images, a name twice, or labels that do not fit `num_classes`.
    """

    format: str

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        labels: Sequence[str] | Sequence[int] | None,
        num_classes: int,
        what: str = "classes",
        numbering: ClassNumbering = DEFAULT_NUMBERING,
    ) -> None:
        self.root = root
        self.names = list(names)
        if not self.names:
            raise UserError(f"{root} holds no images. Fetch it again, or give another.")
        if len(set(self.names)) < len(self.names):
            twice = [name for name, number in Counter(self.names).items() if number > 1]
            raise UserError(f"{root} has images twice: {abbreviate(twice)}. Remove the duplicates.")
        if labels is None:
            self.targets, self.classes, self.class_to_index = [NO_LABEL] * len(self.names), [], {}
            return
        try:
            self.class_to_index = index_of_labels(set(labels), num_classes, what, numbering)
        except UserError as error:
            raise UserError(f"{root}: {error}") from None
        by_label = (
            {index: index for index in self.class_to_index.values()}
            if isinstance(labels[0], int)
            else self.class_to_index
        )
        self.targets = [by_label[label] for label in labels]
        self.classes = list(self.class_to_index)

    def __len__(self) -> int:
        return len(self.names)

    def source(self, position: int) -> ImageSource:
        """Where the bytes of the image at `position` of `names` are."""
        raise NotImplementedError

    def location(self, position: int) -> tuple[Path, tuple[int, ...]]:
        """The file that holds the image at `position` of `names`, and its position in that file."""
        raise NotImplementedError

    def shards(self) -> NDArray[np.int64] | None:
        """Index (len,) of the shard that holds each image, in the order of files; None without shards.

        A shard is an archive or a row group of a file, which is fast to read sequentially.
        """
        return None

    def keep_shards(self, number: int) -> None:
        """Cache up to `number` shards per process, for reading from that many alternately."""

    def read(self, position: int) -> bytes:
        """The encoded bytes of the image at `position` of `names`.

        Raises:
            UserError: bytes are missing.
            OSError: the file cannot be read.
        """
        return read_source(self.source(position))


class FileListing(Listing):
    """Images in separate files: image `i` is `folder / names[i]`."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        labels: Sequence[str] | Sequence[int] | None,
        num_classes: int,
        **options,
    ) -> None:
        super().__init__(options.pop("root", folder), names, labels, num_classes, **options)
        self.folder = folder

    def source(self, position: int) -> Path:
        """The file of the image at `position`."""
        return self.folder / self.names[position]

    def location(self, position: int) -> tuple[Path, tuple[int, ...]]:
        """The file of the image at `position`; no position in it."""
        return self.source(position), ()
