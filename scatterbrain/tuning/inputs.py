"""Inputs of a model in batches, its outputs as tensors, and the model as it is evaluated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from scatterbrain.errors import UserError
from scatterbrain.integrations.router import check_model


def batches(inputs: Any) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """Positional and keyword arguments of the model, for each batch.

    Args:
        inputs: a tensor, a tuple of positional arguments, a mapping of keyword arguments, or an iterable of these.

    Raises:
        UserError: something else, or no batch.
    """
    if isinstance(inputs, torch.Tensor | tuple | Mapping):
        yield _arguments(inputs)
        return
    if isinstance(inputs, str) or not isinstance(inputs, Iterable):
        raise UserError(
            f"inputs is {type(inputs).__name__}. Give a tensor, a tuple of arguments, a dict of keyword arguments, or "
            "an iterable of these."
        )
    count = 0
    for batch in inputs:
        count += 1
        yield _arguments(batch)
    if not count:
        raise UserError("inputs has no batch. Give at least one.")


def _arguments(batch: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    raise UserError(
        f"inputs has a batch of {type(batch).__name__}. Batches are tensors, tuples of arguments or dicts of keyword "
        "arguments."
    )


def output_tensors(output: Any, name: str = "output") -> Iterator[tuple[str, torch.Tensor]]:
    """Floating-point tensors of a model's output with their names, such as `logits` or `output[0]`.

    Args:
        output: a tensor, or tensors in mappings, lists and tuples; what else it holds is left out.
        name: its name.
    """
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from output_tensors(value, f"{key}" if name == "output" else f"{name}.{key}")
    elif isinstance(output, tuple | list):
        for number, value in enumerate(output):
            yield from output_tensors(value, f"{name}[{number}]")


def unwrap(model: nn.Module) -> nn.Module:
    """The model within `torch.compile` and DistributedDataParallel, whose names of modules are those of the plan.

    Args:
        model: the model.

    Raises:
        UserError: it is none.
    """
    check_model(model)
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in getattr(model, "_modules", {}):
            model = model._orig_mod
        else:
            return model


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by their names, which are the same where `torch.compile` wraps a module.

    Args:
        model: the model.
    """
    # the module inside comes after the one that wraps it
    return {".".join(x for x in name.split(".") if x != "_orig_mod"): module for name, module in model.named_modules()}


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Context in which a model is in evaluation mode and without gradients; afterwards each module is as before.

    Args:
        model: the model.
    """
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in training:
            module.training = flag
