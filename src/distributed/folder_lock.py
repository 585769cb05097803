"""The output folder of a run, which one run at a time may use."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from scatterbrain.errors import UserError
from src.distributed.launcher import find_launch
from src.utils.cli import command_line
from src.utils.files import remove_temporary_files

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# of this process, which the operating system does not protect from itself
_held: set[Path] = set()


class FolderInUseError(UserError):
    """Another run holds the output folder."""


@contextmanager
def locked_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a run's output folder, which is created if need be; rank 0 holds it for all processes of its run.

    Temporary files that a killed run left there are removed. The lock ends with the process, however that ends: a
    killed run leaves nothing that would keep others out.

    Args:
        folder: of the results, or of a multirun.

    Raises:
        FolderInUseError: another run uses the folder.
        UserError: it cannot be written to.
    """
    launch = find_launch()
    if launch is not None and launch.rank > 0:
        yield
        return
    path = Path(folder).resolve() / LOCK_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to ({error.strerror}). Check its permissions, or choose another hydra.run.dir."
        ) from error
    try:
        holder = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().astimezone().isoformat(" ", "seconds"),
            "command": command_line(),
        }
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(holder).encode())
        remove_temporary_files(path.parent)
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock ends: see `_acquire`
        _held.discard(path)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """Descriptor of the lock file, locked.

    Raises:
        FolderInUseError: another run holds it.
        OSError: it cannot be opened.
    """
    if path in _held:  # closing any descriptor of the file would end this process's lock
        raise FolderInUseError(_in_use(path, f"process {os.getpid()}, this one"))
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if fcntl is not None:
            try:
                # not flock, which the data loader's workers would inherit and keep after a kill of this process
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                content = os.read(descriptor, 10_000)
                os.close(descriptor)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise FolderInUseError(_in_use(path, _describe_holder(content))) from None
                logger.warning("%s is on a file system without locks: start no second run in it.", path.parent)
                descriptor = os.open(path, os.O_RDWR)
        try:
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                _held.add(path)
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # the former holder removed this file in the meantime


def _in_use(path: Path, holder: str) -> str:
    return f"{path.parent} is in use by another run: {holder}. Wait for it or stop it, or choose another hydra.run.dir."


def _describe_holder(content: bytes) -> str:
    try:
        holder = json.loads(content)
        return "process {process} on {host} since {since}, {command}".format_map(holder)
    except (ValueError, KeyError, TypeError):  # it is about to write this
        return "it has just started"
