"""The kernels that plan adaptive attention against PyTorch: in Triton's interpreter on small shapes, on a GPU too."""

from __future__ import annotations

import pytest
import torch

from scatterbrain.ops.adaptive.plan import _take, exact_keys, log_losses, plan_adaptive_attention
from scatterbrain.ops.clusters.kmeans import cluster_means
from scatterbrain.ops.common.backends import is_interpreted
from tests.helpers import draw_inputs
from tests.scatterbrain.ops.poison import poisoned_memory

triton = pytest.importorskip("triton")

from scatterbrain.ops.adaptive.triton.plan import find_plan, run_plan  # noqa: E402 - imports triton
from scatterbrain.ops.adaptive.triton.tables import (  # noqa: E402
    fill_tables,
    layout_of_plan,
    plan_of_tables,
    tables_layout,
)
from scatterbrain.ops.clusters.triton.operator import LandmarkPlan  # noqa: E402

needs_interpreter = pytest.mark.skipif(
    not is_interpreted() or triton.__version__.startswith("3.2."),
    reason="the kernels are compiled for the GPU here, or Triton's interpreter is too old for them",
)
DEVICES = [
    pytest.param("cpu", torch.float32, marks=needs_interpreter),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
]


def draw(device, dtype, length=50, num_keys=None, width=16, batch=1, heads=1):
    tensors = draw_inputs(batch, heads, length, num_keys or length, width, width)[:3]
    return [x.to(device, dtype) for x in tensors]


def plan_by_kernels(
    tensors, num_landmarks, num_query_landmarks, density, tolerance=None, lengths=(None, None), num_steps=1, labels=None
):
    """The plan, and statistics and tables by name."""
    query, key, value = tensors
    scale = query.shape[3] ** -0.5
    num_landmarks, num_query_landmarks = min(num_landmarks, key.shape[2]), min(num_query_landmarks, query.shape[2])
    options = (num_landmarks, num_query_landmarks, density, tolerance, scale, num_steps, True)
    with poisoned_memory():
        statistics, tables = run_plan(query, key, value, *lengths, labels, *options)
    layout = LandmarkPlan(query, key, value, lengths[0], labels, num_landmarks, 0, scale, num_steps).statistics()
    statistics = layout.views(statistics)
    groups = query.shape[0] * query.shape[1]
    sizes = (num_landmarks, num_query_landmarks, exact_keys(density, key.shape[2]), True)
    tables = tables_layout(groups, query.shape[2], key.shape[2], *sizes).views(tables)
    key_labels = statistics["labels"] if labels is None else labels.flatten(0, 1)
    return plan_of_tables(key_labels, tables, num_landmarks, query.shape[0]), statistics, tables


def check_supports(tensors, plan, tolerance, density, query_lengths):
    """Compare the supports of a plan with those that the specification chooses for its clusters."""
    query, key, _ = (x.flatten(0, 1).double() for x in tensors)
    query_labels = plan.query_assignment
    if query_lengths is not None:
        counted = torch.arange(query.shape[1], device=query.device) < query_lengths.view(-1, 1, 1)
        query_labels = query_labels.where(counted, -1)
    key_labels, query_labels = plan.key_assignment.flatten(0, 1), query_labels.flatten(0, 1)
    sizes, scale = (plan.taken.shape[3], plan.taken.shape[2]), query.shape[2] ** -0.5
    inputs = (query, key, key_labels, query_labels, *sizes)
    expected, found = _take(*inputs, density, tolerance, scale), plan.taken.flatten(0, 1)
    used = (query_labels.unsqueeze(1) == torch.arange(sizes[1], device=query.device)[:, None]).any(2)
    if query.device.type == "cpu":
        assert torch.equal(expected & used.unsqueeze(2), found & used.unsqueeze(2))
        return
    # rounding changes the order of clusters that lose about the same
    log_weight, log_loss, _ = log_losses(*inputs, scale)
    shares = (log_loss - log_weight.logsumexp(2, keepdim=True)).exp().nan_to_num()
    left, least = ((shares * ~taken).sum(2)[used] for taken in (found, expected))
    assert (left - least).abs().mean() < 0.03


def check(tensors, num_landmarks, num_query_landmarks, density, tolerance=None, lengths=(None, None), **options):
    plan, statistics, tables = plan_by_kernels(
        tensors, num_landmarks, num_query_landmarks, density, tolerance, lengths, **options
    )
    exact = tensors[0].dtype == torch.float32
    # the tables are those of the plan
    expected = layout_of_plan(plan, True).views(fill_tables(plan, True)[1])
    place = torch.arange(plan.num_exact, device=tensors[0].device) >= expected["exact_counts"].unsqueeze(2)
    for name, table in expected.items():
        found = tables[name]
        if name == "exact_keys":
            table, found = table.masked_fill(place, -1), found.masked_fill(place, -1)
        assert torch.equal(table, found), name
    assert expected["exact_counts"].max() <= plan.num_exact
    # the supports are those of the clusters
    check_supports(tensors, plan, tolerance, density, lengths[1])
    # the statistics are those of the clusters
    means = cluster_means(tensors[1].double().nan_to_num(), plan.key_assignment, plan.taken.shape[3]).flatten(0, 1)
    empty = expected["key_starts"].diff(dim=1).unsqueeze(2) == 0
    found = statistics["landmarks"].double() + statistics["centre"][:, None, : means.shape[2]].double()
    difference = (found - means).masked_fill(empty, 0.0)
    assert difference.abs().max() < (1e-5 if exact else 0.05)
    return plan


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("density", [0.0, 0.13, 0.5, 1.0])
@pytest.mark.parametrize("num_landmarks", [5, 37])
def test_plan(device, dtype, num_landmarks, density):
    plan = check(draw(device, dtype, 61, 150), num_landmarks, 7, density)
    if density in (0.0, 1.0):
        sizes = torch.nn.functional.one_hot(plan.key_assignment, num_landmarks).sum(2) > 0
        assert torch.equal(plan.taken, sizes.unsqueeze(2).expand_as(plan.taken) & (density == 1.0))


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize(("length", "num_keys"), [(1, 1), (1, 40), (40, 1), (7, 5), (200, 33)])
@pytest.mark.parametrize("num_steps", [0, 2])
def test_few_queries_or_keys(device, dtype, length, num_keys, num_steps):
    check(draw(device, dtype, length, num_keys, 32, batch=2), 12, 9, 0.4, num_steps=num_steps)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_lengths(device, dtype):
    tensors = draw(device, dtype, 60, 50, batch=3)
    key_lengths = torch.tensor([50, 0, 33], device=device)
    query_lengths = torch.tensor([60, 41, 2], device=device)
    plan = check(tensors, 20, 6, 0.25, lengths=(key_lengths, query_lengths))
    assert (plan.key_assignment[1] == -1).all()
    assert (plan.query_assignment >= 0).all()
    hidden = tensors[1].clone()
    hidden[1:, :, 33:] = float("nan")
    again = plan_by_kernels([tensors[0], hidden, tensors[2]], 20, 6, 0.25, lengths=(key_lengths, query_lengths))[0]
    assert all(torch.equal(one, other) for one, other in zip(plan[:3], again[:3], strict=True))


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.99])
def test_tolerance(device, dtype, tolerance):
    plan = check(draw(device, dtype, 120), 24, 8, 0.6, tolerance)
    assert plan.taken.sum() == 0 or tolerance < 0.99


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_equal_keys_and_queries(device, dtype):
    query, key, value = draw(device, dtype, 50)
    equal = [x[:, :, :1].expand_as(x).contiguous() for x in (query, key)]
    check([*equal, value], 8, 5, 0.3)
    check([query, equal[1], value], 8, 5, 1.0)
    check([query, torch.cat([key[:, :, :25], equal[1][:, :, :25]], 2), value], 8, 5, 0.4)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_given_clusters(device, dtype):
    tensors = draw(device, dtype, 70)
    labels = torch.randint(9, (1, 1, 70), device=device, dtype=torch.int16)
    plan = check(tensors, 9, 6, 0.4, labels=labels)
    assert torch.equal(plan.key_assignment, labels.long())


@pytest.mark.parametrize(("device", "dtype"), DEVICES[:1])
def test_plan_is_that_of_pytorch(device, dtype):
    # lumps that are far apart: no point is near the border of two clusters, whatever the rounding
    lumps = 30 * torch.randn(12, 20)
    query, key = (lumps[torch.randint(12, (1, 2, n))] + torch.randn(1, 2, n, 20) for n in (60, 90))
    query *= 0.1
    lengths = torch.tensor([51])
    found = find_plan(query, key, 11, 7, 0.2, None, 0.2, lengths, lengths, 1)
    expected = plan_adaptive_attention(
        query, key, key, 11, 7, 0.2, scale=0.2, key_lengths=lengths, query_lengths=lengths, num_steps=1
    )
    for name, one, other in zip(expected._fields, expected, found, strict=True):
        assert one == other if name == "num_exact" else torch.equal(one, other), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize(("num_landmarks", "num_query_landmarks"), [(64, 48), (128, 64), (300, 256), (1024, 20)])
def test_real_sizes(dtype, width, num_landmarks, num_query_landmarks):
    tensors = draw("cuda", dtype, 3136, 2500, width, batch=3)
    lengths = torch.tensor([2500, 1000, 77], device="cuda")
    check(tensors, num_landmarks, num_query_landmarks, 0.08, lengths=(lengths, None))


@pytest.mark.gpu
def test_plans_on_a_gpu_come_from_the_kernels():
    query, key, value = draw("cuda", torch.bfloat16, 300, 400, 40, batch=2)
    lengths = torch.tensor([400, 123])
    plan = plan_adaptive_attention(query, key, value, 32, 16, 0.1, key_lengths=lengths)
    expected = find_plan(query, key, 32, 16, 0.1, None, 40**-0.5, lengths, None, 1)
    assert all(torch.equal(one, other) for one, other in zip(plan[:3], expected[:3], strict=True))
    check_supports((query, key, value), plan, None, 0.1, None)


@pytest.mark.gpu
def test_long_sequences():
    check(draw("cuda", torch.bfloat16, 65536, width=64), 256, 128, 0.03)


@pytest.mark.gpu
def test_is_the_same_from_run_to_run_and_in_a_graph():
    tensors = draw("cuda", torch.bfloat16, 1000, 1200, 64, heads=3)
    options = (*tensors, None, None, None, 64, 32, 0.08, None, 0.125, 1, False)
    expected = run_plan(*options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run_plan(*options)
    graph.replay()
    sizes = (3, 1000, 1200, 64, 32, exact_keys(0.08, 1200), False)
    counts = tables_layout(*sizes).views(expected[1])["exact_counts"]
    place = torch.arange(sizes[5], device="cuda") >= counts.unsqueeze(2)
    for name, one in tables_layout(*sizes).views(expected[1]).items():
        other = tables_layout(*sizes).views(found[1])[name]
        if name == "exact_keys":
            one, other = one.masked_fill(place, -1), other.masked_fill(place, -1)
        assert torch.equal(one, other), name
