"""Checks of options that every mode takes and no other part checks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from scatterbrain.errors import UserError, check_whole_number

# The largest seed of `seed_everything`, less room for the seeds of further samples.
MAX_SEED = 2**31 - 1


def check_common_options(config: DictConfig) -> None:
    """Check groups, paths, that numbers are finite, `seed` and the sizes of the model, before anything slow.

    Raises:
        UserError: a value that is not valid.
    """
    for name in ("paths", "model", "datamodule", "trainer", "eval", "train"):
        if name in config and not isinstance(config[name], DictConfig):
            raise UserError(
                f"{name}={config[name]} is not valid. It is a group of options: {name}.NAME=VALUE sets one."
            )
    for name in ("datamodule.data_dir", "eval.ckpt", "train.ckpt"):
        value = OmegaConf.select(config, name)
        if value is not None and not isinstance(value, str | os.PathLike):
            raise UserError(f"{name}={value} is not valid. Give a path.")
    for name, value in _leaves(OmegaConf.to_container(config, resolve=False), ""):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name}={value} is not valid. Give a finite number.")
    check_whole_number("seed", config.seed, 0, MAX_SEED)
    # the data module reads these two through its own options, and would name those
    for name in ("image_size", "num_classes"):
        if name in config.model:
            check_whole_number(f"model.{name}", config.model[name], 1)


def _leaves(content: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The values within nested dicts and lists, by their full names."""
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, content
