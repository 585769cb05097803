"""Which warps a kernel may have where the assembler miscompiles products of warp groups."""

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
    ("x", "in_vectors"),
    [
        (rows(), True),
        (rows(48, 48), True),
        (rows(40, 48), True),
        (rows(dtype=torch.float32), True),
        # 80 bytes apart: Triton knows strides as multiples of 16 elements, or not at all
        (rows(40, 40), False),
        (rows(64, 65), False),
        # the mask of the columns ends within a vector
        (rows(36, 64), False),
        (rows(offset=1), False),
        # the stride of a single sample says nothing
        (rows(batch=1).as_strided((1, 1, 8, 64), (1, 1, 64, 1)), True),
    ],
)
def test_rows_that_are_read_in_vectors(x, in_vectors):
    assert triton_functions.is_read_in_vectors(x) == in_vectors


def test_a_warp_group_only_where_it_is_compiled_right(monkeypatch):
    aligned, other = rows(), rows(40, 40)
    monkeypatch.setattr(triton_functions, "has_old_assembler", lambda device: True)
    assert triton_functions.safe_warps(4, aligned) == 4
    assert triton_functions.safe_warps(4, aligned, other) == 2
    assert triton_functions.safe_warps(1, other) == 1
    monkeypatch.setattr(triton_functions, "has_old_assembler", lambda device: False)
    assert triton_functions.safe_warps(4, other) == 4


def test_strides_of_single_elements_are_left_out():
    x = torch.zeros(1, 3, 5, 8)
    assert triton_functions.row_strides(x, x.transpose(0, 1)) == [0, 40, 8, 40, 0, 8]


@pytest.mark.parametrize(("version", "old"), [("12.8", True), ("12.9", False), ("13.0", False), ("unknown", True)])
def test_versions_of_the_assembler(version, old, monkeypatch):
    class Tool:
        pass

    Tool.version = version
    monkeypatch.setattr(
        triton_functions.triton, "knobs", type("Knobs", (), {"nvidia": type("N", (), {"ptxas": Tool})}), raising=False
    )
    triton_functions.has_old_assembler.cache_clear()
    try:
        assert triton_functions.has_old_assembler(torch.device("cuda", 0)) == old
    finally:
        triton_functions.has_old_assembler.cache_clear()
