"""Atomic writes, JSON and checksums of files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from scatterbrain.errors import UserError

CHUNK_BYTES = 1 << 20
# names of the temporary files of `atomic_write`
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")


@contextlib.contextmanager
def atomic_write(
    path: str | os.PathLike[str],
    mode: str = "w",
    *,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
) -> Iterator[IO[Any]]:
    """Write a file atomically: readers see the old file or the complete new one.

    Content goes to a temporary file in the same folder, is flushed to the disk, and then renamed to `path`. If the
    block raises, the temporary file is removed and a file at `path` is unchanged. The new file gets the permissions of
    an ordinary new file (umask). A symbolic link at `path` is replaced, not followed.

    Args:
        path: the file; its folder must exist.
        mode: `"w"` for text (the default) or `"wb"` for bytes.
        encoding: of text, UTF-8 by default.
        errors: of text, as in `open`; `"surrogateescape"` for names of files that are not UTF-8.
        newline: of text, as in `open`; `""` for the csv module.

    Yields:
        The open file.

    Raises:
        UserError: the folder does not exist or cannot be written to, `path` is a folder, or the disk is full.
        ValueError: another mode, or a text option with `"wb"`.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"atomic_write: mode must be 'w' or 'wb', got {mode!r}")
    if mode == "wb" and (encoding, errors, newline) != (None, None, None):
        raise ValueError("atomic_write: encoding, errors and newline are for text, and mode is 'wb'")
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, but a file is to be written there. Move it or choose another name.")
    # The leading dot and the suffix hide the temporary file from listings and globs such as *.json.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        # Not tempfile.mkstemp, whose files only their owner may read, also after the rename.
        descriptor = os.open(temporary, flags, 0o666)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}). Check that its folder exists and that you may write to it."
        ) from error
    if mode == "w":
        encoding = encoding or "utf-8"
    try:
        with os.fdopen(descriptor, mode, encoding=encoding, errors=errors, newline=newline) as file:
            yield file
            file.flush()
            # Without it a crash of the machine could leave an empty file under the new name.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # an interrupt must not leave the temporary file behind either
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.strerror is not None and error.filename in (None, str(temporary)):
            raise UserError(f"{path} cannot be written ({error.strerror}). Check the disk and its quota.") from error
        raise


def remove_temporary_files(folder: str | os.PathLike[str]) -> None:
    """Remove what `atomic_write` left in a folder and its subfolders where its process was killed."""
    for path in Path(folder).rglob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def name_for_json(path: str | os.PathLike[str]) -> str:
    r"""A file's name as text for JSON: bytes that are not UTF-8 are escaped as \x.."""
    return os.fsencode(path).decode(errors="backslashreplace")


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a JSON object by `atomic_write`.

    Raises:
        UserError: see `atomic_write`.
        ValueError: a number is NaN or infinite, which JSON does not allow.
    """
    with atomic_write(path) as file:
        json.dump(content, file, indent=2, allow_nan=False, ensure_ascii=False)
        file.write("\n")


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, read in chunks.

    Args:
        path: the file.

    Returns:
        64 lower-case hexadecimal digits.

    Raises:
        UserError: the file does not exist or cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise UserError(
            f"{os.fspath(path)} cannot be read ({error.strerror}). Check the path and its permissions."
        ) from error
    return digest.hexdigest()
