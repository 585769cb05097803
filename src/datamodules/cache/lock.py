"""A lock between processes."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from scatterbrain.errors import UserError

POLL_SECONDS = 0.2


@contextlib.contextmanager
def file_lock(path: Path, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold an exclusive lock; the system releases it if the process is killed.

    Args:
        path: the lock file, created here and removed at the end.
        on_wait: called once if another process holds the lock, with the name of that process.

    Raises:
        UserError: the system has no POSIX locks.
        OSError: the file cannot be created, or its file system has no locks.
    """
    try:
        import fcntl
    except ImportError as error:
        raise UserError("datamodule.cache_dir needs a system with POSIX locks. Leave it out.") from error
    waiting = False
    while True:
        file = open(path, "a+b")  # noqa: SIM115 - closed below
        try:
            # not flock: worker processes would inherit the lock, and hold it after this one is killed
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                break
            file.close()  # the previous holder has removed this file, and a third process may have created another
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                file.close()
                raise
            file.seek(0)
            holder = file.read(200).decode(errors="replace") or "another process"
            file.close()
            if not waiting:
                on_wait(holder)
                waiting = True
            time.sleep(POLL_SECONDS)
        except BaseException:
            file.close()
            raise
    try:
        with contextlib.suppress(OSError):  # only for messages of waiting processes
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            file.flush()
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        with contextlib.suppress(OSError):
            file.close()


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether `path` still names an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
