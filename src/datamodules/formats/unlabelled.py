"""Images without classes in a folder, such as one's own photographs: `photographs/me.jpg`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from scatterbrain.errors import UserError
from src.datamodules.formats.files import scan_folder
from src.datamodules.formats.listing import FileListing
from src.utils.text import abbreviate

logger = logging.getLogger(__name__)

SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)


def is_image(name: str | os.PathLike[str]) -> bool:
    """Whether a file has the suffix of an image format that Pillow reads."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


class UnlabelledImages(FileListing):
    """Image files without classes: all targets are `NO_LABEL`."""

    format = "unlabelled"

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        super().__init__(folder, names, None, num_classes=0)


def list_unlabelled(folder: str | os.PathLike[str]) -> UnlabelledImages:
    """The files with the suffix of an image in a folder and in its subfolders, in sorted order of their names.

    Other files are left out with a warning. Links are followed.

    Args:
        folder: an existing folder.

    Raises:
        UserError: it holds no images, or a folder cannot be read.
    """
    folder = Path(folder)
    files = list(_walk(folder, "", (folder.resolve(),)))
    names = [name for name in files if is_image(name)]
    if not names:
        found = f"among its {len(files)} files" if files else "and no files at all"
        raise UserError(f"{folder} holds no images {found}. Their names have to end in {', '.join(SUFFIXES)}.")
    if len(names) < len(files):
        others = [name for name in files if not is_image(name)]
        logger.warning("%s: files that are not named as images are left out: %s", folder, abbreviate(others))
    return UnlabelledImages(folder, names)


def _walk(folder: Path, prefix: str, above: tuple[Path, ...]) -> Iterator[str]:
    """Names of the files in and below a folder; a link to one of the folders `above` is not followed."""
    folders, files = scan_folder(folder)
    yield from (prefix + name for name in files)
    for name in folders:
        target = (folder / name).resolve()
        if target not in above:
            yield from _walk(folder / name, f"{prefix}{name}/", (*above, target))
