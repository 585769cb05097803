"""What several Triton kernels share, on the device and on the host. Importing it needs triton."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import operator
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# Exponentials and logarithms of the kernels are to base 2: logits are multiplied by this.
LOG2E = math.log2(math.e)
_TRITON_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


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
_HAS_WGMMA_IN_WHILE = _TRITON_VERSION >= (3, 4)


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
    if warps % 4 or not has_old_ptxas(device) or all(has_vector_loads(x) for x in tensors):
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


# Parts of a buffer begin at a multiple of this many bytes, a cache line of the GPU.
ALIGNMENT = 128


class BufferLayout:
    """Where several tensors lie in one buffer, so that a call allocates once: `torch.empty` takes the host 2 to 3 us.

    Attributes:
        parts: of each tensor by name, its offset in bytes, shape and dtype.
        nbytes: size of the buffer.
        end: offset at which the next part begins. Set it back to an earlier value where the next parts take the place
            of parts that are no longer needed.
    """

    def __init__(self) -> None:
        self.parts: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        self.nbytes = 0
        self.end = 0

    def add(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        """Append an uninitialised tensor."""
        self.parts[name] = (self.end, shape, dtype)
        size = math.prod(shape) * dtype.itemsize
        self.end += -(-size // ALIGNMENT) * ALIGNMENT
        self.nbytes = max(self.nbytes, self.end)

    def empty(self, device: torch.device) -> torch.Tensor:
        """A new buffer, (nbytes,) uint8."""
        return torch.empty(self.nbytes, dtype=torch.uint8, device=device)

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors in a buffer of any dtype, by name."""
        if buffer.dtype != torch.uint8:
            buffer = buffer.as_strided((buffer.numel(),), (1,)).view(torch.uint8)
        return {
            name: buffer[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, (offset, shape, dtype) in self.parts.items()
        }


# What `JITFunction.run` passes to a compiled kernel is known for these versions of Triton; others launch through it.
_HAS_KNOWN_LAUNCHER = (3, 2) <= _TRITON_VERSION <= (3, 8) and torch.version.hip is None


class _Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    tensors: tuple[str, ...]
    scalars: tuple[int | float, ...]
    options: dict[str, Any]


class _CompiledLaunch(NamedTuple):
    run: Callable[..., None]
    grid: tuple[int, int, int]
    function: Any
    metadata: Any
    pick: Callable[[list[int]], Sequence[int]]  # addresses of the kernel's tensors, from those of all
    scalars: tuple[Any, ...]


class LaunchSequence:
    """Kernels of one pass, launched one after another; calls differ in the memory that they pass, and in nothing else.

    `kernel[grid](...)` takes the host 30 us: it binds the arguments, finds out what to specialise on, and looks up the
    compiled kernel. The first call goes this way. It returns the compiled kernels, and later calls launch these, with
    addresses in place of tensors. Where an address is no multiple of 16 bytes, on which Triton specialises, where a
    profiler has set launch hooks, with an unknown version of Triton, and in its interpreter, each call goes the
    ordinary way.

    Whoever keeps a sequence for later calls has to look it up by all that its sizes, strides and options depend on, by
    the dtypes of the tensors and by the device: see `calls.py`. The device has to be current.

    Example::

        workspace = BufferLayout()
        workspace.add("sums", groups, 64)
        sequence = LaunchSequence(("x", "out"), (workspace,))
        sequence.add(sum_kernel, (groups,), ("x", "sums"), (length,), BLOCK=64, num_warps=4)
        sequence.add(scale_kernel, (groups,), ("x", "sums", "out"), (length, scale), BLOCK=64)
        sequence((x, out), (workspace.empty(x.device),))

    Args:
        tensors: names of the tensors that a call passes.
        layouts: of the buffers that a call passes; kernels take their parts by name.
    """

    def __init__(self, tensors: Sequence[str], layouts: Sequence[BufferLayout] = ()) -> None:
        self._names = tuple(tensors)
        self._layouts = tuple(layouts)
        self._launches: list[_Launch] = []
        self._compiled: list[_CompiledLaunch] | None = None
        self._offsets: list[list[int]] = []
        self._device = 0

    def add(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        tensors: Sequence[str],
        scalars: Sequence[int | float] = (),
        **options: Any,
    ) -> None:
        """Append a kernel.

        Args:
            kernel: function under `triton.jit`, whose parameters are pointers, then numbers, then constants.
            grid: number of programs, in one to three dimensions.
            tensors: its pointers, by name.
            scalars: its numbers.
            **options: its constants, and options of the launch such as `num_warps`.
        """
        self._launches.append(_Launch(kernel, grid, tuple(tensors), tuple(scalars), options))

    def __call__(self, tensors: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor] = ()) -> None:
        """Launch all kernels.

        Args:
            tensors: in the order of their names.
            buffers: in the order of the layouts.
        """
        if self._compiled is None or _has_launch_hooks():
            return self._launch(tensors, buffers)
        addresses = [x.data_ptr() for x in tensors]
        starts = [x.data_ptr() for x in buffers]
        # parts of a buffer are as aligned as its start
        if functools.reduce(operator.or_, starts, functools.reduce(operator.or_, addresses)) & 15:
            return self._launch(tensors, buffers)
        for start, offsets in zip(starts, self._offsets, strict=True):
            addresses += [start + offset for offset in offsets]
        stream = triton.runtime.driver.active.get_current_stream(self._device)
        for run, (x, y, z), function, metadata, pick, scalars in self._compiled:
            # without metadata for hooks, and hooks
            run(x, y, z, stream, function, metadata, None, None, None, *pick(addresses), *scalars)

    def _launch(self, tensors: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor]) -> None:
        """Launch all kernels through Triton, and keep what it compiled if all addresses are aligned."""
        memory = dict(zip(self._names, tensors, strict=True))
        for layout, buffer in zip(self._layouts, buffers, strict=True):
            memory |= layout.views(buffer)
        compiled = [
            launch.kernel[launch.grid](*[memory[name] for name in launch.tensors], *launch.scalars, **launch.options)
            for launch in self._launches
        ]
        aligned = all(x.data_ptr() % 16 == 0 for x in (*tensors, *buffers))
        # the interpreter returns nothing, nor does Triton where a hook of its cache declines to compile
        is_compiled = all(kernel is not None for kernel in compiled)
        if self._compiled is None and aligned and is_compiled and _HAS_KNOWN_LAUNCHER:
            self._device = tensors[0].device.index or 0
            self._offsets = [[offset for offset, _, _ in layout.parts.values()] for layout in self._layouts]
            order = list(memory)
            self._compiled = [
                _compiled_launch(launch, kernel, order) for launch, kernel in zip(self._launches, compiled, strict=True)
            ]


def _compiled_launch(launch: _Launch, compiled: Any, order: list[str]) -> _CompiledLaunch:
    """A launch of a compiled kernel, from addresses in the order of these names."""
    indices = [order.index(name) for name in launch.tensors]
    # one index alone would give a number
    pick = operator.itemgetter(*indices) if len(indices) > 1 else operator.itemgetter(slice(indices[0], indices[0] + 1))
    scalars = launch.scalars
    if _TRITON_VERSION >= (3, 3):  # launchers take the constants too, and leave them out
        parameters = list(inspect.signature(launch.kernel.fn).parameters.values())
        constants = parameters[len(indices) + len(scalars) :]
        scalars = (*scalars, *(launch.options.get(constant.name, constant.default) for constant in constants))
    grid = (*launch.grid, 1, 1)[:3]
    return _CompiledLaunch(compiled.run, grid, compiled.function, compiled.packed_metadata, pick, scalars)


def _has_launch_hooks() -> bool:
    """Whether something, such as a profiler, wants to know of each launch."""
    owner = triton.knobs.runtime if _TRITON_VERSION >= (3, 4) else triton.compiler.CompiledKernel
    # from Triton 3.6 on, a chain of hooks
    enter, leave = owner.launch_enter_hook, owner.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
