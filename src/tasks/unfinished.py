"""What is finished of an evaluation under way, on the disk, so that an interrupted one can go on.

Each process adds to a file of its own every few seconds. The file is a row of records; a record begins with its length
and checksum, and one that a crash has cut short, with all that follows, counts as not written. The first one describes
the evaluation, the others hold what was kept of some batches, as arrays: nothing in the file is run.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import signal
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from scatterbrain.errors import UserError
from src.tasks.differences import differences
from src.tasks.records import ImageRecords

logger = logging.getLogger(__name__)

UNFINISHED_FOLDER = "unfinished"
_MAGIC = b"EVAL"
# magic, length and CRC-32 of what follows
_HEAD = struct.Struct("<4sQI")
# Batches that an evaluation that goes on has to evaluate at least, per process: the first of them warms up and fixes
# the size that others are filled up to, so there has to be one before the last, which may be smaller.
_BATCHES_LEFT = 2


class UnfinishedEvaluation:
    """The part of one process of an evaluation, as far as it is finished.

    Args:
        output_dir: folder of the evaluation; the files go to its subfolder `unfinished`, from the first save on.
        description: what has to be the same for the evaluation to go on, of types that JSON has.
        circumstances: what may change figures in their last digits, such as the device: a change is a warning.
        rank: number of the process.
        save_seconds: seconds between two saves; 0 saves after each batch.

    Attributes:
        num_saved: number of batches on the disk.
        skipped: images of the batches on the disk that could not be decoded, by position, and why; after `rest_of`,
            those of the batches left out.

    Raises:
        UserError: the folder holds an unfinished evaluation of another description.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        description: Mapping[str, Any],
        circumstances: Mapping[str, Any],
        rank: int,
        save_seconds: float,
    ) -> None:
        self.folder = unfinished_folder(output_dir)
        # as they come back from the file
        self._description, self._circumstances = json.loads(json.dumps([description, circumstances]))
        self._path = self.folder / f"process-{rank}.records"
        self._save_seconds = save_seconds
        self._asked_to_stop = threading.Event()
        self._left_out = 0  # batches
        self._finished = torch.empty(0, dtype=torch.int64)  # positions of their images
        self._tables: list[ImageRecords] = []
        # those of the batches since the last save, and of how many batches
        self._indices: list[torch.Tensor] = []
        self._skipped_since: dict[int, str] = {}
        self._can_save = True
        for path in sorted(self.folder.glob("process-*.records")):
            self._check_description(path)
        self._end = 0  # of what counts in the file
        self._saved = self._read_batches()
        self.skipped = {
            int(index): str(reason)
            for part in self._saved
            for index, reason in zip(part.pop("skipped", ()), part.pop("reasons", ()), strict=True)
        }
        self.num_saved = sum(int(part.pop("batches")) for part in self._saved)

    # Going on

    def rest_of(self, loader: DataLoader) -> DataLoader:
        """The loader without the batches that are finished; those left out are not decoded either.

        Args:
            loader: batches of this process, the same in each evaluation of the same description.
        """
        self._left_out = max(0, min(self.num_saved, len(loader) - _BATCHES_LEFT))
        if self._left_out == 0:
            pass
        elif loader.batch_sampler is None:  # an item is a batch
            self._finished = torch.cat([loader.dataset[index][-1] for index in range(self._left_out)])
            loader = DataLoader(loader.dataset, batch_size=None, sampler=range(self._left_out, len(loader)))
        else:
            positions, end = list(loader.batch_sampler.sampler), self._left_out * loader.batch_size
            self._finished = torch.tensor(positions[:end])
            loader.batch_sampler.sampler = positions[end:]
        # an image of the others is tried once more, and may have been repaired
        finished = set(self._finished.tolist())
        self.skipped = {index: reason for index, reason in self.skipped.items() if index in finished}
        return loader

    def start(self, tables: Sequence[ImageRecords]) -> None:
        """Fill the tables with the batches left out, start the clock, and take SIGTERM for a request to stop.

        Args:
            tables: what is kept of every image, on the device; saved from, from here on.
        """
        self._tables = list(tables)
        if self._left_out:
            saved = {name: np.concatenate([part[name] for part in self._saved]) for name in self._saved[0]}
            finished = np.isin(saved["indices"], self._finished.numpy())
            saved = {name: torch.from_numpy(rows[finished]) for name, rows in saved.items()}
            for number, table in enumerate(self._tables):
                prefix = f"{number}."
                contents = {name.removeprefix(prefix): x for name, x in saved.items() if name.startswith(prefix)}
                table.fill(saved["indices"], contents)
        self._saved.clear()
        self._last_save = time.monotonic()
        # in place of Lightning's handler, which Lightning puts back in the end
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda signum, frame: self.ask_to_stop())

    # Saving

    def add(self, batch_idx: int, indices: torch.Tensor, skipped: Mapping[int, str] | None = None) -> None:
        """Take note of a batch that the device was asked for; waits for it only where it is time to save.

        Args:
            batch_idx: number of the batch, those left out not counted.
            indices: (B,) positions of its images.
            skipped: positions of those that could not be decoded and are not in it, and why.
        """
        # the last ones before may be evaluated once more
        if self._left_out + batch_idx >= self.num_saved + len(self._indices):
            self._indices.append(indices)
            self._skipped_since |= skipped or {}
        if time.monotonic() - self._last_save >= self._save_seconds:
            self.save()

    def save(self) -> None:
        """Write the batches since the last save; where that fails, warn and save no more."""
        self._last_save = time.monotonic()
        if not self._indices or not self._can_save:
            return
        indices = torch.cat(self._indices)
        arrays = {"batches": np.int64(len(self._indices)), "indices": indices.cpu().numpy()}
        for number, table in enumerate(self._tables):
            arrays |= {f"{number}.{name}": rows.cpu().numpy() for name, rows in table.contents(indices).items()}
        if self._skipped_since:
            arrays["skipped"] = np.array(list(self._skipped_since), np.int64)
            arrays["reasons"] = np.array(list(self._skipped_since.values()), np.str_)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        content = _record(buffer.getvalue())
        if self._end == 0:
            content = _record(json.dumps([self._description, self._circumstances]).encode()) + content
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self._path, "r+b" if self._end else "wb") as file:
                # an earlier call may have been broken off anywhere, by a signal
                file.truncate(self._end)
                file.seek(self._end)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self._can_save = False
            logger.warning("%s cannot be written (%s): from here on, nothing is saved.", self._path, error.strerror)
        else:
            self._end += len(content)
            self.num_saved += len(self._indices)
            self._indices.clear()
            self._skipped_since.clear()

    def remove(self) -> None:
        """Remove the files of all processes, once what they are for is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # Stopping

    def ask_to_stop(self) -> None:
        """Stop after the batch in hand; safe to call from a signal handler."""
        self._asked_to_stop.set()

    @property
    def asked_to_stop(self) -> bool:
        """Whether the evaluation is to stop."""
        return self._asked_to_stop.is_set()

    # Reading

    def _check_description(self, path: Path) -> None:
        first = next(_records(path), None)
        if first is None:  # killed while it was written
            return
        description, circumstances = json.loads(first[0])
        different = differences(description, self._description)
        if different:
            raise UserError(
                f"{self.folder.parent} holds an unfinished evaluation with {', '.join(different)}. Give the same to go "
                "on with it, or choose another hydra.run.dir."
            )
        different = differences(circumstances, self._circumstances)
        if different and path == self._path:
            logger.warning(
                "The evaluation began with %s. Its figures may differ in their last digits from those of an "
                "uninterrupted one.",
                ", ".join(different),
            )

    def _read_batches(self) -> list[dict[str, NDArray[Any]]]:
        """What the process saved; what a crash left behind it is not."""
        if not self._path.exists():
            return []
        parts = []
        for number, (content, end) in enumerate(_records(self._path)):
            self._end = end
            if number > 0:
                try:
                    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                        parts.append(dict(arrays))
                except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
                    raise UserError(
                        f"{self._path} holds something else than arrays, which was not run. Choose another "
                        "hydra.run.dir."
                    ) from error
        return parts


def unfinished_folder(output_dir: str | os.PathLike[str]) -> Path:
    """Where an evaluation into `output_dir` keeps what is finished of it."""
    return Path(output_dir) / UNFINISHED_FOLDER


def names_digest(names: Sequence[str | os.PathLike[str]], targets: Sequence[int] | torch.Tensor) -> str:
    """SHA-256 of the names of images and their targets, in order."""
    digest = hashlib.sha256()
    for name, target in zip(names, torch.as_tensor(targets).tolist(), strict=True):
        digest.update(f"{os.fspath(name)}\0{target}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _record(content: bytes) -> bytes:
    return _HEAD.pack(_MAGIC, len(content), zlib.crc32(content)) + content


def _records(path: Path) -> Iterator[tuple[bytes, int]]:
    """Contents of the intact records from the beginning on, and where each ends."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            while len(head := file.read(_HEAD.size)) == _HEAD.size:
                magic, length, checksum = _HEAD.unpack(head)
                # a length out of thin air must not ask for memory
                if magic != _MAGIC or length > size - file.tell():
                    return
                content = file.read(length)
                if zlib.crc32(content) != checksum:
                    return
                yield content, file.tell()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}). Check its permissions, or choose another hydra.run.dir."
        ) from error
