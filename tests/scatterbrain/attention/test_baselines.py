"""Attentions to compare with, against definitions by plain loops, outputs and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from scatterbrain.attention import create_attention
from scatterbrain.errors import UserError
from scatterbrain.ops.clusters import assign_query_clusters
from tests.helpers import assert_close

WIDTH, SCALE = 5, 0.4
NAMES = ("zero", "uniform", "strided", "random-keys", "querycluster")


def create(name: str, length: int = 37, **options) -> torch.nn.Module:
    return create_attention(name, length, WIDTH, SCALE, memory_fraction=1 / 4, **options)


def draw(num_queries: int, num_keys: int) -> list[torch.Tensor]:
    lengths = (num_queries, num_keys, num_keys)
    return [torch.randn(2, n, 2, WIDTH, dtype=torch.float64, requires_grad=True) for n in lengths]


def softmax_mean(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Output (D,) of one query (E,) over keys (n, E) and values (n, D); zero over none."""
    if not len(keys):
        return torch.zeros_like(query)
    weights = torch.stack([(SCALE * query @ key).exp() for key in keys])
    return (weights[:, None] * values).sum(0) / weights.sum()


def expected_output(attention, name, query, key, value, lengths) -> torch.Tensor:
    rows = []
    num_queries, num_keys = query.shape[1], key.shape[1]
    for sample, length in enumerate(lengths):
        for head in range(2):
            queries, keys, values = (x[sample, :, head] for x in (query, key, value))
            seen = list(range(length))
            if name in ("strided", "random-keys"):
                number = attention.num_keys
                starts = [stretch * num_keys // number for stretch in range(number + 1)]
                sizes = [after - before for before, after in itertools.pairwise(starts)]
                draws = attention.projection_matrix.tolist() if name == "random-keys" else number * [0]
                chosen = [start + draw % size for start, draw, size in zip(starts, draws, sizes, strict=False)]
                seen = [j for j in chosen if j < length]
            if name == "querycluster":
                counted = length if num_queries == num_keys else num_queries
                labels = assign_query_clusters(
                    queries[None, None], attention.num_query_landmarks, 4, torch.tensor([counted])
                )[0, 0]
                groups = [[j for j in range(counted) if labels[j] == labels[i]] for i in range(num_queries)]
                queries = torch.stack([queries[group].mean(0) if group else 0 * queries[0] for group in groups])
            if name == "uniform":
                queries = 0 * queries
            scale = 0 if name == "zero" else 1
            rows += [scale * softmax_mean(each, keys[seen], values[seen]) for each in queries]
    return torch.stack(rows).view(2, 2, num_queries, WIDTH).transpose(1, 2)


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "lengths"), [(37, 37, (37, 21)), (20, 37, (1, 36)), (9, 9, (9, 0))]
)
@pytest.mark.parametrize("backend", ["torch", "naive"])
@pytest.mark.parametrize("name", NAMES)
def test_output_weights_and_gradients(name, num_queries, num_keys, lengths, backend):
    attention = create(name, num_keys, backend=backend)
    tensors = draw(num_queries, num_keys)
    out, weights = attention(*tensors, key_lengths=torch.tensor(lengths), need_weights=True)
    expected = expected_output(attention, name, *tensors, lengths)
    assert_close("out", expected, out, 1e-12)
    assert_close("weights", expected, torch.einsum("bhts,bshd->bthd", weights, tensors[2]), 1e-12)
    cotangent = torch.randn_like(out)
    for which, wanted, got in zip(
        ("query", "key", "value"),
        torch.autograd.grad(expected, tensors, cotangent),
        torch.autograd.grad(out, tensors, cotangent),
        strict=True,
    ):
        assert_close(which, wanted, got, 1e-11)


def test_one_thirty_second_is_every_32nd_key():
    chosen, _ = create_attention("strided", 3136)._chosen(torch.empty(1, 1, 3136, 1), None)
    assert chosen.tolist() == list(range(0, 3136, 32))
    attention = create_attention("random-keys", 3136, seed=1)
    chosen, _ = attention._chosen(torch.empty(1, 1, 3136, 1), None)
    assert (chosen // 32).tolist() == list(range(98))
    before = chosen.clone()
    attention.redraw_projection(2)
    assert not torch.equal(attention._chosen(torch.empty(1, 1, 3136, 1), None)[0], before)
    attention.redraw_projection(1)
    assert torch.equal(attention._chosen(torch.empty(1, 1, 3136, 1), None)[0], before)


@pytest.mark.parametrize("name", ["strided", "random-keys", "querycluster"])
def test_with_all_keys_or_clusters_it_is_full_attention(name):
    tensors = draw(37, 37)
    attention = create_attention(name, 37, WIDTH, SCALE, memory_fraction=1.0)
    expected = create_attention("full", 37, WIDTH, SCALE)(*tensors)[0]
    assert_close("out", expected, attention(*tensors)[0], 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_and_dropout(name):
    query, key, value = (x.detach().bfloat16() for x in draw(37, 37))
    assert create(name)(query, key, value)[0].dtype == torch.bfloat16
    if name not in ("zero", "uniform"):
        attention = create(name, attention_dropout=0.5)
        assert not torch.equal(attention(query, key, value)[0], attention.eval()(query, key, value)[0])
    with pytest.raises(UserError, match="backend"):
        create(name, backend="fast")(query, key, value)
