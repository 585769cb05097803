"""Grouped queries: key and value with fewer heads than query, as if each were repeated for its group."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from scatterbrain.errors import UserError
from scatterbrain.ops.clusters import assign_key_clusters, landmark_attention, paired_landmark_attention
from tests.helpers import OPERATORS, assert_close, draw_inputs


def draw(heads: int, key_heads: int) -> list[torch.Tensor]:
    """Query (2, heads, 19, 5), key and value (2, key_heads, 23, 5 and 3), projection (4, 5); float64."""
    query, _, _, projection = draw_inputs(2, heads, 19, 23, 5, 3, rows=4)
    _, key, value, _ = draw_inputs(2, key_heads, 19, 23, 5, 3)
    return [query, key, value, projection]


@pytest.mark.parametrize("backend", ["torch", "naive"])
@pytest.mark.parametrize(("heads", "key_heads"), [(6, 2), (6, 1), (6, 3), (3, 3)])
@pytest.mark.parametrize("name", OPERATORS)
def test_is_attention_with_repeated_keys_and_values(name, heads, key_heads, backend):
    operator, tensors = OPERATORS[name], draw(heads, key_heads)
    options = {"is_causal": True, "attn_mask": torch.rand(2, 23) < 0.7, "backend": backend}
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    out = operator(*leaves, tensors[3], 7, enable_gqa=True, **options)
    cotangent = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, cotangent)

    query, key, value = (x.clone().requires_grad_() for x in tensors[:3])
    repeated = [torch.stack([x[:, h * key_heads // heads] for h in range(heads)], 1) for x in (key, value)]
    expected = operator(query, *repeated, tensors[3], 7, **options)
    assert torch.equal(out, expected)
    # the gradient of a key is the sum over the queries of its group
    expected_gradients = torch.autograd.grad(expected, [query, key, value], cotangent)
    for which, reference, result in zip(("query", "key", "value"), expected_gradients, gradients, strict=True):
        assert_close(f"grad of {which}", reference, result, 1e-12)


def test_full_attention_is_scaled_dot_product_attention():
    query, key, value, _ = draw(6, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert_close("out", expected, OPERATORS["full"](query, key, value, None, 0, enable_gqa=True), 1e-12)


@pytest.mark.parametrize(
    ("heads", "key_heads", "options"),
    [(6, 2, {}), (6, 4, {"enable_gqa": True}), (2, 6, {"enable_gqa": True}), (6, 12, {"enable_gqa": True})],
)
@pytest.mark.parametrize("name", OPERATORS)
def test_refuses_other_numbers_of_heads(name, heads, key_heads, options):
    with pytest.raises(
        UserError, match=rf"key \(2, {key_heads}, 23, 5\) .* query \(2, {heads}, 19, 5\).* enable_gqa=True"
    ):
        OPERATORS[name](*draw(heads, key_heads), 7, **options)


@pytest.mark.parametrize("name", OPERATORS)
def test_key_and_value_have_the_same_heads(name):
    query, key, _, projection = draw(6, 2)
    with pytest.raises(UserError, match=r"value \(2, 3, 23, 3\) has to be \(B, H, S, D\)"):
        OPERATORS[name](query, key, draw(6, 3)[2], projection, 7, enable_gqa=True)


@pytest.mark.parametrize("name", OPERATORS)
def test_an_empty_batch(name):
    query, key, value, projection = draw(6, 2)
    mask = torch.ones(0, 23, dtype=torch.bool)
    out = OPERATORS[name](query[:0], key[:0], value[:0], projection, 7, enable_gqa=True, attn_mask=mask)
    assert out.shape == (0, 6, 19, 3)


# Operators with clusters, as functions of query, key and value.
LANDMARKS = {
    "landmarks": partial(landmark_attention, num_landmarks=6),
    "window": partial(landmark_attention, num_landmarks=6, window=5, value_weight=0.5),
    "paired": partial(paired_landmark_attention, num_landmarks=6, num_query_landmarks=4, num_exact=2),
}


@pytest.mark.parametrize("backend", ["torch", "naive"])
@pytest.mark.parametrize(("heads", "key_heads"), [(6, 2), (6, 1), (6, 3), (3, 3)])
@pytest.mark.parametrize("name", LANDMARKS)
def test_landmarks_of_repeated_keys_and_values(name, heads, key_heads, backend):
    operator, (*tensors, _) = LANDMARKS[name], draw(heads, key_heads)
    options = {"key_lengths": torch.tensor([23, 9]), "backend": backend}
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = operator(*leaves, enable_gqa=True, **options)
    cotangent = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, cotangent)

    query, key, value = (x.clone().requires_grad_() for x in tensors)
    repeated = [torch.stack([x[:, h * key_heads // heads] for h in range(heads)], 1) for x in (key, value)]
    expected = operator(query, *repeated, **options)
    assert torch.equal(out, expected)
    expected_gradients = torch.autograd.grad(expected, [query, key, value], cotangent)
    for which, reference, result in zip(("query", "key", "value"), expected_gradients, gradients, strict=True):
        assert_close(f"grad of {which}", reference, result, 1e-12)
    if heads != key_heads:
        with pytest.raises(UserError, match=r"key \(2, \d, 23, 5\) .* query \(2, 6, 19, 5\).* enable_gqa=True"):
            operator(*tensors, **options)
    out = operator(*(x[:0] for x in tensors), enable_gqa=True)
    assert out.shape == (0, heads, 19, 3)


def test_given_clusters_are_those_of_the_heads_of_the_keys():
    query, key, value, _ = draw(6, 2)
    labels = assign_key_clusters(key, value, 6, num_steps=2, value_weight=0.0)
    out = landmark_attention(query, key, value, 6, num_steps=2, enable_gqa=True)
    assert torch.equal(out, landmark_attention(query, key, value, 6, assignment=labels, enable_gqa=True))
    with pytest.raises(UserError, match=r"assignment has to be int64 of shape \(2, 2, 23\)"):
        landmark_attention(query, key, value, 6, assignment=labels.repeat_interleave(3, 1), enable_gqa=True)
