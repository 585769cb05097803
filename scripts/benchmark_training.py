"""Time and memory of a training step of a T2T-ViT under each attention, beside full attention in the same run.

A step is what the training does with a batch that is on the device: forward, cross-entropy with soft targets, backward,
update by AdamW. In each round every attention runs in turn, alone on the device, the others' weights and optimizers
being in the host's memory meanwhile; the median of the rounds is reported. Memory is the peak of PyTorch's allocator
during the steps: images, weights, gradients, optimizer, and all that the step keeps; it is counted on CUDA alone.

    python scripts/benchmark_training.py --variant t2t_vit_t_14 --batch-size 256
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from scatterbrain.attention import ATTENTIONS, COMPARED
from scatterbrain.errors import UserError
from src.distributed.trainer import quiet_libraries
from src.models.t2t_vit import create_t2t_vit
from src.tasks.attention_info import attention_options
from src.tasks.build import check_swappable
from src.tasks.classification_training import ClassificationTraining
from src.utils.files import write_json
from src.utils.machine import machine_info
from src.utils.scripts import (
    Parser,
    check_writable,
    choose_device,
    comma_separated,
    figure,
    first_line,
    fraction,
    positive,
    progress_display,
    run_tool,
)
from src.utils.timing import in_turn, seconds_per_call

BASELINE = "full"
PRECISIONS = ("bf16-mixed", "32")
OPTIMIZER = Path(__file__).resolve().parents[1] / "configs" / "optimizer" / "adamw.yaml"
SEED = 0
# The first step compiles, where that is asked for, and fills the optimizer; the libraries choose kernels meanwhile.
WARM_UP_STEPS = 3


@dataclass
class Result:
    """Figures of one attention; those that could not be had are None.

    Attributes:
        attention: its name.
        options: window, features and scale in each token stage.
        out_of_memory: whether the device's memory was too small for it.
        milliseconds: of a step, median of the rounds.
        milliseconds_per_round: of a step, in each round.
        images_per_second: batch over the median.
        time_ratio_to_full: median over that of full attention.
        peak_memory_mib: peak of the device's memory.
        memory_ratio_to_full: that over the one of full attention.
        compile_seconds: of the first step, with the compilation; None where nothing is compiled.
    """

    attention: str
    options: list[dict[str, Any]]
    out_of_memory: bool
    milliseconds: float | None
    milliseconds_per_round: list[float]
    images_per_second: float | None
    time_ratio_to_full: float | None
    peak_memory_mib: float | None
    memory_ratio_to_full: float | None
    compile_seconds: float | None


class Candidate:
    """The training under one attention; all start from the same weights.

    Args:
        name: the attention.
        arguments: the options.
        device: where the steps run; between them everything waits in the host's memory.
    """

    def __init__(self, name: str, arguments: argparse.Namespace, device: torch.device) -> None:
        self.name = name
        self.device = device
        self.autocast = arguments.precision == "bf16-mixed"
        torch.manual_seed(SEED)
        stage = {"name": name, "memory_fraction": arguments.memory_fraction}
        model = create_t2t_vit(
            arguments.variant, [stage, stage], arguments.image_size, arguments.num_classes, seed=SEED
        ).train()
        self.options = attention_options(model)
        self.task = ClassificationTraining(
            model,
            arguments.num_classes,
            make_optimizer=hydra.utils.instantiate(OmegaConf.load(OPTIMIZER), _partial_=True),
            make_scheduler=lambda optimizer: None,
            compile_model=arguments.compile,
        )
        self.task.on_fit_start()
        self.task.on_train_epoch_start()
        self.optimizer = self.task.configure_optimizers()["optimizer"]
        self.compile_seconds: float | None = None
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


class Bench:
    """One run.

    Args:
        arguments: the options.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = choose_device(arguments.device)
        self.arguments = with_defaults(arguments, self.device)
        names = dict.fromkeys((BASELINE, *arguments.attentions))
        self.candidates = [Candidate(name, self.arguments, self.device) for name in names]
        self.batch = self.draw_batch()

    def draw_batch(self) -> list[torch.Tensor]:
        """Normal images and probabilities of the classes, the same in each run.

        Raises:
            UserError: they do not fit in memory.
        """
        arguments = self.arguments
        generator = torch.Generator(self.device).manual_seed(SEED)
        options = {"generator": generator, "device": self.device}
        shape = (arguments.batch_size, 3, arguments.image_size, arguments.image_size)
        try:
            targets = torch.randn(arguments.batch_size, arguments.num_classes, **options).softmax(-1)
            return [torch.randn(shape, **options), targets]
        except RuntimeError as error:
            raise UserError(f"--batch-size {arguments.batch_size}: not even the images fit. Lower it.") from error

    def run(self, console: Console) -> None:
        """Measure everything."""
        arguments = self.arguments
        with progress_display(console) as progress:
            task = progress.add_task("", total=len(self.candidates) * (1 + arguments.rounds))
            for candidate in self.candidates:
                progress.update(task, description=f"warming up {candidate.name}")
                self.measure(candidate, self.warm_up)
                progress.advance(task)
            running = [candidate for candidate in self.candidates if not candidate.out_of_memory]
            progress.update(task, total=len(self.candidates) + len(running) * arguments.rounds)
            for candidate in in_turn(running, arguments.rounds):
                progress.update(task, description=candidate.name)
                if not candidate.out_of_memory:
                    self.measure(candidate, self.time_round)
                progress.advance(task)

    def measure(self, candidate: Candidate, work: Callable[[Candidate], None]) -> None:
        """Do `work(candidate)` on the device; where its memory is too small, note it.

        Raises:
            UserError: a step fails for another reason.
        """
        try:
            with candidate.on_device():
                work(candidate)
        except torch.OutOfMemoryError:
            candidate.out_of_memory = True
        except RuntimeError as error:  # torch.compile without a compiler, a kernel that the device lacks
            raise UserError(f"{candidate.name} fails ({first_line(error)}).") from error

    def warm_up(self, candidate: Candidate) -> None:
        """First steps, which compile where that is asked for."""
        seconds = seconds_per_call(lambda: candidate.step(self.batch), 1, self.device)
        if self.arguments.compile:
            candidate.compile_seconds = seconds
        for _ in range(WARM_UP_STEPS - 1):
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

    def results(self) -> list[Result]:
        """Medians and ratios."""
        found = []
        for candidate in self.candidates:
            milliseconds = memory = None
            if not candidate.out_of_memory:
                milliseconds = statistics.median(candidate.milliseconds)
                memory = candidate.peak_bytes / 2**20 if candidate.peak_bytes else None
            full = found[0] if found else None
            full_milliseconds = milliseconds if full is None else full.milliseconds
            full_memory = memory if full is None else full.peak_memory_mib
            found.append(
                Result(
                    candidate.name,
                    candidate.options,
                    candidate.out_of_memory,
                    milliseconds,
                    [] if candidate.out_of_memory else candidate.milliseconds,
                    None if milliseconds is None else 1e3 * self.arguments.batch_size / milliseconds,
                    ratio(milliseconds, full_milliseconds),
                    memory,
                    ratio(memory, full_memory),
                    candidate.compile_seconds,
                )
            )
        return found


def ratio(value: float | None, reference: float | None) -> float | None:
    """`value` over `reference`, where there are both."""
    return None if value is None or reference is None else value / reference


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--variant", default="t2t_vit_t_7", metavar="NAME", help="one of t2t_vit_t_* (t2t_vit_t_7)")
    parser.add_argument(
        "--attentions",
        type=comma_separated(tuple(ATTENTIONS)),
        default=COMPARED,
        metavar="NAMES",
        help=f"separated by commas, beside {BASELINE}, which is always measured ({','.join(COMPARED)})",
    )
    parser.add_argument("--batch-size", type=positive, metavar="B", help="(256 on CUDA, 8 on the CPU)")
    parser.add_argument("--image-size", type=positive, default=224, metavar="N", help="in pixels (224)")
    parser.add_argument("--num-classes", type=positive, default=1000, metavar="N", help="(1000)")
    parser.add_argument("--precision", choices=PRECISIONS, help="(bf16-mixed on CUDA, 32 on the CPU)")
    parser.add_argument("--compile", action="store_true", help="run the steps through torch.compile")
    parser.add_argument("--rounds", type=positive, default=5, metavar="R", help="(5)")
    parser.add_argument("--steps-per-round", type=positive, default=5, metavar="S", help="(5)")
    parser.add_argument("--memory-fraction", type=fraction, default=1 / 32, metavar="F", help="budget (1/32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto: CUDA where it is)")
    parser.add_argument("--threads", type=positive, metavar="T", help="CPU threads (PyTorch's choice)")
    parser.add_argument("--output", metavar="FILE", help="write the figures as JSON")
    return parser


def with_defaults(arguments: argparse.Namespace, device: torch.device) -> argparse.Namespace:
    """The options, with those that depend on the device filled in.

    Raises:
        UserError: the variant is unknown, or its attention cannot be swapped.
    """
    check_swappable(arguments.variant)
    on_cuda = device.type == "cuda"
    filled = {
        "batch_size": arguments.batch_size or (256 if on_cuda else 8),
        "precision": arguments.precision or ("bf16-mixed" if on_cuda else "32"),
    }
    return argparse.Namespace(**{**vars(arguments), **filled, "device": device.type})


# Output ---------------------------------------------------------------------------------------------------------------


def result_table(bench: Bench) -> Table:
    """One row for each attention."""
    arguments = bench.arguments
    table = Table(
        title=f"Training step of {arguments.variant}: {arguments.image_size} px, batch {arguments.batch_size}, "
        f"{arguments.precision} on {arguments.device}{', compiled' if arguments.compile else ''}",
        title_justify="left",
    )
    table.add_column("attention", no_wrap=True)
    for header in ("ms", "images/s", "time/full", "MiB", "MiB/full", *(["compile s"] if arguments.compile else [])):
        table.add_column(header, justify="right", no_wrap=True)
    for result in bench.results():
        cells = [
            "out of memory" if result.out_of_memory else figure(result.milliseconds),
            *(
                "-" if value is None else form(value)
                for value, form in (
                    (result.images_per_second, figure),
                    (result.time_ratio_to_full, "{:.3f}".format),
                    (result.peak_memory_mib, figure),
                    (result.memory_ratio_to_full, "{:.3f}".format),
                )
            ),
        ]
        if arguments.compile:
            cells.append("-" if result.compile_seconds is None else figure(result.compile_seconds))
        table.add_row(result.attention, *cells)
    return table


def note(arguments: argparse.Namespace) -> str:
    """What is measured."""
    memory = "peak with that network alone on the device" if arguments.device == "cuda" else "not counted on the CPU"
    return (
        "A step is forward, cross-entropy, backward and AdamW's update, on images that are on the device. ms: median "
        f"of {arguments.rounds} rounds of {arguments.steps_per_round} steps, the attentions in turn; MiB: {memory}."
    )


def benchmark(arguments: argparse.Namespace) -> None:
    """Run the benchmark, print its table and write its file."""
    check_writable(arguments.output)
    quiet_libraries()
    bench = Bench(arguments)
    console = Console()
    bench.run(Console(stderr=True))
    console.print(result_table(bench))
    machine = machine_info(bench.device)
    info = ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)
    for line in (note(bench.arguments), info):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if arguments.output is not None:
        results = [asdict(result) for result in bench.results()]
        write_json(arguments.output, {"machine": machine, "settings": vars(bench.arguments), "results": results})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark that `argv` asks for; returns the exit status."""
    return run_tool(build_parser(), benchmark, argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted. Nothing was written.")
