"""What several test modules share: one comparison, the operators as a table, a recorder of tensor sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scatterbrain.ops.full import full_attention, naive_full_attention
from scatterbrain.ops.local import local_attention, naive_local_attention
from scatterbrain.ops.performer import naive_performer_attention, performer_attention
from scatterbrain.ops.scatterbrain import naive_scatterbrain_attention, scatterbrain_attention

GOLDEN_DIR = Path(__file__).parent / "golden"


def load_golden(name: str) -> dict[str, np.ndarray]:
    """Entries of `tests/golden/<name>.npz`, see the README there."""
    with np.load(GOLDEN_DIR / f"{name}.npz") as entries:
        return dict(entries)


def rms_ratio(reference: torch.Tensor, result: torch.Tensor) -> float:
    """Root mean square of the difference over that of the reference; the difference alone where that is zero."""
    reference, result = reference.detach().double(), result.detach().double()
    error, size = ((x.square().mean().sqrt().item()) for x in (result - reference, reference))
    return error / size if size > 0 else error


def assert_close(name: str, reference: torch.Tensor, result: torch.Tensor, ratio: float) -> None:
    """Fail unless `result` is finite and within `ratio` of `reference`, as root mean squares.

    Args:
        name: what the tensor is called in the message.
        reference: finite tensor of any floating-point dtype.
        result: tensor of the same shape.
        ratio: largest RMS of the difference over the RMS of the reference.
    """
    assert result.shape == reference.shape, f"{name}: shape {tuple(result.shape)}, expected {tuple(reference.shape)}"
    for which, tensor in (("reference", reference), ("result", result)):
        bad = (~torch.isfinite(tensor)).sum().item()
        assert bad == 0, f"{name}: {bad} of {tensor.numel()} elements of the {which} are nan or infinite"
    got = rms_ratio(reference, result)
    assert got <= ratio, f"{name}: RMS ratio {got:.3e} exceeds {ratio:.3e}"


def dense_attention(
    logits: torch.Tensor, visible: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, T, D) and weights (B, H, T, S) of a softmax over visible keys, float64; zero over none."""
    weights = logits.masked_fill(~visible, -math.inf).softmax(-1).masked_fill(~visible, 0.0)
    return weights @ value.double(), weights


@dataclass(frozen=True)
class Operator:
    """An operator under one signature: `(query, key, value, projection, window, **options)`.

    Attributes:
        function: as exported by its package.
        naive_function: its specification.
        takes: which of `projection` and `window` it takes, in this order.
    """

    function: Callable
    naive_function: Callable
    takes: tuple[str, ...]

    def __call__(self, query, key, value, projection, window, **options):
        sizes = {"projection": projection, "window": window}
        return self.function(query, key, value, *(sizes[name] for name in self.takes), **options)

    def naive(self, query, key, value, projection, window, **options):
        """Output and weights of the specification, float64."""
        options["scale"] = query.shape[-1] ** -0.5 if options.get("scale") is None else options["scale"]
        sizes = {"projection": projection, "window": window}
        return self.naive_function(query, key, value, *(sizes[name] for name in self.takes), **options)


OPERATORS: dict[str, Operator] = {
    "full": Operator(full_attention, naive_full_attention, ()),
    "local": Operator(local_attention, naive_local_attention, ("window",)),
    "performer": Operator(performer_attention, naive_performer_attention, ("projection",)),
    "scatterbrain": Operator(scatterbrain_attention, naive_scatterbrain_attention, ("projection", "window")),
}


def draw_inputs(
    batch: int = 2,
    heads: int = 2,
    length: int = 50,
    num_keys: int | None = None,
    width: int = 16,
    value_width: int | None = None,
    rows: int = 5,
    dtype: torch.dtype = torch.float64,
    max_logit: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Standard-normal query, key, value (B, H, length, width) and projection (rows, width).

    With `max_logit`, queries and keys are multiplied by one factor such that the largest |q.k| / sqrt(width) is that.
    """
    num_keys = length if num_keys is None else num_keys
    value_width = width if value_width is None else value_width
    query = torch.randn(batch, heads, length, width, dtype=torch.float64)
    key = torch.randn(batch, heads, num_keys, width, dtype=torch.float64)
    value = torch.randn(batch, heads, num_keys, value_width, dtype=torch.float64)
    projection = torch.randn(rows, width, dtype=torch.float64)
    if max_logit is not None:
        largest = (query @ key.transpose(-2, -1)).abs().max() * width**-0.5
        factor = (max_logit / largest).sqrt()
        query, key = query * factor, key * factor
    return query.to(dtype), key.to(dtype), value.to(dtype), projection.to(dtype)


def operators_and_windows(*windows: int) -> list[tuple[str, int]]:
    """Pairs of operator and window: those that take none come once."""
    return [
        (name, window)
        for name, operator in OPERATORS.items()
        for window in (windows if "window" in operator.takes else windows[:1])
    ]


class TensorRecorder(TorchDispatchMode):
    """Records how many elements the storages behind the outputs of every operation hold, forward and backward.

    Storages, not shapes: an expanded or overlapping view of a small tensor takes no memory.

    Attributes:
        largest: elements of the largest storage.
        total: sum over all operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        before = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor) and output.untyped_storage().data_ptr() not in before:
                elements = output.untyped_storage().nbytes() // output.element_size()
                self.largest = max(self.largest, elements)
                self.total += elements
        return outputs
