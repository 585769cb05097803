"""The causal landmark kernels against the specification: in Triton's interpreter on small shapes, on a GPU too."""

from __future__ import annotations

import math

import pytest
import torch

from scatterbrain.attention import create_attention
from scatterbrain.errors import UserError
from scatterbrain.ops.clusters import landmark_attention
from scatterbrain.ops.clusters.causal import causal_clusters, causal_landmark_attention, naive_causal_landmark_attention
from scatterbrain.ops.common.backends import is_interpreted
from tests.helpers import assert_close, draw_inputs
from tests.scatterbrain.ops.poison import poisoned_memory

triton = pytest.importorskip("triton")

from scatterbrain.ops.clusters.causal.triton import find_clusters, operator, unsupported  # noqa: E402 - imports triton

needs_interpreter = pytest.mark.skipif(
    not is_interpreted() or triton.__version__.startswith("3.2."),
    reason="the kernels are compiled for the GPU here, or Triton's interpreter is too old for them",
)
DEVICES = [
    pytest.param("cpu", torch.float32, marks=needs_interpreter),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
]
HALF_DEVICES = [pytest.param("cpu", torch.float16, marks=needs_interpreter), *DEVICES[1:]]
# RMS against float64, as of the other kernels: rounding of weights, values and the result in the dtype of the inputs
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def draw(device, dtype, length=100, num_keys=None, width=16, value_width=None, batch=1, **options):
    tensors = draw_inputs(batch, 1, length, num_keys, width, value_width, max_logit=options.pop("max_logit", None))[:3]
    return [x.to(device, dtype) for x in tensors]


def compare(tensors, num_landmarks, window=0, chunk=16, key_lengths=None, num_steps=1, factor=1.0, value_weight=0.0):
    """Output and gradients of the kernels against the specification on the kernels' clusters."""
    query, _, value = tensors
    scale = query.shape[-1] ** -0.5
    sizes = num_landmarks, window, chunk
    steps = {"num_steps": num_steps, "key_lengths": key_lengths, "value_weight": value_weight}
    clusters = find_clusters(*tensors, *sizes, scale=scale, **steps)
    cotangent = torch.randn(*query.shape[:3], value.shape[3], device=query.device).to(query.dtype)
    leaves = [x.clone().requires_grad_() for x in tensors]
    with poisoned_memory():
        out = causal_landmark_attention(*leaves, *sizes[:2], chunk=chunk, backend="triton", **steps)
        out.backward(cotangent)
    exact = [x.double().requires_grad_() for x in tensors]
    expected, _, _ = naive_causal_landmark_attention(*exact, clusters, window, chunk, scale, key_lengths)
    expected.backward(cotangent.double())
    tolerance = factor * TOLERANCE[query.dtype]
    assert_close("out", expected.detach(), out.detach(), tolerance)
    for name, one, other in zip("qkv", exact, leaves, strict=True):
        # equal keys have queries without gradient, but for the rounding of terms of size 1
        floor = 0.3 * torch.ones_like(one)
        assert_close(f"gradient of {name}", one.grad + floor, other.grad + floor, 2 * tolerance)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize(
    ("num_landmarks", "lengths", "value_weight"),
    [(8, None, 0.0), (16, (141, 33), 0.0), (8, (2, 0), 0.0), (4, (141, 33), 4.0), (8, (2, 0), 4.0)],
)
def test_clusters_are_those_of_the_definition(device, dtype, num_landmarks, lengths, value_weight):
    # lumps that are far apart: no key is near the border of two clusters, whatever the rounding
    lumps = 30 * torch.randn(6, 16)
    keys = (lumps[torch.randint(6, (2, 2, 141))] + torch.randn(2, 2, 141, 16)).to(device, dtype)
    key_lengths = None if lengths is None else torch.tensor(lengths, device=device)
    values = (10 * lumps[torch.randint(6, (2, 2, 141))] + torch.randn(2, 2, 141, 16) + 100).to(device, dtype)
    sizes, options = (num_landmarks, 0, 16), {"key_lengths": key_lengths, "value_weight": value_weight}
    clusters = find_clusters(keys, keys, values, *sizes, scale=1.0, num_steps=1, **options)
    expected = causal_clusters(keys, *sizes, value=values, **options)
    assert clusters.shape == expected.shape
    if dtype == torch.float32:
        assert (clusters != expected).float().mean() < 0.005  # distances that agree in all but 18 bits
    else:
        assert (clusters != expected).float().mean() < 0.3  # keys of one lump that several centroids share


@pytest.mark.parametrize(("device", "dtype"), [DEVICES[0], *HALF_DEVICES])
@pytest.mark.parametrize("kind", ["equal", "apart", "large", "small"])
def test_clusters_of_extreme_values(device, dtype, kind):
    query, key, value = draw(device, dtype, value_width=32)
    value_weight, limit, sizes = 64.0, 0.02, (8, 0, 16)

    def find(value, value_weight):
        return find_clusters(query, key, value, *sizes, scale=0.25, num_steps=1, value_weight=value_weight)

    if kind == "equal":  # which count as little as no values
        value = torch.full_like(value, 3.0)
        expected = find(value, 0.0)
    elif kind == "apart":  # differences of float16 values may overflow
        value_weight, limit = 4.0, 0.02 if dtype == torch.float32 else 0.3  # rounded means are not the definition's
        value = torch.where(value > 1.5, -60000.0, 60000.0).to(dtype)
        expected = causal_clusters(key, *sizes, value=value, value_weight=value_weight)
    else:  # a power of two changes no cluster
        value = torch.where(value > 0, 1.0, -1.0).to(dtype)
        expected = find(value, value_weight)
        exponents = {"large": 15, "small": -8} if dtype == torch.float16 else {"large": 60, "small": -60}
        value *= 2.0 ** exponents[kind]
    assert (find(value, value_weight) != expected).float().mean() < limit
    out = causal_landmark_attention(query, key, value, 8, chunk=16, backend="triton", value_weight=value_weight)
    assert out.isfinite().all()


SHAPES = [  # T, S, E, D, M, W, C, key lengths
    (100, 100, 16, 16, 8, 0, 16, None),
    (128, 128, 20, 32, 16, 16, 16, (128, 50)),
    (150, 150, 32, 16, 8, 70, 16, (0, 149)),
    (10, 10, 16, 16, 8, 0, 64, None),
    (1, 1, 16, 16, 8, 1, 16, None),
    (90, 90, 16, 16, 1, 0, 16, None),
    (90, 90, 16, 16, 4, 0, 16, (90, 17)),
    (120, 40, 16, 16, 16, 0, 32, None),
    (100, 50, 16, 16, 8, 20, 16, None),
    (40, 120, 16, 16, 8, 0, 16, (77, 3)),
    (230, 230, 16, 16, 8, 20, 16, None),
]


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize(("shape", "value_weight"), [*((x, 0.0) for x in SHAPES), (SHAPES[1], 4.0)], ids=str)
def test_kernels_match_the_specification(device, dtype, shape, value_weight):
    length, num_keys, width, value_width, num_landmarks, window, chunk, lengths = shape
    key_lengths = None if lengths is None else torch.tensor(lengths, device=device)
    batch = 1 if lengths is None else 2
    tensors = draw(device, dtype, length, num_keys, width, value_width, batch)
    compare(tensors, num_landmarks, window, chunk, key_lengths, value_weight=value_weight)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("piece_chunks", [2])
def test_nodes_that_many_queries_see(device, dtype, piece_chunks, monkeypatch):
    monkeypatch.setattr(operator, "PIECE_CHUNKS", piece_chunks)
    compare(draw(device, dtype, 200), 8, 16, num_steps=2)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("max_logit", [50, 80])
def test_extreme_logits(device, dtype, max_logit):
    compare(draw(device, dtype, 90, max_logit=max_logit), 8, 9, factor=4)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_a_common_part_of_the_keys(device, dtype):
    query, key, value = draw(device, dtype)
    compare([query, key + 10, value], 8, 9, factor=6)


@pytest.mark.parametrize(("device", "dtype"), HALF_DEVICES)
def test_a_large_common_part_costs_no_digits(device, dtype):
    query, key, value = draw(device, dtype)
    compare([query, key + 100, value], 8, 9)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_all_keys_equal(device, dtype):
    query, key, value = draw(device, dtype)
    # the spread of equal keys is rounding alone
    compare([query, key[:, :, :1].expand_as(key).contiguous(), value], 8, factor=4)


@pytest.mark.parametrize(("device", "dtype"), HALF_DEVICES)
def test_equal_keys_far_apart_have_no_spread(device, dtype):
    """Norms and means of the spread are those of the same rounded points: their difference is squared, and grows."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, 100, 16)
    lumps = 12 * torch.randn(4, 16)
    key = lumps[torch.randint(4, (1, 1, 100))]
    tensors = [x.to(device, dtype) for x in (query, key, value)]
    clusters = find_clusters(*tensors, 8, 0, 16, scale=0.25, num_steps=1)
    out = causal_landmark_attention(*tensors, 8, chunk=16, backend="triton")
    expected = naive_causal_landmark_attention(*tensors, clusters, 0, 16, 0.25)[0]
    assert_close("out", expected, out, 3e-3 if dtype == torch.float16 else 2.4e-2)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_log_sum_exp(device, dtype):
    query, key, value = draw(device, dtype, batch=2)
    lengths = torch.tensor([100, 0], device=device)
    clusters = find_clusters(query, key, value, 8, 0, 16, scale=0.25, num_steps=1, key_lengths=lengths)
    options = {"chunk": 16, "key_lengths": lengths, "backend": "triton"}
    out, lse = causal_landmark_attention(query, key, value, 8, return_lse=True, **options)
    _, _, expected = naive_causal_landmark_attention(query, key, value, clusters, 0, 16, 0.25, lengths)
    assert (lse[1] == -math.inf).all()
    assert (out[1] == 0).all()
    assert_close("log-sum-exp", expected[0], lse[0], TOLERANCE[dtype])


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e4])
@pytest.mark.parametrize(("start", "value_weight"), [(37, 0.0), (64, 0.0), (64, 2.0)])
def test_the_future_has_no_influence(device, dtype, start, value_weight, poison):
    tensors = draw(device, dtype, 120)
    results = []
    for fill in (0.0, poison):
        leaves = [torch.cat([x[:, :, :start], torch.full_like(x[:, :, start:], fill)], 2) for x in tensors]
        leaves = [x.requires_grad_() for x in leaves]
        out = causal_landmark_attention(*leaves, 8, 16, chunk=16, backend="triton", value_weight=value_weight)
        out[:, :, :start].square().sum().backward()
        results.append([out[:, :, :start], *(x.grad for x in leaves)])
        later = out[:, :, start:]
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)
    assert math.isfinite(poison) or later.isnan().all()


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("value_weight", [0.0, 2.0])
def test_padding_has_no_influence(device, dtype, value_weight):
    tensors = draw(device, dtype, 120, batch=2)
    lengths = torch.tensor([70, 33], device=device)
    hidden = torch.arange(120, device=device) >= lengths[:, None]
    hidden = hidden[:, None, :, None]
    results = []
    for fill in (0.0, math.nan):
        leaves = [x.masked_fill(hidden, fill).requires_grad_() for x in tensors]
        options = {"chunk": 16, "key_lengths": lengths, "value_weight": value_weight}
        out = causal_landmark_attention(*leaves, 8, 16, backend="triton", **options)
        out.masked_fill(hidden, 0.0).square().sum().backward()
        results.append([out.masked_fill(hidden, 0.0), *(x.grad for x in leaves)])
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("value_weight", [0.0, 2.0])
def test_grouped_queries_and_modules(device, dtype, value_weight):
    query = torch.randn(1, 100, 4, 16, device=device, dtype=dtype)
    key, value = torch.randn(2, 1, 100, 2, 16, device=device, dtype=dtype).unbind()
    options = {"causal": True, "num_landmarks": 16, "local_context": 1, "value_weight": value_weight}
    modules = [create_attention("sbcluster", 100, 16, backend=name, **options) for name in ("triton", "torch")]
    out, expected = (module(query, key, value, enable_gqa=True)[0] for module in modules)
    # in half precision a key may go to another of two near clusters
    assert_close("out", expected, out, 1e-5 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("window", [0, 20])
def test_gradients_of_grouped_queries(device, dtype, window):
    query = torch.randn(2, 4, 70, 16, device=device, dtype=dtype)
    key, value = torch.randn(2, 2, 2, 70, 16, device=device, dtype=dtype).unbind()
    lengths = torch.tensor([70, 41], device=device)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    options = {"chunk": 16, "key_lengths": lengths, "backend": "triton"}
    out = causal_landmark_attention(*leaves, 8, window, enable_gqa=True, **options)
    expected = causal_landmark_attention(
        query, *(x.repeat_interleave(2, 1) for x in (key, value)), 8, window, **options
    )
    assert torch.equal(out, expected)
    cotangent = torch.randn_like(out)
    for one, other in zip(*(torch.autograd.grad(x, leaves, cotangent) for x in (expected, out)), strict=True):
        assert_close("gradient", one, other, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("size", [1e-15, 3e3])
def test_the_largest_value_weight_loses_no_key(device, dtype, size):
    query, key, value = draw(device, dtype, 150)
    value = size * value
    clusters = find_clusters(query, key, value, 8, 0, 16, scale=0.25, num_steps=1, value_weight=1e6)
    expected = causal_clusters(key, 8, 0, 16, value=value, value_weight=1e6)
    assert torch.equal(clusters < 0, expected < 0)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_later_calls_have_their_own_value_weight(device, dtype):
    tensors = draw(device, dtype, 150)
    weights = (0.0, 2.0, 4.0)
    expected = [landmark_attention(*tensors, 16, is_causal=True, value_weight=x, backend="torch") for x in weights]
    for _ in range(2):
        for value_weight, out in zip(weights, expected, strict=True):
            result = landmark_attention(*tensors, 16, is_causal=True, value_weight=value_weight, backend="triton")
            assert_close("out", out, result, 1e-5 if dtype == torch.float32 else 5e-2)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_runs_are_the_same_bit_by_bit(device, dtype):
    tensors = [x.requires_grad_() for x in draw(device, dtype, 150)]
    results = []
    for _ in range(2):
        out = causal_landmark_attention(*tensors, 8, 16, chunk=16, backend="triton")
        results.append([out, *torch.autograd.grad(out.sum(), tensors)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@needs_interpreter
def test_what_the_kernels_do_not_take():
    query, key, value = draw("cpu", torch.float32)
    for sizes, options, reason in (
        ((query, value, 12, 64), {}, "num_landmarks of 1, 2, 4, 8, 16, 32 or 64, and this is 12"),
        ((query, value, 8, 48), {}, "chunk of 16, 32, 64 or 128, and this is 48"),
        ((query, value, 8, 64), {"dropout_p": 0.1}, "no dropout"),
        ((query, value, 8, 64), {"needs_gradient_of_lse": True}, "no gradient"),
        ((query.double(), value, 8, 64), {}, "float64"),
        ((torch.empty(1, 1, 8, 144), value, 8, 64), {}, "up to 128"),
    ):
        assert reason in unsupported(*sizes, **options)
    assert unsupported(query, value, 8, 64) is None
    with pytest.raises(UserError, match="num_landmarks of 1"):
        causal_landmark_attention(query, key, value, 12, backend="triton")


@pytest.mark.parametrize(("device", "dtype"), DEVICES[:2])
@pytest.mark.parametrize("has_lengths", [False, True])
def test_operator_follows_the_rules_of_torch_library(device, dtype, has_lengths):
    tensors = [x.requires_grad_() for x in draw(device, dtype, 40)]
    lengths = torch.tensor([33], device=device) if has_lengths else None
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (*tensors, lengths, 8, 3, 16, 0.25, 16, 1, 0.5, True)
    torch.library.opcheck(operator.fused_causal_landmark_attention, arguments, test_utils=tests)


@needs_interpreter
@pytest.mark.parametrize("width", [16, 20])
def test_is_traced_as_one_graph(width):
    tensors = [x.requires_grad_() for x in draw("cpu", torch.float32, 40, width=width)]

    def run(*tensors):
        return causal_landmark_attention(*tensors, 8, 3, chunk=16, backend="triton")

    out = torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors)
    expected = run(*tensors)
    assert torch.equal(out, expected)
    grads = [torch.autograd.grad(x, tensors, torch.ones_like(x)) for x in (out, expected)]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_landmarks", [8, 16, 32, 64])
def test_real_sizes(dtype, num_landmarks):
    compare(draw("cuda", dtype, 3136, width=64), num_landmarks, 1, 64)
    compare(draw("cuda", dtype, 1000, 1200, 64, 128), num_landmarks, 200, 64)
    compare(draw("cuda", dtype, 777, 777, 40), num_landmarks, 128, 64, torch.tensor([500], device="cuda"))
    compare(draw("cuda", dtype, 1000, 1200, 64), num_landmarks, 1, 64, value_weight=4.0)


@pytest.mark.gpu
def test_auto_takes_the_kernels_on_cuda():
    options = {"causal": True, "local_context": 1, "num_landmarks": 32}
    tensors = [x.transpose(1, 2) for x in draw("cuda", torch.bfloat16, 256, width=64)]
    modules = [create_attention("sbcluster", 256, 64, backend=name, **options) for name in ("auto", "triton")]
    out, expected = (module(*tensors)[0] for module in modules)
    assert torch.equal(out, expected)
