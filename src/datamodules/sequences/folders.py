"""Files in one folder per class, of a data set that comes in a part for training and one for the test."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console

from scatterbrain.errors import UserError, is_number
from src.datamodules.formats.files import is_no_image, read_file, scan_folder
from src.datamodules.sequences.cache import read_cached
from src.utils.machine import usable_cpus
from src.utils.progress import progress_display

logger = logging.getLogger(__name__)
T = TypeVar("T")
# Files by part (train or test) and class.
Files = Mapping[tuple[str, str], list[Path]]


def read_folders(
    source: str,
    what: str,
    data_dir: str | os.PathLike[str] | None,
    cache: str | os.PathLike[str] | None,
    list_files: Callable[[str | os.PathLike[str]], Files],
    read: Callable[[Files], dict[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """The tensors that `read` gives for the files of a folder, or a cache of them, see `read_cached`.

    A cache is refused if the names or sizes of the files differ from those it was made of.

    Args:
        source: name of the data source.
        what: the files hold, for the messages.
        data_dir: the folder; None where `cache` exists.
        cache: file with all tensors; None for none.
        list_files: from the folder to its files.
        read: from the files to the tensors.

    Raises:
        UserError: there is neither a folder nor a cache, from `list_files` and `read`, or see `read_cached`.
    """
    if data_dir is None and cache is None:
        raise UserError(
            f"There is nothing to read the {what} from. Give the folder with train/ and test/ by "
            "datamodule.read.data_dir, or a file by datamodule.read.cache."
        )
    if data_dir is None:
        return read_cached(cache, source, dict, None)
    files = list_files(data_dir)
    return read_cached(cache, source, lambda: read(files), None if cache is None else _digest(files))


def _digest(files: Files) -> str:
    """SHA-256 of names and sizes."""
    digest = hashlib.sha256()
    for (part, name), paths in files.items():
        for path in paths:
            try:
                size = os.stat(path).st_size
            except OSError:  # which reading explains
                size = None
            digest.update(os.fsencode(f"{part}/{name}/{path.name}") + f"\0{size}\0".encode())
    return digest.hexdigest()


def find_root(data_dir: str | os.PathLike[str], inner: str | None, parts: Iterable[str], layout: str) -> Path:
    """The folder that holds the folders `parts`: `data_dir`, or the folder `inner` in it.

    Args:
        data_dir: the user's option; `~` is expanded.
        inner: what the folder is called in the published archive; None for no such name.
        parts: folders that must be there.
        layout: of the folders, for the message.

    Raises:
        UserError: a folder is missing.
    """
    root = Path(str(data_dir)).expanduser()  # a name such as 3 comes as a number
    if inner is not None and (root / inner).is_dir():
        root = root / inner
    if not root.is_dir():
        fault = "is a file, not a folder" if root.exists() else "does not exist"
        raise UserError(f"{root} {fault}. Give the folder with {layout} by datamodule.read.data_dir.")
    for part in parts:
        if not (root / part).is_dir():
            raise UserError(f"{root} has no folder {part}/. Give the folder with {layout} by datamodule.read.data_dir.")
    return root


def list_class(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files of a class, sorted by name.

    Raises:
        UserError: the folder is missing, or holds none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: a class has no folder. Complete the data.")
    names = [name for name in scan_folder(folder)[1] if name.lower().endswith(suffixes) and not is_no_image(name)]
    if not names:
        raise UserError(f"{folder} holds no {' or '.join(suffixes)} files: the class is empty. Complete the data.")
    return [folder / name for name in names]


def read_all(paths: list[Path], read: Callable[[Path], T], what: str) -> list[T]:
    """What `read` gives for each file, read by several threads, with a progress bar.

    Raises:
        UserError: from `read`, of the first file in order that fails.
    """
    results = []
    with progress_display(Console(stderr=True)) as progress, ThreadPoolExecutor(min(8, usable_cpus())) as pool:
        task = progress.add_task(f"reading {what}", total=len(paths))
        try:
            for number, result in enumerate(pool.map(read, paths), start=1):
                results.append(result)
                if number % 100 == 0 or number == len(paths):
                    progress.update(task, completed=number)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def read_text(path: Path) -> bytes:
    """The bytes of a text.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return read_file(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Replace the file or its permissions.") from error


def warn_if_incomplete(root: Path | str, found: Mapping[str, int], complete: Mapping[str, int]) -> None:
    """Log a warning where a part has another size than that of the published data set."""
    for part, number in complete.items():
        if found[part] != number:
            logger.warning(
                "%s holds %s for the %s part where the published data set has %s: results are not comparable.",
                root,
                f"{found[part]:,}",
                part,
                f"{number:,}",
            )


def check_holdout(holdout: float) -> None:
    """Check the part of the training data that is held out for validation.

    Raises:
        UserError: it is not between 0 and 1.
    """
    if not is_number(holdout) or not 0 < holdout < 1:
        raise UserError(f"datamodule.read.holdout={holdout} is not valid. Give a number above 0 and below 1.")
