"""Optimizer and learning rate schedule of a training, from their config groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from scatterbrain.errors import UserError, did_you_mean, is_number
from src.utils.instantiate import build_later


def optimizer_factory(config: DictConfig, scale: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """From a model to its optimizer, with the learning rate of the config times `scale`."""
    return build_later(config.optimizer, "optimizer", lr=scale * config.optimizer.lr)


def make_scheduler(config: DictConfig, optimizer: torch.optim.Optimizer, scale: float, updates_per_epoch: int) -> Any:
    """The scheduler of timm, with the learning rates of the config times `scale`.

    Raises:
        UserError: it is unknown, or does not end with the training.
    """
    options = config.scheduler
    decaying = config.train.epochs - options.cooldown_epochs
    if decaying <= options.warmup_epochs:
        raise UserError(
            f"train.epochs={config.train.epochs} leaves no epoch between scheduler.warmup_epochs="
            f"{options.warmup_epochs} and scheduler.cooldown_epochs={options.cooldown_epochs}. Lower these."
        )
    if options.sched == "plateau":
        raise UserError("scheduler.sched=plateau needs a metric, which it is not given. Choose another one.")
    rates = {name: scale * options[name] for name in ("warmup_lr", "min_lr")}
    make = build_later(options, "scheduler", **rates)
    scheduler, num_epochs = make(optimizer, num_epochs=decaying, updates_per_epoch=updates_per_epoch)
    if scheduler is None:  # older versions of timm return None for an unknown name
        raise UserError(
            f"scheduler cannot be built: timm knows no sched={options.sched}. Choose another, such as cosine."
        )
    if num_epochs != config.train.epochs:
        raise UserError(
            f"scheduler.sched={options.sched} does not end with train.epochs={config.train.epochs}, but with "
            f"{num_epochs}. Choose another, such as cosine."
        )
    return scheduler


def warmup_and_decay(steps: int, warmup: float = 0.05, decay: str = "cosine") -> Callable[[int], float]:
    """From a step, from 1 on, to its learning rate as a fraction of the highest one.

    Args:
        steps: of the training.
        warmup: fraction of the steps in which the rate rises linearly.
        decay: after that, `"cosine"`, half a cosine to zero at the end, or `"rsqrt"`, the inverse square root of the
            step (Long Range Arena).

    Raises:
        UserError: a value out of range.
    """
    if not (is_number(warmup) and 0 <= warmup <= 1):
        raise UserError(f"scheduler.warmup={warmup} is not valid. Give a fraction of train.steps, from 0 to 1.")
    if decay not in ("cosine", "rsqrt"):
        raise UserError(f"scheduler.decay={decay} is unknown. {did_you_mean(str(decay), ('cosine', 'rsqrt'))}")
    rising = max(1.0, warmup * steps)

    def factor(step: int) -> float:
        if step < rising:
            return step / rising
        if decay == "rsqrt":
            return math.sqrt(rising / step)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1.0, steps - rising))))

    return factor
