"""Classes of images that are not in class folders: from their names, the development kit, or Kaggle's solution.

The development kit's ground truth has one number per image, an ILSVRC2012_ID. The numbers are not in sorted order
(1 is n02119789, a kit fox, the 279th synset in sorted order): `data/meta.mat` maps them to synsets.
"""

from __future__ import annotations

import csv
import io
import re
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from scatterbrain.errors import UserError
from src.datamodules.formats.classes import imagenet_synsets
from src.datamodules.formats.files import read_file
from src.datamodules.formats.location import KAGGLE_FOLDERS, SplitLocation
from src.datamodules.formats.matlab import MatlabError, read_structure
from src.utils.text import abbreviate

DEVKIT = "ILSVRC2012_devkit_t12"
KAGGLE_SOLUTION = "LOC_val_solution.csv"
SOURCES = f"{DEVKIT} (extracted or .tar.gz) or {KAGGLE_SOLUTION}"
_META, _TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
_VALIDATION_IMAGES = 50_000
_MAX_BYTES = 1 << 26  # of a file in the kit; the largest one has 0.4 MB

_VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})\.jpe?g", re.IGNORECASE)
# n01440764_10026.JPEG, or Hugging Face's ILSVRC2012_val_00000293_n01440764.JPEG
_SYNSET = re.compile(r"(?:(n\d{8})_\d+|.*_(n\d{8}))\.\w+")


def is_validation_image(name: str) -> bool:
    """Whether a name is that of an ImageNet validation image, which does not contain its class."""
    return _VALIDATION.fullmatch(PurePosixPath(name).name) is not None


def synset_in_name(name: str) -> str | None:
    """The synset in the name of an image, as in ImageNet's training set; None without one."""
    match = _SYNSET.fullmatch(PurePosixPath(name).name)
    synset = match and (match[1] or match[2])
    return synset if synset in imagenet_synsets() else None


def label_folders(location: SplitLocation, folder: Path | None = None) -> list[Path]:
    """Folders that may hold labels: the split's folder and its parents up to the data folder, Kaggle's included."""
    folders = [location.data_dir]
    for start in (folder, *location.folders):
        if start is not None:
            folders += [start, start.parent]
            folders += [parent for parent in start.parents if parent.is_relative_to(location.data_dir)]
    text = location.data_dir.as_posix()
    for tree in KAGGLE_FOLDERS:
        if text.endswith("/" + tree):
            folders.append(location.data_dir.parents[tree.count("/")])
    return list(dict.fromkeys(folders))


def label_sources(folders: Iterable[Path]) -> list[Path]:
    """Development kits and solutions in `folders`; an archive only if it is not extracted beside it."""
    sources = []
    for folder in folders:
        if (folder / DEVKIT).is_dir():
            sources.append(folder / DEVKIT)
        elif (folder / f"{DEVKIT}.tar.gz").is_file():
            sources.append(folder / f"{DEVKIT}.tar.gz")
        if (folder / KAGGLE_SOLUTION).is_file():
            sources.append(folder / KAGGLE_SOLUTION)
    return sources


def image_labels(names: Sequence[str], folders: Sequence[Path], where: Path) -> list[str]:
    """The class of each image, from its name, its folder or, for validation images, the label files in `folders`.

    Args:
        names: file names of the images, or paths in an archive.
        folders: that may hold label files.
        where: file or folder that holds the images, for messages.

    Returns:
        Synsets, or names of folders.

    Raises:
        UserError: no class in names or folders; labels are missing, damaged, or contradict each other.
    """
    parents = [PurePosixPath(name).parent.name for name in names]
    if all(parent in imagenet_synsets() for parent in parents):
        return parents
    synsets = [synset_in_name(name) for name in names]
    if all(synsets):
        return synsets
    if all(is_validation_image(name) for name in names):
        return _validation_labels(names, folders, where)
    if all(parents):
        return parents
    odd = [
        name
        for name, synset, parent in zip(names, synsets, parents, strict=True)
        if not synset and not parent and not is_validation_image(name)
    ] or names
    raise UserError(
        f"{where} does not contain the classes of its images, such as {abbreviate(odd, 3)}. Give images in "
        "one folder per class, ImageNet's own file names, or a CSV file of paths and labels."
    )


def _validation_labels(names: Sequence[str], folders: Sequence[Path], where: Path) -> list[str]:
    numbers = [int(_VALIDATION.fullmatch(PurePosixPath(name).name)[1]) for name in names]
    sources = label_sources(folders)
    if not sources:
        raise UserError(
            f"{where} holds {len(names)} validation images, whose names do not contain their classes, and no "
            f"labels. Put {SOURCES} into {folders[0]}."
        )
    labels = []
    for source in sources:
        known = read_labels(source)
        unknown = [name for name, number in zip(names, numbers, strict=True) if number not in known]
        if unknown:
            raise UserError(
                f"{source} has no labels for {len(unknown)} images of {where}: {abbreviate(unknown, 3)}. "
                "Fetch the labels again, or remove the images."
            )
        labels.append([known[number] for number in numbers])
        different = [name for name, a, b in zip(names, labels[0], labels[-1], strict=True) if a != b]
        if different:
            raise UserError(
                f"{sources[0]} and {source} differ in the labels of {len(different)} images: "
                f"{abbreviate(different, 3)}. Remove the one that is wrong."
            )
    return labels[0]


def read_labels(source: Path) -> dict[int, str]:
    """Number of each validation image to its synset.

    Args:
        source: a development kit, extracted or not, or Kaggle's solution.

    Raises:
        UserError: it is damaged, or not such a file.
    """
    if source.name == KAGGLE_SOLUTION:
        return _read_solution(source)
    meta, truth = (_read_kit(source, name) for name in (_META, _TRUTH))
    try:
        rows = read_structure(meta, "synsets", ("ILSVRC2012_ID", "WNID"))
        synsets = {int(number): synset for number, synset in rows if number is not None}
    except (MatlabError, TypeError) as error:
        raise UserError(f"{source}: {_META} cannot be read: {error}. Fetch the development kit again.") from error
    # from 1,001 on: the ancestors of the thousand classes
    classes = {synsets.get(number) for number in range(1, 1001)}
    if classes != set(imagenet_synsets()):
        raise UserError(
            f"{source}: {_META} does not number the 1,000 classes of ImageNet-1k. Fetch the development kit again."
        )
    labels = {}
    for index, word in enumerate(truth.decode("latin-1").split(), start=1):
        if not (re.fullmatch(r"\d{1,4}", word, re.ASCII) and 1 <= int(word) <= 1000):
            raise UserError(
                f"{source}: line {index} of {_TRUTH} is {word[:20]!r}, not a number from 1 to 1000. Fetch the "
                "development kit again."
            )
        labels[index] = synsets[int(word)]
    if len(labels) != _VALIDATION_IMAGES:  # a missing line would shift all later labels
        raise UserError(
            f"{source}: {_TRUTH} has {len(labels)} labels, and not {_VALIDATION_IMAGES:,}. Fetch the development kit "
            "again."
        )
    return labels


def _read_kit(source: Path, name: str) -> bytes:
    """A file of the kit, from its folder or its archive."""
    try:
        if source.is_dir():
            # it may have been extracted into a folder of the same name
            for folder in (source, source / DEVKIT):
                if (folder / name).is_file():
                    return read_file(folder / name)
        else:
            with tarfile.open(source) as archive:
                for member in archive:
                    if member.isfile() and f"/{member.name}".endswith(f"/{name}") and member.size <= _MAX_BYTES:
                        return archive.extractfile(member).read()
    # a damaged archive raises errors of zlib, gzip or tarfile, which mean the same to the user
    except (OSError, EOFError, tarfile.TarError, zlib.error, ValueError) as error:
        raise UserError(f"{source} cannot be read: {error}. Fetch the development kit again.") from error
    raise UserError(f"{source} has no {name}. Fetch the development kit again.")


def _read_solution(source: Path) -> dict[int, str]:
    try:
        text = read_file(source).decode("utf-8-sig")
        rows = list(csv.reader(io.StringIO(text)))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{source} cannot be read: {error}. Fetch it again.") from error
    labels: dict[int, str] = {}
    for line, row in enumerate(rows, start=1):
        if not row or (line == 1 and row[0].strip() == "ImageId"):
            continue
        match = re.fullmatch(r"ILSVRC2012_val_(\d{8})", row[0].strip())
        synset = (row[1].split() if len(row) > 1 else []) or [""]
        if match is None or synset[0] not in imagenet_synsets():
            raise UserError(
                f"{source}: row {line} is not an image and its synset, such as ILSVRC2012_val_00000293,n01440764 1 2 "
                "3 4. Fetch it again."
            )
        if labels.setdefault(int(match[1]), synset[0]) != synset[0]:
            raise UserError(f"{source}: row {line} contradicts an earlier one of {row[0]}. Fetch it again.")
    return labels
