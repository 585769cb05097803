"""What accuracy, agreement with full attention and output error each attention has for its memory: a curve for each.

A T2T-ViT that was trained with full attention has it swapped in both token stages for one of each kind, at several
memory budgets and draws of what is random. Every photograph runs through it: top-1 accuracy, and the share of
photographs whose first prediction is that of full attention. Some photographs, spread evenly, give the relative
Frobenius error of the output of each stage, on the queries, keys and values of the network with full attention, so
that stage 2 is not judged on what stage 1 has left. Memory is what the attention really takes by the rule of
`scatterbrain.ops.common.budget`; block-sparse attentions and Reformer take more than their budget.

Ctrl-C and SIGTERM end the run with the configurations that are complete by then. --output is written after each
attention, with "complete": false until all are done. On CUDA, --jobs processes first fill Triton's cache on disk.

    python scripts/experiment_memory.py --checkpoint FILE --data-dir data/flowers --figure memory.png
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from scatterbrain.attention import ATTENTIONS, attention_memory, create_attention
from scatterbrain.attention.base import AttentionModule
from scatterbrain.errors import UserError, check_whole_number
from scatterbrain.ops.common.budget import budget_columns
from scripts.experiment_regimes import COLOURS, FAINT, INK, mean_and_deviation, positive_numbers, style
from scripts.measure_approximation import open_split, spread
from src.datamodules.dataset import ImageFolderDataset
from src.models.inference import inference_form
from src.models.modules.tokens_to_token import STAGE_DIMS, TOKEN_DIM, stage_lengths
from src.models.t2t_vit import T2TViT
from src.tasks.approximation import (
    StageInputs,
    capture_stage_inputs,
    create_stage_attentions,
    load_model,
    relative_error,
)
from src.tasks.attention_info import attention_memory_fraction
from src.tasks.environment import package_versions
from src.tasks.options import MAX_SEED
from src.utils.files import sha256_of_file, write_json
from src.utils.machine import machine_info, usable_cpus
from src.utils.scripts import (
    Parser,
    check_figure,
    check_writable,
    choose_device,
    comma_separated,
    compile_ahead,
    console_for_tables,
    default_jobs,
    first_line,
    positive,
    progress_display,
    run_tool,
    save_figure,
    saved_until_stopped,
)

# Full attention has no budget, and is what the others are compared with.
BUDGETED = tuple(name for name, kind in ATTENTIONS.items() if kind.fit is not None)
MEMORY_FRACTIONS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)
# drawn strong, in the order of the legend; the others are thin
STRONG = ("local", "performer", "sblocal", "cluster", "pairedcluster")
ERROR_TICKS = [digit * 10.0**power for power in range(-4, 3) for digit in (1, 2, 5)]
# of the table where it is not shown on a terminal
WIDTH = 120

Row = dict[str, Any]


def memory_fractions(text: str) -> tuple[float, ...]:
    """Type of an option that takes memory fractions, such as 1/32 or 0.1, separated by commas, ascending."""
    fractions = positive_numbers(text)
    if fractions[-1] > 1:
        raise argparse.ArgumentTypeError(f"'{text}' holds a fraction above 1, more than full attention has")
    return fractions


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="of one of the t2t_vit_t_* variants")
    parser.add_argument("--data-dir", required=True, metavar="DIR", help="folder that holds the split's folder")
    parser.add_argument("--split", default="val", metavar="NAME", help="folder of the class folders (val)")
    parser.add_argument(
        "--attentions",
        type=comma_separated(BUDGETED),
        default=BUDGETED,
        metavar="NAMES",
        help=f"separated by commas; full attention is always the reference ({','.join(BUDGETED)})",
    )
    parser.add_argument(
        "--memory-fractions",
        type=memory_fractions,
        default=MEMORY_FRACTIONS,
        metavar="F,...",
        help="budgets (1/64,1/32,1/16,1/8,1/4)",
    )
    parser.add_argument("--num-draws", type=positive, default=3, metavar="K", help="draws of what is random (3)")
    parser.add_argument("--limit", type=positive, metavar="N", help="take N photographs, spread evenly, not all")
    parser.add_argument(
        "--error-images", type=positive, default=16, metavar="N", help="photographs of the output errors (16)"
    )
    parser.add_argument("--batch-size", type=positive, metavar="B", help="(64 on CUDA, 8 on the CPU)")
    parser.add_argument("--seed", type=int, default=1111, metavar="N", help="of the first draw (1111)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto: CUDA where it is)")
    parser.add_argument("--threads", type=positive, metavar="T", help="CPU threads (PyTorch's choice)")
    parser.add_argument(
        "--jobs",
        type=positive,
        default=default_jobs(),
        metavar="J",
        help="processes that compile kernels ahead on CUDA, 1 for none (as many as usable CPUs, 8 at most)",
    )
    parser.add_argument("--output", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--figure", metavar="FILE", help="draw them: .png, .pdf or .svg")
    return parser


# Photographs and reference --------------------------------------------------------------------------------------------


def load_photographs(dataset: ImageFolderDataset, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode photographs, each once.

    Args:
        dataset: with a transform that gives tensors.
        positions: in the dataset.

    Returns:
        Images (B, 3, size, size) in channels-last memory, which the inference form reads as it is, and labels (B,).

    Raises:
        UserError: a file cannot be decoded.
    """
    with ThreadPoolExecutor(usable_cpus()) as pool:
        items = list(pool.map(dataset.__getitem__, positions))
    images = torch.stack([image for image, _, _ in items]).contiguous(memory_format=torch.channels_last)
    return images, torch.tensor([label for _, label, _ in items])


@contextlib.contextmanager
def swapped(model: T2TViT, attentions: Sequence[AttentionModule]) -> Iterator[T2TViT]:
    """The model with other attentions in its token stages, and with its own again afterwards."""
    stages = (model.patch_embed.attention1, model.patch_embed.attention2)
    own = model.token_attentions
    try:
        for stage, attention in zip(stages, attentions, strict=True):
            stage.attn.attention = attention
        yield model
    finally:
        for stage, attention in zip(stages, own, strict=True):
            stage.attn.attention = attention


@torch.no_grad()
def predict(model: T2TViT, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """First predictions (B,) of a model in its inference form, on its device; nothing waits for the device."""
    form = inference_form(model)
    return torch.cat([form(part).argmax(1) for part in images.split(batch_size)])


@dataclass(frozen=True)
class Reference:
    """The network with full attention, the photographs, and what it makes of them.

    Attributes:
        model: with full attention in both token stages.
        images: (B, 3, size, size), normalised, on the device of the model.
        labels: (B,), likewise.
        batch_size: of all calls.
        predictions: (B,), the first of each photograph.
        stages: inputs of both stages, by batch, of the photographs of the output errors.
        outputs: of full attention, likewise.
    """

    model: T2TViT
    images: torch.Tensor
    labels: torch.Tensor
    batch_size: int
    predictions: torch.Tensor
    stages: tuple[tuple[StageInputs, StageInputs], ...]
    outputs: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: T2TViT,
        images: torch.Tensor,
        labels: torch.Tensor,
        error_images: int = 16,
        batch_size: int = 8,
    ) -> Reference:
        """Run a network with full attention.

        Args:
            model: with full attention, in evaluation mode.
            images: (B, 3, size, size), normalised.
            labels: (B,).
            error_images: photographs of the output errors, spread evenly; all where there are fewer.
            batch_size: of all calls.

        Raises:
            UserError: the token stages have another attention.
        """
        chosen = images[spread(len(images), error_images)].split(batch_size)
        stages = tuple(capture_stage_inputs(model, part) for part in chosen)
        outputs = tuple(
            tuple(
                attention(x.query, x.key, x.value)[0] for attention, x in zip(model.token_attentions, pair, strict=True)
            )
            for pair in stages
        )
        return cls(model, images, labels, batch_size, predict(model, images, batch_size), stages, outputs)

    @property
    def num_error_images(self) -> int:
        """Number of photographs of the output errors."""
        return sum(len(pair[0].query) for pair in self.stages)

    @property
    def top1(self) -> float:
        """Accuracy of full attention in percent."""
        return percent(self.predictions == self.labels)

    def output_errors(self, attentions: Sequence[AttentionModule]) -> list[float]:
        """Relative Frobenius error of the output of each stage, mean over photographs."""
        found = []
        for stage, attention in enumerate(attentions):
            errors = [
                relative_error(attention(x.query, x.key, x.value)[0], full)
                for x, full in (
                    (pair[stage], outputs[stage]) for pair, outputs in zip(self.stages, self.outputs, strict=True)
                )
            ]
            found.append(torch.cat(errors).mean())
        return torch.stack(found).tolist()


def percent(hits: torch.Tensor) -> float:
    """Share of the entries that are true, in percent."""
    return 100 * hits.sum().item() / len(hits)


# Measuring ------------------------------------------------------------------------------------------------------------


def is_random(attention: str) -> bool:
    """Whether an attention has anything that is drawn again."""
    return hasattr(ATTENTIONS[attention].module, "redraw_projection")


def draws_of(values: Sequence[float]) -> Row:
    """`mean` and sample deviation `std` (None of one draw) of the values of all `draws`."""
    return {**mean_and_deviation(torch.tensor(values, dtype=torch.float64)), "draws": list(values)}


@torch.no_grad()
def measure_point(
    reference: Reference,
    attention: str,
    memory_fraction: float,
    seeds: Sequence[int],
    tell: Callable[[str], None] = lambda _: None,
) -> Row:
    """Everything about one attention at one budget.

    Args:
        reference: what it is compared with.
        attention: its name.
        memory_fraction: budget.
        seeds: one for each draw.
        tell: called with what is being measured.

    Returns:
        `attention`, `memory_fraction`, `seeds`; `memory` over that of full attention in both stages together; `top1`
        and `agreement` in percent (`mean`, `std`, `draws`); and for each of the `stages` `sizes`, `memory` and
        `output_error`.

    Raises:
        UserError: a budget that cannot be; an output that is not finite.
    """
    model = reference.model
    top1, agreement, errors = [], [], []
    for number, seed in enumerate(seeds, start=1):
        tell(f"{attention} {fraction_text(memory_fraction)}, draw {number} of {len(seeds)}")
        modules = create_stage_attentions(attention, model, memory_fraction, seed)
        with swapped(model, modules):
            predictions = predict(model, reference.images, reference.batch_size)
            memory = attention_memory_fraction(model)
        errors.append(reference.output_errors(modules))
        if not torch.tensor(errors[-1]).isfinite().all():
            raise UserError(f"The output of seed {seed} is not finite")
        top1.append(percent(predictions == reference.labels))
        agreement.append(percent(predictions == reference.predictions))
    lengths = stage_lengths(model.image_size)
    stages = [
        {"sizes": module.sizes(), "memory": attention_memory(module, length), "output_error": draws_of(values)}
        for module, length, values in zip(modules, lengths, zip(*errors, strict=True), strict=True)
    ]
    row = {"attention": attention, "memory_fraction": memory_fraction, "memory": memory, "seeds": list(seeds)}
    return row | {"top1": draws_of(top1), "agreement": draws_of(agreement), "stages": stages}


def measure_memory(
    reference: Reference,
    attentions: Sequence[str] = BUDGETED,
    memory_fractions: Sequence[float] = MEMORY_FRACTIONS,
    num_draws: int = 3,
    seed: int = 1111,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """Measure every attention at every budget, one attention after the other.

    Args:
        reference: what they are compared with.
        attentions: names.
        memory_fractions: budgets.
        num_draws: draw d has the seed `seed + d`; an attention in which nothing is drawn again has one.
        seed: of the first draw.
        tell: called with what is being measured.

    Yields:
        For each configuration a row of `measure_point`; or, where it cannot be measured, `attention`,
        `memory_fraction` and the `reason`. One whose sizes are those of another budget of the same attention, because
        they can be no smaller, or no larger, is not measured again.

    Raises:
        UserError: a budget or a seed out of range.
    """
    check_whole_number("seed", seed, 0, MAX_SEED - num_draws)
    for memory_fraction in memory_fractions:
        budget_columns(1, memory_fraction)  # refuses what is out of range, before anything is measured
    for attention in attentions:
        seeds = range(seed, seed + (num_draws if is_random(attention) else 1))
        met: dict[str, float] = {}
        for memory_fraction in memory_fractions:
            case = {"attention": attention, "memory_fraction": memory_fraction}
            try:
                modules = create_stage_attentions(attention, reference.model, memory_fraction, seed)
                sizes = json.dumps([module.sizes() for module in modules])
                if sizes in met:
                    raise UserError(f"its sizes are those of the budget {fraction_text(met[sizes])}")
                row = measure_point(reference, attention, memory_fraction, seeds, tell)
                met[sizes] = memory_fraction
            except UserError as error:
                row = case | {"reason": first_line(error)}
            except torch.OutOfMemoryError:
                row = case | {"reason": "out of memory"}
            except Exception as error:  # of compilers there is no end of kinds, and the others can go on
                row = case | {"reason": f"{type(error).__name__}: {first_line(error)}"}
            if "reason" in row and reference.images.is_cuda:
                torch.cuda.empty_cache()  # behind the error, whose traceback held what there was
            yield row


def compile_kernels(case: tuple[str, float], image_size: int, batch_sizes: Sequence[int], device: str) -> None:
    """Compile what one attention runs at one budget, by a call of each stage at each batch: sizes follow from both.

    Args:
        case: name of the attention, and budget.
        image_size: in pixels.
        batch_sizes: of all calls.
        device: that kernels are compiled for.
    """
    attention, memory_fraction = case
    for length, dim in zip(stage_lengths(image_size), STAGE_DIMS, strict=True):
        options = {"softmax_temp": dim**-0.5, "memory_fraction": memory_fraction}
        module = create_attention(attention, length, TOKEN_DIM, **options).to(device).eval()
        for batch_size in batch_sizes:
            # laid out as the network has them
            query, key, value = torch.randn(batch_size, length, 3, 1, TOKEN_DIM, device=device).unbind(2)
            with torch.no_grad():
                module(query, key, value)


def read_results(path: str | os.PathLike[str]) -> Row:
    """What the tool has written.

    Args:
        path: of its --output.

    Returns:
        Dictionary with `results`, `skipped`, `full_attention`, `num_images`, `settings` and what they have to be read
        with.

    Raises:
        UserError: the file cannot be read, or is another.
    """
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{os.fspath(path)} cannot be read: {first_line(error)}. Give the --output of a run.") from None
    if not isinstance(content, dict) or not {"results", "skipped", "full_attention"} <= content.keys():
        raise UserError(f"{os.fspath(path)} holds no results of this experiment. Give the --output of a run.")
    return content


# Figure and table -----------------------------------------------------------------------------------------------------


def fraction_text(value: float) -> str:
    """A memory fraction as it is given, 1/32, where it is one with a small denominator; else to three digits."""
    simple = Fraction(value).limit_denominator(1024)
    return str(simple) if abs(simple - value) < 1e-9 else f"{value:.3g}"


def draw(rows: Sequence[Row]) -> Figure:
    """Agreement and the output errors of both stages against memory, a curve for each attention, on an Agg canvas.

    Args:
        rows: of `measure_memory`; those that have a reason, and no figures, are left out.
    """
    rows = [row for row in rows if "reason" not in row]
    names = list(dict.fromkeys(row["attention"] for row in rows))
    # strong lines last, over the others, and first in the legend
    strong = [name for name in STRONG if name in names]
    thin = [name for name in names if name not in STRONG]
    figure = Figure(figsize=(11, 5.2), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    panels[2].sharey(panels[1])
    for name in thin + strong:
        curve = sorted((row for row in rows if row["attention"] == name), key=lambda row: row["memory"])
        points = [[(row["memory"], row["agreement"]) for row in curve]]
        for stage in (0, 1):
            parts = [row["stages"][stage] for row in curve]
            points.append([(part["memory"], part["output_error"]) for part in parts])
        for axes, each, most in zip(panels, points, (100, math.inf, math.inf), strict=True):
            draw_curve(axes, each, name, most)
    panels[0].axhline(100, color=COLOURS["full"], linewidth=2, label="full")
    panels[0].set_title("first predictions that agree with full attention's, %")
    for stage, axes in enumerate(panels[1:], start=1):
        axes.axhline(1, color=FAINT, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.set_yscale("log")
        set_ticks(axes.yaxis, ERROR_TICKS)
        axes.set_title(f"stage {stage}: relative error of the output")
    for axes in panels:
        axes.set_xscale("log")
        set_ticks(axes.xaxis, [2**-power for power in range(12, -1, -1)], fraction_text)
        axes.set_xlabel("memory, of full attention's")
        style(axes)
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    order = ["full", *strong, *thin]
    options = {"fontsize": 7.5, "frameon": False, "labelcolor": INK, "handlelength": 1.6, "ncols": 6}
    figure.legend([handles[name] for name in order], order, loc="outside lower center", **options)
    return figure


def set_ticks(axis: Axis, values: Sequence[float], text: Callable[[float], str] = "{:g}".format) -> None:
    """Ticks at those of the values that the axis shows now, and no others."""
    low, high = axis.get_view_interval()
    ticks = [value for value in values if low <= value <= high]
    axis.set_ticks(ticks, labels=[text(tick) for tick in ticks])
    axis.set_minor_locator(NullLocator())


def draw_curve(axes: Axes, points: Sequence[tuple[float, Mapping[str, Any]]], name: str, most: float) -> None:
    """One attention over memory; the band is the deviation over draws, up to the largest value there can be."""
    memory = [at for at, _ in points]
    means = [value["mean"] for _, value in points]
    deviations = [value["std"] or 0.0 for _, value in points]
    strong = name in STRONG
    colour = COLOURS[name]
    options = {"color": colour, "marker": "o", "label": name, "zorder": 3 if strong else 2}
    options |= {"linewidth": 2, "markersize": 4} if strong else {"linewidth": 0.8, "markersize": 1.8, "alpha": 0.75}
    axes.plot(memory, means, **options)
    if any(deviations):
        # a band below zero has no place on a logarithmic axis
        low = [max(mean - deviation, 0.1 * mean) for mean, deviation in zip(means, deviations, strict=True)]
        high = [min(mean + deviation, most) for mean, deviation in zip(means, deviations, strict=True)]
        axes.fill_between(memory, low, high, color=colour, alpha=0.2 if strong else 0.1, linewidth=0)


def memory_table(rows: Sequence[Row], full_top1: float) -> Table:
    """The figures of every configuration.

    Args:
        rows: of `measure_memory`; those that have a reason, and no figures, are left out.
        full_top1: accuracy of full attention in percent.
    """
    table = Table(title="Mean ± deviation over draws", title_justify="left", caption_justify="left")
    table.caption = f"full attention: top-1 {full_top1:.2f} %. Errors: of the output, relative to full attention's."
    for header in ("attention", "budget", "memory", "top-1 %", "agreement %", "error, stage 1", "error, stage 2"):
        table.add_column(header, justify="left" if header == "attention" else "right", no_wrap=True)
    last = None
    for row in rows:
        if "reason" in row:
            continue
        if last not in (None, row["attention"]):
            table.add_section()
        last = row["attention"]
        errors = (text(stage["output_error"], 3) for stage in row["stages"])
        table.add_row(
            row["attention"],
            fraction_text(row["memory_fraction"]),
            f"{100 * row['memory']:.2f} %",
            text(row["top1"], 2),
            text(row["agreement"], 2),
            *errors,
        )
    return table


def text(value: Mapping[str, Any], digits: int) -> str:
    """Mean, and deviation where there is one."""
    mean = f"{value['mean']:.{digits}f}"
    return mean if value["std"] is None else f"{mean} ± {value['std']:.{digits}f}"


def skipped_lines(rows: Sequence[Row]) -> Iterator[str]:
    """What was left out and why, each reason of an attention once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "reason" in row:
            key = (row["attention"], row["reason"])
            reasons.setdefault(key, []).append(fraction_text(row["memory_fraction"]))
    for (attention, reason), fractions in reasons.items():
        yield f"{attention} left out at {', '.join(fractions)}: {reason}."


# Running --------------------------------------------------------------------------------------------------------------


class Experiment:
    """One run of the tool: its options, and what is measured by now.

    Args:
        arguments: the options.

    Raises:
        UserError: an option, the checkpoint or the folder does not fit.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        check_whole_number("--seed", arguments.seed, 0, MAX_SEED - arguments.num_draws)
        self.device = choose_device(arguments.device)
        on_cuda = self.device.type == "cuda"
        self.arguments = argparse.Namespace(**vars(arguments))
        self.arguments.batch_size = arguments.batch_size or (64 if on_cuda else 8)
        self.name, self.model = load_model(arguments.checkpoint)
        self.dataset = open_split(arguments.data_dir, arguments.split, self.model)
        self.chosen = spread(len(self.dataset), arguments.limit or len(self.dataset))
        self.reference: Reference | None = None
        self.rows: list[Row] = []
        self.cases = [(name, part) for name in arguments.attentions for part in arguments.memory_fractions]

    @property
    def complete(self) -> bool:
        """Whether every configuration was measured or left out for a reason."""
        return len(self.rows) == len(self.cases)

    @property
    def results(self) -> list[Row]:
        """What was measured."""
        return [row for row in self.rows if "reason" not in row]

    def run(self, console: Console, save: Callable[[], None] = lambda: None) -> None:
        """Measure everything; `save` is called whenever an attention is complete.

        Raises:
            UserError: a photograph cannot be decoded; nothing could be measured.
        """
        arguments = self.arguments
        with progress_display(console) as progress:
            task = progress.add_task("decoding photographs", total=len(self.cases))
            images, labels = load_photographs(self.dataset, self.chosen)
            if self.device.type == "cuda" and arguments.jobs > 1:
                work = functools.partial(compile_kernels, **self.compile_options())
                compile_ahead(work, self.cases, arguments.jobs, progress)
            self.model.to(self.device)
            progress.update(task, description="full attention")
            images, labels = images.to(self.device), labels.to(self.device)
            self.reference = Reference.of(self.model, images, labels, arguments.error_images, arguments.batch_size)
            rows = measure_memory(
                self.reference,
                arguments.attentions,
                arguments.memory_fractions,
                arguments.num_draws,
                arguments.seed,
                lambda text: progress.update(task, description=text),
            )
            for row in rows:
                self.rows.append(row)
                progress.advance(task)
                if self.results and len(self.rows) % len(arguments.memory_fractions) == 0:
                    save()
        if not self.results:
            raise UserError(f"Nothing could be measured. {next(skipped_lines(self.rows))}")

    def compile_options(self) -> dict[str, Any]:
        """Those of `compile_kernels`: images, and all batches that there will be."""
        whole = self.arguments.batch_size
        numbers = (len(self.chosen), min(len(self.chosen), self.arguments.error_images))
        batch_sizes = {min(whole, number) for number in numbers} | {number % whole for number in numbers} - {0}
        return {
            "image_size": self.model.image_size,
            "batch_sizes": sorted(batch_sizes, reverse=True),
            "device": self.device.type,
        }

    def report(self) -> dict[str, Any]:
        """Everything that was measured, for JSON."""
        arguments = self.arguments
        return {
            "complete": self.complete,
            "machine": machine_info(self.device),
            "versions": package_versions(),
            "model": self.name,
            "checkpoint_sha256": sha256_of_file(Path(arguments.checkpoint).expanduser()),
            "image_size": self.model.image_size,
            "num_images": len(self.reference.images),
            "num_error_images": self.reference.num_error_images,
            "settings": {
                name: getattr(arguments, name)
                for name in ("split", "attentions", "memory_fractions", "num_draws", "seed", "batch_size")
            },
            "full_attention": {"top1": self.reference.top1},
            "results": self.results,
            "skipped": [row for row in self.rows if "reason" in row],
        }


def measure(arguments: argparse.Namespace) -> int:
    """Measure, print, write and draw; returns the exit status."""
    check_writable(arguments.output)
    check_figure(arguments.figure)
    experiment = Experiment(arguments)
    return saved_until_stopped(experiment.run, experiment.report, arguments.output, lambda: conclude(experiment))


def conclude(experiment: Experiment) -> int:
    """Print what is complete and write the files; returns the exit status."""
    arguments = experiment.arguments
    if not experiment.results:
        print("Interrupted. Nothing was written.", file=sys.stderr)
        return 1
    console = console_for_tables(WIDTH)
    console.print(memory_table(experiment.rows, experiment.reference.top1))
    for line in skipped_lines(experiment.rows):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if arguments.output is not None:
        write_json(arguments.output, experiment.report())
    if arguments.figure is not None:
        save_figure(draw(experiment.rows), arguments.figure)
    if not experiment.complete:
        print(
            f"Interrupted after {len(experiment.rows)} of {len(experiment.cases)} configurations.",
            file=sys.stderr,
        )
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Take the measurements that `argv` asks for; returns the exit status."""
    return run_tool(build_parser(), measure, argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted. Nothing was written.")
