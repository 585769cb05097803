"""Backends of the operators: Triton kernels on CUDA where triton is installed, plain PyTorch elsewhere."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re

import torch

from scatterbrain.errors import UserError, did_you_mean

# Backends of an operator without and with kernels of its own.
PYTORCH = ("naive", "torch")
PYTORCH_AND_TRITON = ("naive", "torch", "triton")
# what the kernels are compiled for; float64 runs in plain PyTorch
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# elements from the first row of a head to the last
LARGEST_OFFSET = 2**31
# looked up once: torch.compile traces neither a search for packages nor the environment
_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


def _find_triton_version() -> tuple[int, int] | None:
    """Version of Triton; None where it is not known, as in builds under other names."""
    try:
        found = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("triton"))
    except importlib.metadata.PackageNotFoundError:
        return None
    return None if found is None else (int(found[1]), int(found[2]))


_TRITON_VERSION = _find_triton_version()
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def triton_is_installed() -> bool:
    """Whether the package triton can be imported."""
    return _TRITON_IS_INSTALLED


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU: for tests, far slower than plain PyTorch."""
    return _INTERPRETED


def no_kernels(x: torch.Tensor, least_version: tuple[int, int] | None = None) -> str | None:
    """Why Triton kernels cannot run on tensors such as `x`; None where they can.

    Args:
        x: a tensor of the call.
        least_version: of Triton, where not all supported versions compile the kernels.
    """
    if not (x.is_cuda or is_interpreted()):
        return f"it runs on CUDA devices, and the tensors are on {x.device}"
    if not triton_is_installed():
        return "the package triton is not installed"
    if least_version is not None and _TRITON_VERSION is not None and least_version > _TRITON_VERSION:
        needed, found = (".".join(map(str, version)) for version in (least_version, _TRITON_VERSION))
        return f"it needs Triton {needed} or newer, and this is {found}: PyTorch 2.8 has it"
    if x.dtype not in KERNEL_DTYPES:
        return f"it takes float16, bfloat16 and float32, and the tensors are {x.dtype}"
    return None


def too_large(query: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why the kernels cannot run a call: their offsets within a sample have 32 bits; None where they can.

    Args:
        query: (B, H, T, E).
        value: (B, H, S, D).
    """
    heads, length, width = query.shape[1:]
    if heads * max(length, value.shape[2]) * max(width, value.shape[3]) >= LARGEST_OFFSET:
        return "it takes fewer than 2^31 elements of all heads of a sample"
    return None


def with_near_rows(x: torch.Tensor) -> torch.Tensor:
    """The tensor (B, H, N, E), copied where its rows are not contiguous or too far apart for offsets of 32 bits."""
    return x if x.stride(-1) == 1 and x.shape[2] * x.stride(2) < LARGEST_OFFSET else x.contiguous()


def choose_backend(
    backend: str,
    offered: tuple[str, ...] = PYTORCH,
    *,
    unsupported: str | None = None,
    prefer_kernels: bool = False,
) -> str:
    """The backend that runs: `naive`, `torch` or `triton`.

    Args:
        backend: what the caller chose, one of `offered` or `auto`.
        offered: backends of the operator, `PYTORCH` or `PYTORCH_AND_TRITON`.
        unsupported: why the operator's kernels cannot run this call; None where they can.
        prefer_kernels: whether `auto` takes the kernels where they can run; else it takes `torch`.

    Raises:
        UserError: unknown backend (near names are suggested), or `triton` where the kernels cannot run.
    """
    if backend == "auto":
        return "triton" if "triton" in offered and unsupported is None and prefer_kernels else "torch"
    if backend not in offered:
        raise UserError(f"backend='{backend}' is not available here. {did_you_mean(backend, ('auto', *offered))}")
    if backend == "triton" and unsupported is not None:
        raise UserError(f"backend='triton' cannot run this: {unsupported}. Choose 'torch', or 'auto' for what fits.")
    return backend


def check_inference_only(operator: str, *tensors: torch.Tensor | None) -> None:
    """Check that autograd does not record a call of an operator without gradients.

    Args:
        operator: its name, for the message.
        *tensors: its tensor arguments.

    Raises:
        UserError: gradients are recorded, and one of the tensors takes part in them.
    """
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise UserError(
            f"{operator} has no gradients. Call it under torch.inference_mode() or torch.no_grad(), and train the "
            "model itself."
        )
