"""What several Triton kernels share, on the device and on the host. Importing it needs triton."""

from __future__ import annotations

import contextlib
import functools
import inspect
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


# Before Triton 3.4 there are no such functions, and Triton looks up all that a kernel names, even in branches that it
# does not compile. Those of 3.4 lack the argument that its compiler passes, and cannot be called.
_HAS_PDL = hasattr(tl.extra.cuda, "gdc_wait") and "_semantic" in inspect.signature(tl.extra.cuda.gdc_wait).parameters

if _HAS_PDL:

    @triton.jit
    def grid_dependency_control(PDL: tl.constexpr, FIRST: tl.constexpr):
        """Start of a kernel: let the next kernel launch, and wait until the one before ends, unless this is the first.

        With PDL, programmatic dependent launch (Hopper and later): programs of the next kernel start on free SMs while
        the last ones of this kernel still run.
        """
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            if not FIRST:
                tl.extra.cuda.gdc_wait()

else:

    @triton.jit
    def grid_dependency_control(PDL: tl.constexpr, FIRST: tl.constexpr):
        """Start of a kernel: nothing to do, as kernels run one after another."""
        pass


@functools.cache
def is_hopper_or_later(device: torch.device) -> bool:
    """Whether the device is an NVIDIA GPU of compute capability 9 or higher."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def pdl_options(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that waits for the one before it by `grid_dependency_control`.

    Programmatic dependent launch needs a Hopper GPU or later, and Triton 3.5 or newer.
    """
    return {"PDL": True, "launch_pdl": True} if _HAS_PDL and is_hopper_or_later(device) else {"PDL": False}


@functools.cache
def num_sms(device: torch.device) -> int:
    """Number of SMs of a device, for the grids of persistent kernels."""
    if device.type != "cuda":
        return 3  # Triton's interpreter, for tests: programs with several tiles, and not equally many
    return torch.cuda.get_device_properties(device).multi_processor_count


# Triton before 3.4 ends the process with an assertion where it compiles warp-group instructions in a `while` loop.
_HAS_WGMMA_IN_WHILE = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 4)


def safe_warps(warps: int, *tensors: torch.Tensor, has_while_loop: bool = False) -> int:
    """Warps for a kernel that multiplies rows of these tensors: `warps`, or 2 where ptxas would miscompile 4.

    Four warps multiply tiles of 64 rows by Hopper's asynchronous warp-group instructions (`wgmma`). Where rows cannot
    be loaded 16 bytes at a time, both operands go through one shared buffer that is not pipelined. For such loops ptxas
    before CUDA 12.9, which Triton ships up to 3.6 at least, computes the address of an operand from a register that
    holds that of the other. Two warps use `mma` instructions instead.

    Args:
        warps: warps of the tile settings.
        tensors: tensors (..., N, E) with a contiguous last dimension, whose rows the kernel loads.
        has_while_loop: products are in a `while` loop, which Triton before 3.4 does not compile with `wgmma`.
    """
    device = tensors[0].device
    if warps % 4 == 0 and has_while_loop and not _HAS_WGMMA_IN_WHILE and is_hopper_or_later(device):
        return 2
    if warps % 4 or all(has_vector_loads(x) for x in tensors) or not has_old_ptxas(device):
        return warps
    return 2


def has_vector_loads(x: torch.Tensor) -> bool:
    """Whether Triton loads rows (..., N, E) 16 bytes at a time, from what it knows of pointer, strides and mask."""
    return (
        x.data_ptr() % 16 == 0
        and x.shape[-1] * x.element_size() % 16 == 0
        and all(stride % 16 == 0 for stride in row_strides(x))
    )


def row_strides(*tensors: torch.Tensor) -> list[int]:
    """Strides of batch, head and row of tensors (B, H, N, E), one after another; 0 for a dimension of one element.

    The stride of such a dimension is arbitrary in PyTorch, and Triton would infer the alignment of rows from it.
    """
    return [
        stride if size > 1 else 0 for x in tensors for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
    ]


@functools.cache
def has_old_ptxas(device: torch.device) -> bool:
    """Whether Triton uses a ptxas from before CUDA 12.9 for this device; True where the version is unknown."""
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


def field_values(settings: Any) -> tuple[int, ...]:
    """Values of a dataclass of integers, as operators take them; PyTorch 2.6 cannot trace `dataclasses.astuple`."""
    return tuple(getattr(settings, name) for name in settings.__dataclass_fields__)


def device_of(x: torch.Tensor) -> AbstractContextManager:
    """Context in which the device of `x` is current, as Triton launches there; does nothing if it is, or on the CPU."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()
