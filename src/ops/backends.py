"""Which form of an operator runs: Triton kernels on CUDA where triton is installed, plain PyTorch elsewhere."""

from __future__ import annotations

import importlib.util
import os

import torch

from src.ops.inputs import resolve_backend
from src.utils.errors import UserError

# what the kernels are compiled for; float64 runs in plain PyTorch
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# looked up once: the compiler follows neither a search for packages nor the environment
_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def triton_is_installed() -> bool:
    """Whether the package triton can be imported."""
    return _TRITON_IS_INSTALLED


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU: for tests, far slower than plain PyTorch."""
    return _INTERPRETED


def choose_backend(backend: str, x: torch.Tensor) -> str:
    """The form that `backend` selects for the tensor `x`: `auto` is `triton` on CUDA and `torch` elsewhere.

    Raises:
        UserError: unknown backend, or one that does not run here, with those that do.
    """
    available = ["naive", "torch"]
    runs = x.is_cuda or (is_interpreted() and backend == "triton")
    if runs and triton_is_installed() and x.dtype in KERNEL_DTYPES:
        available.append("triton")
    return resolve_backend(backend, tuple(available))


def check_inference_only(operator: str, *tensors: torch.Tensor | None) -> None:
    """Refuse to be recorded by autograd.

    Raises:
        UserError: gradients are recorded, and one of the tensors takes part in them.
    """
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise UserError(
            f"{operator} has no gradients. Call it under torch.inference_mode() or torch.no_grad(), and train the "
            "model itself."
        )
