"""Where a figure comes from: machine, versions, command, and the attention's own options."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer

from scatterbrain.attention import attention_memory
from src.models.modules.tokens_to_token import stage_lengths
from src.models.t2t_vit import T2TViT
from src.utils.machine import processor_name

VERSIONED_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "pytorch-lightning",
    "hydra-core",
    "numpy",
    "pillow",
)


def command_line() -> str:
    """The command that was run, as one could type it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def package_versions() -> dict[str, str]:
    """Version of Python and of each library that matters."""
    versions = {"python": platform.python_version()}
    for package in VERSIONED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    # the wheel's own name of itself says CPU or CUDA, which the metadata may not
    return versions | {"torch": torch.__version__}


def device_name(trainer: Trainer) -> str:
    """Name of the trainer's device, their number before it where there are several."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type} ({processor_name()}, {torch.get_num_threads()} threads)"
    return name if trainer.world_size == 1 else f"{trainer.world_size} x {name}"


def reset_peak_memory(trainer: Trainer) -> None:
    """Count the peak memory from here on, where the device counts it."""
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.init()  # before that, there is nothing to reset
        torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)


def peak_memory_mib(trainer: Trainer) -> float | None:
    """Peak memory of the device in MiB; None where it is not counted."""
    if trainer.strategy.root_device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(trainer.strategy.root_device) / 2**20


def seconds_now(device: torch.device) -> float:
    """Seconds of a clock, once everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def attention_options(model: T2TViT) -> list[dict[str, Any]] | None:
    """Options of the attention of both token stages, as they came out of budget and overrides."""
    if model.token_attentions is None:
        return None
    return [{**attention.sizes(), "scale": attention.softmax_temp} for attention in model.token_attentions]


def attention_memory_fraction(model: T2TViT) -> float | None:
    """Memory of both token stages' attention over that of full attention."""
    if model.token_attentions is None:
        return None
    lengths = stage_lengths(model.image_size)
    entries = [length**2 for length in lengths]
    fractions = [attention_memory(module, n) for module, n in zip(model.token_attentions, lengths, strict=True)]
    return sum(f * n for f, n in zip(fractions, entries, strict=True)) / sum(entries)
