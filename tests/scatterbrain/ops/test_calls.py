"""Calls that are like one that has been checked: what they skip, what they still refuse, and what makes them differ."""

from __future__ import annotations

import math

import pytest
import torch

from scatterbrain.attention import create_attention
from scatterbrain.attention.sblocal import SBLocalAttention
from scatterbrain.errors import UserError
from scatterbrain.ops import adaptive, clusters, scatterbrain
from scatterbrain.ops.adaptive import adaptive_attention, plan_adaptive_attention
from scatterbrain.ops.adaptive.triton.tiles import ExactTiles
from scatterbrain.ops.adaptive.triton.tiles import use_tiles as use_exact_tiles
from scatterbrain.ops.clusters import landmark_attention
from scatterbrain.ops.clusters.triton.tiles import LandmarkTiles
from scatterbrain.ops.clusters.triton.tiles import use_tiles as use_landmark_tiles
from scatterbrain.ops.common import calls
from scatterbrain.ops.common.backends import is_interpreted
from scatterbrain.ops.scatterbrain import scatterbrain_attention
from scatterbrain.ops.scatterbrain.triton.tiles import Tiles, use_tiles
from tests.helpers import draw_inputs

triton = pytest.importorskip("triton")
passes = pytest.importorskip("scatterbrain.ops.common.passes")

from scatterbrain.ops.adaptive.triton import tables  # noqa: E402 - imports triton
from scatterbrain.ops.adaptive.triton.operator import fused_adaptive_attention, run_statistics  # noqa: E402
from scatterbrain.ops.clusters.triton.operator import fused_landmark_attention  # noqa: E402
from scatterbrain.ops.scatterbrain.triton.operator import fused_attention  # noqa: E402

needs_interpreter = pytest.mark.skipif(
    not is_interpreted() or triton.__version__.startswith("3.2."),
    reason="the kernels are compiled for the GPU here, or Triton's interpreter is too old for them",
)
DEVICES = [pytest.param("cpu", marks=needs_interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
NAMES = ("sblocal", "sbcluster", "sbadaptive")
LENGTH, WIDTH = 14, 16


@pytest.fixture(autouse=True)
def _no_earlier_calls(monkeypatch):
    monkeypatch.setattr(calls, "CALLS", calls.Cache())
    for module in (scatterbrain.triton, clusters.triton, clusters.causal.triton, adaptive.triton):
        monkeypatch.setattr(module, "CALLS", calls.CALLS)


class Workload:
    """Calls of one operator, or of the module of it, on tensors that require gradients."""

    def __init__(self, name: str, device: str, is_module: bool) -> None:
        self.name, self.is_module = name, is_module
        query, key, value, rows = draw_inputs(2, 2, LENGTH, width=WIDTH, rows=2)
        self.heads_first = [x.to(device, torch.float32) for x in (query, key, value)]
        self.rows = rows.to(device, torch.float32)
        self.causal = {"is_causal": True} if name == "causal" else {}
        name, options = ("sbcluster", {"causal": True}) if name == "causal" else (name, {})
        if name == "sbadaptive":
            options = {"num_landmarks": 4, "num_query_landmarks": 3, "density": 0.4}
        options |= {"memory_fraction": 0.4, "backend": "triton"}
        self.module = create_attention(name, LENGTH, WIDTH, **options).to(device).eval()

    def tensors(self) -> list[torch.Tensor]:
        """Queries, keys and values in the order of dimensions that a call takes."""
        order = (0, 2, 1, 3) if self.is_module else (0, 1, 2, 3)
        return [x.permute(order).clone(memory_format=torch.contiguous_format) for x in self.heads_first]

    def leaves(self) -> list[torch.Tensor]:
        """The same for autograd."""
        return [x.requires_grad_() for x in self.tensors()]

    def __call__(self, *tensors: torch.Tensor, **options) -> torch.Tensor:
        if self.is_module:
            return self.module(*tensors, **options)[0]
        options = {"backend": "triton"} | options
        if self.name == "sblocal":
            return scatterbrain_attention(*tensors, options.pop("rows", self.rows), options.pop("window", 4), **options)
        sizes = options.pop("num_landmarks", 4), options.pop("window", 4)
        if self.name == "sbadaptive":
            own = options.pop("num_query_landmarks", 3), options.pop("density", 0.4)
            return adaptive_attention(*tensors, sizes[0], *own, sizes[1], **options)
        return landmark_attention(*tensors, *sizes, **self.causal, **options)

    def both(self, **options) -> list[torch.Tensor]:
        """Output and gradients."""
        leaves = self.leaves()
        out = self(*leaves, **options)
        cotangent = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


@pytest.fixture
def count_checks(monkeypatch):
    """Counts calls of the operators' checks."""
    counted = []
    for module in (scatterbrain, clusters.landmark, clusters.causal.attention, adaptive.attention):
        monkeypatch.setattr(module, "check_dropout", counted.append)
    return counted


both_kinds = pytest.mark.parametrize("is_module", [False, True], ids=["operator", "module"])
each_operator = pytest.mark.parametrize("name", NAMES)
each_kernel = pytest.mark.parametrize("name", [*NAMES, "causal"])
# some operators called as such, the others as a module
each_way = pytest.mark.parametrize(
    ("name", "is_module"),
    [("sblocal", False), ("sbcluster", True), ("sbadaptive", False)],
    ids=["operator-sblocal", "module-sbcluster", "operator-sbadaptive"],
)
each_device = pytest.mark.parametrize("device", DEVICES)


@each_device
@each_kernel
@both_kinds
def test_calls_that_are_alike_are_checked_once_and_give_the_same(name, device, is_module, count_checks):
    workload = Workload(name, device, is_module)
    # of a call with gradients, and of one without
    for count, run in enumerate((workload.both, lambda: [workload(*workload.tensors())]), 1):
        first = run()
        assert len(calls.CALLS) == count
        for _ in range(2):
            for one, other in zip(first, run(), strict=True):
                assert torch.equal(one, other)
                assert one.stride() == other.stride()
        assert len(count_checks) == count


@each_device
@each_operator
def test_modules_and_operators_know_the_calls_of_each_other(name, device, count_checks):
    workload = Workload(name, device, True)
    first = workload.both()
    workload.is_module = False
    module = workload.module
    sizes = {"window": module.local_context}
    sizes |= {"rows": module.projection_matrix} if name == "sblocal" else {"num_landmarks": module.num_landmarks}
    if name == "sbadaptive":
        sizes |= {"num_query_landmarks": module.num_query_landmarks, "density": module.density}
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in workload.heads_first]
    leaves = [x.requires_grad_() for x in tensors]
    out = workload(*leaves, **sizes)
    assert len(count_checks) == 1
    assert torch.equal(out, first[0].transpose(1, 2))


@each_device
def test_calls_that_take_no_cluster_are_those_of_landmarks(device, count_checks):
    workload = Workload("sbadaptive", device, False)
    first = workload.both(density=0)
    assert all(map(torch.equal, workload.both(density=0), first))
    assert len(count_checks) == 1
    workload.name = "sbcluster"
    assert all(map(torch.equal, workload.both(), first))


@each_device
def test_calls_of_passes_that_are_no_longer_known_are_checked_again(device, count_checks, monkeypatch):
    monkeypatch.setattr(passes, "PASSES", passes.Cache())
    workload = Workload("sbadaptive", device, False)
    first = workload.both()
    keys = list(passes.PASSES)
    assert len(keys) == 3  # of the plan, of the attention, and of the gradients
    for count, key in enumerate(keys[:2], 2):
        del passes.PASSES[key]
        assert all(map(torch.equal, workload.both(), first))
        assert len(count_checks) == count
    del passes.PASSES[keys[2]]
    assert all(map(torch.equal, workload.both(), first))
    assert len(count_checks) == 3


def bad_calls(workload: Workload) -> list[tuple[str, list, dict]]:
    """Arguments like those of a good call, but for one, and what the message names."""
    query, key, value = workload.tensors()
    calls_ = [
        ("key is torch.float64", [query, key.double(), value], {}),
        ("value is torch.float32 on meta", [query, key, value.to("meta")], {}),
        ("query has to be a tensor", [query.cpu().numpy(), key, value], {}),
        ("query has to be a floating-point", [query.long(), key, value], {}),
        ("key_lengths has to be integers", [query, key, value], {"key_lengths": torch.ones(2)}),
        ("key_lengths has to be integers of shape", [query, key, value], {"key_lengths": torch.ones(3).long()}),
        ("enable_gqa=0", [query, key, value], {"enable_gqa": 0}),
    ]
    if workload.name != "sbadaptive":
        calls_.append(("attn_mask has to be boolean", [query, key, value], {"attn_mask": torch.ones(2, LENGTH)}))
    elif workload.is_module:
        calls_.append(("takes no attn_mask", [query, key, value], {"attn_mask": torch.ones(2, LENGTH).bool()}))
    if not workload.is_module:
        calls_ += [
            ("window=4.0", [query, key, value], {"window": 4.0}),
            ("window=True", [query, key, value], {"window": True}),
            ("window=", [query, key, value], {"window": [4]}),
            ("dropout False", [query, key, value], {"dropout_p": False}),
            ("scale=nan", [query, key, value], {"scale": math.nan}),
            ("scale has no gradient", [query, key, value], {"scale": torch.tensor(1.0, requires_grad=True)}),
        ]
    if workload.name == "sblocal" and not workload.is_module:
        calls_ += [
            ("is_causal=0", [query, key, value], {"is_causal": 0}),
            ("projection has to be", [query, key, value], {"rows": workload.rows[:, :8]}),
            ("no gradient for the projection", [query, key, value], {"rows": workload.rows.clone().requires_grad_()}),
        ]
    elif workload.name == "sbcluster" and not workload.is_module:
        calls_ += [
            ("num_steps=1.0", [query, key, value], {"num_steps": 1.0}),
            ("num_clusters=True", [query, key, value], {"num_landmarks": True}),
        ]
    elif not workload.is_module:
        calls_ += [
            ("is_causal=0", [query, key, value], {"is_causal": 0}),
            ("cannot be causal", [query, key, value], {"is_causal": True}),
            ("num_steps=1.0", [query, key, value], {"num_steps": 1.0}),
            ("num_landmarks=True", [query, key, value], {"num_landmarks": True}),
            ("num_query_landmarks=True", [query, key, value], {"num_query_landmarks": True}),
            ("density=True", [query, key, value], {"density": True}),
            ("tolerance=1", [query, key, value], {"tolerance": 1}),
            ("query_lengths has to be integers", [query, key, value], {"query_lengths": torch.ones(2)}),
            ("plan has to be", [query, key, value], {"plan": 1}),
        ]
    return calls_


@each_device
@each_operator
@both_kinds
def test_bad_input_after_a_good_call_is_refused(name, device, is_module):
    workload = Workload(name, device, is_module)
    options = [{}] if is_module else [{}, {"window": 1}]
    if not is_module and name != "sblocal":
        options.append({"num_landmarks": 1})
    if not is_module and name == "sbadaptive":
        options += [{"num_query_landmarks": 1}, {"density": 1}]
    for good in options:
        for _ in range(2):
            workload(*workload.tensors(), **good)
    for message, tensors, bad in bad_calls(workload):
        with pytest.raises(UserError, match=message):
            workload(*tensors, **bad)


@each_device
@each_operator
def test_changed_options_are_seen(name, device):
    workload = Workload(name, device, False)
    tiles = use_tiles(Tiles(sum_rows=32, query_rows=16, dq_rows=32))
    if name == "sbcluster":
        tiles = use_landmark_tiles(LandmarkTiles(query_rows=16))
    own = {"rows": workload.rows.roll(1, 1)} if name == "sblocal" else {"num_steps": 0}
    variants = [{}, {"window": 6}, {"scale": 0.7}, {"scale": 1}, {"backend": "torch"}, own]
    variants.append({"key_lengths": torch.tensor([LENGTH, 7], device=device)})
    if name == "sbadaptive":
        tiles = use_exact_tiles(ExactTiles(32, 16, 4, 1, 32, 16, 4, 1, 32, 16, 4, 1))
        lengths = torch.tensor([LENGTH, 7], device=device)
        plan = plan_adaptive_attention(*workload.heads_first, 5, 2, 0.3)
        variants += [{"density": 1}, {"num_query_landmarks": 2}, {"tolerance": 0.3}]
        variants += [{"value_weight": 0.5}, {"query_lengths": lengths}, {"plan": plan}]
    expected = []
    for options in variants:
        calls.CALLS.clear()
        expected.append(workload.both(**options))
    calls.CALLS.clear()
    for _ in range(2):
        for options, results in zip(variants, expected, strict=True):
            # gradients in plain PyTorch are added up by atomics on CUDA, in any order
            close = 1e-6 if options.get("backend") == "torch" and device == "cuda" else 0
            torch.testing.assert_close(workload.both(**options), results, atol=close, rtol=close)
    known = len(calls.CALLS)
    with tiles:
        workload.both()
    assert len(calls.CALLS) == known + 1
    # a tensor may change its value
    scale = torch.tensor(0.7)
    workload.both(scale=scale)
    scale.fill_(1.0)
    assert torch.equal(workload.both(scale=scale)[0], expected[3][0])


@each_device
@each_way
def test_gradients_of_calls_with_other_gradients_and_saved_tensors(name, device, is_module):
    workload = Workload(name, device, is_module)
    expected = workload.both()[1:]
    for gradient in ("expanded", "strided", "offset"):
        leaves = workload.leaves()
        out = workload(*leaves)
        cotangent = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
        if gradient == "expanded":
            given, cotangent = torch.ones((), device=device).expand(out.shape), torch.ones_like(cotangent)
        elif gradient == "strided":
            given = cotangent.repeat_interleave(2, -1)[..., ::2]
        else:
            given = torch.cat([cotangent.flatten()[:1], cotangent.flatten()])[1:].view(out.shape)
        one = torch.autograd.grad(out, leaves, given, retain_graph=True)
        other = expected if gradient != "expanded" else torch.autograd.grad(out, leaves, cotangent)
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    # saved tensors come back with other strides
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: x.transpose(-2, -1).clone(memory_format=torch.contiguous_format) if x.dim() == 4 else x,
        lambda x: x.transpose(-2, -1).contiguous() if x.dim() == 4 else x,
    ):
        results = workload.both()
    for x, y in zip(results[1:], expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@needs_interpreter
@pytest.mark.parametrize("name", NAMES)
def test_statistics_have_no_gradient_of_zeros(name):
    """In calls through the dispatcher, such as those of compiled functions: a backward pass fills no memory."""
    query, key, value, rows = (x.float() for x in draw_inputs(1, 1, LENGTH, width=WIDTH, rows=2))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    if name == "sblocal":
        out, statistics = fused_attention(*leaves, rows, None, 4, 0.25, True, False, 0.0, True)
    elif name == "sbadaptive":
        plan = plan_adaptive_attention(query, key, value, 4, 3, 0.4)
        labels, buffer = tables.fill_tables(plan, sorts_keys=True)
        means = run_statistics(key.detach(), value.detach(), None, labels, 4)
        out, statistics = fused_adaptive_attention(*leaves, None, labels, means, buffer, 4, 3, plan.num_exact, 4, 0.25)
    else:
        out, statistics = fused_landmark_attention(*leaves, None, None, 4, 4, 0.25, 1, True)
    assert statistics.numel() > 0
    gradient = torch.ones_like(out)
    with torch.profiler.profile() as record:
        out.backward(gradient)
    assert not {"aten::zeros", "aten::zeros_like", "aten::new_zeros"} & {event.key for event in record.key_averages()}


@each_device
@each_way
def test_second_derivatives_are_refused(name, device, is_module):
    workload = Workload(name, device, is_module)
    for _ in range(2):
        leaves = workload.leaves()
        (gradient,) = torch.autograd.grad(workload(*leaves).square().sum(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@each_device
@each_way
def test_unaligned_and_strided_tensors(name, device, is_module):
    workload = Workload(name, device, is_module)
    expected = workload(*workload.tensors())
    for _ in range(2):
        shifted = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in workload.tensors()]
        strided = [torch.cat([x, x], -1)[..., : x.shape[-1]] for x in workload.tensors()]
        columns = [x.repeat_interleave(2, -1)[..., ::2] for x in workload.tensors()]
        for tensors in (shifted, strided, columns):
            torch.testing.assert_close(workload(*tensors), expected, rtol=1e-5, atol=1e-6)


@each_device
def test_a_subclass_has_its_own_operator(device):
    class Doubled(SBLocalAttention):
        def _attend(self, *tensors, **options):
            return 2 * super()._attend(*tensors, **options)

    workload = Workload("sblocal", device, True)
    module = workload.module
    expected = [workload(*workload.tensors()) for _ in range(2)][1]
    other = Doubled(module.local_context, WIDTH, 2 * len(module.projection_matrix), backend="triton").to(device)
    other.projection_matrix = module.projection_matrix
    assert torch.equal(other(*workload.tensors())[0], 2 * expected)


@each_device
def test_modules_with_centred_keys_are_not_those_without(device):
    workload = Workload("sblocal", device, True)
    for _ in range(2):
        plain = workload(*workload.tensors())
    module = create_attention("sblocal", LENGTH, WIDTH, memory_fraction=0.4, backend="triton", centre="keys").to(device)
    torch.testing.assert_close(module.projection_matrix, workload.module.projection_matrix)
    assert not torch.allclose(module(*workload.tensors())[0], plain)


def test_keys_hold_what_kernels_are_specialised_on():
    x = torch.zeros(40)
    variants = (x, x[1:33], x[:32], x[:32].view(4, 8), x[:32].view(4, 8).t(), x[:32].long(), x[:32].to("meta"), None)
    keys = [calls.call_key(variant) for variant in variants]
    assert len(set(keys)) == len(keys)
    assert calls.call_key(x[16:24], x) == calls.call_key(x[:8], torch.zeros(40))
    y = torch.zeros(2, 3, 4, 5)
    assert calls.call_key(y, x, None, tokens_first=True) == calls.call_key(y.transpose(1, 2), x, None)


def test_caches_are_bounded():
    cache = calls.Cache(2)
    for key in range(5):
        cache[key] = key
    assert dict(cache) == {4: 4}
