"""Progress of evaluation and training: images per second, and the accuracy or the loss so far.

A terminal and a notebook show a progress bar; elsewhere, as in a file or a job of SLURM, there are lines of the log.
"""

from __future__ import annotations

import logging
import math
import time
from datetime import timedelta
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.callbacks.progress.rich_progress import ProcessingSpeedColumn
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task
from rich.table import Column
from rich.text import Text

logger = logging.getLogger(__name__)


def format_rate(images_per_second: float) -> str:
    """`27.1 images/s`, or `1,234 images/s`: short, so that a bar of 80 columns has room for all."""
    return f"{images_per_second:,.{1 if images_per_second < 100 else 0}f} images/s"


class _TextColumn(ProgressColumn):
    """Text that the callback sets."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def render(self, task: Task) -> Text:
        return Text(self.text, style="bold")


class ImageProgressBar(RichProgressBar):
    """Lightning's rich progress bar with the text of the task's `progress_so_far()`.

    Args:
        refresh_rate: updates per second, 1 by default; 0 shows and logs nothing. The task may have to wait for the
            device at each.
        log_seconds: seconds between two lines of the log, where the output is no terminal.
        **options: those of `RichProgressBar`.
    """

    def __init__(self, refresh_rate: int = 1, log_seconds: float = 30, **options: Any) -> None:
        super().__init__(refresh_rate=refresh_rate, **options)
        self.log_seconds = log_seconds
        self._logs = False
        self._column = _TextColumn()
        self._last_reading = -math.inf
        self._first_batch = (0, 0.0)  # its number and its end, of the evaluation or of an epoch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose between bar and log, on rank 0."""
        super().setup(trainer, pl_module, stage)
        console = Console(**self._console_kwargs)
        if self.is_enabled and not (console.is_terminal or console.is_jupyter):
            self.disable()
            self._logs = True
            self._last_reading = time.monotonic()

    @property
    def test_description(self) -> str:
        """Label of the bar."""
        return "Evaluating"

    def _get_train_description(self, current_epoch: int) -> str:
        name = getattr(self.trainer.lightning_module, "epoch_name", "Epoch")
        return f"{name} {current_epoch + 1} of {self.trainer.max_epochs}"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """None of Lightning's, since the text has them."""
        return {}

    def configure_columns(self, trainer: Trainer) -> list:
        """Lightning's columns, with ours in place of the batches per second."""
        columns = [
            column for column in super().configure_columns(trainer) if not isinstance(column, ProcessingSpeedColumn)
        ]
        columns.append(self._column)
        for column in columns:
            if not isinstance(column, BarColumn):  # where the line is short, the bar gives way
                column._table_column = Column(no_wrap=True)
        return columns

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Update the text at the refresh rate, and after the last batch."""
        if self.is_enabled:  # only the rank that shows the bar knows the number of batches
            self._read(pl_module, batch_idx + 1 == self.total_test_batches_current_dataloader)
        elif self._logs:
            self._log(pl_module, self.test_description, batch_idx + 1, int(sum(trainer.num_test_batches)))
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the text at the refresh rate, and after the last batch."""
        if self.is_enabled:
            self._read(pl_module, trainer.is_last_batch)
        elif self._logs:
            description = self._get_train_description(trainer.current_epoch)
            self._log(pl_module, description, batch_idx + 1, int(trainer.num_training_batches))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _read(self, pl_module: LightningModule, is_last: bool) -> None:
        now = time.monotonic()
        if is_last or now - self._last_reading >= 1 / self.refresh_rate:
            self._last_reading = now
            self._column.text = pl_module.progress_so_far()

    def _log(self, pl_module: LightningModule, description: str, number: int, total: int) -> None:
        """Log the progress after batch `number` of `total`, from 1, at intervals and after the last one."""
        now = time.monotonic()
        first, ended = self._first_batch
        if number <= first or first == 0:
            first, ended = self._first_batch = number, now
        if number < total and now - self._last_reading < self.log_seconds:
            return
        self._last_reading = now
        left = ""
        if first < number < total:  # the first batch may have taken long
            seconds = (now - ended) / (number - first) * (total - number)
            left = f", {timedelta(seconds=round(seconds))} left"
        logger.info("%s: batch %d of %d, %s%s", description, number, total, pl_module.progress_so_far(), left)
