"""Progress bar of evaluation and training: images per second, and the accuracy or the loss so far."""

from __future__ import annotations

import math
import time
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.callbacks.progress.rich_progress import ProcessingSpeedColumn
from rich.progress import ProgressColumn, Task
from rich.table import Column
from rich.text import Text


class _TextColumn(ProgressColumn):
    """Text that the callback sets."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True))  # where the line is short, the bar gives way
        self.text = ""

    def render(self, task: Task) -> Text:
        return Text(self.text, style="bold")


class ImageProgressBar(RichProgressBar):
    """Lightning's rich progress bar with the text of the task's `progress_so_far()`.

    Args:
        refresh_rate: updates per second, 1 by default. The task may have to wait for the device at each.
        **options: those of `RichProgressBar`.
    """

    def __init__(self, refresh_rate: int = 1, **options: Any) -> None:
        super().__init__(refresh_rate=refresh_rate, **options)
        self._column = _TextColumn()
        self._last_reading = -math.inf

    @property
    def test_description(self) -> str:
        """Label of the bar."""
        return "Evaluating"

    def configure_columns(self, trainer: Trainer) -> list:
        """Lightning's columns, with ours in place of the batches per second."""
        columns = [
            column for column in super().configure_columns(trainer) if not isinstance(column, ProcessingSpeedColumn)
        ]
        return [*columns, self._column]

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
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the text at the refresh rate, and after the last batch."""
        if self.is_enabled:
            self._read(pl_module, trainer.is_last_batch)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _read(self, pl_module: LightningModule, is_last: bool) -> None:
        now = time.monotonic()
        if is_last or now - self._last_reading >= 1 / self.refresh_rate:
            self._last_reading = now
            self._column.text = pl_module.progress_so_far()
