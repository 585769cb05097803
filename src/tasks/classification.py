"""Image classification: what a test step and its metrics are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytorch_lightning as pl
import torch
from torch import nn

from src.evaluation.results import Records, summarise
from src.tasks.provenance import seconds_now
from src.tasks.records import ImageRecords
from src.tasks.transfer import OverlappedTransfer


class ImageClassification(pl.LightningModule):
    """Evaluates a classifier, over several draws of its random features where it has any.

    A step asks the device for its work and waits for nothing: what is counted stays on the device, and the next batch
    is copied there meanwhile.

    Args:
        model: module (B, 3, size, size) -> (B, num_classes). If its attribute `has_random_features` is true it has
            `redraw_projections(seed)`.
        num_images: number of images of the test split, over all processes.
        num_classes: number of classes.
        seeds: one seed for each draw; a model without random features takes one.
        redraw: draw the random features from the seeds; otherwise those that the model has are kept, for one seed.
        make_forward: from `model`, on its device and in its dtype, to the function that is evaluated in its place; it
            has to read the rows of random features where `model` has them. None evaluates `model` itself.

    Attributes:
        records: after the test, what was kept of every image (on every process).
        seconds: duration of the test loop, the first batch left out where there are more (it warms up).
        images_per_second: forward passes of all processes and draws over that duration.
    """

    def __init__(
        self,
        model: nn.Module,
        num_images: int,
        num_classes: int,
        seeds: Sequence[int],
        redraw: bool = True,
        make_forward: Callable[[nn.Module], Callable[[torch.Tensor], torch.Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.seeds = list(seeds)
        self.redraw = redraw
        self._make_forward = make_forward
        self.num_images = num_images
        self.num_classes = num_classes
        self.records: Records | None = None
        self.seconds = 0.0
        self.images_per_second = 0.0
        self._draws: list[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def on_test_start(self) -> None:
        """Make room for the records, and draw the random features of every seed once; a step then only copies them."""
        # made here: before, a trainer of precision bf16-true would have cast them along with the model, and the model
        # would not have been where and what it is when it runs
        double = next(self.model.parameters()).dtype == torch.float64
        self.image_records = ImageRecords(
            self.num_images, self.num_classes, len(self.seeds), torch.float64 if double else torch.float32
        ).to(self.device)
        # not a sub-module: another form of the model would register its parameters a second time
        self._forward = (self.model if self._make_forward is None else self._make_forward(self.model),)
        self._transfer = OverlappedTransfer(self.device) if self.device.type == "cuda" else None
        self._draws = []
        for seed in self.seeds:
            if self.redraw and getattr(self.model, "has_random_features", False):
                self.model.redraw_projections(seed)
                rows = [buffer for name, buffer in self.model.named_buffers() if name.endswith("projection_matrix")]
                self._draws.append([(buffer, buffer.clone()) for buffer in rows])
            else:
                self._draws.append([])
        self._images_seen = 0
        self._clock_started = seconds_now(self.device)

    def transfer_batch_to_device(
        self, batch: list[torch.Tensor], device: torch.device, dataloader_idx: int
    ) -> list[torch.Tensor]:
        """Copy a batch while the device computes those before."""
        if self._transfer is None:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        return self._transfer(batch)

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Evaluate a batch (images, targets, indices) under every draw."""
        images, targets, indices = batch
        for draw, rows in enumerate(self._draws):
            for buffer, drawn in rows:
                buffer.copy_(drawn)
            self.image_records.update(draw, indices, self._forward[0](images), targets)
        self._images_seen += len(images) * len(self.seeds)
        if batch_idx == 0:
            self._first_batch_ended = seconds_now(self.device)
            self._images_of_first_batch = self._images_seen

    def progress_so_far(self) -> str:
        """Rate and top-1 accuracy of this process, draws taken together, for the progress bar; waits for the device."""
        top1 = float(self.image_records.top1_so_far())
        rate = self._images_seen / (time.perf_counter() - self._clock_started)
        return f"{rate:,.1f} images/s, top-1 {top1:.2f} %"

    def on_test_epoch_end(self) -> None:
        """Gather the records of all processes, and the throughput."""
        ended = seconds_now(self.device)
        start, seen = self._clock_started, self._images_seen
        if seen > self._images_of_first_batch:
            start, seen = self._first_batch_ended, seen - self._images_of_first_batch
        self.seconds = ended - start
        rate = torch.tensor(seen / self.seconds, device=self.device)
        self.images_per_second = float(self.trainer.strategy.reduce(rate, reduce_op="sum"))
        self.records = self.image_records.compute()
        figures = summarise(self.records)
        self.log_dict({f"test/{name}": figures[name] for name in ("top1", "top5", "loss")}, sync_dist=True)
