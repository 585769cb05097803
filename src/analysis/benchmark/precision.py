"""Rounding errors of an attention: its output and gradients against its own float64 specification."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from scatterbrain.attention import create_attention
from scatterbrain.errors import UserError
from src.analysis.benchmark.report import DTYPES
from src.utils.text import first_line

TENSORS = ("output", "gradient of query", "gradient of key", "gradient of value")


def draw_inputs(arguments: argparse.Namespace, sharp: bool) -> tuple[list[torch.Tensor], float]:
    """Query, key, value and gradient of the output (B, N, 1, E), float32, and the largest logit."""
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch, arguments.length, 1, arguments.dim)
    query, key, value, gradient = (torch.randn(shape, generator=generator) for _ in range(4))
    logits = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * arguments.dim**-0.5
    largest = logits.abs().max().item()
    if sharp:
        factor = (arguments.logits / largest) ** 0.5
        query, key, largest = query * factor, key * factor, arguments.logits
    return [query, key, value, gradient], largest


def outputs(module: torch.nn.Module, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients of a module, in the order of `TENSORS`."""
    *leaves, gradient = (x.detach() for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    out = module(*leaves)[0]
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def measure(
    arguments: argparse.Namespace, name: str, dtype: str, sharp: bool, device: torch.device
) -> list[dict[str, Any]]:
    """Errors of one attention in one type on one kind of inputs, a row for each of `TENSORS`.

    `max_abs` is the largest absolute error and `relative_l2` the L2 norm of the error over that of the specification;
    both are None if a value is not finite.
    """
    tensors, largest = draw_inputs(arguments, sharp)
    tensors = [x.to(device, DTYPES[dtype]) for x in tensors]
    options = {"memory_fraction": arguments.memory_fraction}
    # random projections stay float32, as the modules keep them
    fast, naive = (
        create_attention(name, arguments.length, arguments.dim, backend=backend, **options).to(device)
        for backend in ("auto", "naive")
    )
    expected = outputs(naive, [x.double() for x in tensors])
    try:
        results = outputs(fast, tensors)
    except RuntimeError as error:
        raise UserError(f"{name} fails in {dtype} on {device.type} ({first_line(error)}).") from error
    rows = []
    for tensor, result, exact in zip(TENSORS, results, expected, strict=True):
        non_finite = int((~torch.isfinite(result)).sum())
        error = result.double() - exact
        rows.append(
            {
                "attention": name,
                "dtype": dtype,
                "inputs": "sharp" if sharp else "ordinary",
                "largest_logit": largest,
                "tensor": tensor,
                "max_abs": None if non_finite else error.abs().max().item(),
                "relative_l2": None if non_finite else (error.norm() / exact.norm().clamp_min(1e-300)).item(),
                "non_finite": non_finite,
            }
        )
    return rows
