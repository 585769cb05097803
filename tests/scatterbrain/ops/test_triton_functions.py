"""Warps where ptxas miscompiles `wgmma` instructions, strides of rows, buffers, and launches of compiled kernels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from scatterbrain.ops.common import triton_functions


def rows(width: int = 64, stride: int = 64, offset: int = 0, batch: int = 2, dtype=torch.bfloat16) -> torch.Tensor:
    """Rows (batch, 1, 8, width) at a stride, as a view into a larger buffer."""
    buffer = torch.zeros(offset + batch * 8 * stride, dtype=dtype)
    return buffer.as_strided((batch, 1, 8, width), (8 * stride, 8 * stride, stride, 1), offset)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (rows(), True),
        (rows(48, 48), True),
        (rows(40, 48), True),
        (rows(dtype=torch.float32), True),
        # 80 bytes apart: Triton knows only whether strides are multiples of 16 elements
        (rows(40, 40), False),
        (rows(64, 65), False),
        # the mask of the columns ends within a vector
        (rows(36, 64), False),
        (rows(offset=1), False),
        # the stride of a single sample is arbitrary
        (rows(batch=1).as_strided((1, 1, 8, 64), (1, 1, 64, 1)), True),
    ],
)
def test_rows_with_vector_loads(x, expected):
    assert triton_functions.has_vector_loads(x) == expected


def test_four_warps_only_where_they_are_compiled_correctly(monkeypatch):
    aligned, other = rows(), rows(40, 40)
    monkeypatch.setattr(triton_functions, "has_old_ptxas", lambda device: True)
    assert triton_functions.safe_warps(4, aligned) == 4
    assert triton_functions.safe_warps(4, aligned, other) == 2
    assert triton_functions.safe_warps(1, other) == 1
    monkeypatch.setattr(triton_functions, "has_old_ptxas", lambda device: False)
    assert triton_functions.safe_warps(4, other) == 4


def test_four_warps_in_while_loops_only_where_they_are_compiled(monkeypatch):
    monkeypatch.setattr(triton_functions, "_HAS_WGMMA_IN_WHILE", False)
    for hopper, warps in ((True, 2), (False, 4)):
        monkeypatch.setattr(triton_functions, "is_hopper_or_later", lambda device, hopper=hopper: hopper)
        assert triton_functions.safe_warps(4, rows(), has_while_loop=True) == warps
        assert triton_functions.safe_warps(4, rows()) == 4


def test_strides_of_single_elements_are_left_out():
    x = torch.zeros(1, 3, 5, 8)
    assert triton_functions.row_strides(x, x.transpose(0, 1)) == [0, 40, 8, 40, 0, 8]


@pytest.mark.parametrize(("version", "old"), [("12.8", True), ("12.9", False), ("13.0", False), ("unknown", True)])
def test_versions_of_ptxas(version, old, monkeypatch):
    class Tool:
        pass

    Tool.version = version
    monkeypatch.setattr(
        triton_functions.triton, "knobs", type("Knobs", (), {"nvidia": type("N", (), {"ptxas": Tool})}), raising=False
    )
    triton_functions.has_old_ptxas.cache_clear()
    try:
        assert triton_functions.has_old_ptxas(torch.device("cuda", 0)) == old
    finally:
        triton_functions.has_old_ptxas.cache_clear()


def test_parts_of_a_buffer():
    layout = triton_functions.BufferLayout()
    layout.add("counts", 3, dtype=torch.int32)
    before = layout.end
    layout.add("sums", 2, 40)
    end, layout.end = layout.end, before
    layout.add("means", 5, 7, dtype=torch.bfloat16)  # in the place of the sums
    assert layout.nbytes == end
    buffer = layout.empty(torch.device("cpu"))
    views = layout.views(buffer)
    assert {name: (tuple(x.shape), x.dtype) for name, x in views.items()} == {
        "counts": ((3,), torch.int32),
        "sums": ((2, 40), torch.float32),
        "means": ((5, 7), torch.bfloat16),
    }
    assert views["sums"].data_ptr() == views["means"].data_ptr() == buffer.data_ptr() + triton_functions.ALIGNMENT


class Kernel:
    """Stands for a function under `triton.jit`: compiles once for each alignment of its pointers."""

    def __init__(self) -> None:
        self.compiled: list[tuple] = []
        self.launched: list[tuple] = []

    def fn(self, x_ptr, y_ptr, length, scale, block, pdl=False):
        """Signature of the kernel."""

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.compiled.append((grid, arguments, options))
            return self

        return launch

    function, packed_metadata = "function", "metadata"

    def run(self, *arguments):
        self.launched.append(arguments)


@pytest.fixture
def sequence(monkeypatch):
    """A sequence of one launch, of a kernel that records its launches."""
    kernel = Kernel()
    workspace = triton_functions.BufferLayout()
    workspace.add("first", 5)
    workspace.add("y", 3)
    sequence = triton_functions.LaunchSequence(("x",), (workspace,))
    sequence.add(kernel, (4, 2), ("x", "y"), (7, 0.5), block=16, num_warps=2)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 11))
    monkeypatch.setattr(triton_functions.triton.runtime, "driver", driver)
    monkeypatch.setattr(triton_functions, "_HAS_KNOWN_LAUNCHER", True)
    return sequence, kernel, workspace


def test_later_launches_pass_addresses_to_the_compiled_kernel(sequence):
    sequence, kernel, workspace = sequence
    x, buffer = torch.zeros(8), workspace.empty(torch.device("cpu"))
    sequence((x,), (buffer,))
    ((grid, arguments, options),) = kernel.compiled
    assert (grid, options, kernel.launched) == ((4, 2), {"block": 16, "num_warps": 2}, [])
    assert arguments[0] is x
    assert arguments[1].shape == (3,)
    assert arguments[2:] == (7, 0.5)
    for _ in range(2):
        x, buffer = torch.zeros(8), workspace.empty(torch.device("cpu"))
        sequence((x,), (buffer,))
        addresses = x.data_ptr(), buffer.data_ptr() + triton_functions.ALIGNMENT
        constants = (16, False) if triton_functions._TRITON_VERSION >= (3, 3) else ()
        assert kernel.launched[-1] == (
            *(4, 2, 1, 11, "function", "metadata", None, None, None),
            *(*addresses, 7, 0.5, *constants),
        )
    assert len(kernel.compiled) == 1


@pytest.mark.parametrize("reason", ["alignment", "hook", "version", "first"])
def test_launches_that_triton_has_to_see(sequence, reason, monkeypatch):
    sequence, kernel, workspace = sequence
    if reason == "version":
        monkeypatch.setattr(triton_functions, "_HAS_KNOWN_LAUNCHER", False)
    x, buffer = torch.zeros(8), workspace.empty(torch.device("cpu"))
    if reason == "first":
        sequence((x[1:],), (buffer,))  # compiled for pointers that are not aligned
    sequence((x,), (buffer,))
    if reason == "hook":
        monkeypatch.setattr(triton_functions, "_has_launch_hooks", lambda: True)
    sequence((x[1:] if reason == "alignment" else x,), (buffer,))
    assert len(kernel.compiled) == 2
    assert len(kernel.launched) == (1 if reason == "first" else 0)


def test_profilers_are_seen(monkeypatch):
    owner = triton_functions.triton.knobs.runtime if triton_functions._TRITON_VERSION >= (3, 4) else None
    owner = owner or triton_functions.triton.compiler.CompiledKernel
    assert not triton_functions._has_launch_hooks()
    monkeypatch.setattr(owner, "launch_exit_hook", lambda metadata: None)
    assert triton_functions._has_launch_hooks()
