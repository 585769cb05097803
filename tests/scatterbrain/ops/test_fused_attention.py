"""Fused kernels against the specifications: in Triton's interpreter on small shapes, on a GPU at real sizes."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from scatterbrain.errors import UserError
from scatterbrain.ops.clusters.triton import unsupported as landmarks_unsupported
from scatterbrain.ops.common import calls
from scatterbrain.ops.common.backends import is_interpreted, with_near_rows
from scatterbrain.ops.common.projection import draw_projection
from scatterbrain.ops.scatterbrain.triton import check_speed, count_fallback_tiles, unsupported
from scatterbrain.ops.scatterbrain.triton import tiles as tiles_module
from tests.helpers import OPERATORS, assert_close, draw_inputs
from tests.scatterbrain.ops.poison import poisoned_memory

triton = pytest.importorskip("triton")
passes = pytest.importorskip("scatterbrain.ops.common.passes")

NAMES = ("local", "performer", "scatterbrain")
# the interpreter of Triton 3.2 (PyTorch 2.6) ignores masks of one element, and then writes where it should not
needs_interpreter = pytest.mark.skipif(
    not is_interpreted() or triton.__version__.startswith("3.2."),
    reason="the kernels are compiled for the GPU here, or Triton's interpreter is too old for them",
)
# RMS against float64. float32: rounding of logits up to 10 and sums of up to 300 terms; gradients take two such steps.
# Half precision: each weight and feature is rounded once, 2^-11 or 2^-8 at most, and so is the result.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Case:
    """Shapes, masks and dtype of one comparison."""

    length: int = 50
    num_keys: int = 50
    width: int = 16
    value_width: int = 16
    window: int = 7
    rows: int = 3
    batch: int = 2
    heads: int = 1
    is_causal: bool = False
    lengths: tuple[int, ...] | None = None
    max_logit: float | None = None
    dtype: torch.dtype = torch.float32
    names: tuple[str, ...] = NAMES

    def __str__(self) -> str:
        text = f"T{self.length}-S{self.num_keys}-E{self.width}-D{self.value_width}-W{self.window}-R{self.rows}"
        text += f"-B{self.batch}-H{self.heads}-{str(self.dtype).removeprefix('torch.')}"
        text += "-causal" if self.is_causal else ""
        text += "" if self.lengths is None else f"-lengths{','.join(map(str, self.lengths))}"
        return text + ("" if self.max_logit is None else f"-logits{self.max_logit:g}")


INTERPRETED_CASES = [
    Case(),
    Case(1, 1, 16, 16, window=1, rows=1),
    Case(37, 53, 20, 12, window=12, rows=5, heads=2),
    Case(53, 37, 20, 12, window=9, rows=5, lengths=(20, 0)),
    Case(50, 50, is_causal=True),
    Case(70, 50, heads=2, is_causal=True, lengths=(45, 0)),
    Case(40, 70, is_causal=True, lengths=(70, 3)),
    Case(30, 30, window=100, batch=1),
    Case(130, 130, batch=1, max_logit=80),
    Case(90, 90, batch=1, max_logit=80, is_causal=True),
    Case(45, 45, width=48, value_width=33, window=5, rows=20, batch=1),
    Case(dtype=torch.float16),
    Case(37, 53, 20, 12, window=12, rows=5, dtype=torch.float16, is_causal=True),
    Case(60, 60, batch=1, dtype=torch.float16, max_logit=80),
]
GPU_CASES = [
    replace(case, dtype=dtype)
    for case in (
        Case(3136, 3136, 64, 64, window=49, rows=12, batch=1),
        Case(784, 784, 64, 64, window=12, rows=3, batch=3),
        # a single tile, whole and in part
        Case(64, 64, 64, 64, window=12, rows=3),
        Case(9, 16, 64, 64, window=12, rows=3),
        Case(1000, 1000, 64, 64, window=49, rows=12, heads=3, is_causal=True),
        Case(300, 333, 40, 24, window=12, rows=3, lengths=(333, 0)),
        Case(333, 300, 64, 64, window=64, rows=5, lengths=(300, 17), is_causal=True),
        Case(300, 333, 128, 128, window=33, rows=20, is_causal=True, lengths=(300, 10)),
        Case(300, 300, 128, 64, window=33, rows=20),
        Case(256, 200, 64, 64, window=49, rows=120),
        Case(500, 500, 64, 64, window=300, rows=24),
        Case(1000, 1000, 64, 64, window=49, rows=12, max_logit=80),
        Case(600, 600, 64, 64, window=49, rows=12, max_logit=80, is_causal=True),
    )
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
]


def compare(name: str, case: Case, device: str) -> None:
    """Output and gradients of the kernels against the specification in float64, on the same rounded inputs."""
    operator = OPERATORS[name]
    tensors = draw_inputs(
        case.batch,
        case.heads,
        case.length,
        case.num_keys,
        case.width,
        case.value_width,
        case.rows,
        torch.float64,
        case.max_logit,
    )
    *tensors, projection = (x.to(device, case.dtype) for x in tensors)
    lengths = None if case.lengths is None else torch.tensor(case.lengths, device=device)
    options = {"is_causal": case.is_causal, "key_lengths": lengths}
    cotangent = torch.randn(case.batch, case.heads, case.length, case.value_width, device=device).to(case.dtype)

    leaves = [x.clone().requires_grad_() for x in tensors]
    with poisoned_memory():
        out = operator(*leaves, projection, case.window, backend="triton", **options)
        out.backward(cotangent)
    exact = [x.double().requires_grad_() for x in tensors]
    expected = operator.naive(*exact, projection.double(), case.window, **options)[0]
    expected.backward(cotangent.double())

    assert out.dtype == case.dtype
    assert_close("out", expected, out, TOLERANCE[case.dtype])
    # logits up to 80 in half precision: the weights' own rounding is amplified by the logits in the gradients
    factor = 1 if case.max_logit is None else 4
    for which, leaf, expected in zip(("query", "key", "value"), leaves, exact, strict=True):
        assert_close(f"gradient of {which}", expected.grad, leaf.grad, factor * GRADIENT_TOLERANCE[case.dtype])


@needs_interpreter
@pytest.mark.parametrize("case", INTERPRETED_CASES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name, case):
    compare(name, case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_on_gpu(name, case):
    compare(name, case, "cuda")


def adversarial(device: str, dtype: torch.dtype, batch: int = 1, length: int = 100) -> tuple[list[torch.Tensor], int]:
    """Queries and keys along rows of the features, in the last sequence: estimates far exceed the exact weights."""
    width, window = 16, 9
    rows = torch.randn(3, width)
    rows *= 6 / rows.norm(dim=1, keepdim=True)
    query, key = torch.randn(2, batch, 1, length, width) * 0.3
    # where sqrt(s) (q + k) = w, the estimate is exp(|w|^2 / 2) times the exact weight
    for row, first in ((0, 20), (1, 70)):
        along = rows[row] / 2 * width**0.25
        query[-1, 0, first : first + 4] += along
        key[-1, 0, first : first + 4] += along
    value = torch.randn(batch, 1, length, width)
    return [x.to(device, dtype) for x in (query, key, value, rows)], window


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", torch.float32, marks=needs_interpreter),
        pytest.param("cpu", torch.float16, marks=needs_interpreter),
        pytest.param("cuda", torch.float32, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize(
    ("batch", "length", "parts"),
    [(1, 100, 512), (1, 260, 512), (1, 100, 8), (1, 100, 2)],
    ids=["7 splits", "17 splits", "splits of several steps", "whole"],
)
def test_windows_whose_estimates_outweigh_all_else(device, dtype, batch, length, parts, monkeypatch):
    operator_module = pytest.importorskip("scatterbrain.ops.scatterbrain.triton.operator")
    # passes of earlier calls have other constants
    monkeypatch.setattr(passes, "PASSES", passes.Cache())
    # float32 allows more before a tile is a fallback tile
    monkeypatch.setattr(operator_module, "CANCELLATION_LIMIT_FLOAT32", 4.0)
    monkeypatch.setattr(operator_module, "CANCELLATION_LIMIT", 4.0)
    # several splits of the keys of a fallback tile, in the second case more than are added up at a time; or memory for
    # so few that each has several steps, or that there is one for each tile
    monkeypatch.setattr(operator_module, "FALLBACK_PARTS", parts)
    for name in ("FALLBACK_KEYS", "FALLBACK_KEYS_WIDE"):
        monkeypatch.setattr(operator_module, name, 16)
    monkeypatch.setattr(operator_module, "FALLBACK_MEMORY", 10.0)
    (query, key, value, rows), window = adversarial(device, dtype, batch, length)
    arguments = (query, key, value, rows, None, window, 0.25, True, False)
    statistics = operator_module.fused_attention(*arguments, 0.0, True)[1]
    flags = operator_module.read_statistics(statistics, *arguments)["fallback_flags"]
    assert flags.sum(1).tolist() == [0] * (batch - 1) + [2]
    assert count_fallback_tiles(query, key, value, rows, window) == 2

    operator = OPERATORS["scatterbrain"]
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    with poisoned_memory():
        out = operator(*leaves, rows, window, backend="triton")
        out.square().sum().backward()
    exact = [x.double().requires_grad_() for x in (query, key, value)]
    expected = operator.naive(*exact, rows.double(), window)[0]
    expected.square().sum().backward()
    assert_close("out", expected, out, TOLERANCE[dtype])
    if dtype != torch.float32:
        # here the weights are nearly even, and gradients of the queries small differences of large terms: of `delta`,
        # which comes from the rounded output, less than one digit is accurate in half precision
        assert all(leaf.grad.isfinite().all() for leaf in leaves)
        return
    for leaf, expected in zip(leaves, exact, strict=True):
        # features of e^18 times the weight they stand for are formed on the way
        assert_close("gradient", expected.grad, leaf.grad, 4 * GRADIENT_TOLERANCE[dtype])


@needs_interpreter
def test_weights_past_the_range_of_a_float_are_computed_from_pairs():
    # without a running maximum, the exact weight exp(200) of an outlier overflows relative to the features
    *tensors, rows = draw_inputs(1, 1, 40, dtype=torch.float32, rows=2)
    query, key, value = tensors
    query[0, 0, 5] = key[0, 0, 5] = 0.0
    query[0, 0, 5, 0] = key[0, 0, 5, 0] = math.sqrt(4 * 200.0)
    operator = OPERATORS["scatterbrain"]
    out = operator(query, key, value, rows, 3, backend="triton")
    assert_close("out", operator.naive(query, key, value, rows, 3)[0], out, TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", torch.float32, marks=needs_interpreter),
        pytest.param("cpu", torch.float16, marks=needs_interpreter),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("which", [0, 1], ids=["queries", "keys"])
@pytest.mark.parametrize("name", ["performer", "scatterbrain"])
def test_rows_far_above_those_of_the_first_tile(name, which, device, dtype):
    # relative to the features of the first tile, those that follow exceed float32
    length = 50 if device == "cpu" else 300
    *tensors, rows = (x.to(device, dtype) for x in draw_inputs(1, 1, length, dtype=torch.float32, rows=3))
    tensors[which][:, :, : length // 3 + 1] *= 20
    operator = OPERATORS[name]
    leaves = [x.clone().requires_grad_() for x in tensors]
    with poisoned_memory():
        out = operator(*leaves, rows, 7, backend="triton")
        out.square().sum().backward()
    exact = [x.double().requires_grad_() for x in tensors]
    expected = operator.naive(*exact, rows.double(), 7)[0]
    expected.square().sum().backward()
    assert_close("out", expected, out, TOLERANCE[dtype])
    for leaf, expected in zip(leaves, exact, strict=True):
        # logits of 60 are known to a few roundings of theirs only
        assert_close("gradient", expected.grad, leaf.grad, 4 * GRADIENT_TOLERANCE[dtype])


@needs_interpreter
@pytest.mark.parametrize("name", NAMES)
def test_slices_of_a_fused_qkv_are_read_without_a_copy(name):
    qkv = torch.randn(2, 40, 3, 2, 16)
    query, key, value = qkv.unbind(2)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    rows = torch.randn(3, 16)
    operator = OPERATORS[name]
    out = operator(query, key, value, rows, 5, backend="triton")
    same = operator(query.contiguous(), key.contiguous(), value.contiguous(), rows, 5, backend="triton")
    assert torch.equal(out, same)
    # contiguous as (B, N, H, D), so that the model joins the heads of a token without a copy
    assert out.transpose(1, 2).is_contiguous()


@needs_interpreter
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_projection_is_rounded_before_or_in_the_kernels(is_causal, monkeypatch):
    *tensors, rows = draw_inputs(1, 2, 40, dtype=torch.float16, rows=3)
    rows = rows.float() * 1.01  # not representable in float16
    leaves = [x.requires_grad_() for x in tensors]

    def run():
        out = OPERATORS["scatterbrain"](*leaves, rows, 9, is_causal=is_causal, backend="triton")
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    expected = run()
    monkeypatch.setattr("scatterbrain.ops.scatterbrain.triton.MAX_UNCONVERTED", 0)
    calls.CALLS.clear()
    for one, other in zip(expected, run(), strict=True):
        assert torch.equal(one, other)


@needs_interpreter
@pytest.mark.parametrize("name", NAMES)
def test_passes_are_used_again_for_calls_that_are_alike(name):
    operator = OPERATORS[name]

    def run(length=40, width=16, scale=None, tiles=None):
        *tensors, rows = draw_inputs(1, 2, length, dtype=torch.float32, rows=3, width=width)
        leaves = [x.requires_grad_() for x in tensors]
        with tiles_module.use_tiles(tiles) if tiles else contextlib.nullcontext(), poisoned_memory():
            out = operator(*leaves, rows, 5, scale=scale, backend="triton")
            gradients = torch.autograd.grad(out.square().sum(), leaves)
        exact = [x.detach().double().requires_grad_() for x in tensors]
        expected = operator.naive(*exact, rows.double(), 5, scale=scale)[0]
        assert_close("out", expected, out, TOLERANCE[torch.float32])
        for leaf, result in zip(torch.autograd.grad(expected.square().sum(), exact), gradients, strict=True):
            assert_close("gradient", leaf, result, GRADIENT_TOLERANCE[torch.float32])

    variants = (
        {},
        {"length": 41},
        {"width": 24},
        {"scale": 0.3},
        {"tiles": tiles_module.Tiles(sum_rows=32, query_rows=16, dq_rows=32)},
    )
    passes.PASSES.clear()
    for turn in range(2):
        for count, changes in enumerate(variants, 1):
            run(**changes)
            # a forward and a backward pass of each kind of call
            assert len(passes.PASSES) == (2 * count if turn == 0 else 2 * len(variants))


@needs_interpreter
@pytest.mark.parametrize("name", NAMES)
def test_results_do_not_depend_on_tiles(name):
    *tensors, rows = draw_inputs(1, 1, 100, dtype=torch.float32, rows=3)
    operator = OPERATORS[name]
    leaves = [x.requires_grad_() for x in tensors]

    def run(**changes):
        tiles = tiles_module.Tiles(sum_rows=16, query_rows=16, key_rows=16, query_tiles=1, dq_rows=16, dk_rows=32)
        with tiles_module.use_tiles(replace(tiles, **changes)):
            out = operator(*leaves, rows, 9, backend="triton")
            return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    first = run()
    for changes in (
        {"sum_programs": 1},
        {"query_rows": 32, "query_tiles": 3},
        {"dq_rows": 64, "dk_rows": 16, "key_rows": 64},
    ):
        for expected, result in zip(first, run(**changes), strict=True):
            assert_close(str(changes), expected, result, GRADIENT_TOLERANCE[torch.float32])


@needs_interpreter
def test_many_chunks_are_combined():
    *tensors, rows = draw_inputs(1, 1, 16 * 150, dtype=torch.float32, rows=2)
    tiles = tiles_module.Tiles(sum_rows=16, sum_programs=1000, query_rows=128, key_rows=64, dq_rows=128, dk_rows=128)
    operator = OPERATORS["performer"]
    with tiles_module.use_tiles(tiles), poisoned_memory():
        out = operator(*tensors, rows, 0, backend="triton")
    assert_close("out", operator.naive(*tensors, rows, 0)[0], out, TOLERANCE[torch.float32])


@needs_interpreter
def test_eps_of_performer():
    tensors = draw_inputs(length=37, num_keys=20, dtype=torch.float32)
    operator = OPERATORS["performer"]
    expected, _ = operator.naive(*tensors, 0, eps=0.3)
    assert_close("out", expected, operator(*tensors, 0, eps=0.3, backend="triton"), TOLERANCE[torch.float32])


@needs_interpreter
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_operator_follows_the_rules_of_torch_library(name, is_causal):
    from scatterbrain.ops.scatterbrain.triton.operator import fused_attention

    *tensors, rows = draw_inputs(1, 2, 20, dtype=torch.float32, rows=2)
    rows = None if name == "local" else rows
    window = 0 if name == "performer" else 5
    for statistics in (False, True):
        leaves = [x.clone().requires_grad_(statistics) for x in tensors]
        torch.library.opcheck(
            fused_attention,
            (*leaves, rows, torch.tensor([13]), window, 0.25, name == "scatterbrain", is_causal, 0.0, statistics),
            # there is no gradient of the projection, and callers refuse to take it
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@needs_interpreter
@pytest.mark.parametrize("name", NAMES)
def test_is_traced_as_one_graph(name):
    operator = OPERATORS[name]
    *tensors, rows = draw_inputs(1, 2, 30, dtype=torch.float32, rows=2)
    leaves = [x.requires_grad_() for x in tensors]

    def attend(*tensors, window=5):
        return operator(*tensors, rows, window, backend="triton")

    traced = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for window in (5, 7):  # a size that changes between calls
        assert torch.equal(traced(*leaves, window=window), attend(*leaves, window=window))
    for one, other in zip(
        *(torch.autograd.grad(function(*leaves).square().sum(), leaves) for function in (attend, traced)), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_compiles_as_one_graph_and_replays(name, is_causal):
    operator = OPERATORS[name]
    *tensors, rows = (x.cuda() for x in draw_inputs(2, 1, 784, width=64, rows=6, dtype=torch.bfloat16))

    def attend(*tensors):
        return operator(*tensors, rows, 12, is_causal=is_causal)

    expected = attend(*tensors)
    assert torch.equal(torch.compile(attend, fullgraph=True)(*tensors), expected)
    leaves = [x.clone().requires_grad_() for x in tensors]
    gradients = [torch.autograd.grad(function(*leaves).sum(), leaves) for function in (attend, torch.compile(attend))]
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(*tensors)
    tensors[0].copy_(torch.randn_like(tensors[0]))
    graph.replay()
    assert torch.equal(out, attend(*tensors))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_auto_takes_the_kernels_on_cuda(name):
    operator = OPERATORS[name]
    tensors = [x.cuda() for x in draw_inputs(1, 1, 300, width=64, dtype=torch.bfloat16)]
    assert torch.equal(operator(*tensors, 5), operator(*tensors, 5, backend="triton"))


def test_auto_takes_plain_pytorch_on_the_cpu():
    operator = OPERATORS["scatterbrain"]
    tensors = draw_inputs(length=30, dtype=torch.float32)
    assert torch.equal(operator(*tensors, 5), operator(*tensors, 5, backend="torch"))


@needs_interpreter
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"width": 130}, "width up to 128"),
        ({"rows": 129}, "up to 256 random features"),
    ],
)
def test_unsupported_inputs_are_refused(changes, reason):
    tensors = draw_inputs(**({"length": 5, "dtype": torch.float32} | changes))
    with pytest.raises(UserError, match=f"backend='triton' cannot run this: .*{reason}.*Choose 'torch'"):
        OPERATORS["scatterbrain"](*tensors, 3, backend="triton")


@needs_interpreter
def test_offsets_have_32_bits():
    # only strides and sizes count; there is no such memory
    query = torch.zeros(1).expand(1, 2, 2**24, 64)
    assert "2^31 elements" in unsupported(query, query)
    assert "2^31 elements" in landmarks_unsupported(query, query, 4, 0)
    far = torch.empty_strided((1, 1, 3, 4), (0, 0, 2**30, 1), device="meta")
    assert with_near_rows(far).stride(2) == 4
    near = torch.empty_strided((1, 1, 3, 4), (0, 0, 64, 1), device="meta")
    assert with_near_rows(near) is near


@needs_interpreter
@pytest.mark.parametrize(("length", "projections", "is_refused"), [(16384, 129, True), (16383, 129, False)])
def test_many_features_of_a_long_sequence_are_refused_on_cuda(length, projections, is_refused):
    """They would run in plain PyTorch, slower than full attention."""
    with FakeTensorMode():
        query = torch.empty(1, 1, length, 16, device="cuda")
        rows = torch.empty(projections, 16, device="cuda")
        with pytest.raises(UserError, match="sbcluster") if is_refused else contextlib.nullcontext():
            check_speed(query, query, rows)


def test_dropout_and_gradients_of_the_projection_are_refused():
    query, key, value, rows = draw_inputs(length=5, dtype=torch.float32)
    operator = OPERATORS["scatterbrain"]
    with pytest.raises(UserError, match="no dropout"):
        operator(query, key, value, rows, 3, backend="triton", dropout_p=0.1)
    with pytest.raises(UserError, match="no gradient for the projection"):
        operator(query, key, value, rows.requires_grad_(), 3, backend="triton")


def test_without_a_gpu_the_kernels_are_refused(monkeypatch):
    monkeypatch.setattr("scatterbrain.ops.common.backends.is_interpreted", lambda: False)
    query, _, value, _ = draw_inputs(length=5, dtype=torch.float32)
    assert "it runs on CUDA devices" in unsupported(query, value)


@pytest.mark.parametrize(("batch", "length"), [(1, 65536), (16, 12544), (128, 3136)])
def test_memory_of_sums_and_fallback_tiles(batch, length):
    """Under 5 % of q, k, v and the output at any time: sums are freed before the parts of fallback tiles are needed."""
    operator_module = pytest.importorskip("scatterbrain.ops.scatterbrain.triton.operator")
    from scatterbrain.ops.scatterbrain.triton.tiles import DEFAULT, use_tiles

    tensor = torch.empty(batch, 1, length, 64, dtype=torch.bfloat16, device="meta")
    rows = torch.empty(12, 64, dtype=torch.bfloat16, device="meta")
    with use_tiles(DEFAULT):
        plan = operator_module._Plan(tensor, tensor, tensor, rows, None, 49, 0.125, True, False)
    norms = batch * length * 4
    sums = batch * plan.key_chunks * (64 * 32 + 2 * 32) * 4
    fallback = plan.num_parts * operator_module.FALLBACK_ROWS * (64 + 2) * 4
    assert plan.num_parts > 1
    assert norms + max(sums, fallback) < 0.05 * 4 * 2 * tensor.numel()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_memory_beyond_inputs_and_outputs(dtype):
    query, key, value = (torch.randn(32, 1, 3136, 64, device="cuda", dtype=dtype) for _ in range(3))
    rows = draw_projection(12, 64, seed=0).cuda()
    leaves = [x.requires_grad_() for x in (query, key, value)]
    operator = OPERATORS["scatterbrain"]
    gradient = torch.randn_like(value)
    size = query.numel() * query.element_size()
    for _ in range(2):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(operator(*leaves, rows, 49), leaves, gradient)
        peak = torch.cuda.max_memory_allocated() - before
    # query, key, value, their gradients, output and its gradient: eight; four of them are allocated in the call
    assert peak - 4 * size < 0.05 * 8 * size
