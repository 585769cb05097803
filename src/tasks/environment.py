"""Hardware, software versions, memory and command that are stored with results."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from pytorch_lightning import Trainer

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


def package_versions() -> dict[str, str]:
    """Version of Python and of each library that may change results."""
    versions = {"python": platform.python_version()}
    for package in VERSIONED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    # torch's own version says CPU or CUDA, which the metadata may not
    return versions | {"torch": torch.__version__}


def device_name(trainer: Trainer) -> str:
    """Name of the trainer's device, preceded by their number where there are several."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type} ({processor_name()}, {torch.get_num_threads()} threads)"
    return name if trainer.world_size == 1 else f"{trainer.world_size} x {name}"


def reset_peak_memory(trainer: Trainer) -> None:
    """Reset the peak memory, where the device counts it."""
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.init()  # before that, there is nothing to reset
        torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)


def peak_memory_mib(trainer: Trainer) -> float | None:
    """Peak memory of the device in MiB; None where it is not counted."""
    if trainer.strategy.root_device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(trainer.strategy.root_device) / 2**20
