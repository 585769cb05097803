"""Tar archives read in place: the headers once, for the offsets of the members, then bytes at these offsets."""

from __future__ import annotations

import functools
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from scatterbrain.errors import UserError
from src.datamodules.formats.files import is_hidden, open_file

_BLOCK = tarfile.BLOCKSIZE
_MAX_OPEN = 32  # file descriptors per process
_REMEDY = "Fetch or make the archive again."
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class _Descriptor:
    """An open file, closed with its last reference, so that eviction from the cache cannot interrupt a read."""

    def __init__(self, path: Path) -> None:
        self.number = open_file(path)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@functools.lru_cache(maxsize=_MAX_OPEN)
def _descriptor(path: Path, process: int) -> _Descriptor:
    return _Descriptor(path)


def read_range(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset` on.

    Every process opens the file for itself, also after a fork, and uses `pread`, so any number of threads may read.

    Raises:
        UserError: the file has become shorter since it was listed.
        OSError: it cannot be read.
    """
    descriptor = _descriptor(path, os.getpid())
    parts, missing = [], size
    while missing:
        part = os.pread(descriptor.number, missing, offset + size - missing)
        if not part:
            raise UserError(f"{path} has become shorter since its images were listed. {_REMEDY}")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in an archive.

    Args:
        archive: the archive's file.
        path: in the archive.
        offset: of its first byte in the archive's file.
        size: its bytes.
    """

    archive: Path
    path: str
    offset: int
    size: int

    remedy = _REMEDY

    @property
    def name(self) -> str:
        """The name without folders."""
        return PurePosixPath(self.path).name

    def read_bytes(self) -> bytes:
        """Its content.

        Raises:
            UserError: see `read_range`.
        """
        return read_range(self.archive, self.offset, self.size)

    def __str__(self) -> str:
        return f"{self.path} in {self.archive}"


def members(archive: Path, within: TarMember | None = None, limit: int | None = None) -> Iterator[TarMember]:
    """The files of an archive in their order, folders and hidden files left out.

    An archive that does not end as it should is an error: images of it would be missing.

    Args:
        archive: an uncompressed tar file.
        within: read the archive that is this member of it instead.
        limit: look at so many members only, whatever follows them.

    Raises:
        UserError: it is damaged, incomplete, compressed or none, or has a member that cannot be read in place.
    """
    named = archive if within is None else within
    try:
        begin, end = (0, archive.stat().st_size) if within is None else (within.offset, within.offset + within.size)
        with os.fdopen(open_file(archive), "rb") as file:
            file.seek(begin)
            start = file.read(8)
            for magic, program in _COMPRESSED.items():
                if start.startswith(magic):
                    raise UserError(
                        f"{named} is compressed with {program}, so that images cannot be read from it in any order. "
                        "Decompress it."
                    )
            file.seek(begin)
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - it owns nothing but `file`
            seen = 0
            while (limit is None or seen < limit) and (member := tar.next()) is not None:
                tar.members.clear()  # or a million of them would fill the memory
                seen += 1
                if member.isdir() or is_hidden(member.name):
                    continue
                if not member.isreg() or member.issparse():
                    raise UserError(
                        f"{member.name} in {named} is a link, a sparse or a special file, which cannot be read in "
                        "place. Make the archive again with `tar --dereference --hard-dereference`."
                    )
                path = PurePosixPath(member.name).as_posix().lstrip("/")
                yield TarMember(archive, path, member.offset_data, member.size)
            if limit is None:
                _check_end(file, tar.offset, end, named)
    except FileNotFoundError as error:
        raise UserError(f"{archive} does not exist. {_REMEDY}") from error
    except tarfile.TarError as error:
        raise UserError(f"{named} is damaged or no tar archive: {error}. {_REMEDY}") from error
    except OSError as error:
        raise UserError(f"{archive} cannot be read: {error.strerror or error}. {_REMEDY}") from error
    except (ValueError, IndexError, OverflowError) as error:  # from invalid extended headers
        if isinstance(error, UserError):
            raise
        raise UserError(f"{named} is damaged: {error}. {_REMEDY}") from error


def _check_end(file, offset: int, end: int, named: Path | TarMember) -> None:
    """Check that only zeros follow the last member, which is where tarfile silently stops."""
    file.seek(offset)
    if end - offset < _BLOCK:
        # inside another archive, the last member may even overlap what follows
        raise UserError(f"{named} is incomplete: its end-of-archive marker is missing. {_REMEDY}")
    while offset < end:
        part = file.read(min(1 << 16, end - offset))
        if not part:
            raise UserError(f"{named} is incomplete: it ends too early. {_REMEDY}")
        if part.count(0) < len(part):
            raise UserError(f"{named} is damaged: byte {offset} is neither a member nor the end. {_REMEDY}")
        offset += len(part)
