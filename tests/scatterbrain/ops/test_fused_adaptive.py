"""The kernels of adaptive attention against the specification: in Triton's interpreter on small shapes, on a GPU too.

`test_fused_adaptive_plan.py` tests the kernels that plan, and `fuzz.py` compares random calls.
"""

from __future__ import annotations

import pytest
import torch

from scatterbrain.errors import UserError
from scatterbrain.ops.adaptive import adaptive_attention, naive_adaptive_attention, plan_adaptive_attention
from scatterbrain.ops.adaptive.plan import AdaptivePlan
from scatterbrain.ops.clusters import landmark_attention
from scatterbrain.ops.common.backends import is_interpreted
from scatterbrain.ops.full import naive_full_attention
from tests.helpers import assert_close, draw_inputs
from tests.scatterbrain.ops.poison import poisoned_memory

triton = pytest.importorskip("triton")

from scatterbrain.ops.adaptive.triton import operator, tables, unsupported  # noqa: E402 - imports triton
from scatterbrain.ops.adaptive.triton import plan as plan_launches  # noqa: E402
from scatterbrain.ops.adaptive.triton.tiles import ExactTiles, use_tiles  # noqa: E402
from scatterbrain.ops.common import passes  # noqa: E402

needs_interpreter = pytest.mark.skipif(
    not is_interpreted() or triton.__version__.startswith("3.2."),
    reason="the kernels are compiled for the GPU here, or Triton's interpreter is too old for them",
)
DEVICES = [
    pytest.param("cpu", torch.float32, marks=needs_interpreter),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
]
# RMS against float64, as of the kernels of landmark attention
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def draw(device, dtype, length=50, num_keys=None, width=16, value_width=None, batch=1, heads=1, max_logit=None):
    tensors = draw_inputs(batch, heads, length, num_keys, width, value_width, max_logit=max_logit)[:3]
    return [x.to(device, dtype) for x in tensors]


def compare(tensors, sizes, window, key_lengths=None, factor=1.0, plan=None):
    """Output and gradients of the kernels against the specification with one plan.

    Args:
        tensors: query, key and value.
        sizes: M, Q and the density.
        window: width W.
        key_lengths: numbers of visible keys; hidden keys and values become nan.
        factor: of the tolerance.
        plan: the plan; None to make it from `sizes`.
    """
    query, key, value = tensors
    if key_lengths is not None:
        key_lengths = torch.tensor(key_lengths, device=key.device)
        hidden = (torch.arange(key.shape[2], device=key.device) >= key_lengths[:, None])[:, None, :, None]
        key, value = (x.masked_fill(hidden, float("nan")) for x in (key, value))
    if plan is None:
        plan = plan_adaptive_attention(query, key, value, *sizes, key_lengths=key_lengths)
    cotangent = torch.randn(*query.shape[:3], value.shape[3], device=query.device).to(query.dtype)
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    with poisoned_memory():
        out = adaptive_attention(*leaves, *sizes, window, key_lengths=key_lengths, plan=plan, backend="triton")
        out.backward(cotangent)
        with torch.no_grad():
            alone = adaptive_attention(*leaves, *sizes, window, key_lengths=key_lengths, plan=plan, backend="triton")
    assert torch.equal(out, alone)
    exact = [x.double().requires_grad_() for x in (query, key, value)]
    expected = naive_adaptive_attention(*exact, *plan[:3], window, query.shape[3] ** -0.5, key_lengths)[0]
    expected.backward(cotangent.double())
    tolerance = factor * TOLERANCE[query.dtype]
    assert_close("out", expected.detach(), out.detach(), tolerance)
    for name, one, other in zip("qkv", exact, leaves, strict=True):
        # equal keys have queries without gradient, but for the rounding of terms of size 1
        floor = 0.3 * torch.ones_like(one)
        assert_close(f"gradient of {name}", one.grad + floor, other.grad + floor, 2 * tolerance)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize(("density", "window"), [(0.0, 7), (0.1, 0), (0.4, 7), (1.0, 0), (1.0, 7)])
def test_densities_and_windows(device, dtype, density, window):
    compare(draw(device, dtype, 34, heads=2), (9, 4, density), window)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize(
    ("lengths", "widths", "sizes", "window"),
    [
        ((21, 37), (20, 12), (11, 3, 0.4), 300),
        ((37, 20), (16, 48), (20, 17, 0.5), 2),
        ((34, 50), (33, 8), (40, 5, 0.3), 5),  # several words, and landmarks that are not a multiple of 32
        ((20, 140), (16, 16), (130, 4, 0.3), 9),  # more words than are kept in registers
        ((1, 1), (16, 16), (1, 1, 1.0), 1),
        ((70, 3), (16, 16), (3, 6, 0.7), 0),
    ],
)
def test_shapes(device, dtype, lengths, widths, sizes, window):
    compare(draw(device, dtype, *lengths, *widths), sizes, window)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("window", [0, 5])
def test_hidden_keys_may_hold_nan(device, dtype, window):
    compare(draw(device, dtype, 33, batch=3), (7, 4, 0.4), window, (33, 0, 13))
    out = adaptive_attention(
        *draw(device, dtype, 30, batch=2), 6, 3, 0.4, window, key_lengths=[30, 0], backend="triton"
    )
    assert (out[1] == 0).all()
    assert out.isfinite().all()


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("max_logit", [50, 80])
def test_extreme_logits(device, dtype, max_logit):
    compare(draw(device, dtype, 40, max_logit=max_logit), (8, 4, 0.3), 9, factor=3)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_a_large_common_part_of_the_keys_costs_no_accuracy(device, dtype):
    query, key, value = draw(device, dtype, 40)
    # float16 sums overflow beyond this
    compare([query, key + (100 if dtype != torch.float16 else 30), value], (8, 4, 0.3), 9, factor=6)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_degenerate_keys(device, dtype):
    query, key, value = draw(device, dtype, 30)
    # all equal, which are one cluster; every key a cluster of its own; a single key
    compare([query, key[:, :, :1].expand_as(key).contiguous(), value], (8, 4, 0.5), 5)
    compare([query, key, value], (99, 99, 0.5), 5)
    compare([query, key[:, :, :1], value[:, :, :1]], (4, 4, 1.0), 3)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("window", [0, 7])
def test_either_part_may_be_empty(device, dtype, window):
    """Query cluster 0 takes all key clusters, 1 takes none, 2 one: landmarks, exact keys or neither part is empty."""
    tensors = draw(device, dtype, 48, 40)
    labels = torch.arange(40, device=device) % 5
    taken = torch.zeros(1, 1, 3, 5, dtype=torch.bool, device=device)
    taken[0, 0, 0] = True
    taken[0, 0, 2, 3] = True
    queries = (torch.arange(48, device=device) // 7) % 3
    plan = AdaptivePlan(labels.view(1, 1, -1), queries.view(1, 1, -1), taken, 40)
    compare(tensors, (5, 3, 1.0), window, plan=plan)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_queries_of_one_cluster(device, dtype):
    """More clusters than those that have queries, and tiles with one query."""
    tensors = draw(device, dtype, 49, 40)
    taken = torch.rand(1, 1, 6, 5, device=device) < 0.5
    taken[0, 0, 4, 2] = True
    labels = torch.randint(5, (1, 1, 40), device=device)
    plan = AdaptivePlan(labels, torch.full((1, 1, 49), 4, device=device), taken, 40)
    compare(tensors, (5, 6, 1.0), 3, plan=plan)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_special_cases(device, dtype):
    tensors = draw(device, dtype, 60)
    tolerance = TOLERANCE[dtype]
    landmarks = landmark_attention(*tensors, 9, 7, backend="triton")
    assert torch.equal(landmarks, adaptive_attention(*tensors, 9, 4, 0.0, 7, backend="triton"))
    full = naive_full_attention(*tensors, scale=0.25)[0]
    assert_close("density 1", full, adaptive_attention(*tensors, 9, 4, 1.0, 7, backend="triton"), tolerance)


@pytest.mark.parametrize(("device", "dtype"), DEVICES[:1])
@pytest.mark.parametrize("options", [{}, {"tolerance": 0.05}, {"value_weight": 0.5}, {"num_steps": 0}], ids=str)
def test_own_plan_is_that_of_pytorch(device, dtype, options):
    tensors = draw(device, dtype, 40, batch=2)
    arguments = (*tensors, 9, 4, 0.3, 7)
    lengths = {"key_lengths": [40, 23], "query_lengths": torch.tensor([40, 30])}
    results = [adaptive_attention(*arguments, **options, **lengths, backend=name) for name in ("torch", "triton")]
    assert_close("out", *results, 1e-6)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_strided_inputs_and_grouped_queries(device, dtype):
    qkv = torch.randn(1, 33, 3, 4, 16, device=device).to(dtype)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    plan = plan_adaptive_attention(query, key, value, 8, 4, 0.4)
    arguments = (8, 4, 0.4, 5)
    expected = adaptive_attention(
        *(x.contiguous() for x in (query, key, value)), *arguments, plan=plan, backend="triton"
    )
    assert torch.equal(expected, adaptive_attention(query, key, value, *arguments, plan=plan, backend="triton"))
    key, value = key[:, :2], value[:, :2]
    repeated = [x.repeat_interleave(2, 1) for x in (key, value)]
    expected = adaptive_attention(query, *repeated, *arguments, backend="triton")
    out = adaptive_attention(query, key, value, *arguments, enable_gqa=True, backend="triton")
    assert torch.equal(out, expected)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_results_are_the_same_from_run_to_run(device, dtype):
    tensors = [x.requires_grad_() for x in draw(device, dtype, 60)]

    def run():
        out = adaptive_attention(*tensors, 9, 4, 0.3, 7, backend="triton")
        return [out, *torch.autograd.grad(out, tensors, torch.ones_like(out))]

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)


@needs_interpreter
def test_results_do_not_depend_on_tiles():
    tensors = [x.requires_grad_() for x in draw("cpu", torch.float32, 90)]
    plan = plan_adaptive_attention(*tensors, 9, 4, 0.4)
    results = []
    for tiles in (ExactTiles(16, 32, 4, 1, 32, 16, 4, 1, 16, 32, 4, 1), ExactTiles(64, 64, 4, 3, 64, 64, 4, 2)):
        with use_tiles(tiles):
            out = adaptive_attention(*tensors, 9, 4, 0.4, 7, plan=plan, backend="triton")
            results.append([out, *torch.autograd.grad(out, tensors, torch.ones_like(out))])
    for name, one, other in zip("oqkv", *results, strict=True):
        assert_close(name, one, other, 2e-6)


@pytest.mark.parametrize(("device", "dtype"), DEVICES[:2])
@pytest.mark.parametrize("has_lengths", [False, True])
def test_operators_follow_the_rules_of_torch_library(device, dtype, has_lengths):
    query, key, value = (x.requires_grad_() for x in draw(device, dtype, 20))
    lengths = torch.tensor([13], device=device) if has_lengths else None
    sizes = (5, 3)
    plan = plan_adaptive_attention(query, key, value, *sizes, 0.5, key_lengths=lengths)
    labels, buffer = tables.fill_tables(plan, sorts_keys=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    detached = (query.detach(), key.detach(), value.detach())
    torch.library.opcheck(operator.cluster_statistics, (*detached[1:], lengths, labels, 5), test_utils=tests)
    statistics = operator.run_statistics(*detached[1:], lengths, labels, 5)
    arguments = (query, key, value, lengths, labels, statistics, buffer, *sizes, plan.num_exact, 3, 0.25)
    torch.library.opcheck(operator.fused_adaptive_attention, arguments, test_utils=tests)
    arguments = (*detached, lengths, None, None, *sizes, 0.5, None, 0.25, 1, True)
    torch.library.opcheck(operator.adaptive_plan, arguments, test_utils=tests[::2])


@needs_interpreter
@pytest.mark.parametrize(("width", "given"), [(16, False), (20, False), (20, True)])
def test_is_traced_as_one_graph(width, given):
    tensors = [x.requires_grad_() for x in draw("cpu", torch.float32, 20, width=width)]
    plan = plan_adaptive_attention(*tensors, 5, 3, 0.5) if given else None

    def run(*tensors):
        return adaptive_attention(*tensors, 5, 3, 0.5, 3, plan=plan, backend="triton")

    out = torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors)
    expected = run(*tensors)
    assert torch.equal(out, expected)
    grads = [torch.autograd.grad(x, tensors, torch.ones_like(x)) for x in (out, expected)]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 16])
def test_compiles_as_one_graph_and_replays(window):
    tensors = [x.requires_grad_() for x in draw("cuda", torch.bfloat16, 300, width=64)]

    def run(*tensors):
        return adaptive_attention(*tensors, 24, 8, 0.2, window, backend="triton")

    expected = run(*tensors)
    # the first call compiles kernels between launches, later ones overlap
    assert torch.equal(run(*tensors), expected)
    out = torch.compile(run, fullgraph=True)(*tensors)
    assert torch.equal(out, expected)
    grads = [torch.autograd.grad(x, tensors, torch.ones_like(x)) for x in (out, expected)]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
    with torch.no_grad():
        alone = run(*tensors)
        assert torch.equal(alone, expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(*tensors)
        graph.replay()
    assert torch.equal(captured, alone)


@needs_interpreter
def test_compiled_calls_launch_what_eager_calls_do(monkeypatch):
    """All that a pass depends on: shapes, strides, options and tiles of the plan, forward and backward."""
    tensors = [x.requires_grad_() for x in draw("cpu", torch.float32, 20)]
    keys = []
    # eager calls look up passes of earlier calls elsewhere
    monkeypatch.setattr(passes, "PASSES", passes.Cache())

    def record(find):
        def found(build, inputs, tiles, *options):
            keys.append(passes.pass_key(build, inputs, tiles, options))
            return find(build, inputs, tiles, *options)

        return found

    for module in (operator, plan_launches):
        monkeypatch.setattr(module, "find_pass", record(module.find_pass))

    def run(*tensors):
        return adaptive_attention(*tensors, 5, 3, 0.5, 3, backend="triton")

    calls = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        out = function(*tensors)
        torch.autograd.grad(out, tensors, torch.ones_like(out))
        calls.append(list(keys))
        keys.clear()
    # without the alignment of addresses
    eager, compiled = ([(key[0], [x and x[:-1] for x in key[1]], *key[2:]) for key in call] for call in calls)
    assert len(eager) == 3
    assert eager == compiled


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_real_sizes(dtype, window):
    compare(draw("cuda", dtype, 3136, width=64), (128, 48, 0.08), window)
    compare(draw("cuda", dtype, 1000, 1200, 64, 128), (300, 32, 0.2), window)
    compare(draw("cuda", dtype, 777, 777, 40), (48, 16, 0.1), window, [500])


@pytest.mark.gpu
def test_memory_beyond_inputs_and_outputs():
    tensors = [torch.randn(48, 1, 8192, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    leaves, gradient = [x.requires_grad_() for x in tensors], torch.randn_like(tensors[0])
    size = gradient.numel() * gradient.element_size()
    for _ in range(2):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(adaptive_attention(*leaves, 128, 48, 0.03, 64), leaves, gradient)
        peak = torch.cuda.max_memory_allocated() - before
    # query, key, value, their gradients, output and its gradient: eight; four of them are allocated in the call
    assert peak - 4 * size < 0.25 * 8 * size


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"width": 129}, "width up to 128"),
        ({"num_landmarks": 1025}, "up to 1024 landmarks"),
        ({"num_query_landmarks": 257}, "up to 256 query landmarks"),
        ({"window": 513}, "up to 512 keys"),
        ({"dropout_p": 0.1}, "no dropout"),
    ],
)
@needs_interpreter
def test_unsupported_calls_are_refused(changes, reason):
    query = torch.randn(1, 1, 8, changes.pop("width", 16))
    options = {"num_landmarks": 4, "num_query_landmarks": 2, "window": 3} | changes
    assert reason in unsupported(query, query, **options)
    with pytest.raises(UserError, match=reason):
        adaptive_attention(query, query, query, density=0.5, backend="triton", **options)
