"""Image classification: what a test step and its metrics are, for one model and for several at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import pytorch_lightning as pl
import torch
from torch import nn

from scatterbrain.errors import UserError
from src.datamodules.dataset import ImageLoader
from src.evaluation.results import Records, summarise
from src.tasks.device_time import DeviceTime
from src.tasks.provenance import seconds_now
from src.tasks.records import ImageRecords
from src.tasks.transfer import OverlappedTransfer
from src.tasks.unfinished import UnfinishedEvaluation

MakeForward = Callable[[nn.Module], Callable[[torch.Tensor], torch.Tensor]]


class Draws:
    """A classifier under several draws of its random features, and what is kept of every image.

    Args:
        model: module (B, 3, size, size) -> (B, num_classes). If its attribute `has_random_features` is true it has
            `redraw_projections(seed)`.
        seeds: one seed for each draw; a model without random features takes one.
        redraw: draw the random features from the seeds; otherwise those that the model has are kept, for one seed.
        make_forward: from `model`, on its device and in its dtype, to the function that is evaluated in its place; it
            has to read the rows of random features where `model` has them. None evaluates `model` itself.

    Attributes:
        image_records: what is kept, from `start` on.
    """

    def __init__(
        self, model: nn.Module, seeds: Sequence[int], redraw: bool = True, make_forward: MakeForward | None = None
    ) -> None:
        self.model = model
        self.seeds = list(seeds)
        self.redraw = redraw
        self._make_forward = make_forward
        self.image_records: ImageRecords | None = None
        self._rows: list[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def start(self, num_images: int, num_classes: int, device: torch.device) -> None:
        """Make room for the records, and draw the random features of every seed once; a step then only copies them.

        Args:
            num_images: number of images of the test split, over all processes.
            num_classes: number of classes.
            device: where the model is.
        """
        # made here: before, a trainer of precision bf16-true would have cast them along with the model, and the model
        # would not have been where and what it is when it runs
        double = next(self.model.parameters()).dtype == torch.float64
        self.image_records = ImageRecords(
            num_images, num_classes, len(self.seeds), torch.float64 if double else torch.float32
        ).to(device)
        self._forward = self.model if self._make_forward is None else self._make_forward(self.model)
        self._rows = []
        for seed in self.seeds:
            if self.redraw and getattr(self.model, "has_random_features", False):
                self.model.redraw_projections(seed)
                rows = [buffer for name, buffer in self.model.named_buffers() if name.endswith("projection_matrix")]
                self._rows.append([(buffer, buffer.clone()) for buffer in rows])
            else:
                self._rows.append([])

    def step(self, images: torch.Tensor, targets: torch.Tensor, indices: torch.Tensor) -> None:
        """Evaluate a batch under every draw; waits for nothing."""
        for draw, rows in enumerate(self._rows):
            for buffer, drawn in rows:
                buffer.copy_(drawn)
            self.image_records.update(draw, indices, self._forward(images), targets)


class Classification(pl.LightningModule):
    """How batches reach the device, and how an evaluation is kept, stopped and gone on with.

    A batch lacks the images that its loader left out since they could not be decoded, and may be empty then.

    Args:
        num_images: number of images of the test split, over all processes.
        unfinished: what is finished of the evaluation; None keeps nothing and stops for nobody.

    Attributes:
        stopped: after the test, whether it was stopped before its end, in any of the processes.
        evaluated: after the test, positions of the images that were evaluated, over all processes.
        skipped: after the test, positions of the images that could not be decoded, over all processes, and why.
    """

    _transfer: OverlappedTransfer | None = None

    def __init__(self, num_images: int, unfinished: UnfinishedEvaluation | None) -> None:
        super().__init__()
        self.num_images = num_images
        self.stopped = False
        self.evaluated: Sequence[int] = range(num_images)
        self.skipped: dict[int, str] = {}
        self._unfinished = unfinished

    def on_test_start(self) -> None:
        """Get ready for batches on their way."""
        self._transfer = OverlappedTransfer(self.device) if self.device.type == "cuda" else None

    def transfer_batch_to_device(
        self, batch: list[torch.Tensor], device: torch.device, dataloader_idx: int
    ) -> list[torch.Tensor]:
        """Copy a batch while the device computes those before."""
        if self._transfer is None:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        return self._transfer(batch)

    def _start(self, tables: Sequence[ImageRecords]) -> None:
        """Fill in what is finished already."""
        self.skipped = {}
        if self._unfinished is not None:
            self._unfinished.start(tables)
            self.skipped |= self._unfinished.skipped

    def _leave_if_asked(self) -> None:
        """End the loop, which goes on to its end of the epoch then."""
        if self._unfinished is not None and self._unfinished.asked_to_stop:
            self.stopped = True
            raise StopIteration

    def _keep(self, batch_idx: int, indices: torch.Tensor) -> None:
        """Take note of a batch, and of the images that are missing in it."""
        loader = self.trainer.test_dataloaders
        skipped = loader.skipped[batch_idx] if isinstance(loader, ImageLoader) and loader.skipped else {}
        self.skipped |= skipped
        if self._unfinished is not None:
            self._unfinished.add(batch_idx, indices, skipped)

    def _agree(self, tables: Sequence[ImageRecords]) -> None:
        """Let all processes know whether any was stopped, and what each skipped.

        Nobody waits for a stopped one in vain, as all come here.
        """
        if self._unfinished is not None:
            stopped = torch.tensor(float(self.stopped), device=self.device)
            self.stopped = bool(self.trainer.strategy.reduce(stopped, reduce_op="sum"))
            if self.stopped:
                self._unfinished.save()
        if self.trainer.world_size > 1:
            parts: list[dict[int, str]] = [{}] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, self.skipped)
            self.skipped = {index: reason for part in parts for index, reason in part.items()}
        for table in tables:
            table.partial, table.skipped = self.stopped, sorted(self.skipped)

    def _records_of(self, table: ImageRecords) -> Records | None:
        """The table over all processes; None where it is empty since they were stopped, or skipped every image."""
        try:
            records = table.compute()
        except UserError:
            if not self.stopped and not self.skipped:
                raise
            records = None
        self.evaluated = table.evaluated.nonzero()[:, 0].tolist()
        return records


class ImageClassification(Classification):
    """Evaluates a classifier, over several draws of its random features where it has any.

    A step asks the device for its work and waits for nothing: what is counted stays on the device, and the next batch
    is copied there meanwhile.

    Args:
        model: see `Draws`, as for `seeds`, `redraw` and `make_forward`.
        num_images: number of images of the test split, over all processes.
        num_classes: number of classes.
        seeds: one seed for each draw.
        redraw: draw the random features from the seeds.
        make_forward: from `model` to the function that is evaluated in its place.
        unfinished: see `Classification`.

    Attributes:
        stopped, evaluated: see `Classification`.
        records: after the test, what was kept of every image that was evaluated (on every process); None where there
            is none.
        seconds: duration of the test loop, the first batch with images left out where there are more (it warms up),
            and those that were finished before.
        images_per_second: forward passes of all processes and draws over that duration.
    """

    def __init__(
        self,
        model: nn.Module,
        num_images: int,
        num_classes: int,
        seeds: Sequence[int],
        redraw: bool = True,
        make_forward: MakeForward | None = None,
        unfinished: UnfinishedEvaluation | None = None,
    ) -> None:
        super().__init__(num_images, unfinished)
        self.model = model
        self.num_classes = num_classes
        self.records: Records | None = None
        self.seconds = 0.0
        self.images_per_second = 0.0
        self._draws = Draws(model, seeds, redraw, make_forward)

    @property
    def image_records(self) -> ImageRecords | None:
        """What is kept of every image, from the start of the test on."""
        return self._draws.image_records

    def on_test_start(self) -> None:
        """Make room for the records, and draw the random features of every seed."""
        super().on_test_start()
        self._draws.start(self.num_images, self.num_classes, self.device)
        self._start([self.image_records])
        self._images_seen = self._images_of_first_batch = 0
        self._clock_started = seconds_now(self.device)

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Evaluate a batch (images, targets, indices) under every draw."""
        self._leave_if_asked()
        images, targets, indices = batch
        if len(images):
            is_first = self._images_seen == 0
            self._draws.step(images, targets, indices)
            self._images_seen += len(images) * len(self._draws.seeds)
            if is_first:
                self._first_batch_ended = seconds_now(self.device)
                self._images_of_first_batch = self._images_seen
        self._keep(batch_idx, indices)

    def progress_so_far(self) -> str:
        """Rate and top-1 accuracy of this process, draws taken together, for the progress bar; waits for the device."""
        top1 = float(self.image_records.top1_so_far())
        rate = self._images_seen / (time.perf_counter() - self._clock_started)
        return f"{rate:,.1f} images/s, top-1 {top1:.2f} %"

    def on_test_epoch_end(self) -> None:
        """Gather the records of all processes, and the throughput."""
        ended = seconds_now(self.device)
        self._agree([self.image_records])
        start, seen = self._clock_started, self._images_seen
        if seen > self._images_of_first_batch:
            start, seen = self._first_batch_ended, seen - self._images_of_first_batch
        self.seconds = ended - start
        rate = torch.tensor(seen / self.seconds if seen else 0.0, device=self.device)
        self.images_per_second = float(self.trainer.strategy.reduce(rate, reduce_op="sum"))
        self.records = self._records_of(self.image_records)
        if self.stopped or self.records is None:  # figures of a part are for no logger
            return
        figures = summarise(self.records)
        self.log_dict({f"test/{name}": figures[name] for name in ("top1", "top5", "loss")}, sync_dist=True)


class SeveralClassifications(Classification):
    """Evaluates several classifiers in one pass over the images, each of which is read once.

    Args:
        draws: name to classifier and draws. They may share modules and parameters.
        num_images: number of images of the test split, over all processes.
        num_classes: number of classes.
        guard: from a name to a context in which the work on that classifier is done; it can turn what fails into an
            error with that name.
        unfinished: see `Classification`.

    Attributes:
        stopped, evaluated: see `Classification`.
        records: after the test, name to what was kept of every image that was evaluated (on every process), or None
            where there is none.
        device_seconds: name to the time that the device took for that classifier, its forward passes and what is
            counted of them; the first batch is left out where there are more (it warms up).
        images_per_second: name to its forward passes, of all processes and draws, over that time.
        seconds: duration of the whole pass on this process.
    """

    def __init__(
        self,
        draws: Mapping[str, Draws],
        num_images: int,
        num_classes: int,
        guard: Callable[[str], AbstractContextManager[None]],
        unfinished: UnfinishedEvaluation | None = None,
    ) -> None:
        super().__init__(num_images, unfinished)
        self.models = nn.ModuleList(classifier.model for classifier in draws.values())
        self.draws = dict(draws)
        self.num_classes = num_classes
        self._guard = guard
        self.records: dict[str, Records | None] = {}
        self.device_seconds: dict[str, float] = {}
        self.images_per_second: dict[str, float] = {}
        self.seconds = 0.0

    def on_test_start(self) -> None:
        """Make room for the records of all classifiers."""
        super().on_test_start()
        for name, draws in self.draws.items():
            with self._guard(name):
                draws.start(self.num_images, self.num_classes, self.device)
        self._start(self._tables())
        self._first, self._rest = ({name: DeviceTime(self.device) for name in self.draws} for _ in range(2))
        self._images_of_first_batch = self._images_seen = 0
        self._clock_started = seconds_now(self.device)

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Evaluate a batch (images, targets, indices) with every classifier under every draw."""
        self._leave_if_asked()
        images, targets, indices = batch
        if len(images):
            is_first = self._images_seen == 0
            times = self._first if is_first else self._rest
            for name, draws in self.draws.items():
                with self._guard(name), times[name].measure():
                    draws.step(images, targets, indices)
            self._images_seen += len(images)
            if is_first:
                self._images_of_first_batch = len(images)
        self._keep(batch_idx, indices)

    def progress_so_far(self) -> str:
        """Rate of this process and top-1 accuracy of each classifier, for the progress bar; waits for the device."""
        top1 = [f"{float(draws.image_records.top1_so_far()):.2f}" for draws in self.draws.values()]
        rate = self._images_seen / (time.perf_counter() - self._clock_started)
        number = f"{len(top1)} attention" + ("s" if len(top1) > 1 else "")
        return f"{rate:,.1f} images/s with {number}, top-1 {' / '.join(top1)} %"

    def on_test_epoch_end(self) -> None:
        """Gather the records of all processes, and the throughput."""
        self.seconds = seconds_now(self.device) - self._clock_started
        self._agree(self._tables())
        seen, times = self._images_seen - self._images_of_first_batch, self._rest
        if seen == 0:
            seen, times = self._images_seen, self._first
        for name, draws in self.draws.items():
            self.device_seconds[name] = seconds = times[name].seconds()
            rate = torch.tensor(seen * len(draws.seeds) / seconds if seconds else 0.0, device=self.device)
            self.images_per_second[name] = float(self.trainer.strategy.reduce(rate, reduce_op="sum"))
            self.records[name] = self._records_of(draws.image_records)

    def _tables(self) -> list[ImageRecords]:
        return [draws.image_records for draws in self.draws.values()]
