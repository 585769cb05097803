"""How many warps a kernel may have where ptxas miscompiles `wgmma` instructions, and strides of rows."""

from __future__ import annotations

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
