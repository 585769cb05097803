"""The benchmark of loading: timm's loader and ours, with the same images and the same transform."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageDataset as TimmImages
from timm.data import create_loader
from torch.utils.data import DataLoader

from src.analysis.benchmark.timing import in_turn
from src.analysis.tools import shown, split_folder
from src.datamodules.formats import imagenet_synsets, scan_folder
from src.datamodules.image_folder import ImageFolderDataModule

TIMM, TIMM_NORMALISED, OURS, CACHED = "timm", "timm, normalised", "ours", "ours, cached"
# A pass over few decoded images takes no time: so long are they passed over again, seconds.
MIN_SECONDS = 0.5
# Of the published evaluation.
PIXELS = {"interpolation": "bicubic", "crop_pct": 0.9}


@dataclass
class Candidate:
    """A loader, by a function that opens it, and its rates in images per second, one a round."""

    name: str
    open_loader: Callable[[], DataLoader]
    rates: list[float] = field(default_factory=list)
    num_images: int = 0

    def time_round(self) -> None:
        """Pass over all images, everything being opened and started anew as in an evaluation."""
        seen, passes = 0, 0
        begin = time.perf_counter()
        while (seconds := time.perf_counter() - begin) < MIN_SECONDS or not passes:
            for images, *_ in self.open_loader():
                seen += len(images)
            passes += 1
        self.rates.append(seen / seconds)
        self.num_images = seen // passes


def count_classes(split: Path) -> int:
    """Outputs of a model of a split's class folders."""
    folders = scan_folder(split)[0]
    return 1000 if any(name in imagenet_synsets() for name in folders) else max(1, len(folders))


def make_candidates(arguments: argparse.Namespace, cache_dir: Path) -> tuple[list[Candidate], float | None]:
    """The loaders, and the seconds in which the cache was made; None where it was there."""
    split = split_folder(arguments.data_dir, arguments.split)
    common = {"batch_size": arguments.batch_size, "num_workers": arguments.num_workers, **PIXELS}
    options = {"num_classes": count_classes(split), "image_size": arguments.image_size, **common}
    options |= {"test_split": arguments.split, "pin_memory": False}
    ours, cached = (ImageFolderDataModule(arguments.data_dir, cache_dir=x, **options) for x in (None, str(cache_dir)))
    begin, before = time.perf_counter(), set(cache_dir.glob("*"))
    cached.test_dataloader()
    seconds = time.perf_counter() - begin if set(cache_dir.glob("*")) != before else None
    timm = {"input_size": arguments.image_size, "is_training": False, "device": torch.device("cpu"), **common}
    images = [TimmImages(str(split)) for _ in range(2)]  # a loader gives its images its transform
    return [
        # the prefetcher would normalise on the device what this loader returns
        Candidate(TIMM, lambda: create_loader(images[0], use_prefetcher=True, **timm).loader),
        Candidate(TIMM_NORMALISED, lambda: create_loader(images[1], use_prefetcher=False, **timm)),
        Candidate(OURS, ours.test_dataloader),
        Candidate(CACHED, cached.test_dataloader),
    ], seconds


def measure(candidates: Sequence[Candidate], rounds: int) -> list[dict[str, Any]]:
    """Time the loaders in turn; a row for each, the first one being what the others are compared with."""
    for candidate in shown(in_turn(candidates, rounds), "Timing", len(candidates) * rounds):
        candidate.time_round()
    medians = [statistics.median(each.rates) for each in candidates]
    rows = []
    for each, median in zip(candidates, medians, strict=True):
        row = {"loader": each.name, "num_images": each.num_images, "images_per_second": median}
        rows.append(row | {"images_per_second_per_round": each.rates, "ratio_to_timm": median / medians[0]})
    return rows
