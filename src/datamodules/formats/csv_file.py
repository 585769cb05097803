"""A CSV file of paths and labels: `val.csv` with rows such as `images/1.jpg,n01440764`."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from scatterbrain.errors import UserError
from src.datamodules.formats.files import files_matching, read_file
from src.datamodules.formats.listing import FileListing
from src.datamodules.formats.location import FoundSplit, SplitLocation

FORMAT = "csv"
SEARCHED_NAMES = "{split}.csv of paths and labels"
_PATHS = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img", "name")
_LABELS = ("label", "class", "target", "synset", "wnid", "index", "class_index", "label_index", "category")


def find(location: SplitLocation) -> list[FoundSplit]:
    """CSV files named after the split."""
    paths = [path for path in location.named_files if path.suffix.lower() == ".csv"]
    if not paths:
        names = {f"{stem}.csv" for stem in location.stems}
        paths = files_matching(dict.fromkeys([location.data_dir, *location.folders]), names.__contains__)
    return [FoundSplit(FORMAT, path) for path in paths]


class CsvListing(FileListing):
    """Images named in a CSV file, sorted by path."""

    format = FORMAT


def parse_labels(texts: Sequence[str], where: Callable[[int], str]) -> list[str] | list[int]:
    """Labels from strings: indices if all are whole numbers, names of classes otherwise.

    Args:
        texts: at least one.
        where: from a position in `texts` to its description in a message.

    Raises:
        UserError: a label is empty or a number with a sign, a point or too many digits; numbers among names.
    """
    whole = [text.isascii() and text.isdecimal() for text in texts]
    for index, text in enumerate(texts):
        number = text.replace(".", "", 1).lstrip("+-")
        if not text or (not whole[index] and number.isascii() and number.isdecimal()) or len(text) > 200:
            raise UserError(
                f"The label of {where(index)} is {text[:40]!r}. Give an index that counts from 0, or the name of a "
                "class."
            )
    if all(whole):
        return [int(text[-18:]) if not text[:-18].strip("0") else 10**18 for text in texts]
    if any(whole):
        odd = whole.index(not whole[0])
        raise UserError(
            f"The label of {where(odd)} is {texts[odd]!r}, and that of {where(0)} is {texts[0]!r}. Give either indices "
            "or names of classes throughout."
        )
    return list(texts)


def list_images(found: FoundSplit, location: SplitLocation, num_classes: int) -> CsvListing:
    """List the images named in a CSV file.

    Raises:
        UserError: the file is not valid CSV, an image does not exist or comes twice, or see `Listing`.
    """
    path = found.root
    rows, lines = _read(path)
    paths, texts = zip(*rows, strict=True)
    labels = parse_labels(texts, lambda index: f"line {lines[index]} of {path}")
    _check_files(path, paths, lines)
    folder = path.parent
    names = [PurePosixPath(os.path.relpath(name, folder) if os.path.isabs(name) else name).as_posix() for name in paths]
    order = sorted(range(len(names)), key=lambda index: names[index].split("/"))
    return CsvListing(
        folder,
        [names[index] for index in order],
        [labels[index] for index in order],
        num_classes,
        root=path,
        numbering=location.numbering,
    )


def _read(path: Path) -> tuple[list[tuple[str, str]], list[int]]:
    """Path and label of each row, and the line of each."""
    try:
        reader = csv.reader(io.StringIO(read_file(path).decode("utf-8-sig"), newline=""), strict=True)
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text in UTF-8. Save it as such.") from None
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num} cannot be read: {error}. Correct it.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Grant it to the user who runs this.") from None
    if not rows:
        raise UserError(f"{path} is empty. Give one row per image: its path relative to the file, and its label.")
    header = [cell.lower() for cell in rows[0][1]]
    columns = [next((header.index(name) for name in known if name in header), None) for known in (_PATHS, _LABELS)]
    if None in columns:  # no header
        columns, width = [0, 1], 2
    else:
        rows, width = rows[1:], len(header)
    if not rows:
        raise UserError(f"{path} has a header and no rows. Give one row per image: its path and its label.")
    for line, row in rows:
        if len(row) != width:
            raise UserError(
                f"{path}: line {line} has {len(row)} columns separated by commas, and not {width}. Give the path and "
                "the label, or a header that has 'path' and 'label' among others."
            )
        if not row[columns[0]] or "\0" in row[columns[0]]:
            raise UserError(f"{path}: line {line} has no path. Give the image's, relative to the file.")
    return [(row[columns[0]].replace("\\", "/"), row[columns[1]]) for _, row in rows], [line for line, _ in rows]


def _check_files(path: Path, names: Sequence[str], lines: Sequence[int]) -> None:
    """Check that all images exist; lists every folder once, which is fast on any file system."""
    folders: dict[Path, set[str]] = {}
    missing = []
    for name, line in zip(names, lines, strict=True):
        image = path.parent / name
        if image.parent not in folders:
            try:
                folders[image.parent] = set(os.listdir(image.parent))
            except OSError:
                folders[image.parent] = set()
        if image.name not in folders[image.parent]:
            missing.append((line, name))
    if missing:
        line, name = missing[0]
        raise UserError(
            f"{path}: {len(missing)} of {len(names)} images do not exist, the first one in line {line}: {name}. Give "
            "paths relative to the CSV file."
        )
