"""Images per second, time and memory of a T2T-ViT in each of its forms, against each other in one run.

    published   computes as the published code does: full attention with its softmax written out, in both token stages
                and in the backbone
    module      T2TViT under each attention, as it is trained
    inference   the form that evaluations run, of the same weights; on CUDA recorded as a CUDA graph
    peer        timm's vit_small_patch16_224, a network of about the size of t2t_vit_t_14

--compile adds each of them under torch.compile; on CUDA those too are recorded as CUDA graphs, the published form with
and without. For each batch all forms are built, each is warmed up, and then each runs once in each round, in turn; the
medians of the rounds are reported, and the medians of the ratios within a round. Batches of images are on the device.

Memory is what PyTorch takes from the device for one form alone: images, weights, everything in between, and what a CUDA
graph keeps. It is counted on CUDA alone. --end-to-end adds whole evaluations, as run.py does them, of images in memory.

Ctrl-C and SIGTERM end the run with the batches and evaluations that are complete by then; forms take turns, so those of
a batch are complete together. --output is written after each batch and evaluation, with "complete": false until all
are done. On CUDA, --jobs processes first fill Triton's cache on disk.

    python scripts/benchmark_model.py --variant t2t_vit_t_14 --attentions full,sblocal --compile
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import io
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from scatterbrain.attention import ATTENTIONS, COMPARED
from scatterbrain.errors import UserError
from scripts.make_random_checkpoint import make_checkpoint
from src.models.inference import inference_model
from src.models.modules.transformer_block import SelfAttention
from src.models.t2t_vit import T2TViT, create_t2t_vit
from src.tasks.build import check_swappable
from src.utils.files import write_json
from src.utils.machine import machine_info
from src.utils.scripts import (
    Parser,
    check_figure,
    check_writable,
    choose_device,
    comma_separated,
    compile_ahead,
    default_jobs,
    figure,
    first_line,
    fraction,
    positive,
    positive_list,
    progress_display,
    run_tool,
    save_figure,
    saved_until_stopped,
    without_paths,
)
from src.utils.static_shapes import CudaGraphForward, compiled
from src.utils.timing import in_turn, seconds_per_call

KINDS = ("published", "module", "inference", "peer")
PEER = "vit_small_patch16_224"
PRECISIONS = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.float32,
}
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SEED = 0
WARM_UP_CALLS = 3
# On CUDA calls are repeated until a sample takes this long: a few launches would show the queue, not the device.
SHORTEST_SAMPLE_SECONDS = 0.05
# How long an evaluation should take, to average over the loop.
EVALUATION_SECONDS = 3.0

Forward = Callable[[torch.Tensor], torch.Tensor]


# Forms ----------------------------------------------------------------------------------------------------------------


class PublishedTokenAttention(nn.Module):
    """Full attention of a token stage as published: the N x N matrix of weights is there in full.

    Args:
        scale: of the queries.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Attend: three (B, N, H, E) to one."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        weights = ((query * self.scale) @ key.transpose(-2, -1)).softmax(-1)
        return (weights @ value).transpose(1, 2), None


class PublishedSelfAttention(nn.Module):
    """Attention of a backbone block as published, in evaluation.

    Args:
        attention: ours, whose weights it takes.
    """

    def __init__(self, attention: SelfAttention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.qkv, self.proj = attention.qkv, attention.proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, N, dim) to (B, N, dim)."""
        batch, length, dim = x.shape
        width = dim // self.num_heads
        query, key, value = self.qkv(x).reshape(batch, length, 3, self.num_heads, width).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) * width**-0.5).softmax(-1)
        return self.proj((weights @ value).transpose(1, 2).reshape(batch, length, dim))


def as_published(model: T2TViT) -> T2TViT:
    """Let a T2T-ViT of full attention compute as the published code does, from the same weights.

    The rest of it does so already: unfolded patches, LayerNorm, and a linear map, one after the other.
    """
    for stage in (model.patch_embed.attention1, model.patch_embed.attention2):
        stage.attn.attention = PublishedTokenAttention(stage.attn.attention.softmax_temp)
    for block in model.blocks:
        block.attn = PublishedSelfAttention(block.attn)
    return model


@dataclass(frozen=True)
class Form:
    """One way to run a network.

    Attributes:
        kind: one of `KINDS`.
        attention: of the token stages; None where the kind says it.
        compiled: run through `torch.compile`.
        graph: record as a CUDA graph.
    """

    kind: str
    attention: str | None = None
    compiled: bool = False
    graph: bool = False

    @property
    def name(self) -> str:
        """Its row in the table."""
        parts = [self.kind if self.attention is None else f"{self.kind} {self.attention}"]
        if self.kind == "peer":
            parts = [f"timm {PEER}"]
        return ", ".join(parts + ["compiled"] * self.compiled + ["CUDA graph"] * self.graph)


def choose_forms(arguments: argparse.Namespace, device: torch.device) -> list[Form]:
    """The forms that the options ask for, in the order of the table."""
    on_cuda = device.type == "cuda"
    forms = []
    for kind in arguments.forms:
        for attention in arguments.attentions if kind in ("module", "inference") else (None,):
            forms.append(Form(kind, attention, graph=on_cuda and kind == "inference"))
            if arguments.compile:
                if kind == "published" and on_cuda:
                    forms.append(Form(kind, attention, compiled=True))
                forms.append(Form(kind, attention, compiled=True, graph=on_cuda))
    return forms


def create_network(form: Form, arguments: argparse.Namespace) -> nn.Module:
    """The network of a form before it is brought into it, with weights that are the same for all but the peer.

    Raises:
        UserError: sizes that the network does not take.
    """
    torch.manual_seed(SEED)
    if form.kind == "peer":
        return timm.create_model(PEER, img_size=arguments.image_size, num_classes=arguments.num_classes).eval()
    stage = {"name": "full"}
    if form.attention is not None:
        stage = {"name": form.attention, "memory_fraction": arguments.memory_fraction}
    return create_t2t_vit(
        arguments.variant, [stage, stage], arguments.image_size, arguments.num_classes, seed=SEED
    ).eval()


def build(form: Form, arguments: argparse.Namespace, device: torch.device) -> Forward:
    """A form on the device, from images (B, 3, size, size) to logits (B, num_classes)."""
    network = create_network(form, arguments)
    if form.kind == "published":
        network = as_published(network)
    network = network.to(device, PRECISIONS[arguments.precision])
    if form.kind == "inference":
        network = inference_model(network)
    call = compiled(network) if form.compiled else network
    call = CudaGraphForward(call) if form.graph else call
    if not arguments.precision.endswith("mixed"):
        return call

    def autocast_call(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return call(images)

    return autocast_call


def draw_images(batch: int, arguments: argparse.Namespace, device: torch.device) -> torch.Tensor:
    """Normal images, the same in each run."""
    size = arguments.image_size
    generator = torch.Generator(device).manual_seed(SEED)
    images = torch.randn(batch, 3, size, size, generator=generator, device=device)
    return images.to(PRECISIONS[arguments.precision])


def in_layout_of(form: Form, images: torch.Tensor) -> torch.Tensor:
    """Images as a form gets them: for inference, the colours of a pixel together, as an evaluation has them."""
    return images.contiguous(memory_format=torch.channels_last) if form.kind == "inference" else images


def compile_kernels(arguments: argparse.Namespace, form: Form) -> None:
    """Compile the kernels of one form, by a call at each batch: some of their sizes follow from it.

    Args:
        arguments: the options, all filled in.
        form: neither compiled nor a graph.
    """
    device = choose_device(arguments.device)
    forward = build(form, arguments, device)
    with torch.inference_mode():
        for batch in arguments.batches:
            forward(in_layout_of(form, draw_images(batch, arguments, device)))


# Measurement ----------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """Figures of a form at one batch.

    Attributes:
        name: of the form.
        kind: one of `KINDS`.
        attention: of the token stages; None where the kind says it.
        batch: images in a call.
        milliseconds: of a call, median of the rounds.
        milliseconds_per_round: of a call, in each round.
        images_per_second: batch over the median.
        speed_over_published: how many times as fast as the published form uncompiled, at the same batch, median of the
            rounds; None without it.
        peak_memory_mib: what the form takes from the device; None where it is not counted.
        first_call_seconds: of the first call, which compiles and records.
    """

    name: str
    kind: str
    attention: str | None
    batch: int
    milliseconds: float
    milliseconds_per_round: list[float]
    images_per_second: float
    speed_over_published: float | None
    peak_memory_mib: float | None
    first_call_seconds: float


@dataclass
class Candidate:
    """A form at one batch, while it is measured."""

    form: Form
    call: Callable[[], torch.Tensor]
    first_call_seconds: float = 0.0
    peak_bytes: int | None = None
    number: int = 1
    milliseconds: list[float] = field(default_factory=list)


class Bench:
    """One run: what is timed, on what, and what was left out.

    Args:
        arguments: the options.

    Raises:
        UserError: a network cannot be built with the options.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = choose_device(arguments.device)
        self.arguments = with_defaults(arguments, self.device)
        self.forms = choose_forms(self.arguments, self.device)
        # what is wrong with the options is told of no form, but of the options
        for attention in dict.fromkeys(form.attention for form in self.forms):
            create_network(Form("module", attention), self.arguments)
        self.results: list[Result] = []
        self.skipped: list[dict[str, str | int]] = []
        self.end_to_end: list[dict[str, Any]] = []
        # in the order in which they are measured
        self.missing = [f"batch {batch}" for batch in self.arguments.batches]
        if self.arguments.end_to_end:
            self.missing += [f"evaluation {attention}" for attention in self.arguments.attentions]

    def run(self, console: Console, save: Callable[[], None] = lambda: None) -> None:
        """Measure everything; `save` is called whenever a batch or an evaluation is complete.

        Raises:
            UserError: nothing could be measured.
        """
        self.run_alone(console, save)
        if self.arguments.end_to_end:
            self.run_end_to_end(save)

    @torch.inference_mode()
    def run_alone(self, console: Console, save: Callable[[], None]) -> None:
        """Measure the forms at each batch.

        Raises:
            UserError: nothing could be measured.
        """
        arguments = self.arguments
        with progress_display(console) as progress:
            if self.device.type == "cuda" and arguments.jobs > 1:
                work = functools.partial(compile_kernels, arguments)
                compile_ahead(work, self.forms_with_kernels(), arguments.jobs, progress)
            steps = len(self.forms) * (1 + arguments.repeats) * len(arguments.batches)
            task = progress.add_task("", total=steps)

            def say(text: str) -> None:
                progress.update(task, description=text)
                progress.advance(task)

            for batch in arguments.batches:
                self.measure(batch, say)
                self.missing.remove(f"batch {batch}")
                if self.results:
                    save()
                if arguments.compile:
                    torch._dynamo.reset()  # or it would keep what it has compiled, with the weights
                self.free()
        if not self.results:
            first = self.skipped[0]
            raise UserError(f"Nothing could be measured. {first['name']} at batch {first['batch']}: {first['reason']}.")

    def forms_with_kernels(self) -> list[Form]:
        """The networks that run Triton kernels of ours, each as it is when nothing compiles or records it."""
        return list(dict.fromkeys(Form(form.kind, form.attention) for form in self.forms if form.attention is not None))

    def measure(self, batch: int, say: Callable[[str], None]) -> None:
        """Build and time every form at one batch."""
        images = self.attempt(lambda: draw_images(batch, self.arguments, self.device), "images", batch)
        if images is None:
            return
        candidates = []
        for form in self.forms:
            say(f"batch {batch}: preparing {form.name}")
            candidate = self.attempt(lambda form=form: self.prepare(form, images), form.name, batch)
            candidates += [] if candidate is None else [candidate]
        failed = set()
        for candidate in in_turn(candidates, self.arguments.repeats):
            name = candidate.form.name
            say(f"batch {batch}: {name}")
            if name not in failed:
                seconds = self.attempt(lambda x=candidate: seconds_per_call(x.call, x.number, self.device), name, batch)
                if seconds is None:
                    failed.add(name)
                else:
                    candidate.milliseconds.append(1e3 * seconds)
        # all rows at once, whenever an interrupt comes
        self.results += list(self.summarise([x for x in candidates if x.form.name not in failed], batch))

    def attempt(self, work: Callable[[], Any], name: str, batch: int) -> Any:
        """What `work` gives; None where it fails, in which case the reason is noted and the others can go on."""
        try:
            return work()
        except Exception as error:  # of compilers there is no end of kinds
            memory = isinstance(error, torch.OutOfMemoryError)
            reason = "out of memory" if memory else f"{type(error).__name__}: {first_line(error)}"
        self.free()  # after the error, whose traceback holds what was built so far
        self.skipped.append({"name": name, "batch": batch, "reason": reason})
        return None

    def prepare(self, form: Form, images: torch.Tensor) -> Candidate:
        """Build a form, warm it up, and count its memory."""
        on_cuda = self.device.type == "cuda"
        self.free()
        before = torch.cuda.memory_reserved() if on_cuda else 0
        with torch.inference_mode(False):  # weights that are tensors like any other
            forward = build(form, self.arguments, self.device)
        images = in_layout_of(form, images)
        candidate = Candidate(form, lambda: forward(images))
        begin = time.perf_counter()
        candidate.call()
        if on_cuda:
            torch.cuda.synchronize()
        candidate.first_call_seconds = time.perf_counter() - begin
        for _ in range(WARM_UP_CALLS - 1 if on_cuda else 0):
            candidate.call()
        if on_cuda:
            # from here on: compilers and the choice of kernels take memory of their own
            self.free()
            torch.cuda.reset_peak_memory_stats()
            candidate.call()
            torch.cuda.synchronize()
            shared = 0 if form.kind == "inference" else images.nbytes
            candidate.peak_bytes = torch.cuda.max_memory_reserved() - before + shared
            seconds = seconds_per_call(candidate.call, WARM_UP_CALLS, self.device)
            candidate.number = max(1, math.ceil(SHORTEST_SAMPLE_SECONDS / seconds))
        return candidate

    def free(self) -> None:
        """Give memory that nobody uses back to the device."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def summarise(self, candidates: Sequence[Candidate], batch: int) -> Iterator[Result]:
        """Medians and ratios at one batch."""
        published = next((x.milliseconds for x in candidates if x.form == Form("published")), None)
        for candidate in candidates:
            median = statistics.median(candidate.milliseconds)
            yield Result(
                candidate.form.name,
                candidate.form.kind,
                candidate.form.attention,
                batch,
                median,
                candidate.milliseconds,
                1e3 * batch / median,
                published and median_ratio(published, candidate.milliseconds),
                None if candidate.peak_bytes is None else candidate.peak_bytes / 2**20,
                candidate.first_call_seconds,
            )

    def best(self) -> list[Result]:
        """Each form at the batch at which it is fastest, in the order of the forms."""
        found: dict[str, Result] = {}
        for result in self.results:
            if result.name not in found or result.images_per_second > found[result.name].images_per_second:
                found[result.name] = result
        return [found[form.name] for form in self.forms if form.name in found]

    def run_end_to_end(self, save: Callable[[], None] = lambda: None) -> None:
        """Whole evaluations, one for each attention, at the best batch of the fastest form an evaluation can take."""
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder, "random.pth")
            make_checkpoint(self.arguments.variant, self.arguments.num_classes, self.arguments.image_size, checkpoint)
            for attention in self.arguments.attentions:
                of_attention = [x for x in self.best() if x.attention == attention]
                alone = max(
                    [x for x in of_attention if x.kind == "inference"] or of_attention,
                    key=lambda result: result.images_per_second,
                    default=None,
                )
                found = alone and self.attempt(
                    lambda x=alone: self.evaluate(x, checkpoint, Path(folder, x.attention)),
                    f"evaluation {attention}",
                    alone.batch,
                )
                if found is not None:
                    self.end_to_end.append(found)
                self.missing.remove(f"evaluation {attention}")
                save()
                self.free()

    def evaluate(self, alone: Result, checkpoint: Path, output_dir: Path) -> dict[str, Any]:
        """One evaluation beside the network alone."""
        # imported here: benchmarks of the network alone need none of it
        from src.tasks.evaluate import evaluate

        number = min(1000, max(3, math.ceil(EVALUATION_SECONDS * alone.images_per_second / alone.batch)))
        output_dir.mkdir()
        config = self.compose(alone, number * alone.batch, checkpoint, output_dir)
        with contextlib.redirect_stdout(io.StringIO()):  # accuracies that mean nothing
            results, _ = evaluate(config)
        return {
            "attention": alone.attention,
            "form_alone": alone.name,
            "batch": alone.batch,
            "num_images": number * alone.batch,
            "images_per_second": results.images_per_second,
            "images_per_second_alone": alone.images_per_second,
            "ratio_to_alone": results.images_per_second / alone.images_per_second,
            "peak_memory_mib": results.peak_memory_mib,
        }

    def compose(self, alone: Result, num_images: int, checkpoint: Path, output_dir: Path) -> DictConfig:
        """The configuration of an evaluation, as its command line would give it."""
        arguments = self.arguments
        overrides = {
            "experiment": "synthetic-t2tvit-eval",
            "model/t2tmodel": arguments.variant,
            "model/t2tattn_cfg": alone.attention,
            "model.image_size": arguments.image_size,
            "model.num_classes": arguments.num_classes,
            "datamodule.batch_size": alone.batch,
            "datamodule.num_images": num_images,
            "datamodule.num_distinct": min(num_images, 4 * alone.batch),
            "trainer.accelerator": self.device.type,
            "trainer.precision": arguments.precision,
            "eval.compile": str("compiled" in alone.name).lower(),
            "logger": "none",
        }
        if alone.attention != "full":
            overrides["model.t2tattn1_cfg.memory_fraction"] = arguments.memory_fraction
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose("config", [f"{name}={value}" for name, value in overrides.items()])
        # not in the command line: paths would have to be quoted
        config.paths.output_dir, config.eval.ckpt = str(output_dir), str(checkpoint)
        return config


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios within each round."""
    return statistics.median(x / y for x, y in zip(numerators, denominators, strict=True))


# Options --------------------------------------------------------------------------------------------------------------


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--variant", default="t2t_vit_t_14", metavar="NAME", help="one of t2t_vit_t_* (t2t_vit_t_14)")
    parser.add_argument(
        "--forms",
        type=comma_separated(KINDS),
        default=KINDS,
        metavar="NAMES",
        help=f"separated by commas ({','.join(KINDS)})",
    )
    parser.add_argument(
        "--attentions",
        type=comma_separated(tuple(ATTENTIONS)),
        default=COMPARED,
        metavar="NAMES",
        help=f"of the forms module and inference, separated by commas ({','.join(COMPARED)})",
    )
    parser.add_argument(
        "--batches",
        type=positive_list,
        metavar="B,...",
        help="the best one is reported (32,128,256,512 on CUDA, 8 on the CPU)",
    )
    parser.add_argument("--image-size", type=positive, default=224, metavar="N", help="in pixels (224)")
    parser.add_argument("--num-classes", type=positive, default=1000, metavar="N", help="(1000)")
    parser.add_argument("--memory-fraction", type=fraction, default=1 / 32, metavar="F", help="budget (1/32)")
    parser.add_argument(
        "--precision", choices=tuple(PRECISIONS), help="as trainer.precision (bf16-true on CUDA, 32-true on the CPU)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto: CUDA where it is)")
    parser.add_argument("--threads", type=positive, metavar="T", help="CPU threads (PyTorch's choice)")
    parser.add_argument("--repeats", type=positive, default=7, metavar="R", help="rounds (7)")
    parser.add_argument("--compile", action="store_true", help="also run the forms through torch.compile")
    parser.add_argument("--no-peers", action="store_true", help="leave out the form peer")
    parser.add_argument("--end-to-end", action="store_true", help="also run whole evaluations")
    parser.add_argument(
        "--jobs",
        type=positive,
        default=default_jobs(),
        metavar="J",
        help="processes that compile kernels ahead on CUDA, 1 for none (as many as usable CPUs, 8 at most)",
    )
    parser.add_argument("--output", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--figure", metavar="FILE", help="draw the images per second as bars (.png, .pdf, .svg)")
    return parser


def with_defaults(arguments: argparse.Namespace, device: torch.device) -> argparse.Namespace:
    """The options, with those that depend on others filled in.

    Raises:
        UserError: the variant is unknown, or its attention cannot be swapped; no form is left.
    """
    check_swappable(arguments.variant)
    on_cuda = device.type == "cuda"
    filled = {
        "batches": arguments.batches or ((32, 128, 256, 512) if on_cuda else (8,)),
        "precision": arguments.precision or ("bf16-true" if on_cuda else "32-true"),
        "forms": tuple(kind for kind in arguments.forms if kind != "peer" or not arguments.no_peers),
        "device": device.type,
    }
    if not filled["forms"]:
        raise UserError("--no-peers leaves no form of --forms. Leave out one of the two.")
    return argparse.Namespace(**{**vars(arguments), **filled})


# Output ---------------------------------------------------------------------------------------------------------------


def result_tables(bench: Bench) -> Iterator[Table]:
    """The forms at their best batch, and the evaluations."""
    arguments = bench.arguments
    where = f"{arguments.variant}: {arguments.image_size} px, {arguments.precision} on {arguments.device}"
    table = Table(title=where, title_justify="left")
    table.add_column("form", overflow="fold")
    for header in ("batch", "images/s", "ms", "MiB", "times\npublished", "first\ncall s"):
        table.add_column(header, justify="right", no_wrap=True)
    kind = None
    for result in bench.best():
        if kind is not None and result.kind != kind:
            table.add_section()
        kind = result.kind
        table.add_row(
            result.name,
            str(result.batch),
            figure(result.images_per_second),
            figure(result.milliseconds),
            "-" if result.peak_memory_mib is None else figure(result.peak_memory_mib),
            "-" if result.speed_over_published is None else figure(result.speed_over_published),
            figure(result.first_call_seconds),
        )
    yield table
    if bench.end_to_end:
        table = Table(title="Whole evaluations of images in memory", title_justify="left")
        table.add_column("attention")
        for header in ("batch", "images", "images/s", "network\nalone", "part of it", "MiB"):
            table.add_column(header, justify="right", no_wrap=True)
        for row in bench.end_to_end:
            table.add_row(
                row["attention"],
                str(row["batch"]),
                f"{row['num_images']:,}",
                figure(row["images_per_second"]),
                figure(row["images_per_second_alone"]),
                f"{row['ratio_to_alone']:.3f}",
                "-" if row["peak_memory_mib"] is None else figure(row["peak_memory_mib"]),
            )
        yield table


def left_out(bench: Bench) -> Iterator[str]:
    """What failed and why, each reason once."""
    batches: dict[tuple[str, str], list[str]] = {}
    for skipped in bench.skipped:
        batches.setdefault((skipped["name"], skipped["reason"]), []).append(str(skipped["batch"]))
    for (name, reason), failed in batches.items():
        yield f"{name} left out at batch {', '.join(failed)}: {reason}."


def plot(bench: Bench, path: str) -> None:
    """Bars of the images per second of each form at its best batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arguments, best = bench.arguments, bench.best()
    colours = dict(zip(KINDS, ("black", "tab:blue", "tab:red", "grey"), strict=True))
    drawing, axis = plt.subplots(figsize=(9, 1.2 + 0.35 * len(best)), layout="constrained")
    bars = axis.barh(
        [result.name for result in best],
        [result.images_per_second for result in best],
        color=[colours[result.kind] for result in best],
    )
    axis.bar_label(bars, [f"{figure(x.images_per_second)} (batch {x.batch})" for x in best], padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.3)
    axis.set_xlabel("images per second")
    axis.set_title(f"{arguments.variant}, {arguments.image_size} px, {arguments.precision} on {machine_name(bench)}")
    save_figure(drawing, path)
    plt.close(drawing)


def machine_name(bench: Bench) -> str:
    info = machine_info(bench.device)
    return info["gpu"] or f"{info['processor']}, {info['threads']} threads"


def report(bench: Bench) -> dict[str, Any]:
    """Everything that was measured, for JSON."""
    return {
        "complete": not bench.missing,
        "machine": machine_info(bench.device),
        "settings": without_paths(bench.arguments),
        "results": [asdict(result) for result in bench.results],
        "best_batch": {result.name: result.batch for result in bench.best()},
        "end_to_end": bench.end_to_end,
        "skipped": bench.skipped,
    }


def benchmark(arguments: argparse.Namespace) -> int:
    """Run the benchmark, print its tables and write its files; returns the exit status."""
    check_writable(arguments.output)
    check_figure(arguments.figure)
    bench = Bench(arguments)
    return saved_until_stopped(bench.run, lambda: report(bench), arguments.output, lambda: conclude(bench))


def conclude(bench: Bench) -> int:
    """Print what is complete and write the files; returns the exit status."""
    arguments = bench.arguments
    if not bench.results:
        print("Interrupted. Nothing was written.", file=sys.stderr)
        return 1
    console = Console()
    for table in result_tables(bench):
        console.print(table, "")
    for line in left_out(bench):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    info = ", ".join(f"{name} {value}" for name, value in machine_info(bench.device).items() if value is not None)
    console.print(info, markup=False, highlight=False, soft_wrap=True)
    if arguments.output is not None:
        write_json(arguments.output, report(bench))
    if arguments.figure is not None:
        plot(bench, arguments.figure)
    if bench.missing:
        print(f"Interrupted. Missing: {', '.join(bench.missing)}.", file=sys.stderr)
    return 1 if bench.missing else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark that `argv` asks for; returns the exit status."""
    return run_tool(build_parser(), benchmark, argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted. Nothing was written.")
