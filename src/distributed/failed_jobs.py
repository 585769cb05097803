"""Errors of jobs that a multirun submitted to a cluster, reported by the process that submitted them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

# Where a job on a cluster leaves the message for the process that submitted it.
ERROR_FILE = "error.txt"


class FailedJobs(Callback):
    """Prints the errors of failed jobs at the end of a multirun on a cluster; jobs have no other way to the terminal.

    Attributes:
        messages: one for each failed job of the last multirun.
    """

    messages: tuple[str, ...] = ()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Read the errors that the jobs left in their folders.

        Args:
            config: the composed config, with `hydra.sweep.dir`.
            **kwargs: not used.
        """
        files = sorted(Path(config.hydra.sweep.dir).rglob(ERROR_FILE))
        FailedJobs.messages = tuple(f"{file.parent}: {file.read_text().strip()}" for file in files)
        for message in FailedJobs.messages:
            print(f"Error in {message}", file=sys.stderr, flush=True)
