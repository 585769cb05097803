"""Rate at which images are loaded for an evaluation: by timm's loader, by ours, and by ours from its cache.

All of them hand on the same bytes, resized and cropped: what timm's workers give to its prefetcher, and ours to the
device, both of which normalise there. Beside them is timm's loader without the prefetcher, whose workers normalise. In
each round every loader passes over all images in turn; the median of the rounds is reported. The images have been read
before, so that files come from memory.

    python scripts/benchmark_loading.py --data-dir /path/to/imagenet
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timm.data import ImageDataset as TimmImages
from timm.data import create_loader
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from scatterbrain.errors import UserError
from src.datamodules.augmentation import INTERPOLATIONS
from src.datamodules.cache import DecodedCache
from src.datamodules.formats.classes import imagenet_synsets
from src.datamodules.formats.files import scan_folder
from src.datamodules.image_folder import ImageFolderDataModule
from src.utils.files import write_json
from src.utils.machine import machine_info, usable_cpus
from src.utils.scripts import (
    Parser,
    check_writable,
    figure,
    fraction,
    positive,
    progress_display,
    run_tool,
    without_paths,
)
from src.utils.timing import in_turn

TIMM, TIMM_NORMALISED, OURS, CACHED = "timm", "timm, normalised", "ours", "ours, cached"
# A pass over few decoded images takes no time: so long are they passed over again, seconds.
LEAST_SECONDS = 0.5


@dataclass
class Result:
    """Figures of one loader.

    Attributes:
        loader: its name.
        num_images: images in a pass.
        images_per_second: median of the rounds.
        images_per_second_per_round: in each round.
        ratio_to_timm: median over that of timm's loader of bytes.
    """

    loader: str
    num_images: int
    images_per_second: float
    images_per_second_per_round: list[float]
    ratio_to_timm: float


@dataclass
class Candidate:
    """A loader and its rates.

    Attributes:
        name: of the loader.
        open_loader: gives batches of images and what comes with them.
        rates: images per second in each round.
    """

    name: str
    open_loader: Callable[[], DataLoader]
    rates: list[float] = field(default_factory=list)
    num_images: int = 0

    def time_round(self) -> None:
        """Pass over all images, everything being opened and started anew as in an evaluation."""
        seen, passes = 0, 0
        begin = time.perf_counter()
        while (seconds := time.perf_counter() - begin) < LEAST_SECONDS or not passes:
            for images, *_ in self.open_loader():
                seen += len(images)
            passes += 1
        self.rates.append(seen / seconds)
        self.num_images = seen // passes


def count_classes(split: Path) -> int:
    """Outputs of a model of a split's class folders.

    Raises:
        UserError: there is no such folder.
    """
    if not split.is_dir():
        raise UserError(
            f"There is no folder {split}. Give --data-dir the folder that holds the split's folder, and name the split "
            "with --split: timm reads folders only."
        )
    folders = scan_folder(split)[0]
    return 1000 if any(name in imagenet_synsets() for name in folders) else max(1, len(folders))


def make_candidates(arguments: argparse.Namespace, cache_dir: str) -> tuple[list[Candidate], float | None]:
    """The loaders, and the seconds in which the cache was made; None where it was there."""
    split = Path(arguments.data_dir).expanduser() / arguments.split
    common = {"batch_size": arguments.batch_size, "num_workers": arguments.num_workers}
    pixels = {"interpolation": arguments.interpolation, "crop_pct": arguments.crop_pct}
    options = {"num_classes": count_classes(split), "image_size": arguments.image_size, **common, **pixels}
    modules = {
        name: ImageFolderDataModule(
            arguments.data_dir, test_split=arguments.split, pin_memory=False, cache_dir=cache, **options
        )
        for name, cache in ((OURS, None), (CACHED, cache_dir))
    }
    made: list[float] = []
    make = DecodedCache.make

    def timed_make(self: DecodedCache, *args: Any) -> None:
        begin, there = time.perf_counter(), self.folder.is_dir()
        make(self, *args)
        if not there:
            made.append(time.perf_counter() - begin)

    DecodedCache.make = timed_make
    try:
        modules[CACHED].test_dataloader()
    finally:
        DecodedCache.make = make
    timm = {"input_size": arguments.image_size, "is_training": False, "device": torch.device("cpu"), **common, **pixels}
    images = [TimmImages(str(split)) for _ in range(2)]  # a loader gives its images its transform
    return [
        # the prefetcher would normalise on the device what this loader hands on
        Candidate(TIMM, lambda: create_loader(images[0], use_prefetcher=True, **timm).loader),
        Candidate(TIMM_NORMALISED, lambda: create_loader(images[1], use_prefetcher=False, **timm)),
        Candidate(OURS, modules[OURS].test_dataloader),
        Candidate(CACHED, modules[CACHED].test_dataloader),
    ], (made[0] if made else None)


def results(candidates: Sequence[Candidate]) -> list[Result]:
    """Medians and ratios; the first one is what the others are compared with."""
    reference = statistics.median(candidates[0].rates)
    return [
        Result(each.name, each.num_images, rate := statistics.median(each.rates), each.rates, rate / reference)
        for each in candidates
    ]


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--data-dir", required=True, metavar="DIR", help="folder that holds the split's folder")
    parser.add_argument("--split", default="val", metavar="NAME", help="folder of class folders (val)")
    parser.add_argument("--image-size", type=positive, default=224, metavar="N", help="in pixels (224)")
    parser.add_argument("--crop-pct", type=fraction, default=0.9, metavar="F", help="(0.9)")
    parser.add_argument("--interpolation", choices=INTERPOLATIONS, default="bicubic", help="(bicubic)")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="B", help="(64)")
    parser.add_argument(
        "--num-workers",
        type=positive,
        default=min(16, usable_cpus()),
        metavar="N",
        help="processes that decode (as many as there are CPUs, at most 16)",
    )
    parser.add_argument("--rounds", type=positive, default=3, metavar="R", help="(3)")
    parser.add_argument("--cache-dir", metavar="DIR", help="folder of the cache (a temporary one)")
    parser.add_argument("--output", metavar="FILE", help="write the figures as JSON")
    return parser


def result_table(found: Sequence[Result], arguments: argparse.Namespace) -> Table:
    """One row for each loader."""
    table = Table(
        title=f"Loading {found[0].num_images:,} images at {arguments.image_size} px: batch {arguments.batch_size}, "
        f"{arguments.num_workers} workers",
        title_justify="left",
    )
    table.add_column("loader", no_wrap=True)
    for header in ("images/s", "ratio to timm"):
        table.add_column(header, justify="right", no_wrap=True)
    for result in found:
        table.add_row(result.loader, figure(result.images_per_second), f"{result.ratio_to_timm:.2f}")
    return table


@contextlib.contextmanager
def folder_of_cache(name: str | None) -> Iterator[str]:
    """The folder that was named, or one that is gone at the end."""
    if name is not None:
        yield name
        return
    with tempfile.TemporaryDirectory(prefix="decoded-images-") as folder:
        yield folder


def benchmark(arguments: argparse.Namespace) -> None:
    """Run the benchmark, print its table and write its file."""
    check_writable(arguments.output)
    console, progress_console = Console(), Console(stderr=True)
    with folder_of_cache(arguments.cache_dir) as cache_dir:
        candidates, seconds = make_candidates(arguments, cache_dir)
        with progress_display(progress_console) as progress:
            task = progress.add_task("", total=len(candidates) * arguments.rounds)
            for candidate in in_turn(candidates, arguments.rounds):
                progress.update(task, description=candidate.name)
                candidate.time_round()
                progress.advance(task)
    found = results(candidates)
    console.print(result_table(found, arguments))
    machine = machine_info(torch.device("cpu"))
    made = "" if seconds is None else f" Making the cache took {figure(seconds)} s."
    info = ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)
    note = f"Median of {arguments.rounds} rounds, the loaders in turn; bytes but for '{TIMM_NORMALISED}'.{made}"
    for line in (note, info):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if arguments.output is not None:
        settings = without_paths(arguments)
        del settings["data_dir"], settings["cache_dir"]
        write_json(
            arguments.output,
            {
                "machine": machine,
                "settings": settings,
                "cache_seconds": seconds,
                "results": [asdict(result) for result in found],
            },
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark that `argv` asks for; returns the exit status."""
    return run_tool(build_parser(), benchmark, argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted. Nothing was written.")
