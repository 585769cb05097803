"""Names of files: folders scanned, braces expanded, series of numbered files."""

from __future__ import annotations

import errno
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

from scatterbrain.errors import UserError
from src.utils.text import abbreviate

# What operating systems and NAS put beside files: never a class, and never an image. In lower case.
_SYSTEM_FOLDERS = (
    "@eadir",
    "__macosx",
    "lost+found",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "system volume information",
)
_NO_IMAGE = re.compile(r"(eh)?thumbs\.db|desktop\.ini|icon\r|(readme|licen[sc]e)(\.(txt|md|rst|html?))?", re.IGNORECASE)
# Without O_NONBLOCK, opening a FIFO would wait; without O_NOCTTY, a terminal could take control of the process.
_READ_ONLY = os.O_RDONLY | sum(getattr(os, flag, 0) for flag in ("O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY", "O_BINARY"))


def is_system_folder(name: str) -> bool:
    """Whether a folder is known to hold neither a class nor images, such as `lost+found`."""
    return name.lower() in _SYSTEM_FOLDERS


def is_no_image(name: str) -> bool:
    """Whether a file is known not to be an image, such as `Thumbs.db` or `README.txt`."""
    return _NO_IMAGE.fullmatch(name) is not None


def scan_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the folders and of the files directly in `folder`, links followed.

    Hidden files and folders, and system folders such as `lost+found`, are left out.

    A broken or circular link, a FIFO and a device count as files, so that reading them raises an error: skipped, they
    would silently change the results.

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
                    (folders if _is_folder(entry) else files).append(entry.name)
    except PermissionError:
        raise UserError(f"{folder} cannot be read: permission denied. Grant it to the user who runs this.") from None
    return sorted(name for name in folders if not is_system_folder(name)), sorted(files)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circular link
        return False


def open_file(path: str | os.PathLike[str]) -> int:
    """Descriptor of a regular file, open for reading; the caller closes it.

    Reading a FIFO waits for a writer, and reading a device may never end.

    Raises:
        OSError: it cannot be opened or is no regular file.
    """
    descriptor = os.open(path, _READ_ONLY)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise OSError(errno.ENXIO, "not a regular file", os.fspath(path))


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: see `open_file`.
    """
    with os.fdopen(open_file(path), "rb") as file:
        return file.read()


def expand_braces(text: str) -> list[str]:
    """`a-{00..12}.tar` or `{a,b}.tar` expanded as a shell does; numbers keep their leading zeros.

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
    """Groups of files whose paths differ only in numbers, each sorted by name."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(paths):
        groups.setdefault(str(path.parent) + "/" + re.sub(r"\d+", "#", path.name), []).append(path)
    return [tuple(group) for group in groups.values()]


def check_complete(files: Sequence[Path], option: str) -> None:
    """Check that no shard of a series is missing, which would silently evaluate fewer images.

    The shard's number is the one that differs between the names and starts at 0 or 1; a suffix such as `-of-00064`
    gives the number of shards.

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
            f"number {abbreviate([f'{number:05}' for number in missing])}. Fetch them, or name the files "
            f"by datamodule.{option}, such as '{pattern(files)}'."
        )


def pattern(files: Sequence[Path]) -> str:
    """A glob pattern for the names of a series of files: each number that differs becomes a star."""
    parts = [re.split(r"(\d+)", path.name) for path in files]
    return "".join(column[0] if len(set(column)) == 1 else "*" for column in zip(*parts, strict=True))


def files_matching(folders: Iterable[Path], matches: Callable[[str], bool]) -> list[Path]:
    """Files directly in `folders` whose names match."""
    return [folder / name for folder in folders if folder.is_dir() for name in scan_folder(folder)[1] if matches(name)]


def unpack_command(archive: Path, folder: Path) -> str | None:
    """The command that unpacks a compressed archive into a folder; None if its name is not that of one."""
    name = archive.name.lower()
    source, target = shlex.quote(str(archive)), shlex.quote(str(folder))
    if name.endswith(".zip"):
        return f"unzip {source} -d {target}"
    if re.search(r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst))$", name):
        return f"tar -xf {source} -C {target}"
    return f"7z x {source} -o{target}" if name.endswith((".7z", ".rar")) else None


def is_hidden(member: str) -> bool:
    """Whether a path has a hidden part, such as the `._name` that macOS puts into archives."""
    return any(part.startswith(".") for part in PurePosixPath(member).parts)
