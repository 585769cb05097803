"""What the benchmarks share around their measurements: the machine, and what was left out."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from src.analysis.tools import Run, left_out_lines, without_paths
from src.utils.machine import machine_info

# What every time is divided by: PyTorch's scaled_dot_product_attention as it chooses its kernel.
BASELINE = "SDPA"
SYMBOLS = {"local_context": "W", "nb_features": "M", "num_landmarks": "C", "num_query_landmarks": "Q", "num_exact": "X"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def sizes_text(sizes: Mapping[str, float]) -> str:
    """Sizes of an attention, as the tables have them."""
    texts = {name: f"{size:.2g}" if isinstance(size, float) else size for name, size in sizes.items()}
    return ", ".join(f"{SYMBOLS.get(name, name.removeprefix('num_'))} {text}" for name, text in texts.items())


def cell(value: float | None, shape: Callable[[float], str]) -> str:
    """A number as text, a dash where there is none."""
    return "-" if value is None else shape(value)


def header(arguments: argparse.Namespace, device: torch.device, *without: str, **settings: Any) -> dict[str, Any]:
    """Machine and settings, which results are stored with; of the options paths and those `without` are left out."""
    settings = {**without_paths(arguments, *without), "device": device.type, **settings}
    return {"machine": machine_info(device), "settings": settings}


def machine_line(device: torch.device) -> str:
    """Hardware and software versions, as they stand below the tables."""
    return ", ".join(f"{name} {value}" for name, value in machine_info(device).items() if value is not None)


class Bench(Run):
    """A benchmark; subclasses define `place`: the key by which `skipped` says where, and its words."""

    place: tuple[str, str]

    def __init__(self, arguments: argparse.Namespace, missing: Iterable[str]) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.results: list[dict[str, Any]] = []
        self.skipped: list[dict[str, Any]] = []
        self.missing = list(missing)

    def more(self) -> dict[str, Any]:
        """What the JSON has beside the rows of `results`; subclasses add to it."""
        return {}

    def report(self) -> dict[str, Any]:
        """What is complete, for JSON."""
        content = {"complete": not self.missing, **header(self.arguments, self.device), "results": self.results}
        return {**content, **self.more(), "skipped": self.skipped}

    def notes(self) -> list[str]:
        """What could not be measured and why, each reason once, and the machine."""
        key, words = self.place
        skipped = ((item["name"], item["reason"], str(item[key])) for item in self.skipped)
        return [*left_out_lines(skipped, f"{words} "), machine_line(self.device)]
