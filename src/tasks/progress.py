"""Progress bar of an evaluation: images per second and the accuracy so far."""

from __future__ import annotations

import time
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.callbacks.progress.rich_progress import ProcessingSpeedColumn
from rich.progress import ProgressColumn, Task
from rich.table import Column
from rich.text import Text

# Reading the accuracy waits for the device, which each batch would feel.
SECONDS_BETWEEN_READINGS = 0.5


class _RateAndAccuracy(ProgressColumn):
    """Text that the callback sets."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True))  # where the line is short, the bar gives way
        self.text = ""

    def render(self, task: Task) -> Text:
        return Text(self.text, style="bold")


class EvaluationProgressBar(RichProgressBar):
    """Lightning's rich progress bar with images/s and the running top-1 accuracy of this process.

    Args:
        refresh_rate: batches between two updates.
        **options: those of `RichProgressBar`.
    """

    def __init__(self, refresh_rate: int = 1, **options: Any) -> None:
        super().__init__(refresh_rate=refresh_rate, **options)
        self._column = _RateAndAccuracy()
        self._last_reading = -SECONDS_BETWEEN_READINGS

    @property
    def test_description(self) -> str:
        """What stands before the bar."""
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
        """Update the figures now and then, and after the last batch."""
        if self.is_enabled:
            now = time.monotonic()
            is_last = batch_idx + 1 == self.total_test_batches_current_dataloader
            if is_last or now - self._last_reading >= SECONDS_BETWEEN_READINGS:
                self._last_reading = now
                rate, accuracy = pl_module.progress_so_far()
                self._column.text = f"{rate:,.1f} images/s, top-1 {accuracy:.2f} %"
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
