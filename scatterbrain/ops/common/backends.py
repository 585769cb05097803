"""Which form of an operator runs: Triton kernels on CUDA where triton is installed, plain PyTorch elsewhere."""

from __future__ import annotations

import importlib.util
import os

import torch

from scatterbrain.errors import UserError
from scatterbrain.ops.common.inputs import resolve_backend

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


def no_kernels(x: torch.Tensor) -> str | None:
    """Why Triton kernels cannot run on tensors such as `x`; None where they can."""
    if not (x.is_cuda or is_interpreted()):
        return f"it runs on CUDA devices, and the tensors are on {x.device}"
    if not triton_is_installed():
        return "the package triton is not installed"
    if x.dtype not in KERNEL_DTYPES:
        return f"it takes float16, bfloat16 and float32, and the tensors are {x.dtype}"
    return None


def choose_backend(backend: str, x: torch.Tensor) -> str:
    """The form that `backend` selects for the tensor `x`: `auto` is `triton` on CUDA and `torch` elsewhere.

    Raises:
        UserError: unknown backend, or one that does not run here, with those that do.
    """
    available = ["naive", "torch"]
    if no_kernels(x) is None and (x.is_cuda or backend == "triton"):
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
