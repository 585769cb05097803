"""The network benchmark: images per second, time and memory of each implementation, and whole evaluations."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import io
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from scatterbrain.errors import UserError
from src.analysis.benchmark.networks import KINDS, Implementation, build, choose
from src.analysis.benchmark.report import Bench, cell
from src.analysis.benchmark.timing import in_turn, median_ratio, seconds_per_call
from src.analysis.tools import choose_device, compose_config, digits, new_table, shown
from src.checkpoints.seeded_weights import save_seeded_checkpoint
from src.tasks.build import check_swappable
from src.utils.machine import machine_info
from src.utils.text import first_line

WARM_UP_CALLS = 3
# On CUDA calls are repeated until a sample takes this long: a few launches would show the queue, not the device.
MIN_SAMPLE_SECONDS = 0.05
# How long an evaluation should take, to average over the loop.
EVALUATION_SECONDS = 3.0


@dataclass
class Candidate:
    """An implementation at one batch, while it is measured."""

    implementation: Implementation
    call: Callable[[], torch.Tensor]
    first_call_seconds: float = 0.0
    peak_memory_mib: float | None = None
    number: int = 1
    milliseconds: list[float] = field(default_factory=list)

    def row(self, batch: int, published: Sequence[float] | None) -> dict[str, Any]:
        """Results for JSON; `published` is the time of the published implementation, uncompiled, in the same rounds."""
        median, item = statistics.median(self.milliseconds), self.implementation
        row = {"name": item.name, "kind": item.kind, "attention": item.attention, "batch": batch}
        row |= {"milliseconds": median, "milliseconds_per_round": self.milliseconds}
        row |= {"images_per_second": 1e3 * batch / median}
        row |= {"speed_over_published": published and median_ratio(published, self.milliseconds)}
        return row | {"peak_memory_mib": self.peak_memory_mib, "first_call_seconds": self.first_call_seconds}


class ModelBench(Bench):
    """One run, with the options of `scripts/benchmark_model.py`."""

    place = ("batch", "batch")

    def __init__(self, arguments: argparse.Namespace) -> None:
        device = choose_device(arguments.device)
        arguments = with_defaults(arguments, device)
        missing = [f"batch {batch}" for batch in arguments.batches]
        if arguments.end_to_end:
            missing += [f"evaluation {attention}" for attention in arguments.attentions]
        super().__init__(arguments, missing)
        self.implementations = choose(arguments, device)
        # before anything is measured: sizes that no network takes
        for attention in dict.fromkeys(each.attention for each in self.implementations):
            Implementation("module", attention).network(arguments)
        self.end_to_end: list[dict[str, Any]] = []

    def run(self, _: Console, save: Callable[[], None]) -> None:
        """Measure everything; `save` is called whenever a batch or an evaluation is complete."""
        arguments = self.arguments
        for batch in arguments.batches:
            rows = self.measure(batch)
            # all rows at once, whenever an interrupt comes
            self.results += rows
            self.missing.remove(f"batch {batch}")
            if self.results:
                save()
            if arguments.compile:
                torch._dynamo.reset()  # or it would keep what it has compiled, with the weights
            self.free()
        if not self.results:
            first = self.skipped[0]
            raise UserError(f"Nothing could be measured. {first['name']} at batch {first['batch']}: {first['reason']}.")
        if arguments.end_to_end:
            self.run_end_to_end(save)

    @torch.inference_mode()
    def measure(self, batch: int) -> list[dict[str, Any]]:
        """Rows of the implementations at one batch."""
        candidates = []
        for each in shown(self.implementations, f"batch {batch}: preparing"):
            candidate = self.attempt(lambda x=each: self.prepare(x, batch), each.name, batch)
            candidates += [] if candidate is None else [candidate]
        failed = set()
        repeats = self.arguments.repeats
        for candidate in shown(in_turn(candidates, repeats), f"batch {batch}", len(candidates) * repeats):
            name = candidate.implementation.name
            if name not in failed:
                seconds = self.attempt(lambda x=candidate: seconds_per_call(x.call, x.number, self.device), name, batch)
                candidate.milliseconds += [] if seconds is None else [1e3 * seconds]
                failed |= {name} if seconds is None else set()
        candidates = [candidate for candidate in candidates if candidate.implementation.name not in failed]
        published = next((x.milliseconds for x in candidates if x.implementation == Implementation("published")), None)
        return [candidate.row(batch, published) for candidate in candidates]

    def attempt(self, work: Callable[[], Any], name: str, batch: int) -> Any:
        """What `work` returns; None where it fails: the reason is noted, and the others can be measured."""
        try:
            return work()
        except Exception as error:  # compilers raise exceptions of many kinds
            memory = isinstance(error, torch.OutOfMemoryError)
            reason = "out of memory" if memory else f"{type(error).__name__}: {first_line(error)}"
        self.free()  # after the error, whose traceback holds what was built so far
        self.skipped.append({"name": name, "batch": batch, "reason": reason})
        return None

    def prepare(self, implementation: Implementation, batch: int) -> Candidate:
        """Build an implementation, warm it up, and count what it takes from the device."""
        on_cuda = self.device.type == "cuda"
        self.free()
        before = torch.cuda.memory_reserved() if on_cuda else 0
        with torch.inference_mode(False):  # weights that are tensors like any other
            forward = build(implementation, self.arguments, self.device)
        images = implementation.images(batch, self.arguments, self.device)
        candidate = Candidate(implementation, lambda: forward(images))
        begin = time.perf_counter()
        candidate.call()
        if on_cuda:
            torch.cuda.synchronize()
        candidate.first_call_seconds = time.perf_counter() - begin
        if on_cuda:
            for _ in range(WARM_UP_CALLS - 1):
                candidate.call()
            # from here on: compilers and the choice of kernels take memory of their own
            self.free()
            torch.cuda.reset_peak_memory_stats()
            candidate.call()
            torch.cuda.synchronize()
            candidate.peak_memory_mib = (torch.cuda.max_memory_reserved() - before) / 2**20
            seconds = seconds_per_call(candidate.call, WARM_UP_CALLS, self.device)
            candidate.number = max(1, math.ceil(MIN_SAMPLE_SECONDS / seconds))
        return candidate

    def free(self) -> None:
        """Return unused memory to the device."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def best(self) -> list[dict[str, Any]]:
        """Each implementation at the batch at which it is fastest, in their order."""
        found: dict[str, dict[str, Any]] = {}
        for row in self.results:
            if row["name"] not in found or row["images_per_second"] > found[row["name"]]["images_per_second"]:
                found[row["name"]] = row
        return [found[each.name] for each in self.implementations if each.name in found]

    # Whole evaluations ------------------------------------------------------------------------------------------------

    def run_end_to_end(self, save: Callable[[], None]) -> None:
        """Evaluate each attention, at the best batch of the fastest implementation that an evaluation can take."""
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder, "random.pth")
            arguments = self.arguments
            save_seeded_checkpoint(arguments.variant, arguments.num_classes, arguments.image_size, checkpoint)
            for attention in arguments.attentions:
                rows = [row for row in self.best() if row["attention"] == attention]
                rows = [row for row in rows if row["kind"] == "inference"] or rows
                if rows:
                    alone = max(rows, key=lambda row: row["images_per_second"])
                    work = functools.partial(self.evaluate, alone, checkpoint, Path(folder, attention))
                    found = self.attempt(work, f"evaluation {attention}", alone["batch"])
                    self.end_to_end += [] if found is None else [found]
                self.missing.remove(f"evaluation {attention}")
                save()
                self.free()

    def evaluate(self, alone: dict[str, Any], checkpoint: Path, output_dir: Path) -> dict[str, Any]:
        """One evaluation beside the row of the network alone."""
        # imported here: benchmarks of the network alone need none of it
        from src.tasks.evaluate import evaluate

        rate, batch = alone["images_per_second"], alone["batch"]
        num_images = batch * min(1000, max(3, math.ceil(EVALUATION_SECONDS * rate / batch)))
        output_dir.mkdir()
        config = self.compose(alone, num_images, checkpoint, output_dir)
        with contextlib.redirect_stdout(io.StringIO()):  # accuracies that mean nothing
            results, _ = evaluate(config)
        row = {"attention": alone["attention"], "implementation_alone": alone["name"], "batch": batch}
        row |= {"num_images": num_images, "images_per_second": results.images_per_second}
        row |= {"images_per_second_alone": rate, "ratio_to_alone": results.images_per_second / rate}
        return row | {"peak_memory_mib": results.peak_memory_mib}

    def compose(self, alone: dict[str, Any], num_images: int, checkpoint: Path, output_dir: Path) -> DictConfig:
        """The configuration of an evaluation, as its command line would give it."""
        arguments = self.arguments
        overrides = {"experiment": "synthetic-t2tvit-eval", "logger": "none", "model/t2tmodel": arguments.variant}
        overrides |= {"model/t2tattn_cfg": alone["attention"], "model.image_size": arguments.image_size}
        overrides |= {"model.num_classes": arguments.num_classes, "datamodule.batch_size": alone["batch"]}
        overrides |= {"datamodule.num_images": num_images}
        overrides |= {"datamodule.num_distinct": min(num_images, 4 * alone["batch"])}
        overrides |= {"trainer.accelerator": self.device.type, "trainer.precision": arguments.precision}
        overrides |= {"eval.compile": str("compiled" in alone["name"]).lower()}
        if alone["attention"] != "full":
            overrides["model.t2tattn1_cfg.memory_fraction"] = arguments.memory_fraction
        return compose_config(overrides, {"paths.output_dir": output_dir, "eval.ckpt": checkpoint})

    # Output -----------------------------------------------------------------------------------------------------------

    def tables(self) -> Iterator[Table]:
        """The implementations at their best batch, and the evaluations."""
        arguments = self.arguments
        title = f"{arguments.variant}: {arguments.image_size} px, {arguments.precision} on {arguments.device}"
        columns = ("implementation", "batch", "images/s", "ms", "MiB", "times\npublished", "first\ncall s")
        keys = ("images_per_second", "milliseconds", "peak_memory_mib", "speed_over_published", "first_call_seconds")
        table = new_table(title, columns, columns[:1])
        for row in self.best():
            table.add_row(row["name"], str(row["batch"]), *(cell(row[key], digits) for key in keys))
        yield table
        if self.end_to_end:
            columns = ("attention", "batch", "images", "images/s", "network\nalone", "part of it", "MiB")
            table = new_table("Whole evaluations of images in memory", columns, columns[:1])
            for row in self.end_to_end:
                counts = (str(row["batch"]), f"{row['num_images']:,}")
                rates = (digits(row["images_per_second"]), digits(row["images_per_second_alone"]))
                ratio, memory = f"{row['ratio_to_alone']:.3f}", cell(row["peak_memory_mib"], digits)
                table.add_row(row["attention"], *counts, *rates, ratio, memory)
            yield table

    def more(self) -> dict[str, Any]:
        """Best batches and evaluations, for JSON."""
        return {"best_batch": {row["name"]: row["batch"] for row in self.best()}, "end_to_end": self.end_to_end}

    def draw(self) -> Figure:
        """Bars of the images per second of each implementation at its best batch."""
        best, info = self.best(), machine_info(self.device)
        machine = info["gpu"] or f"{info['processor']}, {info['threads']} threads"
        colours = dict(zip(KINDS, ("black", "tab:blue", "tab:red", "grey"), strict=True))
        drawing = Figure(figsize=(9, 1.2 + 0.35 * len(best)), layout="constrained")
        axis, rates = drawing.subplots(), [row["images_per_second"] for row in best]
        bars = axis.barh([row["name"] for row in best], rates, color=[colours[row["kind"]] for row in best])
        labels = [f"{digits(rate)} (batch {row['batch']})" for rate, row in zip(rates, best, strict=True)]
        axis.bar_label(bars, labels, padding=3, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.3)
        axis.set_xlabel("images per second")
        arguments = self.arguments
        axis.set_title(f"{arguments.variant}, {arguments.image_size} px, {arguments.precision} on {machine}")
        return drawing


def with_defaults(arguments: argparse.Namespace, device: torch.device) -> argparse.Namespace:
    """The options, with those that depend on others filled in."""
    check_swappable(arguments.variant)
    batches, precision = ((32, 128, 256, 512), "bf16-true") if device.type == "cuda" else ((8,), "32-true")
    filled = {"batches": arguments.batches or batches, "precision": arguments.precision or precision}
    return argparse.Namespace(**{**vars(arguments), **filled, "device": device.type})
