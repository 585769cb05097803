"""What the layouts share: a listing of images, what their labels mean, and the names of files and classes."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from timm.data import ImageNetInfo

from scatterbrain.errors import UserError

# Kaggle's tree, below which the splits lie.
KAGGLE_FOLDERS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
# A split's other names in the names of files.
_ALIASES = {"val": ("val", "validation"), "validation": ("validation", "val")}


@functools.cache
def imagenet_synsets() -> dict[str, int]:
    """ImageNet-1k's synset names, `n01440764` to `n15075141`, with the output index of each (0 to 999)."""
    return {name: index for index, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}


def listing(names: Iterable[str], limit: int = 5) -> str:
    """The first `limit` names in sorted order, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def class_index(names: Iterable[str], num_classes: int = 1000, what: str = "class folders") -> dict[str, int]:
    """Give each class the index of the model's output that stands for it.

    Classes that are all named after ImageNet-1k synsets get the standard indices, so a subset of ImageNet's
    classes is labelled as the whole set is. Any other classes are numbered in sorted order.

    Args:
        names: names of the classes, in any order.
        num_classes: outputs of the model.
        what: the names are names of, for the messages.

    Returns:
        Name to index in [0, num_classes), in sorted order of the names.

    Raises:
        UserError: no classes; synsets among other names; synsets and `num_classes` other than 1000; other names
            and their count is not `num_classes`.
    """
    names = sorted(set(names))
    if not names:
        raise UserError("No class folders. Put the images in one folder per class.")
    synsets = imagenet_synsets()
    others = [name for name in names if name not in synsets]
    if not others:
        if num_classes != len(synsets):
            raise UserError(
                f"The {what} ({listing(names)}) are ImageNet-1k synsets, which stand for {len(synsets)} "
                f"classes, but the model has {num_classes}. Set model.num_classes={len(synsets)}, or rename the "
                f"{what.split()[-1]} to have them numbered in sorted order."
            )
        return {name: synsets[name] for name in names}
    if len(others) < len(names):
        raise UserError(
            f"{len(others)} of {len(names)} {what} are not ImageNet-1k synsets, unlike the rest: "
            f"{listing(others)}. Remove or rename them: {what} are either all synsets "
            "(n01440764, ...) or all other names."
        )
    if len(names) != num_classes:
        raise UserError(
            f"{len(names)} {what} ({listing(names)}), but the model has {num_classes} classes. Set "
            f"model.num_classes={len(names)} and a checkpoint trained on these classes, or give the data the "
            "model was trained on."
        )
    return {name: index for index, name in enumerate(names)}


def scan_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the folders and of the files directly in `folder`, links followed, hidden ones left out.

    A link to nothing counts as a file: left out, it would change what is evaluated without a word.

    Args:
        folder: an existing folder.

    Returns:
        Names of the folders, names of the files.

    Raises:
        UserError: the folder cannot be read.
    """
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (folders if entry.is_dir() else files).append(entry.name)
    except PermissionError:
        raise UserError(f"{folder} cannot be read: permission denied. Grant it to the user who runs this.") from None
    return sorted(folders), sorted(files)


class ImageSource(Protocol):
    """Where the bytes of one image are: a `Path`, or a place inside a file. Its text names it in messages."""

    name: str

    def read_bytes(self) -> bytes:
        """All of the image's bytes, still encoded."""


class Listing:
    """The images of one split, in an order that depends on nothing but their names.

    A listing holds no open file and can be pickled: it is what worker processes are given.

    Args:
        root: file or folder that the images are in.
        names: of the images, relative, with forward slashes.
        labels: class of each image: names of classes, see `class_index`, or indices.
        num_classes: outputs of the model.
        what: the classes are, for messages.

    Attributes:
        root: as given.
        names: as given.
        targets: index of each image's class.
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
        labels: Sequence[str] | Sequence[int],
        num_classes: int,
        what: str = "classes",
    ) -> None:
        self.root = root
        self.names = list(names)
        if not self.names:
            raise UserError(f"{root} holds no images. Fetch it again, or give another.")
        if len(set(self.names)) < len(self.names):
            twice = [name for name, number in Counter(self.names).items() if number > 1]
            raise UserError(
                f"{root} has images twice, and each is to be counted once: {listing(twice)}. Remove the repetitions."
            )
        try:
            self.class_to_index = _index_of_labels(set(labels), num_classes, what)
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
        """The file that holds the image at `position` of `names`, and numbers that tell where in it."""
        raise NotImplementedError

    def shards(self) -> NDArray[np.int64] | None:
        """Number (len,) of the shard that holds each image, counted in the order of files; None without shards.

        A shard is read from its beginning to its end at the speed of the disk: an archive, or a part of a file.
        """
        return None

    def keep_shards(self, number: int) -> None:
        """Be ready to read from so many shards in turns: what a process keeps of them, it keeps of that many."""

    def read(self, position: int) -> bytes:
        """The bytes of the image at `position` of `names`, still encoded.

        Raises:
            UserError: they are not there, or not all of them.
            OSError: the file system refuses them.
        """
        return self.source(position).read_bytes()


class FileListing(Listing):
    """Images that are files of their own: `paths[i]` relative to `folder` is the image `names[i]`."""

    def __init__(
        self, folder: Path, names: Sequence[str], labels: Sequence[str] | Sequence[int], num_classes: int, **options
    ) -> None:
        super().__init__(options.pop("root", folder), names, labels, num_classes, **options)
        self.folder = folder

    def source(self, position: int) -> Path:
        """The file of the image at `position`."""
        return self.folder / self.names[position]

    def location(self, position: int) -> tuple[Path, tuple[int, ...]]:
        """The file of the image at `position`, all of it."""
        return self.source(position), ()


def _index_of_labels(labels: set[str] | set[int], num_classes: int, what: str) -> dict[str, int]:
    if not all(isinstance(label, int) for label in labels):
        return class_index(labels, num_classes, what)
    outside = sorted(label for label in labels if not 0 <= label < num_classes)
    if outside:
        raise UserError(
            f"The label {outside[0]} is outside 0 to {num_classes - 1}, the model's {num_classes} classes. Set "
            "model.num_classes and a checkpoint trained on these classes, or correct the labels: they start at 0."
        )
    synsets = list(imagenet_synsets())
    names = synsets if num_classes == len(synsets) else [str(index) for index in range(num_classes)]
    return {names[label]: label for label in sorted(labels)}


@dataclass(frozen=True)
class Place:
    """Where a split may be.

    Args:
        data_dir: an existing folder.
        split: name of the split: a folder, file or pattern of files in `data_dir`.
        option: the option that names it, such as `test_split`.
    """

    data_dir: Path
    split: str
    option: str = "test_split"

    @property
    def folders(self) -> list[Path]:
        """Folders named after the split: in `data_dir`, and in Kaggle's tree."""
        candidates = [self.data_dir / parent / self.split for parent in (".", *KAGGLE_FOLDERS)]
        # links may lead to one folder by two names
        return list({folder.resolve(): folder for folder in reversed(candidates) if folder.is_dir()}.values())[::-1]

    @property
    def stems(self) -> tuple[str, ...]:
        """What the names of the split's files may start with."""
        return _ALIASES.get(self.split, (self.split,))

    @property
    def named_files(self) -> list[Path]:
        """Files that `split` names itself, by a path, braces or a pattern, sorted.

        Raises:
            UserError: one of several named by braces is missing.
        """
        texts = expand_braces(self.split)
        if any(character in self.split for character in "*?["):
            paths = [path for text in texts for path in _glob(self.data_dir, text)]
        else:
            paths = [self.data_dir / text for text in texts]
            missing = [path.name for path in paths if not path.is_file()]
            if missing and len(paths) > 1:
                raise UserError(
                    f"{len(missing)} of the {len(paths)} files of datamodule.{self.option}={self.split} are missing in "
                    f"{self.data_dir}: {listing(missing)}. Fetch them, or name those that are there."
                )
        return sorted({path for path in paths if path.is_file()})


@dataclass(frozen=True)
class Found:
    """A split in a layout.

    Args:
        format: the layout.
        root: file or folder that stands for it.
        files: the files that hold it where they are several; they lie in one folder.
    """

    format: str
    root: Path
    files: tuple[Path, ...] = ()

    def __str__(self) -> str:
        if len(self.files) > 1:
            return f"{self.format} ({self.files[0]} and {len(self.files) - 1} more)"
        return f"{self.format} ({self.files[0] if self.files else self.root})"


def _glob(folder: Path, pattern: str) -> list[Path]:
    try:
        return list(folder.glob(pattern))
    except (ValueError, NotImplementedError):  # "**" within a name; an absolute pattern
        return []


def expand_braces(text: str) -> list[str]:
    """`a-{00..12}.tar` or `{a,b}.tar` as the names that a shell makes of it; numbers keep their leading zeros.

    Raises:
        UserError: more than a million names.
    """
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
    if match is None:
        return [text]
    first, last, names = match.groups()
    if names is not None:
        parts = names.split(",")
    else:
        if abs(int(last) - int(first)) >= 10**6:
            raise UserError(f"{text} names more than a million files. Correct its numbers.")
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        step = 1 if int(first) <= int(last) else -1
        parts = [str(number).zfill(width) for number in range(int(first), int(last) + step, step)]
    return [text[: match.start()] + part + rest for part in parts for rest in expand_braces(text[match.end() :])]


def series(paths: Iterable[Path]) -> list[tuple[Path, ...]]:
    """Files whose paths differ in nothing but numbers, together and in the order of their names."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(paths):
        groups.setdefault(str(path.parent) + "/" + re.sub(r"\d+", "#", path.name), []).append(path)
    return [tuple(group) for group in groups.values()]


def check_complete(files: Sequence[Path], option: str) -> None:
    """Refuse a series of shards in which one is missing: fewer images would be counted without a word.

    The number is the one in which the names differ, from 0 or 1 on; `-of-00064` behind it tells how many there are.

    Raises:
        UserError: numbers are missing.
    """
    counted = [re.search(r"(\d+)-of-(\d+)\D*$", path.name) for path in files]
    if all(counted):
        numbers = {int(match[1]) for match in counted}
        expected = range(max(int(match[2]) for match in counted))
    else:
        columns = list(zip(*(re.findall(r"\d+", path.name) for path in files), strict=True))
        varying = [{int(number) for number in column} for column in columns if len(set(column)) > 1]
        if len(varying) != 1:
            return
        numbers = varying[0]
        expected = range(min(1, *numbers), max(numbers) + 1)
    missing = sorted(set(expected) - numbers)
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(expected)} files like {files[0]} are missing: "
            f"number {listing([f'{number:05}' for number in missing])}. Fetch them, or name the files that are meant "
            f"by datamodule.{option}, such as '{pattern(files)}'."
        )


def pattern(files: Sequence[Path]) -> str:
    """A pattern for the names of a series of files, where each number that differs is a star."""
    parts = [re.split(r"(\d+)", path.name) for path in files]
    return "".join(column[0] if len(set(column)) == 1 else "*" for column in zip(*parts, strict=True))


def files_matching(folders: Iterable[Path], matches: Callable[[str], bool]) -> list[Path]:
    """Files directly in `folders` whose names match."""
    return [folder / name for folder in folders if folder.is_dir() for name in scan_folder(folder)[1] if matches(name)]


def is_hidden(member: str) -> bool:
    """Whether a path has a hidden part, such as the `._name` that macOS puts into archives."""
    return any(part.startswith(".") for part in PurePosixPath(member).parts)
