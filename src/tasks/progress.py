"""Progress bar of an evaluation: images per second and the accuracy so far."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar
from rich.progress import ProgressColumn, Task
from rich.text import Text


class _RateAndAccuracy(ProgressColumn):
    """Text that the callback sets; the accuracy is fetched from the device when the bar is redrawn, not each step."""

    def __init__(self) -> None:
        super().__init__()
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

    @property
    def test_description(self) -> str:
        """What stands before the bar."""
        return "Evaluating"

    def configure_columns(self, trainer: Trainer) -> list:
        """Lightning's columns and ours."""
        return [*super().configure_columns(trainer), self._column]

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Update the figures as often as the bar is redrawn."""
        if self.is_enabled and (batch_idx + 1) % max(1, self.refresh_rate) == 0:
            rate, accuracy = pl_module.progress_so_far()
            self._column.text = f"{rate:,.1f} images/s  top-1 {accuracy:.2f} %"
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
