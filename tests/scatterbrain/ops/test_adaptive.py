"""Adaptive attention against its specification, its special cases, the choice of clusters, and refused arguments."""

from __future__ import annotations

import math

import pytest
import torch

from scatterbrain.errors import UserError
from scatterbrain.ops.adaptive import (
    adaptive_attention,
    exact_pairs,
    naive_adaptive_attention,
    plan_adaptive_attention,
)
from scatterbrain.ops.adaptive import attention as implementation
from scatterbrain.ops.adaptive.plan import AdaptivePlan
from scatterbrain.ops.clusters import assign_key_clusters, landmark_attention, naive_landmark_attention
from scatterbrain.ops.common.inputs import length_mask
from tests.helpers import TensorRecorder, assert_close, dense_attention, draw_inputs

# float64 against float64: sums of up to 300 terms, exponentials of logits up to 80
DOUBLE = 1e-11
# float32 against float64: rounding 6e-8 of logits up to 10, once more for the gradients
SINGLE_OUTPUT = 2e-6
SINGLE_GRADIENT = 1e-5

SHAPES = [  # T, S, E, D, M, Q, key lengths
    (50, 50, 16, 16, 7, 4, None),
    (1, 1, 1, 1, 1, 1, None),
    (37, 37, 5, 3, 4, 3, (37, 5)),
    (50, 97, 16, 8, 9, 1, (97, 0)),
    (97, 50, 16, 8, 9, 12, (1, 49)),
    (200, 30, 4, 4, 5, 7, (30, 3)),
    (3, 300, 4, 4, 25, 5, None),
    (300, 3, 4, 4, 5, 3, (2, 3)),
    (150, 150, 144, 8, 30, 9, (150, 90)),
    (20, 9, 4, 4, 12, 30, None),
]


def lengths_of(lengths):
    return None if lengths is None else torch.tensor(lengths)


def adaptive_pair(sizes, window, lengths, plan):
    """`adaptive_attention` and its specification with one plan, as functions of query, key and value."""

    def fast(query, key, value):
        return adaptive_attention(query, key, value, *sizes, window, key_lengths=lengths, plan=plan)

    def naive(query, key, value):
        scale = query.shape[-1] ** -0.5
        return naive_adaptive_attention(query, key, value, *plan[:3], window, scale, lengths)[0]

    return fast, naive


def differentiate(function, tensors, cotangent):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    out.backward(cotangent.to(out.dtype))
    return {"out": out.detach()} | {name: x.grad for name, x in zip("qkv", leaves, strict=True)}


def compare(pair, tensors, ratio_out, ratio_grad, dtype):
    fast, naive = pair
    cotangent = torch.randn(*tensors[0].shape[:3], tensors[2].shape[3])
    expected = differentiate(naive, tensors, cotangent)
    result = differentiate(fast, [x.to(dtype) for x in tensors], cotangent)
    for name, reference in expected.items():
        assert result[name].dtype == dtype
        assert_close(name, reference, result[name], ratio_out if name == "out" else ratio_grad)


@pytest.mark.parametrize("synchronise", [True, False])
@pytest.mark.parametrize("density", [0.0, 0.08, 0.4, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_match_the_specification(shape, density, synchronise, monkeypatch):
    monkeypatch.setattr(implementation, "_may_synchronise", lambda _: synchronise)
    length, num_keys, width, value_width, *sizes, lengths = shape
    lengths = lengths_of(lengths)
    *tensors, _ = draw_inputs(2, 2, length, num_keys, width, value_width, dtype=torch.float32)
    tensors = [x.double() for x in tensors]
    sizes = (*sizes, density)
    plan = plan_adaptive_attention(*tensors, *sizes, key_lengths=lengths)
    for window in (0, 1, 8, 131):
        pair = adaptive_pair(sizes, window, lengths, plan)
        compare(pair, tensors, DOUBLE, DOUBLE, torch.float64)
        compare(pair, tensors, SINGLE_OUTPUT, SINGLE_GRADIENT, torch.float32)


@pytest.mark.parametrize("max_logit", [50, 80, 400])
def test_extreme_logits(max_logit):
    lengths = torch.tensor([130, 70])
    *tensors, _ = draw_inputs(2, 2, 130, 130, dtype=torch.float32, max_logit=max_logit)
    tensors = [x.double() for x in tensors]
    for density in (0.1, 0.3):
        plan = plan_adaptive_attention(*tensors, 19, 5, density, key_lengths=lengths)
        for window in (0, 7):
            pair = adaptive_pair((19, 5, density), window, lengths, plan)
            # float32 rounds a logit of 80 by 4e-6, and gradients hold differences of weights times keys of the size 30
            compare(pair, tensors, DOUBLE, 10 * DOUBLE, torch.float64)
            compare(pair, tensors, max_logit * 1e-6, max_logit * 1e-5, torch.float32)


def test_a_landmark_far_above_all_keys_of_its_window_leaves_no_nan():
    # as of landmark attention; most query clusters take few of the key clusters
    query, key, value = (torch.randn(2, 2, 140, 16) for _ in range(3))
    key = key[:, :, ::7].repeat_interleave(7, 2)
    tensors = [x.requires_grad_() for x in (1e5 * query, 1e5 * key, value)]
    out = adaptive_attention(*tensors, 20, 6, 0.1, 40, backend="torch")
    assert out.isfinite().all()
    assert out.abs().max() <= value.abs().max()
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_have_float32_sums(dtype):
    lengths = torch.tensor([130, 0])
    *tensors, _ = draw_inputs(2, 2, 130, dtype=dtype, max_logit=20)
    plan = plan_adaptive_attention(*tensors, 19, 5, 0.2, key_lengths=lengths)
    fast, naive = adaptive_pair((19, 5, 0.2), 7, lengths, plan)
    out = fast(*tensors)
    assert out.dtype == dtype
    # what remains is the rounding of the output
    assert_close("out", naive(*tensors), out, torch.finfo(dtype).eps)


@pytest.mark.parametrize("lengths", [None, (60, 22)])
@pytest.mark.parametrize("window", [0, 1, 9])
def test_without_a_support_it_is_landmark_attention(window, lengths):
    query, key, value, _ = draw_inputs(2, 2, 50, 60, dtype=torch.float32)
    options = {"key_lengths": lengths_of(lengths), "scale": 0.3}
    out = adaptive_attention(query, key, value, 7, 4, 0.0, window, **options)
    assert torch.equal(out, landmark_attention(query, key, value, 7, window, **options))
    # a support that no cluster fits, by the tiles
    out = adaptive_attention(query, key, value, 7, 4, 1 / 60, window, **options)
    assert_close("out", landmark_attention(query, key, value, 7, window, **options), out, SINGLE_OUTPUT)
    clusters = assign_key_clusters(key, value, 7, 1, options["key_lengths"], 0.0)
    expected, _ = naive_landmark_attention(query, key, value, clusters, window, 0.3, options["key_lengths"])
    naive = adaptive_attention(query, key, value, 7, 4, 0.0, window, backend="naive", **options)
    assert_close("naive", expected, naive, SINGLE_OUTPUT)


@pytest.mark.parametrize("lengths", [None, (60, 22), (0, 1)])
@pytest.mark.parametrize("window", [0, 9])
def test_with_every_cluster_it_is_full_attention(window, lengths):
    query, key, value, _ = draw_inputs(2, 2, 50, 60, dtype=torch.float32)
    lengths = lengths_of(lengths)
    visible = torch.ones(1, dtype=torch.bool) if lengths is None else length_mask(lengths, 60)[:, None, None]
    expected, _ = dense_attention(0.25 * query.double() @ key.double().mT, visible, value)
    for backend in ("torch", "naive"):
        out = adaptive_attention(query, key, value, 7, 4, 1.0, window, key_lengths=lengths, backend=backend)
        assert_close("out", expected, out, SINGLE_OUTPUT)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_exact_where_every_cluster_is_one_key_or_its_copies(window, shift):
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value, _ = draw_inputs(2, 2, 33, 21, dtype=torch.float32)
        query, key, value = query.to(dtype), (key + shift).to(dtype), value.to(dtype)
        copies = key[:, :, torch.arange(21) // 7]
        one = key[:, :, :1]
        for keys, num_landmarks, lengths in (
            (key, 21, None),
            (key, 300, (8, 0)),
            (one.expand_as(key), 4, (21, 3)),
            (copies, 7, None),
        ):
            lengths = lengths_of(lengths)
            visible = torch.ones(1, dtype=torch.bool) if lengths is None else length_mask(lengths, 21)[:, None, None]
            expected, _ = dense_attention(0.25 * query.double() @ keys.double().mT, visible, value)
            out = adaptive_attention(query, keys, value, num_landmarks, 5, 0.2, window, key_lengths=lengths)
            assert_close("out", expected, out, 3e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
        expected, _ = dense_attention(0.25 * query.double() @ one.double().mT, torch.tensor(True), value[:, :, :1])
        out = adaptive_attention(query, one, value[:, :, :1], 6, 5, 0.5, window)
        assert_close("one key", expected, out, torch.finfo(dtype).eps)


def test_gradcheck():
    # labels and supports are constants: far from a change of them, finite differences agree
    tensors = [x.requires_grad_() for x in draw_inputs(2, 1, 6, 7, 3, 2)[:3]]
    lengths = torch.tensor([7, 4])
    plan = plan_adaptive_attention(*tensors, 4, 2, 0.4, key_lengths=lengths)
    assert plan.taken.any()
    fast, _ = adaptive_pair((4, 2, 0.4), 3, lengths, plan)
    assert torch.autograd.gradcheck(fast, tensors)


def test_merged_sums_are_those_of_both_parts():
    logits, value = torch.randn(2, 5, 12, dtype=torch.float64) * 300, torch.randn(2, 12, 3, dtype=torch.float64)

    def sums(some, values):
        if some.shape[2] == 0:
            zero = values.new_zeros(2, 5, 1)
            return zero.expand(-1, -1, 3), zero, zero - 1e30
        maximum = some.amax(2, keepdim=True)
        weights = (some - maximum).exp()
        return weights @ values, weights.sum(2, keepdim=True), maximum

    for cut in (0, 5, 12):
        parts = sums(logits[..., :cut], value[:, :cut]), sums(logits[..., cut:], value[:, cut:])
        total, normaliser, _ = implementation.merge_sums(*parts)
        assert_close("merged", logits.softmax(2) @ value, total / normaliser, DOUBLE)


def test_the_share_holds_for_every_query_cluster():
    torch.manual_seed(0)
    query, key, value, _ = draw_inputs(2, 3, 300, 300, dtype=torch.float32, max_logit=12)
    key[:, :, :150] = key[:, :, :1] + 0.01 * key[:, :, :150]  # a cluster of half the keys
    lengths = torch.tensor([300, 210])
    for density in (0.02, 0.08, 0.3, 0.7):
        plan = plan_adaptive_attention(query, key, value, 24, 6, density, key_lengths=lengths)
        sizes = torch.nn.functional.one_hot(plan.key_assignment + 1, 25).sum(2)[..., 1:]
        exact = (plan.taken * sizes.unsqueeze(2)).sum(3)
        room = (density * lengths.double() + 1e-6).long().view(2, 1, 1)
        assert (exact <= room).all()
        assert exact.max() <= plan.num_exact
        # no cluster that would fit is left, unless rounds end first
        smallest = sizes.unsqueeze(2).masked_fill(plan.taken | (sizes == 0).unsqueeze(2), 10**6).amin(3)
        assert (exact + smallest > room).float().mean() > 0.7
        pairs = exact_pairs(plan.key_assignment, plan.query_assignment, plan.taken, 0).float()
        share = pairs.sum((2, 3)) / 300 / lengths.unsqueeze(1)
        assert_close("density", share, plan.density(), 1e-6)


def test_chosen_clusters_err_less_than_others():
    # queries and keys in lumps, so that each query cluster has keys of its own
    torch.manual_seed(1)
    query, key, value, _ = draw_inputs(1, 4, 300, 300)
    lumps = 3 * torch.randn(6, 16, dtype=query.dtype)
    query, key = (x + lumps[torch.randint(6, x.shape[:3])] for x in (query, key))
    full, _ = dense_attention(0.25 * query @ key.mT, torch.ones(1, dtype=torch.bool), value)

    def error(plan):
        return ((adaptive_attention(query, key, value, 24, 6, 0.2, plan=plan) - full).norm() / full.norm()).item()

    plan = plan_adaptive_attention(query, key, value, 24, 6, 0.2)
    none = error(plan._replace(taken=torch.zeros_like(plan.taken)))
    # the same clusters, for the wrong queries
    rolled = error(plan._replace(taken=plan.taken.roll(1, 2)))
    assert error(plan) < 0.8 * rolled
    assert error(plan) < 0.7 * none


def test_tolerance_bounds_the_support():
    torch.manual_seed(1)
    query, key, value, _ = draw_inputs(2, 2, 300, 300, max_logit=12)
    full, _ = dense_attention(0.25 * query @ key.mT, torch.ones(1, dtype=torch.bool), value)
    shares, errors = [], []
    for tolerance in (0.0, 0.05, 0.2, 0.5, 0.99):
        options = {"tolerance": tolerance}
        plan = plan_adaptive_attention(query, key, value, 60, 6, 1.0, **options)
        shares.append(plan.density().mean().item())
        out = adaptive_attention(query, key, value, 60, 6, 1.0, **options)
        assert torch.equal(out, adaptive_attention(query, key, value, 60, 6, 1.0, plan=plan))
        errors.append(((out - full).norm() / full.norm()).item())
    assert shares == sorted(shares, reverse=True)
    assert errors == sorted(errors)
    assert shares[0] == 1
    assert errors[0] < 1e-12
    assert 0.02 < shares[2] < 0.9
    bounded = plan_adaptive_attention(query, key, value, 60, 6, 0.1, tolerance=0.05)
    assert bounded.density().max() <= 0.1


def test_a_plan_can_be_reused():
    query, key, value, _ = draw_inputs(2, 2, 50, 60, dtype=torch.float32)
    lengths = torch.tensor([60, 23])
    sizes, options = (9, 4, 0.2), {"key_lengths": lengths, "scale": 0.3}
    settings = {"num_steps": 3, "value_weight": 0.7, "query_lengths": torch.tensor([50, 31])}
    plan = plan_adaptive_attention(query, key, value, *sizes, **options, **settings)
    expected = adaptive_attention(query, key, value, *sizes, 5, **options, **settings)
    assert torch.equal(expected, adaptive_attention(query, key, value, 2, 2, 0.9, 5, plan=plan, **options))
    assert not torch.equal(expected, adaptive_attention(query, key, value, *sizes, 5, **options))
    # what is hidden is in no cluster
    labels = plan.key_assignment.masked_fill(plan.key_assignment < 0, 10**6)
    other = plan._replace(key_assignment=labels)
    assert torch.equal(expected, adaptive_attention(query, key, value, *sizes, 5, plan=other, **options))
    # any plan, of more clusters than keys
    taken = torch.rand(2, 2, 70, 100) < 0.3
    other = AdaptivePlan(torch.randint(100, (2, 2, 60)), torch.randint(70, (2, 2, 50)), taken, 60)
    naive, out = (
        adaptive_attention(query, key, value, *sizes, 5, plan=other, backend=backend, **options)
        for backend in ("naive", "torch")
    )
    assert_close("out", naive, out, SINGLE_OUTPUT)


def test_plans_that_do_not_fit_are_refused():
    query, key, value, _ = draw_inputs(2, 2, 8, 20)
    plan = plan_adaptive_attention(query, key, value, 8, 3, 0.5)
    keys, queries, taken, _ = plan
    for wrong, match in (
        (tuple(plan), "result of plan_adaptive_attention"),
        (plan._replace(key_assignment=keys[:, :, 1:]), r"key_assignment.*int64 of shape \(2, 2, 20\)"),
        (plan._replace(query_assignment=queries.int()), "query_assignment.*got torch.int32"),
        (plan._replace(taken=taken.int()), "taken.*torch.bool"),
        (plan._replace(taken=taken[0]), "taken"),
        (plan._replace(taken=taken[:, :, :1]), r"query_assignment of the plan has the cluster .*\[0, 1\)"),
        (plan._replace(key_assignment=keys.masked_fill(keys == 2, -1)), "cluster -1"),
        (plan._replace(num_exact=1), "num_exact=1 of the plan is below"),
        (plan._replace(num_exact=12.5), "num_exact=12.5 of the plan has to be a whole number"),
        (plan._replace(num_exact=None), "num_exact=None of the plan has to be a whole number"),
    ):
        with pytest.raises(UserError, match=match):
            adaptive_attention(query, key, value, 8, 3, 0.5, plan=wrong)
    # clusters of fewer keys
    plan = plan_adaptive_attention(query, key, value, 8, 3, 0.5, key_lengths=torch.tensor([20, 10]))
    with pytest.raises(UserError, match="same key_lengths"):
        adaptive_attention(query, key, value, 8, 3, 0.5, plan=plan)


def test_options_have_an_effect_and_dropout_keeps_the_mean():
    query, key, value, _ = draw_inputs(2, 2, 50, 60, dtype=torch.float32)

    def function(**options):
        return adaptive_attention(query, key, value, 12, 4, 0.2, 5, **options)

    for option in ({"num_steps": 0}, {"value_weight": 2.0}, {"scale": 0.7}, {"key_lengths": torch.tensor([50, 9])}):
        assert (function() - function(**option)).abs().max() > 1e-3, option
    assert (function() - function(tolerance=0.9)).abs().max() > 1e-3
    assert (function() - function(query_lengths=torch.tensor([50, 20]))).abs().max() > 1e-3
    torch.manual_seed(0)
    dropped = torch.stack([function(dropout_p=0.3) for _ in range(400)])
    assert (dropped[0] - function()).abs().max() > 1e-3
    # 400 samples: 1 / 20 of the standard deviation of one
    assert_close("mean under dropout", function(), dropped.mean(0), 0.1)


@pytest.mark.parametrize("synchronise", [True, False])
def test_slices_and_the_tiles_of_other_devices_change_nothing(synchronise, monkeypatch):
    monkeypatch.setattr(implementation, "_may_synchronise", lambda _: synchronise)
    *tensors, _ = draw_inputs(2, 2, 130, 150, dtype=torch.float32)
    lengths = torch.tensor([150, 70])
    plan = plan_adaptive_attention(*tensors, 19, 5, 0.2, key_lengths=lengths)
    monkeypatch.setattr(implementation, "tile_budget", lambda _: 1 << 10)
    pair = adaptive_pair((19, 5, 0.2), 7, lengths, plan)
    compare(pair, [x.double() for x in tensors], SINGLE_OUTPUT, SINGLE_GRADIENT, torch.float32)


@pytest.mark.parametrize("backward", [False, True])
def test_memory_is_linear_at_lists_of_fixed_length(backward):
    totals, largest = [], []
    for length in (4096, 8192):
        *tensors, _ = draw_inputs(1, 1, length, width=32, dtype=torch.float32)
        leaves = [x.requires_grad_() for x in tensors]
        sizes = (256, 24, 256 / length, 32)
        recorder = TensorRecorder()
        if backward:
            out = adaptive_attention(*leaves, *sizes)
            with recorder:
                out.backward(torch.ones_like(out))
        else:
            with recorder:
                adaptive_attention(*leaves, *sizes)
        totals.append(recorder.total)
        largest.append(recorder.largest)
    assert totals[1] < 2.2 * totals[0]
    # neither keys by landmarks nor keys by queries
    assert largest[1] < 8192 * 256 / 2


def test_errors_name_what_is_wrong():
    query, key, value, _ = draw_inputs(length=20)
    with pytest.raises(UserError, match="cannot be causal"):
        adaptive_attention(query, key, value, 4, 4, 0.1, is_causal=True)
    for option, match in (
        ({"density": 1.5}, "density=1.5"),
        ({"density": math.nan}, "density=nan"),
        ({"tolerance": -0.1}, "tolerance=-0.1"),
        ({"window": -1}, "window=-1"),
        ({"num_steps": -1}, "num_steps=-1"),
        ({"value_weight": -1.0}, "value_weight=-1"),
        ({"scale": 0.0}, "scale=0"),
        ({"dropout_p": 1.0}, "dropout"),
        ({"backend": "toch"}, "torch"),
        ({"key_lengths": torch.tensor([1])}, "key_lengths"),
        ({"query_lengths": torch.tensor([1.0, 2.0])}, "query_lengths"),
        ({"query_lengths": torch.tensor([True, False])}, "query_lengths"),
        ({"query_lengths": [20, 10]}, "query_lengths has to be a tensor"),
        ({"is_causal": None}, "is_causal"),
    ):
        with pytest.raises(UserError, match=match):
            adaptive_attention(query, key, value, 4, 4, **({"density": 0.1} | option))
    out = adaptive_attention(query[:0], key[:0], value[:0], 4, 4, 0.1)
    assert out.shape == (0, *value.shape[1:])


def test_a_plan_of_inputs_that_do_not_fit_is_refused():
    query, key, value, _ = draw_inputs(length=20)
    for tensors, options, match in (
        ((query, key[:, :1], value), {}, "key"),
        ((query[0], key[0], value[0]), {}, "query has to be a floating-point tensor"),
        ((query, key, value), {"key_lengths": torch.tensor([1])}, "key_lengths"),
        ((query, key, value), {"query_lengths": torch.tensor([1])}, "query_lengths"),
    ):
        with pytest.raises(UserError, match=match):
            plan_adaptive_attention(*tensors, 4, 3, 0.5, **options)
    listed = plan_adaptive_attention(query, key, value, 4, 3, 0.5, key_lengths=[20, 9])
    plan = plan_adaptive_attention(query, key, value, 4, 3, 0.5, key_lengths=torch.tensor([20, 9]))
    assert torch.equal(listed.key_assignment, plan.key_assignment)


@pytest.mark.parametrize("option", ["num_landmarks", "num_query_landmarks"])
@pytest.mark.parametrize("number", [0, 2.5])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_numbers_of_clusters_are_checked(backend, option, number):
    query, key, value, _ = draw_inputs(length=20, dtype=torch.float32)
    sizes = {"num_landmarks": 4, "num_query_landmarks": 3} | {option: number}
    with pytest.raises(UserError, match=f"^{option}={number} "):
        adaptive_attention(query, key, value, **sizes, density=0.5, backend=backend)


def test_is_traced_where_every_size_is_dynamic():
    def run(query, key, value):
        return adaptive_attention(query, key, value, 4, 3, 0.5)

    tensors = draw_inputs(1, 1, 20)[:3]
    compiled = torch.compile(run, fullgraph=True, backend="eager", dynamic=True)
    assert_close("out", run(*tensors), compiled(*tensors), 1e-12)
