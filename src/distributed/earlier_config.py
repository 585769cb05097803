"""The configuration that Hydra saves in a run's folder: a run that writes no results there leaves the earlier one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from src.distributed.folder_lock import FolderInUseError

_SAVED = ".hydra/*.yaml"
# what runs write and resume from
_RESULTS = ("results.json", "[0-9]*/results.json", "training.json", "unfinished/*", "checkpoints/*.ckpt")


class EarlierConfig(Callback):
    """Restores `.hydra` after a run that left the results in its folder as they were, for example a refused resume.

    Hydra overwrites the files before the run can check what the folder holds. A run that was killed is not restored.
    """

    def __init__(self) -> None:
        # of the runs that the folders held before: contents of `.hydra`, and times of results
        self._contents: dict[Path, dict[Path, bytes]] = {}
        self._results: dict[Path, dict[Path, int]] = {}

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Read what the folder of the run holds.

        Args:
            config: the composed config, with `hydra.run.dir`.
            **kwargs: not used.
        """
        self._read(config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Read what the folders of the runs hold.

        Args:
            config: the composed config, with `hydra.sweep.dir`.
            **kwargs: not used.
        """
        for folder in {path.parent.parent for path in Path(config.hydra.sweep.dir).rglob(_SAVED)}:
            self._read(folder)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Restore the files where the run wrote no results.

        Args:
            config: the run's config, with `hydra.runtime.output_dir`.
            job_return: how it ended; a run returns the error of the user's that ended it.
            **kwargs: not used.
        """
        folder = Path(config.hydra.runtime.output_dir)
        if config.hydra.output_subdir is None or folder not in self._contents:  # not the first of several ranks
            return
        before = self._results[folder]
        # a run that holds the folder may have written results in the meantime
        in_use = job_return.status == JobStatus.COMPLETED and isinstance(job_return.return_value, FolderInUseError)
        if in_use or (before and before == _times(folder)):
            for path, content in self._contents[folder].items():
                path.write_bytes(content)

    def _read(self, folder: str | os.PathLike[str]) -> None:
        folder = Path(os.path.abspath(folder))  # as Hydra names it
        self._contents[folder] = {path: path.read_bytes() for path in folder.glob(_SAVED)}
        self._results[folder] = _times(folder)


def _times(folder: Path) -> dict[Path, int]:
    """When each file of results in a folder was written, nanoseconds."""
    return {path: path.stat().st_mtime_ns for pattern in _RESULTS for path in folder.glob(pattern)}
