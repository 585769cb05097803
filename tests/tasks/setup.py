"""A small evaluation: generated images, weights from names, and the command line that joins them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image

from src.utils.named_tensors import named_weights, official_shapes

CONFIG_DIR = str(Path(__file__).parents[2] / "configs")
EXPERIMENT = "imagenet-t2tvit-eval"
NUM_CLASSES = 5
IMAGE_SIZE = 32


def make_images(folder: Path, number: int) -> Path:
    """`folder`/val/c0 ... c4 with `number` images of random pixels, no two of the same size."""
    generator = np.random.default_rng(0)
    for index in range(number):
        path = folder / "val" / f"c{index % NUM_CLASSES}" / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 40 + index, 3), dtype=np.uint8)).save(path)
    return folder


def make_checkpoint(path: Path, variant: str) -> Path:
    """A checkpoint in the published form."""
    weights = named_weights(official_shapes(variant, NUM_CLASSES, IMAGE_SIZE))
    torch.save({"state_dict_ema": {key: weight.float() for key, weight in weights.items()}}, path)
    return path


def overrides(data: Path, checkpoint: Path, variant: str, **changes: object) -> list[str]:
    """Command line of an evaluation.

    `changes` are further options, `.` written as `__` and `/` as `___`; None leaves an option out.
    """
    options: dict[str, object] = {
        "experiment": EXPERIMENT,
        "model/t2tmodel": variant,
        "model.image_size": IMAGE_SIZE,
        "model.num_classes": NUM_CLASSES,
        "datamodule.data_dir": data,
        "datamodule.batch_size": 4,
        "datamodule.num_workers": 0,
        "eval.ckpt": checkpoint,
        "trainer.accelerator": "cpu",
        "callbacks": "none",
    }
    options |= {name.replace("___", "/").replace("__", "."): value for name, value in changes.items()}
    return [f"{name}={value}" for name, value in options.items() if value is not None]


def compose_config(arguments: list[str], output_dir: Path | None = None) -> DictConfig:
    """The configuration of a command line, as a run sees it."""
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        config = compose("config", arguments)
    if output_dir is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
        config.paths.output_dir = str(output_dir)
    return config
