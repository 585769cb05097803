"""Accuracy, agreement with full attention and output errors by attention columns: `scripts/experiment_memory.py`."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.console import Console
from rich.table import Table

from scatterbrain.attention import ATTENTIONS, attention_memory
from scatterbrain.attention.base import AttentionModule
from scatterbrain.errors import UserError, check_whole_number
from scatterbrain.ops.common.budget import budget_columns
from src.analysis import tools
from src.analysis.approximation import load_model, model_entries, open_split, over_seeds, plus_minus, relative_errors
from src.datamodules.dataset import ImageFolderDataset
from src.datamodules.sampling import spread
from src.evaluation.colours import ATTENTION_MARKERS
from src.evaluation.figure_style import COLOURS, DOTTED, FAINT, LEGEND, label_ends, new_figure, style
from src.evaluation.result_rows import read_rows
from src.models.attention_inputs import StageInputs, capture_stage_inputs, create_stage_attentions
from src.models.inference import inference_model
from src.models.modules.tokens_to_token import stage_lengths
from src.models.t2t_vit import T2TViT
from src.tasks.attention_info import attention_memory_fraction
from src.tasks.options import MAX_SEED
from src.utils.machine import usable_cpus
from src.utils.progress import progress_display
from src.utils.text import first_line

# Full attention has no budget, and is what the others are compared with.
BUDGETED = tuple(name for name, kind in ATTENTIONS.items() if kind.fit is not None)
MEMORY_FRACTIONS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)
# drawn strong, in the order of the legend; the others are thin, with their names at the ends of their lines
STRONG = ("local", "performer", "sblocal", "smyrf", "cluster", "pairedcluster")
LOG_TICKS = [digit * 10.0**power for power in range(-4, 3) for digit in (1, 2, 5)]

Row = dict[str, Any]
Log = Callable[[str], None]


def load_photographs(dataset: ImageFolderDataset, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 3, size, size) in channels-last memory, which the inference model reads as it is, and labels (B,)."""
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
    """First predictions (B,) of a model, by its inference implementation; nothing waits for the device."""
    fast = inference_model(model)
    return torch.cat([fast(part).argmax(1) for part in images.split(batch_size)])


@dataclass(frozen=True)
class Reference:
    """The network with full attention, the photographs, and its predictions for them."""

    model: T2TViT
    images: torch.Tensor  # (B, 3, size, size), normalised, on the device of the model
    labels: torch.Tensor  # (B,), likewise
    batch_size: int  # of all calls
    predictions: torch.Tensor  # (B,), the first of each photograph
    stages: tuple[tuple[StageInputs, StageInputs], ...]  # by batch, of the photographs of the output errors

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: T2TViT, images: torch.Tensor, labels: torch.Tensor, error_images: int = 16, batch_size: int = 8
    ) -> Reference:
        """Run a network with full attention in evaluation mode; `error_images` of the images are spread evenly."""
        chosen = images[spread(len(images), error_images)].split(batch_size)
        stages = tuple(capture_stage_inputs(model, part) for part in chosen)
        return cls(model, images, labels, batch_size, predict(model, images, batch_size), stages)

    @property
    def top1(self) -> float:
        """Accuracy of full attention in percent."""
        return percent(self.predictions == self.labels)

    def output_errors(self, attentions: Sequence[AttentionModule]) -> list[float]:
        """Relative Frobenius error of the output of each stage, mean over photographs."""
        stages = zip(attentions, zip(*self.stages, strict=True), strict=True)
        errors = [torch.cat([relative_errors(x, [attention])[0] for x in inputs]) for attention, inputs in stages]
        return [values.mean().item() for values in errors]


def percent(hits: torch.Tensor) -> float:
    """Share of the entries that are true, in percent."""
    return 100 * hits.sum().item() / len(hits)


@torch.no_grad()
def measure_point(
    reference: Reference,
    attention: str,
    memory_fraction: float,
    seeds: Sequence[int],
    log: Log = lambda _: None,
    create: Callable[..., Sequence[AttentionModule]] | None = None,
) -> Row:
    """Row of one attention at one budget, over seeds; `log` is called with the name of each step.

    `create` makes the modules, in place of `create_stage_attentions`, with its arguments.

    It has `attention`, `memory_fraction`, `seeds`; `memory`, the share of the attention columns of both stages; `top1`
    and `agreement` in percent (see `over_seeds`); and for each of the `stages` `sizes`, `memory`, `output_error`.
    """
    model = reference.model
    top1, agreement, errors = [], [], []
    for number, seed in enumerate(seeds, start=1):
        log(f"{attention} {fraction_text(memory_fraction)}, seed {number} of {len(seeds)}")
        modules = (create or create_stage_attentions)(attention, model, memory_fraction, seed)
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
        {"sizes": module.sizes(), "memory": attention_memory(module, length), "output_error": over_seeds(values)}
        for module, length, values in zip(modules, lengths, zip(*errors, strict=True), strict=True)
    ]
    row = {"attention": attention, "memory_fraction": memory_fraction, "memory": memory, "seeds": list(seeds)}
    return row | {"top1": over_seeds(top1), "agreement": over_seeds(agreement), "stages": stages}


def measure_memory(
    reference: Reference,
    attentions: Sequence[str] = BUDGETED,
    memory_fractions: Sequence[float] = MEMORY_FRACTIONS,
    num_seeds: int = 3,
    seed: int = 1111,
    log: Log = lambda _: None,
) -> Iterator[Row]:
    """Rows of `measure_point` of every attention at every budget, one attention after the other.

    Seeds are `seed`, `seed + 1`, ...; an attention that does not depend on its seed has one. What cannot be measured
    has `attention`, `memory_fraction` and the `reason`. A configuration whose sizes are those of another budget of the
    same attention, because they are the smallest or the largest that it has, is not measured again.
    """
    check_whole_number("seed", seed, 0, MAX_SEED - num_seeds)
    for memory_fraction in memory_fractions:
        budget_columns(1, memory_fraction)  # refuses what is out of range, before anything is measured
    for attention in attentions:
        is_random = hasattr(ATTENTIONS[attention].module, "redraw_projection")
        seeds = range(seed, seed + (num_seeds if is_random else 1))
        measured: dict[str, float] = {}
        for memory_fraction in memory_fractions:
            case = {"attention": attention, "memory_fraction": memory_fraction}
            try:
                modules = create_stage_attentions(attention, reference.model, memory_fraction, seed)
                sizes = json.dumps([module.sizes() for module in modules])
                if sizes in measured:
                    raise UserError(f"its sizes are those of the budget {fraction_text(measured[sizes])}")
                row = measure_point(reference, attention, memory_fraction, seeds, log)
                measured[sizes] = memory_fraction
            except UserError as error:
                row = case | {"reason": first_line(error)}
            except torch.OutOfMemoryError:
                row = case | {"reason": "out of memory"}
            except Exception as error:  # compilers raise many kinds, and the others are still to be measured
                row = case | {"reason": f"{type(error).__name__}: {first_line(error)}"}
            if "reason" in row and reference.images.is_cuda:
                torch.cuda.empty_cache()  # after the error, whose traceback held the tensors
            yield row


def read_results(path: str | Path) -> Row:
    """Content of a file of `--output`."""
    return read_rows(path, ("results", "skipped", "full_attention"), "Give the --output of a run.")


def fraction_text(value: float) -> str:
    """A memory fraction as a ratio, 1/32, where the denominator is small; else to three digits."""
    simple = Fraction(value).limit_denominator(1024)
    return str(simple) if abs(simple - value) < 1e-9 else f"{value:.3g}"


def draw(rows: Sequence[Row]) -> Figure:
    """Agreement and the output errors of both stages against attention columns, a curve for each attention.

    Rows of `measure_memory` that have a reason, and no results, are left out.
    """
    rows = [row for row in rows if "reason" not in row]
    names = list(dict.fromkeys(row["attention"] for row in rows))
    # strong lines last, over the others, and first in the legend
    strong = [name for name in STRONG if name in names]
    thin = [name for name in names if name not in STRONG]
    figure = new_figure(14, 5.2)
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
    panels[0].set_title("agreement with full attention, %")
    for stage, axes in enumerate(panels[1:], start=1):
        axes.axhline(1, color=FAINT, linewidth=0.8, linestyle=DOTTED)
        axes.set_yscale("log")
        set_ticks(axes.yaxis, LOG_TICKS)
        axes.set_title(f"stage {stage}: relative error of the output")
    for axes in panels:
        axes.set_xscale("log")
        set_ticks(axes.xaxis, [2**-power for power in range(12, -1, -1)], fraction_text)
        axes.set_xlabel("attention columns, of all")
        style(axes)
    figure.canvas.draw()  # limits and sizes of the panels are known then
    for axes in panels:
        lines = {line.get_label(): line for line in axes.lines}
        ends = [(*(float(each[-1]) for each in lines[name].get_data()), name, COLOURS[name]) for name in thin]
        label_ends(axes, ends)
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    order = ["full", *strong]
    options = {"loc": "outside lower center", "handlelength": 1.6, "ncols": len(order), **LEGEND}
    figure.legend([handles[name] for name in order], order, **options)
    return figure


def set_ticks(axis: Axis, values: Sequence[float], text: Callable[[float], str] = "{:g}".format) -> None:
    """Set ticks at those of the values that the axis shows now, and no others."""
    low, high = axis.get_view_interval()
    ticks = [value for value in values if low <= value <= high]
    axis.set_ticks(ticks, labels=[text(tick) for tick in ticks])
    axis.set_minor_locator(NullLocator())


def draw_curve(axes: Axes, points: Sequence[tuple[float, Mapping[str, Any]]], name: str, most: float) -> None:
    """Draw one attention over its columns; the band is the std over seeds, up to `most`, the largest possible value."""
    memory = [at for at, _ in points]
    means = [value["mean"] for _, value in points]
    stds = [value["std"] or 0.0 for _, value in points]
    strong = name in STRONG
    colour = COLOURS[name]
    options = {"color": colour, "marker": ATTENTION_MARKERS.get(name, "o"), "label": name, "zorder": 3 if strong else 2}
    options |= {"linewidth": 2, "markersize": 4} if strong else {"linewidth": 0.8, "markersize": 2.5, "alpha": 0.75}
    axes.plot(memory, means, **options)
    if any(stds):
        # a band below zero has no place on a logarithmic axis
        low = [max(mean - std, 0.1 * mean) for mean, std in zip(means, stds, strict=True)]
        high = [min(mean + std, most) for mean, std in zip(means, stds, strict=True)]
        axes.fill_between(memory, low, high, color=colour, alpha=0.2 if strong else 0.1, linewidth=0)


def memory_table(rows: Sequence[Row], full_top1: float) -> Table:
    """Table of every configuration that was measured, and full attention's accuracy in percent."""
    headers = ("attention", "budget", "columns", "top-1 %", "agreement %", "error, stage 1", "error, stage 2")
    table = tools.new_table("Mean ± std over seeds", headers, ("attention",))
    table.caption = f"full attention: top-1 {full_top1:.2f} %. Columns: of the attention matrix. Errors: of the output."
    last = None
    for row in rows:
        if "reason" in row:
            continue
        if last not in (None, row["attention"]):
            table.add_section()
        last = row["attention"]
        cells = [row["attention"], fraction_text(row["memory_fraction"]), f"{100 * row['memory']:.2f} %"]
        cells += [plus_minus(row[name], 2) for name in ("top1", "agreement")]
        table.add_row(*cells, *(plus_minus(stage["output_error"]) for stage in row["stages"]))
    return table


def skipped_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Lines on what was left out and why, each reason of an attention once."""
    rows = [row for row in rows if "reason" in row]
    return tools.left_out_lines(
        (row["attention"], row["reason"], fraction_text(row["memory_fraction"])) for row in rows
    )


class Experiment(tools.Run):
    """One run of the script: its options, and the rows so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        check_whole_number("--seed", arguments.seed, 0, MAX_SEED - arguments.num_seeds)
        budget_columns(1, max(arguments.memory_fractions))  # refuses what is out of range
        self.device = tools.choose_device(arguments.device)
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
    def missing(self) -> list[str]:
        """Configurations that were not reached."""
        return [f"{name} {fraction_text(part)}" for name, part in self.cases[len(self.rows) :]]

    @property
    def results(self) -> list[Row]:
        """Rows that were measured."""
        return [row for row in self.rows if "reason" not in row]

    def run(self, console: Console, save: Callable[[], None] = lambda: None) -> None:
        """Measure everything; `save` is called whenever an attention is complete."""
        arguments = self.arguments
        with progress_display(console) as progress:
            task = progress.add_task("decoding photographs", total=len(self.cases))
            images, labels = load_photographs(self.dataset, self.chosen)
            self.model.to(self.device)
            progress.update(task, description="full attention")
            images, labels = images.to(self.device), labels.to(self.device)
            self.reference = Reference.of(self.model, images, labels, arguments.error_images, arguments.batch_size)
            names = ("attentions", "memory_fractions", "num_seeds", "seed")
            options = {name: getattr(arguments, name) for name in names}
            options["log"] = lambda text: progress.update(task, description=text)
            for row in measure_memory(self.reference, **options):
                self.rows.append(row)
                progress.advance(task)
                if self.results and len(self.rows) % len(arguments.memory_fractions) == 0:
                    save()
        if not self.results:
            raise UserError(f"Nothing could be measured. {next(skipped_lines(self.rows))}")

    def tables(self) -> list[Table]:
        """See `memory_table`."""
        return [memory_table(self.rows, self.reference.top1)]

    def notes(self) -> Iterator[str]:
        """See `skipped_lines`."""
        return skipped_lines(self.rows)

    def draw(self) -> Figure:
        """See `draw`."""
        return draw(self.rows)

    def report(self) -> dict[str, Any]:
        """Everything that was measured, for JSON."""
        names = ("split", "attentions", "memory_fractions", "num_seeds", "seed", "batch_size")
        content = {"complete": not self.missing, **tools.provenance(self.device)}
        content |= model_entries(self.name, self.arguments.checkpoint)
        content |= {"image_size": self.model.image_size, "num_images": len(self.reference.images)}
        content |= {"num_error_images": sum(len(pair[0].query) for pair in self.reference.stages)}
        content |= {"settings": {name: getattr(self.arguments, name) for name in names}}
        content |= {"full_attention": {"top1": self.reference.top1}, "results": self.results}
        return content | {"skipped": [row for row in self.rows if "reason" in row]}
