"""The Lightning module of an evaluation: one or several classifiers in one pass over the images."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import pytorch_lightning as pl
import torch
from torch import nn

from scatterbrain.errors import UserError
from src.datamodules.dataset import ImageLoader
from src.evaluation.records import Records
from src.tasks.device_time import DeviceTime, seconds_now
from src.tasks.image_records import ImageRecords
from src.tasks.prefetch import CudaPrefetcher
from src.tasks.progress import format_rate
from src.tasks.resume_state import ResumeState

logger = logging.getLogger(__name__)

MakeForward = Callable[[nn.Module], Callable[[torch.Tensor], torch.Tensor]]


class SeededClassifier:
    """A classifier under several seeds of its random features, with the records of every image.

    Args:
        model: module (B, 3, size, size) -> (B, num_classes). If its attribute `has_random_features` is true it has
            `redraw_projections(seed)`.
        seeds: seeds of the random features; a model without random features takes one.
        redraw: draw the random features from the seeds; otherwise those of the model are kept, for one seed.
        make_forward: from `model`, on its device and in its dtype, to the function to evaluate; it has to read the
            projections where `model` has them. None (the default) evaluates `model` itself.
        name: of the attention, for error messages; None (the default) where there is one classifier.

    Attributes:
        image_records: from `start` on, the records of every image.
    """

    def __init__(
        self,
        model: nn.Module,
        seeds: Sequence[int],
        redraw: bool = True,
        make_forward: MakeForward | None = None,
        name: str | None = None,
    ) -> None:
        self.model = model
        self.seeds = list(seeds)
        self.redraw = redraw
        self.name = name
        self._make_forward = make_forward
        self.image_records: ImageRecords | None = None
        # for each seed, the model's projections and their values
        self._projections: list[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def start(self, num_images: int, num_classes: int, device: torch.device) -> None:
        """Allocate the records, and draw the random features of every seed once; a step then only copies them.

        Args:
            num_images: number of images of the test split, over all ranks.
            num_classes: number of classes.
            device: of the model.
        """
        # here and not in __init__: a trainer of precision bf16-true casts the records along with the model, and the
        # model gets its final device and dtype only now
        double = next(self.model.parameters()).dtype == torch.float64
        self.image_records = ImageRecords(
            num_images, num_classes, len(self.seeds), torch.float64 if double else torch.float32
        ).to(device)
        self._forward = self.model if self._make_forward is None else self._make_forward(self.model)
        self._projections = []
        for seed in self.seeds:
            if self.redraw and getattr(self.model, "has_random_features", False):
                self.model.redraw_projections(seed)
                buffers = [buffer for name, buffer in self.model.named_buffers() if name.endswith("projection_matrix")]
                self._projections.append([(buffer, buffer.clone()) for buffer in buffers])
            else:
                self._projections.append([])

    def compile(self, images: torch.Tensor) -> None:
        """Evaluate a batch without a record of it, which compiles the model for its shape."""
        self._forward(images)

    def step(self, images: torch.Tensor, targets: torch.Tensor, indices: torch.Tensor) -> None:
        """Evaluate a batch under every seed, without synchronisation with the device."""
        for seed_index, projections in enumerate(self._projections):
            for buffer, values in projections:
                buffer.copy_(values)
            self.image_records.update(seed_index, indices, self._forward(images), targets)


class ClassificationEvaluation(pl.LightningModule):
    """Evaluates one or several classifiers on every batch, so that each image is read once.

    A step does not synchronise with the device: the records stay there, and the next batch is copied meanwhile. A batch
    lacks the images that the loader skipped since they could not be decoded, and may be empty then.

    Args:
        classifiers: they may share modules and parameters.
        num_images: number of images of the test split, over all ranks.
        num_classes: number of classes.
        guard: from the name of a classifier to a context for its work, which may rewrite errors.
        resume_state: keeps what is evaluated on the disk, and says when to stop.
        device_times: whether `images_per_second` counts the device's time for each classifier alone, in place of the
            duration of the loop.
        compiles: whether the first call of each classifier compiles it, which is then logged and not timed.

    Attributes:
        stopped: after the test, whether it was stopped before its end, on any rank.
        evaluated: after the test, positions of the evaluated images, over all ranks.
        skipped: after the test, positions of the images that could not be decoded, over all ranks, and why.
        records: after the test, for each classifier the records of every evaluated image (on every rank), or None
            where there are none.
        seconds: duration of the whole pass on this rank, without the batches that were restored.
        seconds_of: for each classifier the time that its rate is based on, the first batch left out where there are
            more (it warms up).
        images_per_second: for each classifier its forward passes, of all ranks and seeds, over that time.
    """

    def __init__(
        self,
        classifiers: Sequence[SeededClassifier],
        num_images: int,
        num_classes: int,
        guard: Callable[[str | None], AbstractContextManager[None]],
        resume_state: ResumeState,
        device_times: bool,
        compiles: bool = False,
    ) -> None:
        super().__init__()
        self.models = nn.ModuleList(classifier.model for classifier in classifiers)
        self.classifiers = list(classifiers)
        self.num_images = num_images
        self.num_classes = num_classes
        self.stopped = False
        self.evaluated: Sequence[int] = range(num_images)
        self.skipped: dict[int, str] = {}
        self.records: list[Records | None] = []
        self.seconds = 0.0
        self.seconds_of: list[float] = []
        self.images_per_second: list[float] = []
        self._guard = guard
        self._resume_state = resume_state
        self._device_times = device_times
        self._compiles = compiles
        self._prefetcher: CudaPrefetcher | None = None

    def transfer_batch_to_device(
        self, batch: list[torch.Tensor], device: torch.device, dataloader_idx: int
    ) -> list[torch.Tensor]:
        """A batch on the device, copied while the device computes those before."""
        if self._prefetcher is None:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        return self._prefetcher(batch)

    def on_test_start(self) -> None:
        """Prepare the classifiers, restore what was evaluated before an interruption, and start the clock."""
        self._prefetcher = CudaPrefetcher(self.device) if self.device.type == "cuda" else None
        for classifier in self.classifiers:
            with self._guard(classifier.name):
                classifier.start(self.num_images, self.num_classes, self.device)
        self._resume_state.restore(self._tables())
        self.skipped = dict(self._resume_state.skipped)
        self._images_seen = self._images_of_first_batch = 0
        # of the first batch, and of those after it
        self._times = [[DeviceTime(self.device) for _ in self.classifiers] for _ in range(2)]
        self._clock_started = self._first_batch_started = self._first_batch_ended = seconds_now(self.device)

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Evaluate a batch (images, targets, indices) with every classifier under every seed."""
        if self._resume_state.stop_requested:
            self.stopped = True
            raise StopIteration  # ends the loop as its last batch does
        images, targets, indices = batch
        if len(images):
            is_first = self._images_seen == 0
            if is_first and self._compiles:
                self._compile(images)
            for classifier, time_of in zip(self.classifiers, self._times[not is_first], strict=True):
                with self._guard(classifier.name), time_of.measure() if self._device_times else nullcontext():
                    classifier.step(images, targets, indices)
            self._images_seen += len(images)
            if is_first:
                self._images_of_first_batch = len(images)
                self._first_batch_ended = seconds_now(self.device)
        loader = self.trainer.test_dataloaders
        skipped = loader.skipped[batch_idx] if isinstance(loader, ImageLoader) and loader.skipped else {}
        self.skipped |= skipped
        self._resume_state.add(batch_idx, indices, skipped)

    def _compile(self, images: torch.Tensor) -> None:
        logger.info("Compiling (eval.compile=true), which can take minutes")
        for classifier in self.classifiers:
            started = seconds_now(self.device)
            with self._guard(classifier.name):
                classifier.compile(images)
            name = "" if classifier.name is None else f" {classifier.name}"
            logger.info("Compiled%s in %.0f s", name, seconds_now(self.device) - started)
        self._first_batch_started = seconds_now(self.device)

    def progress_so_far(self) -> str:
        """Images per second of all ranks, and the top-1 accuracy on this one, for the progress bar.

        Waits for the device. Of several classifiers, the rate is of images that all have evaluated, and the accuracies
        are the lowest and the highest. Without labels it is the rate alone.
        """
        top1 = [float(table.top1_so_far()) for table in self._tables()]
        seen, started = self._timed_images()
        rate = seen * self.trainer.world_size / (time.perf_counter() - started)
        text = format_rate(rate * len(self.classifiers[0].seeds) if len(top1) == 1 else rate)
        if any(map(math.isnan, top1)):
            return text
        shown = f"{top1[0]:.2f}" if len(top1) == 1 else f"{min(top1):.2f} to {max(top1):.2f}"
        return f"{text}, top-1 {shown} %"

    def _timed_images(self) -> tuple[int, float]:
        """Number of images that rates are of, and when the first was started; the first batch where it is alone."""
        if self._images_seen > self._images_of_first_batch:
            return self._images_seen - self._images_of_first_batch, self._first_batch_ended
        return self._images_seen, self._first_batch_started

    def on_test_epoch_end(self) -> None:
        """Gather the records and the throughput of all ranks."""
        ended = seconds_now(self.device)
        self.seconds = ended - self._clock_started
        self._gather_stops_and_skips()
        seen, started = self._timed_images()
        times = self._times[seen < self._images_seen]
        self.seconds_of = [time_of.seconds() if self._device_times else ended - started for time_of in times]
        self.images_per_second = [
            self._sum_over_ranks(seen * len(classifier.seeds) / seconds if seconds else 0.0)
            for classifier, seconds in zip(self.classifiers, self.seconds_of, strict=True)
        ]
        self.records = [self._gather_records(table) for table in self._tables()]

    def _gather_stops_and_skips(self) -> None:
        """Share with all ranks whether any was stopped, and what each skipped; stopped ranks come here too."""
        self.stopped = bool(self._sum_over_ranks(float(self.stopped)))
        if self.stopped:
            self._resume_state.save()
        if self.trainer.world_size > 1:
            parts: list[dict[int, str]] = [{}] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, self.skipped)
            self.skipped = {index: reason for part in parts for index, reason in part.items()}
        for table in self._tables():
            table.partial, table.skipped = self.stopped, sorted(self.skipped)

    def _gather_records(self, table: ImageRecords) -> Records | None:
        """The records of all ranks; None where a stop or skipped images leave none."""
        try:
            records = table.compute()
        except UserError:
            if not self.stopped and not self.skipped:
                raise
            records = None
        self.evaluated = table.evaluated.nonzero()[:, 0].tolist()
        return records

    def _sum_over_ranks(self, value: float) -> float:
        return float(self.trainer.strategy.reduce(torch.tensor(value, device=self.device), reduce_op="sum"))

    def _tables(self) -> list[ImageRecords]:
        return [classifier.image_records for classifier in self.classifiers]
