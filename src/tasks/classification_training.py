"""The Lightning module of a training: training step, validation step and their metrics."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from scatterbrain.errors import UserError
from src.evaluation.training_summary import best_epoch
from src.tasks.device_time import seconds_now
from src.tasks.progress import format_rate

logger = logging.getLogger(__name__)

# Entry of a training checkpoint with the configuration, the history, and sums of the current epoch.
CHECKPOINT_KEY = "training"


class ClassificationTraining(pl.LightningModule):
    """Trains a classifier on augmented batches, and validates it on others.

    Args:
        model: module (B, 3, size, size) -> (B, num_classes). If its attribute `has_random_features` is true it has
            `redraw_projections(seed)`.
        num_classes: number of classes.
        make_optimizer: from the model to its optimizer.
        make_scheduler: from the optimizer to one of timm's schedulers.
        seed: seed of the run: random features are redrawn from the seeds that follow it.
        redraw_steps: updates between two redraws of the random features; None keeps the first ones.
        compile_model: run the training steps through `torch.compile`.
        run_config: plain dict that is stored in checkpoints.

    Attributes:
        history: one dict for each finished epoch: `epoch` (from 1), `step` (updates so far), `lr` (after the epoch),
            `train_loss`, `val_loss` (nats), `val_top1`, `val_top5` (percent; the three absent where the epoch had no
            validation), `images_per_second` (of training, all ranks), `seconds` (of training).
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        make_scheduler: Callable[[torch.optim.Optimizer], Any],
        seed: int = 0,
        redraw_steps: int | None = None,
        compile_model: bool = False,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.seed = seed
        self.redraw_steps = redraw_steps
        self.history: list[dict[str, float]] = []
        self._make_optimizer = make_optimizer
        self._make_scheduler = make_scheduler
        self._compile_model = compile_model
        self._forward: tuple[Callable[[torch.Tensor], torch.Tensor]] = (model,)
        self._run_config = dict(run_config or {})
        self.val_top1 = MulticlassAccuracy(num_classes, average="micro")
        self.val_top5 = MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes))
        self.val_loss = MeanMetric()
        # of the epoch so far, on this rank; a MeanMetric would synchronise with the device in every step
        self._loss_sum: torch.Tensor | float = 0.0
        self._num_batches = self._images_seen = 0
        self._seconds_before = 0.0  # of the epoch, before the training was resumed in it
        self._is_extended = False

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer, and a schedule that is stepped on every update and every epoch."""
        optimizer = self._make_optimizer(self.model)
        self._scheduler = self._make_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step timm's scheduler on an update; one that steps on epochs ignores it."""
        scheduler.step_update(num_updates=self.global_step)

    def on_fit_start(self) -> None:
        """Compile the model, after callbacks have made their copies of the module."""
        # a trainer of precision bf16-true has cast it along with the model, too coarse for a sum over images
        self.val_loss.set_dtype(torch.float32)
        if self._compile_model:
            logger.info("Compiling in the first update (train.compile=true), which can take minutes")
            self._forward = (torch.compile(self.model),)

    def on_train_start(self) -> None:
        """Start the clock, in the middle of an epoch where the training is resumed there; set the learning rate."""
        self._clock_started = seconds_now(self.device) - self._seconds_before
        if self._is_extended:  # the stored learning rate is that of the end of a shorter training
            self._scheduler.step(self.current_epoch)
            self._scheduler.step_update(self.global_step)

    def on_train_epoch_start(self) -> None:
        """Reset the sums of the epoch."""
        self._loss_sum, self._num_batches, self._images_seen = 0.0, 0, 0
        self._clock_started = seconds_now(self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Redraw the random features when it is time; a resumed training draws the same ones."""
        if self.redraw_steps is not None and self.global_step and self.global_step % self.redraw_steps == 0:
            self.model.redraw_projections(self.seed + self.global_step // self.redraw_steps)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Cross-entropy of a batch (images, probabilities of the classes), in float32."""
        images, targets = batch
        dtype = next(self.model.parameters()).dtype  # of a trainer of precision bf16-true
        logits = self._forward[0](images.to(dtype))
        loss = F.cross_entropy(logits.float(), targets)
        self._last_loss = loss.detach()
        self._loss_sum = self._loss_sum + self._last_loss
        self._num_batches += 1
        self._images_seen += len(images)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the loss at intervals, and stop when it is not finite."""
        if self.trainer.is_last_batch:
            self._clock_ended = seconds_now(self.device)
        log_step(self, batch_idx, self._last_loss, self._learning_rate())

    def progress_so_far(self) -> str:
        """Rate and loss of the epoch so far, for the progress bar; waits for the device."""
        loss = float(self._last_loss)
        seconds = seconds_now(self.device) - self._clock_started
        return f"{format_rate(self._images_seen * self.trainer.world_size / seconds)}, loss {loss:.3f}"

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Count the hits of a batch (images, targets, indices)."""
        images, targets, _ = batch
        logits = self.model(images.to(next(self.model.parameters()).dtype)).float()
        self.val_top1.update(logits, targets)
        self.val_top5.update(logits, targets)
        self.val_loss.update(F.cross_entropy(logits, targets, reduction="none"))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over all images of all ranks."""
        self.log_dict(
            {
                "val/top1": 100 * self.val_top1.compute(),
                "val/top5": 100 * self.val_top5.compute(),
                "val/loss": self.val_loss.compute(),
            },
            # they are reduced over the ranks already
            sync_dist=False,
        )
        for metric in (self.val_top1, self.val_top5, self.val_loss):
            metric.reset()

    def on_train_epoch_end(self) -> None:
        """Add the epoch to the history, and step the schedule.

        Raises:
            UserError: the validation loss is not finite.
        """
        self._scheduler.step(self.current_epoch + 1)
        mean = self._mean_over_ranks(self._loss_sum) / self._num_batches
        seconds = self._clock_ended - self._clock_started
        entry: dict[str, float] = {
            "epoch": self.current_epoch + 1,
            "step": self.global_step,
            "lr": self._learning_rate(),
            "train_loss": mean,
        }
        metrics = self.trainer.callback_metrics
        if (self.current_epoch + 1) % self.trainer.check_val_every_n_epoch == 0:
            entry |= {f"val_{name}": float(metrics[f"val/{name}"]) for name in ("loss", "top1", "top5")}
            if not math.isfinite(entry["val_loss"]):
                raise not_finite(f"The validation loss became {entry['val_loss']}", self.global_step)
        entry |= {
            "images_per_second": self._images_seen * self.trainer.world_size / seconds,
            "seconds": seconds,
        }
        self.history.append(entry)
        self.log_dict({"train/loss": mean, "images_per_second": entry["images_per_second"]})
        logger.info(_epoch_message(entry, self.trainer.max_epochs))

    @property
    def last_is_best(self) -> bool:
        """Whether the last epoch is the first of the best ones."""
        best = best_epoch(self.history)
        return best is not None and best["epoch"] == self.history[-1]["epoch"]

    def _learning_rate(self) -> float:
        return max(group["lr"] for group in self._scheduler.optimizer.param_groups)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the configuration, the history and the sums of the epoch, as plain types."""
        checkpoint[CHECKPOINT_KEY] = {
            "config": self._run_config,
            "history": self.history,
            "loss_sum": self._mean_over_ranks(self._loss_sum),
            "num_batches": self._num_batches,
            "images_seen": self._images_seen,
            "seconds": seconds_now(self.device) - self._clock_started,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` stored."""
        state = checkpoint[CHECKPOINT_KEY]
        self.history = list(state["history"])
        self._loss_sum, self._num_batches = state["loss_sum"], state["num_batches"]
        self._images_seen, self._seconds_before = state["images_seen"], state["seconds"]
        if state["config"].get("train.epochs") != self._run_config.get("train.epochs"):
            # an extended training has another schedule than the stored one
            checkpoint["lr_schedulers"] = []
            self._is_extended = True

    def _mean_over_ranks(self, value: torch.Tensor | float) -> float:
        return float(self.trainer.strategy.reduce(torch.as_tensor(value, device=self.device), reduce_op="mean"))


def log_step(module: pl.LightningModule, batch_idx: int, loss: torch.Tensor, learning_rate: float) -> None:
    """Log loss and learning rate at the trainer's intervals, and after the last batch of an epoch.

    Args:
        module: of the training.
        batch_idx: number of the batch in the epoch.
        loss: of the batch; the device is waited for only where it is logged.
        learning_rate: of the step.

    Raises:
        NotFiniteError: a logged loss is not finite.
    """
    if not module.trainer.is_last_batch and (batch_idx + 1) % module.trainer.log_every_n_steps:
        return
    value = float(loss)
    if not math.isfinite(value):
        raise not_finite(f"The loss became {value}", module.global_step)
    module.log_dict({"train/loss_step": value, "lr": learning_rate})


class NotFiniteError(UserError):
    """The loss or the weights of a training are no longer finite."""


def not_finite(what: str, update: int) -> NotFiniteError:
    """The error of a training whose loss or weights are no longer finite."""
    return NotFiniteError(
        f"{what} at update {update}. Lower optimizer.lr, lengthen the warm-up of the scheduler, set "
        "trainer.gradient_clip_val=1, or use trainer.precision=32-true."
    )


def _epoch_message(entry: Mapping[str, float], num_epochs: int) -> str:
    """One epoch of the history, for the log."""
    parts = [f"loss {entry['train_loss']:.4f}"]
    if "val_top1" in entry:
        parts.append(f"validation loss {entry['val_loss']:.4f}, top-1 {entry['val_top1']:.2f} %")
    parts.append(f"{entry['images_per_second']:,.0f} images/s")
    return f"Epoch {entry['epoch']} of {num_epochs}: {', '.join(parts)}"
