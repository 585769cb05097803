"""The Lightning module of a training on sequences: training step, evaluations, and the history of both."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from src.datamodules.sampling import derive_seed
from src.datamodules.sequences.base import IGNORED
from src.datamodules.sequences.datamodule import METRICS, Batch
from src.models.sequence_network import Network
from src.tasks.classification_training import CHECKPOINT_KEY, log_step, not_finite
from src.tasks.device_time import seconds_now

logger = logging.getLogger(__name__)


class SequenceTraining(pl.LightningModule):
    """Trains a network on sequences, an epoch of Lightning's being the steps between two evaluations.

    Args:
        model: network `(tokens, lengths) -> logits`.
        metric: what results are compared by, see `METRICS`.
        make_optimizer: from the network to its optimizer.
        learning_rate: from a step, from 1 on, to the learning rate as a fraction of the highest one.
        steps: of the training.
        seed: seed of the run: dropout is seeded in every step, and random features are redrawn from the seeds that
            follow it.
        redraw_steps: steps between two redraws of the random features, where there are any; None keeps the first ones.
        compile_model: run the training steps through `torch.compile`.
        run_config: plain dict that is stored in checkpoints.

    Attributes:
        history: one dict for each evaluation: `step`, `lr` (of the last step), `train_loss` (nats, mean since the
            evaluation before), `loss`, `accuracy` and the `metric` on the validation part, `tokens_per_second`,
            `seconds` (of training since the evaluation before) and `evaluation_seconds`.
        test: the entries of `scores` for the test part, empty before `on_test_end`.
        after_evaluation: called after each evaluation of the training; None for nothing.
    """

    epoch_name = "Part"  # in the progress: the steps between two evaluations are no pass over the data

    def __init__(
        self,
        model: Network,
        metric: str,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        learning_rate: Callable[[int], float],
        steps: int,
        seed: int = 0,
        redraw_steps: int | None = None,
        compile_model: bool = False,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.metric, self.steps, self.seed, self.redraw_steps = model, metric, steps, seed, redraw_steps
        self.history: list[dict[str, Any]] = []
        self.test: dict[str, float] = {}
        self.after_evaluation: Callable[[], object] | None = None
        self._make_optimizer, self._learning_rate = make_optimizer, learning_rate
        self._compile_model, self._run_config = compile_model, dict(run_config or {})
        self._forward: tuple[Callable[..., torch.Tensor]] = (model,)  # a tuple, so that it is no submodule
        self._loss_sum: torch.Tensor | float = 0.0
        self._num_steps = self._tokens = 0
        self._seconds_before = 0.0  # of the steps since the last evaluation, before the training was resumed
        # of the steps since the last evaluation, when the training was saved last
        self._partial_seconds, self._partial_tokens = 0.0, 0
        self._total_before, self._created = 0.0, time.perf_counter()
        self._scores: list[tuple[torch.Tensor, torch.Tensor]] = []

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer, and its learning rate for each step."""
        optimizer = self._make_optimizer(self.model)
        # the scheduler counts the steps that are done: the first one has the rate of step 1
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: self._learning_rate(done + 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of the gradients; Lightning's own refuses fused optimizers in mixed precision."""
        if gradient_clip_val:
            nn.utils.clip_grad_norm_(self.model.parameters(), gradient_clip_val)

    def on_fit_start(self) -> None:
        """Compile the network."""
        if self._compile_model:
            logger.info("Compiling in the first step (train.compile=true), which can take minutes")
            torch.compiler.reset()  # earlier runs of a multirun count towards the limit of recompilations
            self._forward = (torch.compile(self.model, dynamic=False),)

    def on_train_start(self) -> None:
        """Start the clock, between two evaluations where the training is resumed there."""
        self._clock_started = seconds_now(self.device) - self._seconds_before
        self._seconds_before = 0.0

    def on_train_epoch_start(self) -> None:
        """Reset the sums since the last evaluation."""
        self._reset_sums()

    def _reset_sums(self) -> None:
        self._loss_sum, self._num_steps, self._tokens = 0.0, 0, 0
        self._partial_seconds, self._partial_tokens = 0.0, 0  # what they counted is in the history now
        self._clock_started = seconds_now(self.device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed the dropout, and redraw the random features when it is time; a resumed training draws the same ones."""
        step = self.global_step
        # that of the device alone: torch.manual_seed takes as long as a small network
        on_cuda = self.device.type == "cuda"
        generator = torch.cuda.default_generators[self.device.index] if on_cuda else torch.default_generator
        generator.manual_seed(derive_seed(self.seed, step))
        if self.redraw_steps is not None and step and step % self.redraw_steps == 0 and self.model.has_random_features:
            self.model.redraw_projections(self.seed + step // self.redraw_steps)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Cross-entropy of a batch in float32, nats."""
        tokens, lengths, targets = batch
        logits = self._forward[0](tokens, lengths)
        loss = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED)
        self._last_loss = loss.detach()
        self._loss_sum = self._loss_sum + self._last_loss
        self._num_steps += 1
        self._tokens += tokens.numel()
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the loss at intervals, and stop when it is not finite."""
        if self.trainer.is_last_batch:
            self._train_seconds = seconds_now(self.device) - self._clock_started
        log_step(self, batch_idx, self._last_loss, self._current_rate())

    def progress_so_far(self) -> str:
        """Rate and loss since the last evaluation, for the progress bar; waits for the device."""
        if not self.trainer.training:
            return f"{len(self._scores)} batches"
        loss = float(self._last_loss)
        rate = self._tokens / (seconds_now(self.device) - self._clock_started)
        return f"{rate:,.0f} tokens/s, loss {loss:.3f}"

    # Evaluation

    def on_validation_epoch_start(self) -> None:
        """Forget earlier scores, and start the clock."""
        self._scores.clear()
        self._evaluation_started = time.perf_counter()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch; the scores stay on the device."""
        tokens, lengths, targets = batch
        self._scores.append(sample_scores(self.model(tokens, lengths), targets))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation part."""
        self._validation = summarise(self._scores, self.metric)
        self._evaluation_seconds = time.perf_counter() - self._evaluation_started
        self.log_dict({f"val/{name}": value for name, value in self._validation.items()})

    def on_test_epoch_start(self) -> None:
        """Forget earlier scores."""
        self._scores.clear()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch; the scores stay on the device."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test part."""
        self.test = summarise(self._scores, self.metric)
        self.log_dict({f"test/{name}": value for name, value in self.test.items()})

    def on_train_epoch_end(self) -> None:
        """Add the evaluation to the history.

        Raises:
            UserError: the validation loss is not finite.
        """
        validation = self._validation
        if not math.isfinite(validation["loss"]):
            raise not_finite(f"The validation loss became {validation['loss']}", self.global_step)
        seconds = self._train_seconds
        entry: dict[str, Any] = {"step": self.global_step, "lr": self._current_rate()}
        entry |= {"train_loss": float(self._loss_sum) / self._num_steps, **validation}
        entry |= {"tokens_per_second": self._tokens / seconds, "seconds": seconds}
        entry["evaluation_seconds"] = self._evaluation_seconds
        self.history.append(entry)
        self._reset_sums()  # what is saved from here on has no steps since the last evaluation
        self.log_dict({"train/loss": entry["train_loss"], "tokens_per_second": entry["tokens_per_second"]})
        logger.info(
            "Step %s of %s: loss %.4f, validation loss %.4f, %s %.4g, %s tokens/s",
            *(f"{entry['step']:,}", f"{self.steps:,}", entry["train_loss"], entry["loss"]),
            *(self.metric.replace("_", " "), entry[self.metric], f"{entry['tokens_per_second']:,.0f}"),
        )
        if self.after_evaluation is not None:
            self.after_evaluation()

    @property
    def last_is_best(self) -> bool:
        """Whether the last evaluation is the first of the best ones."""
        return bool(self.history) and best_entry(self.history, self.metric) is self.history[-1]

    @property
    def training_seconds(self) -> float:
        """Seconds of all steps up to the last checkpoint, evaluations not counted."""
        return sum(entry["seconds"] for entry in self.history) + self._partial_seconds

    @property
    def total_seconds(self) -> float:
        """Seconds so far, with compilation and evaluations, and with those before the training was resumed."""
        return self._total_before + time.perf_counter() - self._created

    @property
    def tokens_per_second(self) -> float | None:
        """Rate of training: median over the parts, the first left out where there are more; None before a save."""
        rates = [entry["tokens_per_second"] for entry in self.history]
        if rates:
            return median(rates[1:] or rates)
        return self._partial_tokens / self._partial_seconds if self._partial_seconds else None

    def _current_rate(self) -> float:
        return self.trainer.optimizers[0].param_groups[0]["lr"]

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the configuration, the history and the sums since the last evaluation, as plain types."""
        self._partial_seconds = seconds_now(self.device) - self._clock_started if self._num_steps else 0.0
        self._partial_tokens = self._tokens
        checkpoint[CHECKPOINT_KEY] = {
            "config": self._run_config,
            "history": self.history,
            "loss_sum": float(self._loss_sum),
            "num_steps": self._num_steps,
            "tokens": self._tokens,
            "seconds": self._partial_seconds,
            "total_seconds": self.total_seconds,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` stored."""
        state = checkpoint[CHECKPOINT_KEY]
        self.history = list(state["history"])
        self._loss_sum, self._num_steps = state["loss_sum"], state["num_steps"]
        self._tokens, self._seconds_before = state["tokens"], state["seconds"]
        self._total_before = state["total_seconds"]


def sample_scores(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy in nats and accuracy (B,) of each sample, the means over its tokens that are scored."""
    flat = logits.flatten(0, -2).float()
    nats = F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, reduction="none").view_as(targets)
    right = (flat.argmax(-1).view_as(targets) == targets).float()
    if targets.ndim == 1:
        return nats, right
    number = (targets != IGNORED).sum(1)
    return nats.sum(1) / number, right.sum(1) / number


def summarise(scores: list[tuple[torch.Tensor, torch.Tensor]], metric: str) -> dict[str, float]:
    """Means over all samples: `loss`, `accuracy`, the `metric` and its `standard_error`."""
    loss, accuracy = (torch.cat(each).double() for each in zip(*scores, strict=True))
    means = {"loss": loss.mean().item(), "accuracy": accuracy.mean().item()}
    errors = {
        name: x.std().item() / len(x) ** 0.5 if len(x) > 1 else 0.0
        for name, x in (("loss", loss), ("accuracy", accuracy))
    }
    if metric == "accuracy":
        return {**means, "standard_error": errors["accuracy"]}
    if metric == "bits_per_byte":
        return {**means, metric: means["loss"] / math.log(2), "standard_error": errors["loss"] / math.log(2)}
    # the error of an exponential is the exponential times the error
    perplexity = math.exp(min(means["loss"], 700.0))
    return {**means, metric: perplexity, "standard_error": perplexity * errors["loss"]}


def best_entry(history: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The first of the best evaluations."""
    return (max if METRICS[metric] else min)(history, key=lambda entry: entry[metric])
