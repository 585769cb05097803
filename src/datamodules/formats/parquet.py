"""Parquet files as Hugging Face stores images: `data/validation-00000-of-00014.parquet` with `image.bytes` and `label`.

Parquet is read by row groups, of which each process caches one. That suits evaluation, which reads the images in
order; training in random order reads a whole row group for each image, unless `datamodule.shuffle_shards` limits the
shuffling to a few row groups at a time, which are cached then.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scatterbrain.errors import UserError
from src.datamodules.formats.classes import DEFAULT_NUMBERING, ClassNumbering
from src.datamodules.formats.csv_file import parse_labels
from src.datamodules.formats.files import check_complete, files_matching, open_file, series
from src.datamodules.formats.listing import Listing
from src.datamodules.formats.location import FoundSplit, SplitLocation
from src.utils.text import first_line

FORMAT = "parquet"
SEARCHED_NAMES = "{split}*.parquet, data/{split}*.parquet or {folder}/*.parquet"
_REMEDY = "Fetch the file again."


def find(location: SplitLocation) -> list[FoundSplit]:
    """Series of parquet files of the split."""
    named = [path for path in location.named_files if path.suffix == ".parquet"]
    if named:
        found = [tuple(named)]
    else:

        def matches(name: str) -> bool:
            return name.endswith(".parquet") and any(
                name.startswith(stem) and not name[len(stem)].isalpha() for stem in location.stems
            )

        found = series(files_matching([location.data_dir, location.data_dir / "data"], matches))
        for folder in location.folders:
            found += series(files_matching([folder], lambda name: name.endswith(".parquet")))
    return [
        FoundSplit(FORMAT, files[0].parent if len(files) > 1 else files[0], files) for files in dict.fromkeys(found)
    ]


@dataclass(frozen=True)
class ParquetImage:
    """An image in a parquet file.

    Args:
        listing: that the image belongs to.
        position: in the listing.
    """

    listing: ParquetListing
    position: int

    remedy = _REMEDY

    @property
    def name(self) -> str:
        """The name without folders."""
        return PurePosixPath(self.listing.names[self.position]).name

    def read_bytes(self) -> bytes:
        """Its content.

        Raises:
            UserError: the file is damaged or has no bytes here.
        """
        return self.listing.read(self.position)

    def __str__(self) -> str:
        return self.listing.describe(self.position)


class ParquetListing(Listing):
    """Images of parquet files, in the order of files and rows.

    Args:
        root: file or folder that holds the split.
        names: see `Listing`; likewise `labels`, `num_classes` and `numbering`.
        files: the files, sorted.
        groups: (G, 3) index of the file, index in the file and number of rows of each row group, in the order of the
            images.
    """

    format = FORMAT

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        labels: Sequence[str] | Sequence[int],
        num_classes: int,
        files: Sequence[Path],
        groups: np.ndarray,
        numbering: ClassNumbering = DEFAULT_NUMBERING,
    ) -> None:
        super().__init__(root, names, labels, num_classes, numbering=numbering)
        self._files = list(files)
        self._groups = groups
        self._ends = np.cumsum(groups[:, 2])
        self._cache_size = 1
        self._clear_cache()

    def _clear_cache(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._cache: dict[int, Any] = {}  # row group to its images, most recently read last

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_process", "_lock", "_cache")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._clear_cache()

    def source(self, position: int) -> ParquetImage:
        """The image at `position`."""
        return ParquetImage(self, position)

    def location(self, position: int) -> tuple[Path, tuple[int, ...]]:
        """The file with the image at `position`; its row group there and its row in it."""
        group, row = self._find(position)
        return self._files[self._groups[group, 0]], (int(self._groups[group, 1]), row)

    def describe(self, position: int) -> str:
        """Row and file of the image at `position`, for messages."""
        group, row = self._find(position)
        file, number, _ = self._groups[group]
        before = int(self._groups[(self._groups[:, 0] == file) & (self._groups[:, 1] < number), 2].sum())
        return f"row {before + row} of {self._files[file]}"

    def read(self, position: int) -> bytes:
        """The encoded bytes of the image at `position`; its row group is cached, see `keep_shards`.

        Raises:
            UserError: the file is damaged or has no bytes here.
        """
        group, row = self._find(position)
        if self._process != os.getpid():  # a lock that another thread held during the fork would never be released
            self._clear_cache()
        images = self._cache.get(group)  # without the lock: reading a dictionary is atomic
        if images is None:
            with self._lock:
                images = self._cache.get(group)
                if images is None:
                    while len(self._cache) >= self._cache_size:
                        del self._cache[next(iter(self._cache))]
                    file, number, _ = (int(value) for value in self._groups[group])
                    images = self._cache[group] = _read_group(self._files[file], number)
        data = images[row].as_py()
        if data is None:
            raise UserError(f"{self.describe(position)} has no image bytes, maybe only a path. {_REMEDY}")
        return data

    def shards(self) -> NDArray[np.int64]:
        """Index of the row group that holds each image."""
        return np.repeat(np.arange(len(self._groups)), self._groups[:, 2])

    def keep_shards(self, number: int) -> None:
        """Cache up to `number` row groups per process."""
        self._cache_size = number

    def _find(self, position: int) -> tuple[int, int]:
        """Row group of an image, and its row there."""
        group = int(np.searchsorted(self._ends, position, side="right"))
        return group, position - int(self._ends[group] - self._groups[group, 2])


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path} is read with PyArrow, which is not installed: pip install pyarrow") from error
    return pyarrow


def _open(pyarrow: Any, path: Path) -> Any:
    os.close(open_file(path))  # checks that it is a regular file
    return pyarrow.parquet.ParquetFile(path, pre_buffer=False)


def _read_group(path: Path, number: int) -> Any:
    """The bytes of the images of one row group."""
    pyarrow = _pyarrow(path)
    try:
        # without PyArrow's thread pool, which does not survive the fork of a worker process
        with _open(pyarrow, path) as file:
            table = file.read_row_group(number, columns=["image.bytes"], use_threads=False)
            return table.column("image").combine_chunks().field("bytes")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged in row group {number}: {first_line(error)}. {_REMEDY}") from error


def list_images(found: FoundSplit, location: SplitLocation, num_classes: int) -> ParquetListing:
    """List the images of parquet files from their columns of labels and names.

    Raises:
        UserError: PyArrow is not installed, a file is damaged or missing or has other columns, or see `Listing`.
    """
    if not location.named_files:
        check_complete(found.files, location.option)
    names, labels, groups = [], [], []
    for index, path in enumerate(found.files):
        its_labels, its_names, sizes = _columns(path)
        base = [PurePosixPath(name or "").name for name in its_names]
        if len(set(base)) < len(base) or not all(base):
            base = [f"{row:06}" for row in range(len(its_labels))]
        names += [f"{path.name}/{name}" for name in base]
        texts = [str(label) for label in its_labels]
        labels += parse_labels(texts, lambda row, path=path: f"row {row} of {path}") if texts else []
        groups += [(index, number, size) for number, size in enumerate(sizes)]
    if len({type(label) for label in labels}) > 1:
        raise UserError(f"{found.root} has indices and names among its labels. Give one of the two throughout.")
    return ParquetListing(
        found.root,
        names,
        labels,
        num_classes,
        found.files,
        np.array(groups, dtype=np.int64).reshape(-1, 3),
        location.numbering,
    )


def _check_columns(pyarrow: Any, path: Path, schema: Any) -> bool:
    """Whether images have a name; checks that the columns are those that Hugging Face writes.

    Raises:
        UserError: a column is missing, there twice or of another type.
    """
    types = pyarrow.types
    columns = {field.name: field.type for field in schema}
    image, label = columns.get("image"), columns.get("label")
    parts = {}
    if image is not None and types.is_struct(image):
        parts = {image.field(index).name: image.field(index).type for index in range(image.num_fields)}
        columns |= {f"image.{name}": part for name, part in parts.items()}
    remedy = "Give files with the columns image.bytes and label, as Hugging Face writes them."
    for name in ("image.bytes", "label"):
        if name not in columns or "bytes" not in parts:
            raise UserError(f"{path} has no column '{name}'; it has {', '.join(list(columns)[:8])}. {remedy}")
    twice = [name for name in ("image", "label") if schema.names.count(name) > 1]
    if twice:
        raise UserError(f"{path} has {schema.names.count(twice[0])} columns '{twice[0]}'. {remedy}")
    values = label.value_type if types.is_dictionary(label) else label
    allowed = {
        "image.bytes": types.is_binary(parts["bytes"]) or types.is_large_binary(parts["bytes"]),
        # values of other types are named by their row
        "label": not types.is_nested(values) and not types.is_temporal(values),
    }
    for name, right in allowed.items():
        if not right:
            kind = "bytes" if name == "image.bytes" else "whole numbers or text"
            raise UserError(f"{path}: the column '{name}' holds {columns[name]} in place of {kind}. {remedy}")
    return "path" in parts and (types.is_string(parts["path"]) or types.is_large_string(parts["path"]))


def _columns(path: Path) -> tuple[list[int | str], list[str | None], list[int]]:
    """Labels, names of the images where there are any, and rows of each row group."""
    pyarrow = _pyarrow(path)
    try:
        with _open(pyarrow, path) as file:
            named = _check_columns(pyarrow, path, file.schema_arrow)
            wanted = ["label"] + (["image.path"] if named else [])
            table = file.read(columns=wanted, use_threads=False)
            labels = table.column("label").to_pylist()
            names = [None] * len(labels)
            if len(wanted) > 1:
                names = [image and image["path"] for image in table.column("image").to_pylist()]
            sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged or no parquet file: {first_line(error)}. {_REMEDY}") from error
    if sum(sizes) != len(labels):
        raise UserError(f"{path} is damaged: {len(labels)} labels of {sum(sizes)} rows. {_REMEDY}")
    for row, label in enumerate(labels):
        if not isinstance(label, int | str) or isinstance(label, bool):
            raise UserError(
                f"row {row} of {path} has the label {label!r}, not an index or the name of a class. {_REMEDY}"
            )
    return labels, names, sizes
