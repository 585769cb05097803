"""The state of an evaluation on the disk, from which an interrupted one resumes.

Each rank appends to a file of its own every few seconds. The file is a sequence of blocks; a block begins with its
length and checksum, and one that a crash cut short is ignored with all that follows. The first block describes the
evaluation, the others hold the records of some batches as arrays: nothing in the file is executed.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
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
from src.datamodules.dataset import ImageDataset
from src.datamodules.sampling import spread
from src.datamodules.synthetic import SyntheticImages
from src.distributed.interrupts import on_sigterm
from src.tasks.image_records import ImageRecords
from src.tasks.option_changes import option_changes

logger = logging.getLogger(__name__)

FOLDER = "unfinished"
_MAGIC = b"EVAL"
# magic, length and CRC-32 of what follows
_HEAD = struct.Struct("<4sQI")
# Batches that a resumed evaluation evaluates at least, per rank: the first one warms up and fixes the size to which
# others are padded, so there has to be one before the last, which may be smaller.
_BATCHES_LEFT = 2
# images whose files are compared, spread over the data set
COMPARED_IMAGES = 16


class ResumeState:
    """The part of an evaluation that one rank has finished.

    Args:
        output_dir: folder of the evaluation; the files go to its subfolder `unfinished`, from the first save on.
        description: what has to be the same to resume the evaluation, of types that JSON has.
        environment: what may change results in their last digits, such as the device: a change is a warning.
        rank: of this process.
        save_seconds: seconds between two saves; 0 saves after each batch.

    Attributes:
        num_saved: number of batches on the disk.
        skipped: positions of images in the saved batches that could not be decoded, and why; after
            `remaining_batches`, those of the restored batches.

    Raises:
        UserError: the folder holds an unfinished evaluation of another description.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        description: Mapping[str, Any],
        environment: Mapping[str, Any],
        rank: int,
        save_seconds: float,
    ) -> None:
        self.folder = resume_folder(output_dir)
        # as the file returns them
        self._description, self._environment = json.loads(json.dumps([description, environment]))
        self._path = self.folder / f"process-{rank}.records"
        self._save_seconds = save_seconds
        self._stop_requested = threading.Event()
        self._num_restored = 0  # batches
        self._restored = torch.empty(0, dtype=torch.int64)  # positions of their images
        self._tables: list[ImageRecords] = []
        # of the batches since the last save, one entry per batch
        self._indices: list[torch.Tensor] = []
        self._skipped_since: dict[int, str] = {}
        self._can_save = True
        for path in sorted(self.folder.glob("process-*.records")):
            self._check_description(path)
        self._end = 0  # of the intact blocks in the file
        self._saved = self._read_batches()
        self.skipped = {
            int(index): str(reason)
            for part in self._saved
            for index, reason in zip(part.pop("skipped", ()), part.pop("reasons", ()), strict=True)
        }
        self.num_saved = sum(int(part.pop("batches")) for part in self._saved)

    # Resuming

    def remaining_batches(self, loader: DataLoader) -> DataLoader:
        """The loader without the restored batches, which are not decoded either.

        Args:
            loader: batches of this rank, the same in each evaluation of the same description.
        """
        self._num_restored = max(0, min(self.num_saved, len(loader) - _BATCHES_LEFT))
        if self._num_restored == 0:
            pass
        elif loader.batch_sampler is None:  # an item is a batch
            self._restored = torch.cat([loader.dataset[index][-1] for index in range(self._num_restored)])
            loader = DataLoader(loader.dataset, batch_size=None, sampler=range(self._num_restored, len(loader)))
        else:
            positions, end = list(loader.batch_sampler.sampler), self._num_restored * loader.batch_size
            self._restored = torch.tensor(positions[:end])
            loader.batch_sampler.sampler = positions[end:]
        # images of the other batches are decoded again, and may have been repaired
        restored = set(self._restored.tolist())
        self.skipped = {index: reason for index, reason in self.skipped.items() if index in restored}
        return loader

    def restore(self, tables: Sequence[ImageRecords]) -> None:
        """Fill the tables with the restored batches, start the clock, and let SIGTERM request a stop.

        Args:
            tables: records of every image, on the device; saves read them.
        """
        self._tables = list(tables)
        if self._num_restored:
            saved = {name: np.concatenate([part[name] for part in self._saved]) for name in self._saved[0]}
            restored = np.isin(saved["indices"], self._restored.numpy())
            saved = {name: torch.from_numpy(rows[restored]) for name, rows in saved.items()}
            for number, table in enumerate(self._tables):
                prefix = f"{number}."
                contents = {name.removeprefix(prefix): x for name, x in saved.items() if name.startswith(prefix)}
                table.fill(saved["indices"], contents)
        self._saved.clear()
        self._last_save = time.monotonic()
        on_sigterm(self.request_stop)

    # Saving

    def add(self, batch_idx: int, indices: torch.Tensor, skipped: Mapping[int, str] | None = None) -> None:
        """Add a batch that is in the device's queue; waits for it only where it is time to save.

        Args:
            batch_idx: number of the batch, restored ones not counted.
            indices: (B,) positions of its images.
            skipped: positions of the images that could not be decoded and are not in it, and why.
        """
        # the last saved batches may be evaluated once more
        if self._num_restored + batch_idx >= self.num_saved + len(self._indices):
            self._indices.append(indices)
            self._skipped_since |= skipped or {}
        if time.monotonic() - self._last_save >= self._save_seconds:
            self.save()

    def save(self) -> None:
        """Write the batches since the last save; where that fails, warn and stop saving."""
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
        content = _block(buffer.getvalue())
        if self._end == 0:
            content = _block(json.dumps([self._description, self._environment]).encode()) + content
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self._path, "r+b" if self._end else "wb") as file:
                # a signal may have interrupted an earlier call at any point
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
        """Remove the files of all ranks."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # Stopping

    def request_stop(self) -> None:
        """Stop after the current batch; safe to call from a signal handler."""
        self._stop_requested.set()

    @property
    def stop_requested(self) -> bool:
        """Whether the evaluation is to stop."""
        return self._stop_requested.is_set()

    # Reading

    def _check_description(self, path: Path) -> None:
        first = next(_blocks(path), None)
        if first is None:  # the process was killed during its first save
            return
        description, environment = json.loads(first[0])
        different = option_changes(description, self._description)
        if different:
            raise UserError(
                f"{self.folder.parent} holds an unfinished evaluation with {', '.join(different)}. Give the same to "
                "resume it, or choose another hydra.run.dir."
            )
        different = option_changes(environment, self._environment)
        if different and path == self._path:
            logger.warning(
                "The evaluation began with %s. Its results may differ in their last digits from those of an "
                "uninterrupted one.",
                ", ".join(different),
            )

    def _read_batches(self) -> list[dict[str, NDArray[Any]]]:
        """The batches that the rank saved, up to the first damaged block."""
        if not self._path.exists():
            return []
        parts = []
        for number, (content, end) in enumerate(_blocks(self._path)):
            self._end = end
            if number > 0:
                try:
                    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                        parts.append(dict(arrays))
                except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
                    raise UserError(
                        f"{self._path} holds something else than arrays, which was not executed. Choose another "
                        "hydra.run.dir."
                    ) from error
        return parts


def resume_folder(output_dir: str | os.PathLike[str]) -> Path:
    """Folder of the resume state of an evaluation into `output_dir`."""
    return Path(output_dir) / FOLDER


def data_digests(dataset: ImageDataset | SyntheticImages) -> dict[str, str]:
    """SHA-256 of the names of images and their targets, in order, and of the files of some images.

    Other versions of a data set, reduced or distorted ones, have the same names.
    """
    names = hashlib.sha256()
    for name, target in zip(dataset.paths, torch.as_tensor(dataset.targets).tolist(), strict=True):
        names.update(f"{os.fspath(name)}\0{target}\0".encode(errors="surrogateescape"))
    digests = {"names.sha256": names.hexdigest()}
    if isinstance(dataset, ImageDataset):
        contents = hashlib.sha256()
        for index in spread(len(dataset), COMPARED_IMAGES):
            try:
                contents.update(hashlib.sha256(dataset.read(index)).digest())
            except (OSError, UserError):
                contents.update(b"unreadable")
        digests["images.sha256"] = contents.hexdigest()
    return digests


def _block(content: bytes) -> bytes:
    return _HEAD.pack(_MAGIC, len(content), zlib.crc32(content)) + content


def _blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """Contents of the intact blocks from the beginning on, and where each ends."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            while len(head := file.read(_HEAD.size)) == _HEAD.size:
                magic, length, checksum = _HEAD.unpack(head)
                # a damaged length must not allocate memory
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
