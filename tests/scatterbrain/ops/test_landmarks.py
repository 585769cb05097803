"""Landmark attention: clusters, features, both operators against their specifications, and refused arguments."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from scatterbrain.errors import UserError
from scatterbrain.ops.clusters import (
    assign_clusters,
    assign_key_clusters,
    assign_query_clusters,
    blocked,
    kmeans,
    landmark_attention,
    log_landmark_features,
    naive_landmark_attention,
    naive_landmark_lse,
    naive_paired_landmark_attention,
    paired_landmark_attention,
)
from scatterbrain.ops.clusters.kmeans import cluster_means
from scatterbrain.ops.common.inputs import length_mask
from scatterbrain.ops.scatterbrain.blocked import blocked_attention
from tests.helpers import TensorRecorder, assert_close, dense_attention, draw_inputs

# float64 against float64: sums of up to 300 terms, exponentials of logits up to 80
DOUBLE = 1e-11
# float32 against float64: rounding 6e-8 of logits up to 10, once more for the gradients
SINGLE_OUTPUT = 2e-6
SINGLE_GRADIENT = 1e-5

SHAPES = [  # T, S, E, D, M, key lengths
    (50, 50, 16, 16, 7, None),
    (1, 1, 1, 1, 1, None),
    (37, 37, 5, 3, 4, (37, 5)),
    (50, 97, 16, 8, 9, (97, 0)),
    (97, 50, 16, 8, 9, (1, 49)),
    (200, 30, 4, 4, 5, (30, 3)),
    (3, 300, 4, 4, 5, None),
    (300, 3, 4, 4, 5, (2, 3)),
    (150, 150, 144, 8, 12, (150, 90)),
    (20, 9, 4, 4, 12, None),
]


def lengths_of(lengths):
    return None if lengths is None else torch.tensor(lengths)


def landmark_pair(window, num_landmarks, lengths, **options):
    """`landmark_attention` and its specification, as functions of query, key and value."""

    def fast(query, key, value):
        return landmark_attention(query, key, value, num_landmarks, window, key_lengths=lengths, **options)

    def naive(query, key, value):
        clusters = assign_key_clusters(key, value, num_landmarks, 1, lengths, options.get("value_weight", 0.0))
        scale = query.shape[-1] ** -0.5
        return naive_landmark_attention(query, key, value, clusters, window, scale, lengths)[0]

    return fast, naive


def paired_pair(num_exact, num_landmarks, lengths, num_groups=4, query_lengths=None):
    """The same of paired landmarks."""

    def fast(query, key, value):
        sizes = (num_landmarks, num_groups, num_exact)
        return paired_landmark_attention(query, key, value, *sizes, key_lengths=lengths, query_lengths=query_lengths)

    def naive(query, key, value):
        clusters = assign_key_clusters(key, value, num_landmarks, 2, lengths)
        groups = assign_query_clusters(query, num_groups, 2, query_lengths)
        scale = query.shape[-1] ** -0.5
        return naive_paired_landmark_attention(
            query, key, value, clusters, groups, num_exact, scale, lengths, query_lengths
        )[0]

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


def all_pairs(num_landmarks, lengths, windows, exact):
    for window in windows:
        yield f"window {window}", landmark_pair(window, num_landmarks, lengths)
    for num_exact in exact:
        yield f"exact {num_exact}", paired_pair(num_exact, num_landmarks, lengths)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fast_forms_match_the_specifications(shape):
    length, num_keys, width, value_width, num_landmarks, lengths = shape
    lengths = lengths_of(lengths)
    # float32 numbers in every dtype, so that float32 and float64 find the same clusters
    *tensors, _ = draw_inputs(2, 2, length, num_keys, width, value_width, dtype=torch.float32)
    tensors = [x.double() for x in tensors]
    for _, pair in all_pairs(num_landmarks, lengths, (0, 1, 8, 131), (0, 3, 1000)):
        compare(pair, tensors, DOUBLE, DOUBLE, torch.float64)
        compare(pair, tensors, SINGLE_OUTPUT, SINGLE_GRADIENT, torch.float32)


@pytest.mark.parametrize("num_groups", [1, 9, 70])
def test_any_number_of_query_clusters(num_groups):
    *tensors, _ = draw_inputs(2, 2, 50, 60, dtype=torch.float64)
    lengths = torch.tensor([60, 22])
    compare(paired_pair(2, 7, lengths, num_groups, torch.tensor([50, 31])), tensors, DOUBLE, DOUBLE, torch.float64)


@pytest.mark.parametrize("max_logit", [50, 80, 400])
def test_extreme_logits(max_logit):
    lengths = torch.tensor([130, 70])
    *tensors, _ = draw_inputs(2, 2, 130, 130, dtype=torch.float32, max_logit=max_logit)
    tensors = [x.double() for x in tensors]
    for _, pair in all_pairs(9, lengths, (0, 7), (0, 3)):
        # float32 rounds a logit of 80 by 4e-6, and gradients hold differences of weights times keys of the size 30
        compare(pair, tensors, DOUBLE, 10 * DOUBLE, torch.float64)
        compare(pair, tensors, max_logit * 1e-6, max_logit * 1e-5, torch.float32)


@pytest.mark.parametrize("width", [16, 300])
def test_keys_of_a_window_that_their_landmark_is_far_from(width):
    # Each key alone in its window, clusters of opposite keys: what a landmark claims for a query is far from the exact
    # weight. The claim is a mean of logits, so some key of the cluster outweighs it: no width is too large.
    *tensors, _ = draw_inputs(1, 1, 64, 64, width, 4, dtype=torch.float64, max_logit=300)
    query, key, value = tensors
    key = torch.cat([key[:, :, :32], -key[:, :, :32] + 0.1], dim=2)
    clusters = (torch.arange(64) % 2).view(1, 1, -1)
    scale = width**-0.5
    expected, _ = naive_landmark_attention(query.float(), key.float(), value.float(), clusters, 5, scale)
    query, key, value = (x.float() for x in (query, key, value))
    features = log_landmark_features(query, key, clusters, 2, scale)
    assert_close(
        "out", expected, blocked_attention(query, key, value, 5, scale=scale, log_features=features), 300 * 1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_landmark_far_above_all_keys_of_its_window_leaves_no_nan(dtype):
    # clusters of 7 equal keys, one after another: their mean rounds, and products of 1e10 differ by more than float32's
    # exponentials can hold; nothing is left of a landmark whose keys are all in the window
    query, key, value = (torch.randn(2, 2, 140, 16) for _ in range(3))
    key = key[:, :, ::7].repeat_interleave(7, 2)
    tensors = [x.to(dtype).requires_grad_() for x in (1e5 * query, 1e5 * key, value)]
    clusters = (torch.arange(140) // 7).expand(2, 2, -1)
    out, lse = landmark_attention(*tensors, 20, 40, assignment=clusters, backend="torch", return_lse=True)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    assert out.abs().max() <= tensors[2].abs().max()
    out.float().sum().backward()
    assert all(x.grad.isfinite().all() for x in tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_have_float32_sums(dtype):
    lengths = torch.tensor([130, 0])
    *tensors, _ = draw_inputs(2, 2, 130, dtype=dtype, max_logit=20)
    for _, (fast, naive) in all_pairs(9, lengths, (0, 7), (0, 3)):
        # what remains is the rounding of the output
        out = fast(*tensors)
        assert out.dtype == dtype
        assert_close("out", naive(*tensors), out, torch.finfo(dtype).eps)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [0, 6, 200])
def test_blocked_takes_any_log_features(window, is_causal):
    # both references, with zeros among the features, a feature that no key has, and keys without any feature
    *tensors, _ = draw_inputs(2, 2, 150, 170, dtype=torch.float64)
    query, key, value = tensors
    lengths = torch.tensor([170, 90])
    log_query = torch.randn(2, 2, 150, 6, dtype=torch.float64).requires_grad_()
    log_key = torch.randn(2, 2, 170, 6, dtype=torch.float64).masked_fill(torch.rand(2, 2, 170, 6) < 0.6, -math.inf)
    log_key[..., 2] = -math.inf
    log_key[:, :, 5] = -math.inf
    log_key.requires_grad_()
    scale = 0.25
    offset = torch.arange(170) - torch.arange(150)[:, None]
    in_window = (offset >= -(window // 2)) & (offset < (window + 1) // 2)
    visible = (torch.arange(170) < lengths[:, None])[:, None, None] & ((offset <= 0) | (not is_causal))
    low_rank = log_query.exp() @ log_key.exp().transpose(2, 3)
    # a key of no feature has weight zero; the logarithm of it has no gradient
    low_rank = low_rank.masked_fill(low_rank == 0, 1.0).log().masked_fill(low_rank == 0, -math.inf)
    logits = torch.where(in_window, scale * query @ key.transpose(2, 3), low_rank)
    expected, _ = dense_attention(logits, visible, value)
    out = blocked_attention(
        query, key, value, window, scale=scale, log_features=(log_query, log_key),
        is_causal=is_causal, key_lengths=lengths,
    )  # fmt: skip
    assert_close("out", expected, out, DOUBLE)
    cotangent = torch.randn_like(out)
    reference = torch.autograd.grad(expected, (log_query, log_key), cotangent)
    result = torch.autograd.grad(out, (log_query, log_key), cotangent)
    for name, a, b in zip(("log_query", "log_key"), reference, result, strict=True):
        if window < 200:
            assert a.abs().sum() > 0
        assert_close(name, a, b, 1e-10)


def test_blocked_leaves_the_given_features_as_they_are():
    query, key, value, _ = draw_inputs(length=50, dtype=torch.float32)
    features = log_landmark_features(query, key, assign_clusters(key, 5), 5, 0.25)
    before = [x.clone() for x in features]
    blocked_attention(query, key, value, 7, scale=0.25, log_features=features)
    assert all(torch.equal(a, b) for a, b in zip(before, features, strict=True))


def test_features_are_the_definition():
    query, key, _, _ = draw_inputs(length=20, num_keys=30)
    clusters = assign_clusters(key, 4, lengths=torch.tensor([30, 11]))
    log_query, log_key = log_landmark_features(query, key, clusters, 4, 0.3)
    means = torch.stack([key[1, 1][clusters[1, 1] == b].mean(0) for b in range(4)])
    assert_close("log_query", 0.3 * query[1, 1] @ means.T, log_query[1, 1], 1e-14)
    assert torch.equal(log_key[1, 1].exp()[:11].argmax(-1), clusters[1, 1, :11])
    assert torch.equal(log_key[1, 1].exp().sum(-1), (torch.arange(30) < 11).double())


def test_paired_is_exact_at_the_means_of_query_clusters_and_for_single_keys():
    query, key, value, _ = draw_inputs(2, 2, 40, 60)
    full, _ = dense_attention(0.25 * query @ key.transpose(2, 3), torch.ones(1, dtype=torch.bool), value)
    # as many clusters as queries: every query is the mean of its own
    assert_close("queries", full, paired_landmark_attention(query, key, value, 5, 40, num_steps=0), 1e-12)
    assert_close("keys", full, paired_landmark_attention(query, key, value, 60, 3, num_steps=0), 1e-12)
    assert_close("exact keys", full, paired_landmark_attention(query, key, value, 3, 3, num_exact=60), 1e-12)
    assert_close("landmarks", full, landmark_attention(query, key, value, 60, num_steps=0), 1e-12)


def test_error_falls_with_each_kind_of_landmark():
    torch.manual_seed(1)
    query, key, value, _ = draw_inputs(1, 4, 300, 300, max_logit=12)
    full, _ = dense_attention(0.25 * query @ key.transpose(2, 3), torch.ones(1, dtype=torch.bool), value)

    def error(*sizes):
        return (paired_landmark_attention(query, key, value, *sizes, num_steps=4) - full).norm() / full.norm()

    start = error(8, 8)
    assert error(32, 8) < 0.9 * start
    assert error(8, 32) < 0.9 * start
    assert error(8, 8, 24) < 0.9 * start


@pytest.mark.parametrize("num_exact", [0, 2])
def test_gradcheck(num_exact):
    # labels are constants: far from a change of them, finite differences agree
    tensors = [x.requires_grad_() for x in draw_inputs(2, 1, 6, 7, 3, 2)[:3]]
    lengths = torch.tensor([7, 4])
    fast, _ = paired_pair(num_exact, 3, lengths, 2)
    assert torch.autograd.gradcheck(fast, tensors)
    fast, _ = landmark_pair(3, 3, lengths)
    assert torch.autograd.gradcheck(fast, tensors)


def clusters_by_definition(points, num_clusters, num_steps):
    """Labels (N,) of the points (N, E) of one sequence, point by point in float64."""
    points = points.double()
    starts = []
    for m in range(num_clusters):
        stretch = [x for i, x in enumerate(points) if i * num_clusters // len(points) == m]
        if not stretch:
            starts.append(points[0])
            continue
        mean = torch.stack(stretch).mean(0)
        distances = [(x - mean).square().sum().item() for x in stretch]
        starts.append(stretch[0] if len(stretch) == 2 else stretch[distances.index(max(distances))])
    centroids = torch.stack(starts)
    for step in range(num_steps + 1):
        distances = (points[:, None] - centroids).square().sum(-1).tolist()
        labels = torch.tensor([row.index(min(row)) for row in distances])
        if step < num_steps:
            some, of_some = points[::2], labels[::2]
            means = [some[of_some == b].mean(0) if b in of_some else centroids[b] for b in range(num_clusters)]
            centroids = torch.stack(means)
    return labels


@pytest.mark.parametrize("num_steps", [0, 1, 3])
@pytest.mark.parametrize("large", [0.0, 100.0])
def test_clusters_are_those_of_the_definition(num_steps, large):
    # large steps of the coordinates: what a float32 holds beside 100
    points = (256 * torch.randn(2, 2, 83, 5)).round() / 256
    # a start far from the mean of its stretch, not of the sequence; copies, and so clusters without points
    points[0, 0, :20] += 8
    points[0, 1, 30:60] = points[0, 1, 30:31]
    points = points + large
    lengths = torch.tensor([83, 47])
    for num_clusters in (1, 6, 12, 30, 47, 60):
        labels = assign_clusters(points, num_clusters, num_steps, lengths)
        for b, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
            count = lengths[b]
            expected = clusters_by_definition(points[b, h, :count], num_clusters, num_steps)
            assert torch.equal(labels[b, h, :count], expected), (num_clusters, b, h)
            assert (labels[b, h, count:] == -1).all()


def test_sums_of_a_long_cluster_round_little():
    points = torch.full((1, 1, 60_000, 1), 0.1)
    labels = torch.zeros(1, 1, 60_000, dtype=torch.int64)
    assert_close("mean", points[:, :, :1].double(), cluster_means(points, labels, 1), 4e-6)


def test_clusters_are_those_of_separated_points():
    centres = 20 * torch.eye(6)
    truth = torch.randint(6, (2, 3, 90))
    points = centres[truth] + 0.1 * torch.randn(2, 3, 90, 6) + 100
    truth[..., :6] = torch.arange(6)  # every one there, so that the start can find it
    points[..., :6, :] = centres + 100
    labels = assign_clusters(points, 30, num_steps=4)
    for each, expected in zip(labels.flatten(0, 1), truth.flatten(0, 1), strict=True):
        # more clusters than lumps: none holds points of two
        assert all(len(expected[each == b].unique()) <= 1 for b in range(30))


def test_steps_lower_the_objective():
    points = torch.randn(2, 2, 200, 8)

    def objective(steps):
        labels = assign_clusters(points, 12, steps)
        one_hot = torch.nn.functional.one_hot(labels, 12).float()
        means = one_hot.mT @ points / one_hot.sum(-2).unsqueeze(-1).clamp_min(1)
        return (points - one_hot @ means).square().sum()

    values = [objective(steps) for steps in (0, 1, 2, 4, 8)]
    assert all(later < earlier for earlier, later in pairwise(values))


@pytest.mark.parametrize("large", [1.0, 1e4])
def test_labels_are_the_nearest_means_once_they_settle(large):
    points = torch.randn(1, 1, 120, 4) + large
    labels = assign_clusters(points, 5, 60)[0, 0]
    some, of_some = points[0, 0, ::2].double(), labels[::2]  # what the steps look at
    means = torch.stack([some[of_some == b].mean(0) for b in range(5)])
    assert torch.equal(torch.cdist(points[0, 0].double(), means).argmin(-1), labels)


def test_values_count_relative_to_their_spread():
    _, key, value, _ = draw_inputs(2, 2, 1, 60, value_width=3, dtype=torch.float32)
    lengths = torch.tensor([60, 31])
    alone = assign_clusters(key, 8, lengths=lengths)
    joint = assign_key_clusters(key, value, 8, key_lengths=lengths, value_weight=0.8)
    assert not torch.equal(alone, joint)
    # powers of two change no bit of the ratios
    assert torch.equal(joint, assign_key_clusters(64 * key, value / 16, 8, key_lengths=lengths, value_weight=0.8))
    padded = value.clone()
    padded[1, :, 31:] = 1e20
    assert torch.equal(joint, assign_key_clusters(key, padded, 8, key_lengths=lengths, value_weight=0.8))
    # values that are the same up to rounding have no influence
    for size in (0.0, 0.1, 1e6):
        value = (size * torch.ones(2, 2, 60, 3)).mul(1 + 1e-7 * torch.randn(2, 2, 60, 3))
        values = assign_key_clusters(key, value, 8, key_lengths=lengths, value_weight=0.8)
        assert torch.equal(alone, values)


def test_padding_is_in_no_cluster_and_changes_nothing():
    query, key, value, _ = draw_inputs(2, 2, 50, 60, dtype=torch.float32)
    lengths, query_lengths = torch.tensor([60, 23]), torch.tensor([50, 19])
    labels = assign_key_clusters(key, value, 6, key_lengths=lengths)
    assert torch.equal(labels >= 0, (torch.arange(60) < lengths[:, None])[:, None].expand(2, 2, 60))
    alone = assign_key_clusters(key[1:, :, :23], value[1:, :, :23], 6)
    assert torch.equal(labels[1:, :, :23], alone)

    options = {"key_lengths": lengths, "query_lengths": query_lengths}
    expected = paired_landmark_attention(query, key, value, 6, 4, 2, **options)
    out = paired_landmark_attention(query[1:, :, :19], key[1:, :, :23], value[1:, :, :23], 6, 4, 2)
    assert_close("short sequence", expected[1:, :, :19], out, 1e-5)
    for poison in (math.nan, math.inf, 1e30):
        query, key, value = (x.clone() for x in (query, key, value))
        query[1, :, 19:], key[1, :, 23:], value[1, :, 23:] = poison, poison, poison
        out = paired_landmark_attention(query, key, value, 6, 4, 2, **options)
        assert torch.equal(out[0], expected[0])
        assert torch.equal(out[1, :, :19], expected[1, :, :19])


def test_sequences_do_not_depend_on_each_other_or_on_slices():
    query, key, value, _ = draw_inputs(3, 2, 700, 600, dtype=torch.float32)
    whole = paired_landmark_attention(query, key, value, 40, 20, 5)
    for b in range(3):
        for h in range(2):
            part = paired_landmark_attention(*(x[b : b + 1, h : h + 1] for x in (query, key, value)), 40, 20, 5)
            assert_close("part", whole[b : b + 1, h : h + 1], part, 1e-6)
    assert torch.equal(whole, paired_landmark_attention(query, key, value, 40, 20, 5))


def test_equal_keys_and_more_clusters_than_keys_give_numbers():
    query, _, value, _ = draw_inputs(2, 2, 30, 30, dtype=torch.float32)
    key = torch.ones_like(query)
    expected = value.mean(2, keepdim=True).expand_as(query)
    for clusters in (1, 7, 100):
        assert_close("paired", expected, paired_landmark_attention(query, key, value, clusters, clusters), 1e-5)
        assert_close("window", expected, landmark_attention(query, key, value, clusters, 5), 1e-5)
        same = torch.ones_like(value)
        assert_close("values", same, paired_landmark_attention(query, query, same, clusters, 4), 1e-5)


def test_options_change_the_result():
    query, key, value, _ = draw_inputs(2, 2, 60, dtype=torch.float32)

    def paired(**options):
        return paired_landmark_attention(query, key, value, 6, 4, **options)

    def landmarks(**options):
        return landmark_attention(query, key, value, 6, 5, **options)

    for function in (paired, landmarks):
        for option in ({"num_steps": 0}, {"value_weight": 2.0}, {"scale": 0.7}, {"key_lengths": torch.tensor([50, 9])}):
            assert (function() - function(**option)).abs().max() > 1e-3, option
        assert_close("naive", function(backend="naive"), function(backend="torch"), SINGLE_OUTPUT)
        torch.manual_seed(0)
        dropped = torch.stack([function(dropout_p=0.3) for _ in range(400)])
        assert (dropped[0] - function()).abs().max() > 1e-3
        # 400 samples: 1 / 20 of the standard deviation of one
        assert_close("mean under dropout", function(), dropped.mean(0), 0.1)
    assert (paired() - paired(query_lengths=torch.tensor([60, 20]))).abs().max() > 1e-3
    assert (paired() - paired(num_exact=3)).abs().max() > 1e-3


@pytest.mark.parametrize("window", [0, 5])
def test_clusters_can_be_reused(window):
    query, key, value, _ = draw_inputs(2, 2, 50, 60, dtype=torch.float32)
    lengths = torch.tensor([60, 23])
    options = {"window": window, "key_lengths": lengths, "scale": 0.3}
    labels = assign_key_clusters(key, value, 9, 3, lengths, value_weight=0.7)
    expected = landmark_attention(query, key, value, 9, num_steps=3, value_weight=0.7, **options)
    assert torch.equal(expected, landmark_attention(query, key, value, 9, assignment=labels, **options))
    assert not torch.equal(expected, landmark_attention(query, key, value, 9, **options))
    # what is hidden is in no cluster
    labels = labels.masked_fill(labels < 0, 10**6)
    assert torch.equal(expected, landmark_attention(query, key, value, 9, assignment=labels, **options))
    # of other keys, more than there are keys, most of them empty
    labels = torch.randint(70, 100, (2, 2, 60))
    naive, out = (
        landmark_attention(query, key, value, 100, assignment=labels, backend=backend, **options)
        for backend in ("naive", "torch")
    )
    assert_close("out", naive, out, SINGLE_OUTPUT)


def test_clusters_that_do_not_fit_are_refused():
    query, key, value, _ = draw_inputs(2, 2, 8, 20)
    labels = assign_key_clusters(key, value, 5)
    for wrong, match in (
        (labels[:, :, 1:], r"int64 of shape \(2, 2, 20\)"),
        (labels.int(), "got torch.int32"),
        (labels.tolist(), "assignment has to be a tensor"),
        (labels.masked_fill(labels == 4, 5), r"cluster 5.*\[0, 5\)"),
        (labels.masked_fill(labels == 4, -1), "cluster -1"),
    ):
        with pytest.raises(UserError, match=match):
            landmark_attention(query, key, value, 5, assignment=wrong)
    # clusters of fewer keys
    labels = assign_key_clusters(key, value, 5, key_lengths=torch.tensor([20, 10]))
    with pytest.raises(UserError, match="cluster -1"):
        landmark_attention(query, key, value, 5, assignment=labels)


@pytest.mark.parametrize("window", [0, 1, 6, 200])
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_log_sum_exp(window, shift):
    *tensors, _ = draw_inputs(2, 2, 50, 70, dtype=torch.float32)
    query, key, value = (x.double() for x in tensors)
    key = key + shift
    lengths = torch.tensor([70, 0])

    def naive(query, key, value):
        clusters = assign_key_clusters(key, value, 7, 1, lengths, 0.0)
        return naive_landmark_lse(query, key, clusters, window, 0.25, lengths)

    def fast(query, key, value, **options):
        options |= {"scale": 0.25, "key_lengths": lengths, "return_lse": True}
        return landmark_attention(query, key, value, 7, window, **options)[1]

    expected = naive(query, key, value)
    assert (expected[1] == -math.inf).all()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        cast = [x.to(dtype) for x in (query, key, value)]
        for backend in ("torch", "naive"):
            lse = fast(*cast, backend=backend)
            assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert (lse[1] == -math.inf).all()
            reference = naive(*(x.double() for x in cast))[0]
            assert_close("lse", reference, lse[0], DOUBLE if dtype == torch.float64 else 1e-6)
    cotangent = torch.randn(50, dtype=torch.float64)
    results = []
    for function in (naive, fast):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        (function(*leaves)[0, 1] * cotangent).sum().backward()
        results.append([x.grad for x in leaves[:2]])
    for name, a, b in zip("qk", *results, strict=True):
        assert_close(name, a, b, 10 * DOUBLE)
    out, _ = landmark_attention(query, key, value, 7, window, return_lse=True)
    assert torch.equal(out, landmark_attention(query, key, value, 7, window))
    out, lse = landmark_attention(query[:0], key[:0], value[:0], 7, window, return_lse=True)
    assert out.shape == (0, 2, 50, 16)
    assert lse.shape == (0, 2, 50)


@pytest.mark.parametrize("window", [0, 1, 5])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_exact_where_every_cluster_is_one_key_or_its_copies(window, shift):
    def check(query, key, value, num_landmarks, lengths=None):
        visible = (
            torch.ones(1, dtype=torch.bool) if lengths is None else length_mask(lengths, key.shape[2])[:, None, None]
        )
        expected, _ = dense_attention(0.25 * query.double() @ key.double().mT, visible, value)
        options = {"scale": 0.25, "key_lengths": lengths}
        out = landmark_attention(query, key, value, num_landmarks, window, **options)
        rounding = 3e-6 if query.dtype == torch.float32 else torch.finfo(query.dtype).eps
        assert_close("out", expected, out, rounding)

    for dtype in (torch.float32, torch.bfloat16):
        query, key, value, _ = draw_inputs(2, 2, 33, 21, dtype=torch.float32)
        query, key, value = query.to(dtype), (key + shift).to(dtype), value.to(dtype)
        check(query, key, value, 21)
        check(query, key, value, 300)
        check(query, key, value, 21, torch.tensor([21, 1]))
        check(query, key, value, 300, torch.tensor([8, 0]))
        check(query, key[:, :, :1], value[:, :, :1], 6)
        # all keys equal: every cluster but the first is empty
        for num_landmarks in (1, 4, 21, 300):
            check(query, key[:, :, :1].expand_as(key), value, num_landmarks)
            check(query, key[:, :, :1].expand_as(key), value, num_landmarks, torch.tensor([21, 3]))
        # three keys, seven times each in turn
        copies = key[:, :, torch.arange(21) // 7]
        check(query, copies, value, 7)


@pytest.mark.parametrize("length", [79, 80])
def test_padding_does_not_decide_whether_keys_are_sampled(length):
    """16 keys per cluster are enough for a sample: keys that count."""
    key, value, _, _ = draw_inputs(2, 2, 130, 130, dtype=torch.float32)
    alone = assign_key_clusters(key[:, :, :length], value[:, :, :length], 5, value_weight=0.0)
    padded = assign_key_clusters(key, value, 5, 1, torch.tensor([length, length]), 0.0)
    assert torch.equal(padded[:, :, :length], alone)
    assert (length >= 16 * 5) != torch.equal(alone, assign_clusters(key[:, :, :length], 5))


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_common_part_of_the_keys_costs_no_accuracy(window, dtype):
    *tensors, _ = draw_inputs(2, 2, 130, 150, dtype=torch.float32)
    query, key, value = tensors
    key = (key + 100).to(dtype)
    tensors = [x.to(dtype).double() for x in (query, key, value)]
    lengths = torch.tensor([150, 70])
    # with other numbers, two of the bfloat16 keys of a stretch are equally far from its mean
    clusters = (assign_key_clusters(x, value, 8, 1, lengths, 0.0) for x in (key, key.double()))
    assert torch.equal(*clusters)
    pair = landmark_pair(window, 8, lengths)
    rounding = SINGLE_OUTPUT if dtype == torch.float32 else torch.finfo(dtype).eps
    gradient_rounding = SINGLE_GRADIENT if dtype == torch.float32 else torch.finfo(dtype).eps
    compare(pair, tensors, rounding, gradient_rounding, dtype)


@pytest.mark.parametrize("window", [0, 7, 40])
@pytest.mark.parametrize("in_order", [True, False])
def test_slices_and_the_products_of_other_devices_change_nothing(window, in_order, monkeypatch):
    *tensors, _ = draw_inputs(2, 2, 130, 150, dtype=torch.float32)
    pair = landmark_pair(window, 9, torch.tensor([150, 70]))
    for module in (blocked, kmeans):
        monkeypatch.setattr(module, "adds_in_order", lambda _: in_order)
        monkeypatch.setattr(module, "tile_budget", lambda _: 1 << 12)
    compare(pair, [x.double() for x in tensors], SINGLE_OUTPUT, SINGLE_GRADIENT, torch.float32)


def test_no_matrix_of_keys_and_landmarks():
    query, key, value, _ = draw_inputs(1, 1, 8192, dtype=torch.float32)
    for window in (0, 64):
        with TensorRecorder() as recorder:
            landmark_attention(query, key, value, 256, window)
        # the tiles take as much as a CPU's cache, 1 MiB
        assert recorder.largest <= 1 << 19 < 8192 * 256


def test_errors_name_what_is_wrong():
    query, key, value, _ = draw_inputs(length=20)
    with pytest.raises(UserError, match="cannot be causal"):
        paired_landmark_attention(query, key, value, 4, 4, is_causal=True)
    for option, match in (
        ({"value_weight": -0.5}, "value_weight=-0"),
        ({"assignment": torch.zeros(1, 1, 20, dtype=torch.int64)}, "leave out assignment"),
    ):
        with pytest.raises(UserError, match=match):
            landmark_attention(query, key, value, 4, is_causal=True, **option)
    for function, sizes in ((landmark_attention, (4,)), (paired_landmark_attention, (4, 4))):
        for option, match in (
            ({"num_steps": -1}, "num_steps=-1"),
            ({"value_weight": -1.0}, "value_weight=-1"),
            ({"scale": 0.0}, "scale=0"),
            ({"dropout_p": 1.0}, "dropout"),
            ({"backend": "toch"}, "torch"),
            ({"key_lengths": torch.tensor([1])}, "key_lengths"),
        ):
            with pytest.raises(UserError, match=match):
                function(query, key, value, *sizes, **option)
        with pytest.raises(UserError, match="num_clusters=0"):
            function(query, key, value, *(0 for _ in sizes))
    with pytest.raises(UserError, match="window=-1"):
        landmark_attention(query, key, value, 4, -1)
    with pytest.raises(UserError, match="num_exact=-1"):
        paired_landmark_attention(query, key, value, 4, 4, -1)
    with pytest.raises(UserError, match="query_lengths"):
        paired_landmark_attention(query, key, value, 4, 4, query_lengths=torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("form", ["window", "paired"])
@pytest.mark.parametrize("backward", [False, True])
def test_memory_is_linear(form, backward):
    # The numbers of clusters stay, the length doubles: quadratic terms would show as four times. Both lengths are past
    # the number of blocks from which on the sums outside a tile are taken in groups.
    totals, largest = [], []
    for length in (6144, 12288):
        *tensors, _ = draw_inputs(1, 1, length, width=32, dtype=torch.float32)
        leaves = [x.requires_grad_() for x in tensors]
        pair = landmark_pair(49, 24, None) if form == "window" else paired_pair(6, 24, None, 12)
        recorder = TensorRecorder()
        if backward:
            out = pair[0](*leaves)
            with recorder:
                out.backward(torch.ones_like(out))
        else:
            with recorder:
                pair[0](*leaves)
        totals.append(recorder.total)
        largest.append(recorder.largest)
    assert totals[1] < 2.1 * totals[0]
    assert largest[1] < 2.1 * largest[0]
    assert largest[1] < 6 * 12288 * 32
