"""The benchmark of training steps: what a step is, its time and its memory."""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import OmegaConf
from rich.table import Table

from scatterbrain.errors import UserError
from src.analysis.benchmark.networks import SEED, Implementation
from src.analysis.benchmark.report import cell
from src.analysis.benchmark.timing import in_turn, seconds_per_call
from src.analysis.tools import choose_device, digits, new_table, shown
from src.tasks.attention_info import attention_options
from src.tasks.build import check_swappable
from src.tasks.classification_training import ClassificationTraining
from src.utils.text import first_line

BASELINE = "full"
PRECISIONS = ("bf16-mixed", "32")
OPTIMIZER = Path(__file__).resolve().parents[3] / "configs" / "optimizer" / "adamw.yaml"
# The first step fills the optimizer; the libraries choose kernels meanwhile.
WARM_UP_STEPS = 3


class Candidate:
    """The training under one attention; all start from the same weights, and wait in the host's memory."""

    def __init__(self, name: str, arguments: argparse.Namespace, device: torch.device) -> None:
        self.name = name
        self.device = device
        self.autocast = arguments.precision == "bf16-mixed"
        model = Implementation("module", name).network(arguments).train()
        self.options = attention_options(model)
        makers = {"make_optimizer": hydra.utils.instantiate(OmegaConf.load(OPTIMIZER), _partial_=True)}
        makers["make_scheduler"] = lambda optimizer: None
        self.task = ClassificationTraining(model, arguments.num_classes, **makers)
        self.task.on_fit_start()
        self.task.on_train_epoch_start()
        self.optimizer = self.task.configure_optimizers()["optimizer"]
        self.out_of_memory = False
        self.milliseconds: list[float] = []
        self.peak_bytes = 0

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Everything on the device, and nothing of it left there afterwards."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the allocator as a training of its own would find it
        try:
            self._move(self.device)
            yield
        finally:
            self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        self.task.to(device)
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # takes the state to where the weights are

    def step(self, batch: list[torch.Tensor]) -> None:
        """One update, in Lightning's order: the gradients of the step before are still there during forward."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.task.training_step(batch, 0)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class TrainingBench:
    """One run, with the options of `scripts/benchmark_training.py`."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        check_swappable(arguments.variant)
        self.device = choose_device(arguments.device)
        on_cuda = self.device.type == "cuda"
        arguments.batch_size = arguments.batch_size or (256 if on_cuda else 8)
        arguments.precision = arguments.precision or ("bf16-mixed" if on_cuda else "32")
        self.arguments = arguments
        names = dict.fromkeys((BASELINE, *arguments.attentions))
        self.candidates = [Candidate(name, arguments, self.device) for name in names]
        self.batch = self.draw_batch()

    def draw_batch(self) -> list[torch.Tensor]:
        """Normal images and probabilities of the classes, the same in each run."""
        size, batch_size = self.arguments.image_size, self.arguments.batch_size
        options = {"generator": torch.Generator(self.device).manual_seed(SEED), "device": self.device}
        try:
            targets = torch.randn(batch_size, self.arguments.num_classes, **options).softmax(-1)
            return [torch.randn(batch_size, 3, size, size, **options), targets]
        except RuntimeError as error:
            raise UserError(f"--batch-size {batch_size}: not even the images fit. Lower it.") from error

    def run(self) -> None:
        """Measure everything."""
        for candidate in shown(self.candidates, "Warming up"):
            self.measure(candidate, self.warm_up)
        running = [candidate for candidate in self.candidates if not candidate.out_of_memory]
        rounds = self.arguments.rounds
        for candidate in shown(in_turn(running, rounds), "Timing", len(running) * rounds):
            if not candidate.out_of_memory:
                self.measure(candidate, self.time_round)

    def measure(self, candidate: Candidate, work: Callable[[Candidate], None]) -> None:
        """Do `work(candidate)` on the device; where its memory is too small, note it."""
        try:
            with candidate.on_device():
                work(candidate)
        except torch.OutOfMemoryError:
            candidate.out_of_memory = True
        except RuntimeError as error:  # such as a kernel that the device lacks
            raise UserError(f"{candidate.name} fails ({first_line(error)}).") from error

    def warm_up(self, candidate: Candidate) -> None:
        """First steps."""
        for _ in range(WARM_UP_STEPS):
            candidate.step(self.batch)

    def time_round(self, candidate: Candidate) -> None:
        """Time and memory of some steps, after one that takes its memory from the system again."""
        candidate.step(self.batch)
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        number = self.arguments.steps_per_round
        seconds = seconds_per_call(lambda: candidate.step(self.batch), number, self.device)
        candidate.milliseconds.append(1e3 * seconds)
        if on_cuda:
            candidate.peak_bytes = max(candidate.peak_bytes, torch.cuda.max_memory_allocated())

    def results(self) -> list[dict[str, Any]]:
        """A row for each attention; None for what cannot be had."""
        rows: list[dict[str, Any]] = []
        for candidate in self.candidates:
            milliseconds = memory = None
            if not candidate.out_of_memory:
                milliseconds = statistics.median(candidate.milliseconds)
                memory = candidate.peak_bytes / 2**20 if candidate.peak_bytes else None
            full = rows[0] if rows else {"milliseconds": milliseconds, "peak_memory_mib": memory}
            row = {"attention": candidate.name, "options": candidate.options, "out_of_memory": candidate.out_of_memory}
            row |= {"milliseconds": milliseconds}
            row |= {"milliseconds_per_round": [] if candidate.out_of_memory else candidate.milliseconds}
            row |= {"images_per_second": milliseconds and 1e3 * self.arguments.batch_size / milliseconds}
            row |= {"time_ratio_to_full": ratio(milliseconds, full["milliseconds"]), "peak_memory_mib": memory}
            rows.append(row | {"memory_ratio_to_full": ratio(memory, full["peak_memory_mib"])})
        return rows

    def table(self) -> Table:
        """One row for each attention."""
        arguments = self.arguments
        shapes: dict[str, tuple[str, Callable[[float], str]]] = {
            "ms": ("milliseconds", digits),
            "images/s": ("images_per_second", digits),
            "time/full": ("time_ratio_to_full", "{:.3f}".format),
            "MiB": ("peak_memory_mib", digits),
            "MiB/full": ("memory_ratio_to_full", "{:.3f}".format),
        }
        title = f"Training step of {arguments.variant}: {arguments.image_size} px, batch {arguments.batch_size}, "
        title += f"{arguments.precision} on {self.device.type}"
        table = new_table(title, ["attention", *shapes], ["attention"])
        for row in self.results():
            cells = [cell(row[key], shape) for key, shape in shapes.values()]
            table.add_row(row["attention"], "out of memory" if row["out_of_memory"] else cells[0], *cells[1:])
        return table


def ratio(value: float | None, baseline: float | None) -> float | None:
    """`value` over `baseline`, where there are both."""
    return None if value is None or baseline is None else value / baseline
