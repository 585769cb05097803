"""The landmark kernels against the specification: in Triton's interpreter on small shapes, on a GPU at real sizes.

`fuzz.py` compares random calls; here are the cases that random ones seldom meet.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from scatterbrain.attention import create_attention
from scatterbrain.errors import UserError
from scatterbrain.ops.clusters import assign_clusters, landmark_attention, naive_landmark_attention
from scatterbrain.ops.clusters.naive import naive_landmark_lse
from scatterbrain.ops.common.backends import is_interpreted
from tests.helpers import assert_close, draw_inputs
from tests.scatterbrain.ops.poison import poisoned_memory

triton = pytest.importorskip("triton")

from scatterbrain.ops.clusters.triton import find_clusters, operator, unsupported  # noqa: E402 - imports triton
from scatterbrain.ops.clusters.triton.tiles import LandmarkTiles, use_tiles  # noqa: E402
from scatterbrain.ops.common import backends, passes  # noqa: E402

needs_interpreter = pytest.mark.skipif(
    not is_interpreted() or triton.__version__.startswith("3.2."),
    reason="the kernels are compiled for the GPU here, or Triton's interpreter is too old for them",
)
DEVICES = [
    pytest.param("cpu", torch.float32, marks=needs_interpreter),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
]
# RMS against float64, as of the other kernels: rounding of weights, values and the result in the dtype of the inputs
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def draw(device, dtype, length=50, num_keys=None, width=16, value_width=None, batch=1, **options):
    tensors = draw_inputs(batch, 1, length, num_keys, width, value_width, max_logit=options.pop("max_logit", None))[:3]
    return [x.to(device, dtype) for x in tensors]


def compare(tensors, num_landmarks, window, key_lengths=None, num_steps=1, given=False, factor=1.0):
    """Output and gradients of the kernels against the specification on the kernels' clusters."""
    clusters = find_clusters(tensors[1], min(num_landmarks, tensors[1].shape[2]), num_steps, key_lengths)
    scale = tensors[0].shape[-1] ** -0.5
    cotangent = torch.randn(*tensors[0].shape[:3], tensors[2].shape[3], device=tensors[0].device).to(tensors[0].dtype)
    leaves = [x.clone().requires_grad_() for x in tensors]
    options = {"num_steps": num_steps, "assignment": clusters if given else None}
    with poisoned_memory():
        out = landmark_attention(*leaves, num_landmarks, window, key_lengths=key_lengths, backend="triton", **options)
        out.backward(cotangent)
    exact = [x.double().requires_grad_() for x in tensors]
    expected = naive_landmark_attention(*exact, clusters, window, scale, key_lengths)[0]
    expected.backward(cotangent.double())
    tolerance = factor * TOLERANCE[tensors[0].dtype]
    assert_close("out", expected.detach(), out.detach(), tolerance)
    for name, one, other in zip("qkv", exact, leaves, strict=True):
        # equal keys have queries without gradient, but for the rounding of terms of size 1
        floor = 0.3 * torch.ones_like(one)
        assert_close(f"gradient of {name}", one.grad + floor, other.grad + floor, 2 * tolerance)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize(
    ("num_landmarks", "lengths"), [(1, None), (5, (41, 13)), (16, None), (23, (41, 13)), (40, (2, 0))]
)
def test_clusters_are_those_of_the_definition(device, dtype, num_landmarks, lengths):
    # lumps that are far apart: no key is near the border of two clusters, whatever the rounding
    lumps = 30 * torch.randn(12, 16)
    keys = (lumps[torch.randint(12, (2, 2, 41))] + torch.randn(2, 2, 41, 16)).to(device, dtype)
    key_lengths = None if lengths is None else torch.tensor(lengths, device=device)
    clusters = find_clusters(keys, num_landmarks, 1, key_lengths)
    expected = assign_clusters(keys, num_landmarks, 1, key_lengths)
    if dtype == torch.float32:
        assert torch.equal(clusters, expected)
    else:
        assert (clusters != expected).float().mean() < 0.02  # keys of one lump that two centroids share


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("window", [0, 9])
def test_many_chunks_and_blocks(device, dtype, window, monkeypatch):
    monkeypatch.setattr(operator, "MANY_CHUNKS", 2)
    monkeypatch.setattr(operator, "FEW_CHUNKS", 2)
    monkeypatch.setattr(passes, "PASSES", passes.Cache())
    compare(draw(device, dtype, 90), 37, window, num_steps=2)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("window", [0, 7, 300])
def test_windows_and_given_clusters(device, dtype, window):
    compare(draw(device, dtype, 37, 53, 20, 12), 11, window, given=True)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("max_logit", [50, 80])
def test_extreme_logits(device, dtype, max_logit):
    compare(draw(device, dtype, 60, max_logit=max_logit), 8, 9, factor=3)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_a_landmark_far_above_all_keys_of_its_window_leaves_no_nan(device, dtype):
    # Rounding puts landmarks of two or three keys, all in the window, above these by many times. Their weights cancel
    # but for rounding errors, which are of either sign and larger than the exact weights.
    std = {torch.float32: 3000, torch.bfloat16: 100, torch.float16: 200}[dtype]
    query, key, value = draw(device, dtype, 300)
    query, key = (x / x.std() * std for x in (query, key))
    tensors = [x.detach().requires_grad_() for x in (query, key, value)]
    out = landmark_attention(*tensors, 100, 40, backend="triton")
    assert out.isfinite().all()
    if dtype != torch.float16:  # which has gradients of such logits beyond its range
        out.float().sum().backward()
        assert all(x.grad.isfinite().all() for x in tensors)


@pytest.mark.parametrize(("device", "dtype"), [*DEVICES, pytest.param("cpu", torch.float16, marks=needs_interpreter)])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_what_rounding_leaves_of_a_landmark_is_no_multiple_of_the_values(device, dtype, size):
    # clusters of equal keys, one after another: exact weights are those of the landmark but for its rounding
    std = 3000 if dtype == torch.float32 else 300
    query, key, value = (torch.randn(1, 1, 120, 16) for _ in range(3))
    key = key[:, :, ::size].repeat_interleave(size, 2)
    query, key, value = (x.to(device, dtype) for x in (std * query, std * key, value))
    clusters = (torch.arange(120, device=device) // size).view(1, 1, -1)
    out = landmark_attention(query, key, value, 120 // size, 16, assignment=clusters, backend="triton")
    assert out.isfinite().all()
    assert out.abs().max() <= 3 * value.abs().max()


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("window", [0, 9])
def test_a_large_common_part_of_the_keys_costs_no_accuracy(device, dtype, window):
    query, key, value = draw(device, dtype, 60)
    # float16 sums overflow beyond this
    compare([query, key + (100 if dtype != torch.float16 else 30), value], 8, window, factor=6)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("window", [0, 5])
def test_degenerate_keys(device, dtype, window):
    query, key, value = draw(device, dtype, 30)
    # all equal, every key a cluster of its own, a single key
    compare([query, key[:, :, :1].expand_as(key).contiguous(), value], 8, window)
    compare([query, key, value], 99, window)
    compare([query, key[:, :, :1], value[:, :, :1]], 4, window)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_samples_without_keys_are_zero(device, dtype):
    tensors = draw(device, dtype, 30, batch=3)
    lengths = torch.tensor([30, 0, 4], device=device)
    compare(tensors, 6, 5, lengths)
    out = landmark_attention(*tensors, 6, 5, key_lengths=lengths, backend="triton")
    assert (out[1] == 0).all()


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("window", [0, 7])
def test_log_sum_exp(device, dtype, window):
    query, key, value = draw(device, dtype, 40, batch=2)
    key = key + 3
    lengths = torch.tensor([40, 0], device=device)
    clusters = find_clusters(key, 8, 1, lengths)
    options = {"key_lengths": lengths, "backend": "triton"}
    _, lse = landmark_attention(query, key, value, 8, window, return_lse=True, **options)
    expected = naive_landmark_lse(query, key, clusters, window, 0.25, lengths)
    assert (lse[1] == -math.inf).all()
    torch.testing.assert_close(lse[0].double(), expected[0], rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
    query.requires_grad_()
    with pytest.raises(UserError, match="log-sum-exp has no gradient"):
        landmark_attention(query, key, value, 8, window, return_lse=True, **options)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_results_are_the_same_from_run_to_run(device, dtype):
    tensors = [x.requires_grad_() for x in draw(device, dtype, 60)]

    def run():
        out = landmark_attention(*tensors, 9, 7, backend="triton")
        return [out, *torch.autograd.grad(out, tensors, torch.ones_like(out))]

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)


@needs_interpreter
@pytest.mark.parametrize("num_steps", [0, 1, 2])
@pytest.mark.parametrize("num_landmarks", [9, 3])  # 3: clusters are found from a sample of the longer sequence
def test_results_do_not_depend_on_tiles(num_landmarks, num_steps):
    tensors = draw("cpu", torch.float32, 60, batch=2)
    lengths = torch.tensor([60, 31])

    def run():
        options = {"key_lengths": lengths, "num_steps": num_steps, "backend": "triton"}
        return landmark_attention(*tensors, num_landmarks, 7, **options)

    expected = run()
    tiles = LandmarkTiles(block=16, min_block=16, sum_rows=32, query_rows=32, key_rows=16, query_tiles=2)
    # a program has a whole sequence and makes all steps, or half of it; two initial centroids in a program, or one
    for changes in ({"sum_programs": 2, "start_pair_rows": 32}, {"sum_programs": 4, "start_pair_rows": 0}):
        with use_tiles(replace(tiles, **changes)):
            assert_close("out", expected, run(), 1e-6)


@pytest.mark.parametrize(("device", "dtype"), DEVICES[:2])
@pytest.mark.parametrize("has_lengths", [False, True])
def test_operator_follows_the_rules_of_torch_library(device, dtype, has_lengths):
    tensors = [x.requires_grad_() for x in draw(device, dtype, 20)]
    lengths = torch.tensor([13], device=device) if has_lengths else None
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (*tensors, lengths, None, 5, 3, 0.25, 1, True)
    torch.library.opcheck(operator.fused_landmark_attention, arguments, test_utils=tests)


@needs_interpreter
@pytest.mark.parametrize("width", [16, 20])
def test_is_traced_as_one_graph(width):
    tensors = [x.requires_grad_() for x in draw("cpu", torch.float32, 20, width=width)]

    def run(*tensors):
        return landmark_attention(*tensors, 5, 3, backend="triton")

    out = torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors)
    expected = run(*tensors)
    assert torch.equal(out, expected)
    grads = [torch.autograd.grad(x, tensors, torch.ones_like(x)) for x in (out, expected)]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@needs_interpreter
def test_sizes_that_change_between_compiled_calls():
    """Dynamo passes an integer that has changed as a symbol."""
    tensors = draw("cpu", torch.float32, 20)

    def run(num_landmarks, window):
        return landmark_attention(*tensors, num_landmarks, window, backend="triton")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for sizes in ((5, 3), (6, 7)):
        assert torch.equal(compiled(*sizes), run(*sizes))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 16])
def test_compiles_as_one_graph_and_replays(window):
    tensors = [x.requires_grad_() for x in draw("cuda", torch.bfloat16, 300, width=64)]

    def run(*tensors):
        return landmark_attention(*tensors, 24, window, backend="triton")

    expected = run(*tensors)
    out = torch.compile(run, fullgraph=True)(*tensors)
    assert torch.equal(out, expected)
    grads = [torch.autograd.grad(x, tensors, torch.ones_like(x)) for x in (out, expected)]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
    with torch.no_grad():  # the kernel without statistics is another one
        expected = run(*tensors)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(*tensors)
        graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_real_sizes(dtype, window):
    compare(draw("cuda", dtype, 3136, width=64), 128, window)
    compare(draw("cuda", dtype, 1000, 1200, 64, 128), 300, window)
    compare(draw("cuda", dtype, 777, 777, 40), 48, window, torch.tensor([500], device="cuda"))


@pytest.mark.gpu
def test_auto_takes_the_kernels_on_cuda():
    attention = create_attention("sbcluster", 256, 64, local_context=16, num_landmarks=32)
    tensors = [x.transpose(1, 2) for x in draw("cuda", torch.bfloat16, 256, width=64)]
    kernels = create_attention("sbcluster", 256, 64, local_context=16, num_landmarks=32, backend="triton")
    assert torch.equal(attention(*tensors)[0], kernels(*tensors)[0])


@pytest.mark.gpu
def test_memory_beyond_inputs_and_outputs():
    tensors = [torch.randn(128, 1, 3136, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    leaves, gradient = [x.requires_grad_() for x in tensors], torch.randn_like(tensors[0])
    size = gradient.numel() * gradient.element_size()
    for _ in range(2):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(landmark_attention(*leaves, 128, 64), leaves, gradient)
        peak = torch.cuda.max_memory_allocated() - before
    # query, key, value, their gradients, output and its gradient: eight; four of them are allocated in the call
    assert peak - 4 * size < 0.06 * 8 * size


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"width": 129}, "width up to 128"),
        ({"num_landmarks": 1025}, "up to 1024 landmarks"),
        ({"window": 513}, "up to 512 keys"),
        ({"dropout_p": 0.1}, "no dropout"),
    ],
)
@needs_interpreter
def test_unsupported_calls_are_refused(changes, reason):
    query = torch.randn(1, 1, 8, changes.pop("width", 16))
    options = {"num_landmarks": 4, "window": 3} | changes
    assert reason in unsupported(query, query, **options)
    with pytest.raises(UserError, match=reason):
        landmark_attention(query, query, query, backend="triton", **options)


@needs_interpreter
def test_triton_whose_compiler_fails_is_refused(monkeypatch):
    """Adaptive and causal kernels share the check."""
    query = torch.randn(1, 1, 8, 16)
    monkeypatch.setattr(backends, "_TRITON_VERSION", (3, 3))
    reason = "needs Triton 3.4 or newer, and this is 3.3"
    assert reason in unsupported(query, query, 4, 3)
    with pytest.raises(UserError, match=reason):
        landmark_attention(query, query, query, 4, 3, backend="triton")
    # the version of a build under another name
    monkeypatch.setattr(backends, "_TRITON_VERSION", None)
    assert unsupported(query, query, 4, 3) is None
