"""What several Triton kernels share. Imported only where they run: importing it needs triton."""

from __future__ import annotations

import contextlib
import functools
import re
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """GELU of float32 values, x (1 + erf(x / sqrt 2)) / 2.

    EXACT: by erf. Otherwise by a polynomial, for results that are rounded to half precision: within 7e-5 of the exact
    value everywhere (minimax on |x| < 4.5; beyond, the value is x or 0 to 2e-5), less than half an instruction count.
    """
    if EXACT:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        # Phi(x) - 1/2 = t p(t^2), its error weighted by x, with Phi(4.5) = 1
        t = tl.minimum(tl.maximum(x, -4.5), 4.5)
        u = t * t
        p = -1.6801922266690417e-12 * u + 1.980312441807186e-10
        p = p * u - 1.0402728456426757e-08
        p = p * u + 3.24300373222286e-07
        p = p * u - 6.765374109818367e-06
        p = p * u + 0.00010132000898011029
        p = p * u - 0.0011404838878661394
        p = p * u + 0.009884648025035858
        p = p * u - 0.06640899181365967
        p = p * u + 0.3989177942276001
        y = tl.where(x > -4.5, x * (p * t + 0.5), 0.0)
    return y


def precision_of_products(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot`: float32 products are exact unless PyTorch's are not."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


@triton.jit
def follow(OVERLAP: tl.constexpr, FIRST: tl.constexpr):
    """Start of a kernel: let the next one be launched, and wait for the one before, unless this is the first.

    With OVERLAP, programmatic dependent launch (Hopper and later): the next kernel's programs are brought up while
    the last ones of this kernel still run.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        if not FIRST:
            tl.extra.cuda.gdc_wait()


@functools.cache
def overlaps_launches(device: torch.device) -> bool:
    """Whether kernels can be brought up while the ones before them end: Hopper GPUs and later, Triton 3.4 or newer."""
    if device.type != "cuda" or not hasattr(tl.extra.cuda, "gdc_wait"):
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def overlapped(device: torch.device) -> dict[str, bool]:
    """Options of the launch of a kernel that calls `follow`, not as the first."""
    return {"OVERLAP": True, "launch_pdl": True} if overlaps_launches(device) else {"OVERLAP": False}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a device, for kernels whose programs stay and go from one piece of work to the next."""
    if device.type != "cuda":
        return 3  # Triton's interpreter, for tests: programs that have several pieces, and not equally many
    return torch.cuda.get_device_properties(device).multi_processor_count


def safe_warps(warps: int, *tensors: torch.Tensor) -> int:
    """Warps for a kernel that multiplies rows of these tensors: `warps`, or 2 where a group of 4 would be miscompiled.

    Four warps multiply tiles of 64 rows by Hopper's asynchronous warp-group products. Their operands come through one
    shared buffer, not a pipelined one, where rows are not read 16 bytes at a time; and for such loops the assembler
    ptxas before CUDA 12.9, which Triton brings along up to 3.6 at least, computes the addresses of an operand from a
    register that holds another one's. Two warps multiply by other instructions.

    Args:
        warps: warps of the tile settings.
        tensors: what the kernel reads by rows, (..., N, E) with a contiguous last dimension.
    """
    if warps % 4 or all(is_read_in_vectors(x) for x in tensors) or not has_old_assembler(tensors[0].device):
        return warps
    return 2


def is_read_in_vectors(x: torch.Tensor) -> bool:
    """Whether Triton reads rows (..., N, E) 16 bytes at a time: by what it knows of pointers, strides and the mask."""
    return (
        x.data_ptr() % 16 == 0
        and x.shape[-1] * x.element_size() % 16 == 0
        and all(stride % 16 == 0 for stride in row_strides(x))
    )


def row_strides(*tensors: torch.Tensor) -> list[int]:
    """Strides of batch, head and row of tensors (B, H, N, E), one after another; 0 for a dimension of one element.

    PyTorch leaves the stride of such a dimension to chance, and Triton would conclude from it how rows are aligned.
    """
    return [
        stride if size > 1 else 0 for x in tensors for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
    ]


@functools.cache
def has_old_assembler(device: torch.device) -> bool:
    """Whether kernels for this device are assembled by a ptxas before CUDA 12.9's; also where that is not known."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    try:
        try:
            version = triton.knobs.nvidia.ptxas.version
        except AttributeError:  # Triton 3.3 and older
            from triton.backends.nvidia.compiler import _path_to_binary

            version = _path_to_binary("ptxas")[1]
        release = re.search(r"(\d+)\.(\d+)", version)
    except (ImportError, AttributeError, RuntimeError, TypeError):
        return True
    return release is None or tuple(map(int, release.groups())) < (12, 9)


def as_numbers(settings: Any) -> tuple[int, ...]:
    """A dataclass of integers as operators take it; PyTorch 2.6 cannot trace `dataclasses.astuple`."""
    return tuple(getattr(settings, name) for name in settings.__dataclass_fields__)


def device_of(x: torch.Tensor) -> AbstractContextManager:
    """Context in which Triton launches on the device of `x`; nothing where that is the current one, or the CPU."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()
