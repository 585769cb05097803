"""Photographs written in each data format that an evaluation reads."""

from __future__ import annotations

import csv
import io
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from scatterbrain.errors import UserError
from src.datamodules.formats import scan_folder
from src.datamodules.formats.class_folders import ClassFolders
from src.datamodules.sampling import spread
from src.utils.text import abbreviate

REFERENCE = "class_folders"
NUM_SHARDS = 4
ROW_GROUP_SIZE = 16  # so few that a shard of the demo has several groups


@dataclass(frozen=True)
class Photograph:
    """An image as it is stored: the file's name and content, its class folder, and the index of its class."""

    name: str
    data: bytes
    folder: str
    label: int


def stem(path: str) -> str:
    """Name of an image in every format: that of its file without folder and suffix."""
    return PurePosixPath(path).stem


def photographs_of(root: Path, num_classes: int, num_damaged: int = 0) -> list[Photograph]:
    """Every image of the class folders in `root`, with `num_damaged` of them cut to a third, spread evenly.

    Raises:
        UserError: no such folder, no images in a class folder, names that not every format holds, too many to damage.
    """
    found = ClassFolders(root, num_classes)
    empty = set(scan_folder(root)[0]) - {name.split("/")[0] for name in found.names}
    if empty:
        raise UserError(
            f"{root}: class folders without images, which other formats lack: {abbreviate(empty)}. Remove them."
        )
    times = Counter(map(stem, found.names))
    odd = [name for name in found.names if times[stem(name)] > 1 or "." in stem(name) or not name.isprintable()]
    if odd:
        raise UserError(
            f"{root}: not every format holds names that are the same without folder and suffix, have a second dot or "
            f"cannot be printed: {abbreviate(map(ascii, odd))}. Rename the files."
        )
    if num_damaged >= len(found):
        raise UserError(f"--damage {num_damaged}: of {len(found)} images, one at least has to be left. Give fewer.")
    damaged = set(spread(len(found), num_damaged))
    images = []
    for position, (name, label) in enumerate(zip(found.names, found.targets, strict=True)):
        try:
            data = found.read(position)
        except OSError as error:
            raise UserError(f"{root / name} cannot be read ({error.strerror}). Remove or replace it.") from error
        folder, file = name.split("/")
        images.append(Photograph(file, data[: len(data) // 3] if position in damaged else data, folder, label))
    return images


def write_class_folders(folder: Path, images: Sequence[Photograph]) -> None:
    """Write one file for each image, in the folder of its class."""
    for image in images:
        path = folder / "val" / image.folder / image.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image.data)


def write_csv(folder: Path, images: Sequence[Photograph]) -> None:
    """Write all files in one folder, and a table of paths and labels."""
    (folder / "images").mkdir()
    for image in images:
        (folder / "images" / image.name).write_bytes(image.data)
    with open(folder / "val.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *((f"images/{image.name}", image.label) for image in images)])


def write_tar(folder: Path, images: Sequence[Photograph]) -> None:
    """Write one archive of class folders."""
    write_archive(folder / "val.tar", ((f"{image.folder}/{image.name}", image.data) for image in images))


def write_webdataset(folder: Path, images: Sequence[Photograph]) -> None:
    """Write shards of pairs of files, image and label."""
    for number, shard in enumerate(shards(images)):
        files = []
        for image in shard:
            name = stem(image.name)
            files += [(f"{name}.jpg", image.data), (f"{name}.cls", str(image.label).encode())]
        write_archive(folder / f"val-{number:02}.tar", files)


def write_parquet(folder: Path, images: Sequence[Photograph]) -> None:
    """Write shards of tables with the bytes of the images."""
    import pyarrow
    import pyarrow.parquet

    (folder / "data").mkdir()
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    for number, shard in enumerate(shards(images)):
        column = pyarrow.array([{"bytes": image.data, "path": image.name} for image in shard], struct)
        table = pyarrow.table({"image": column, "label": [image.label for image in shard]})
        path = folder / "data" / f"validation-{number:05}-of-{len(shards(images)):05}.parquet"
        pyarrow.parquet.write_table(table, path, row_group_size=ROW_GROUP_SIZE)


WRITERS: dict[str, Callable[[Path, Sequence[Photograph]], None]] = {
    REFERENCE: write_class_folders,
    "csv": write_csv,
    "tar": write_tar,
    "webdataset": write_webdataset,
    "parquet": write_parquet,
}


def write_archive(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write a tar file of pairs of name and content."""
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def shards(images: Sequence[Photograph]) -> list[Sequence[Photograph]]:
    """The images in turns, as published shards are mixed, too."""
    return [images[start::NUM_SHARDS] for start in range(min(NUM_SHARDS, len(images)))]
