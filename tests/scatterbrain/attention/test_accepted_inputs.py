"""What attention modules and operators take beside plain tensors, and what they refuse with one message."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scatterbrain import landmark_attention, paired_landmark_attention
from scatterbrain.attention import ATTENTIONS, create_attention
from scatterbrain.errors import UserError
from tests.helpers import OPERATORS

LENGTH, HEADS, WIDTH = 16, 2, 8


def create(name: str, **options) -> torch.nn.Module:
    return create_attention(name, LENGTH, WIDTH, memory_fraction=1 / 2, **options)


def draw(batch: int = 2) -> list[torch.Tensor]:
    return [torch.randn(batch, LENGTH, HEADS, WIDTH) for _ in range(3)]


PROJECTION = torch.randn(4, WIDTH)
CALLS = {
    **{
        name: lambda *tensors, operator=operator, **options: operator(*tensors, PROJECTION, 3, **options)
        for name, operator in OPERATORS.items()
    },
    "landmark": lambda *tensors, **options: landmark_attention(*tensors, 4, 3, **options),
    "paired": lambda *tensors, **options: paired_landmark_attention(*tensors, 4, 2, **options),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_operators_follow_sdpa_in_mixed_dtypes(name, backend):
    query, key, value = (x.transpose(1, 2) for x in draw())
    expected = CALLS[name](*(x.bfloat16() for x in (query, key, value)), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        out = CALLS[name](query, key, value.bfloat16(), backend=backend)
        sdpa = torch.nn.functional.scaled_dot_product_attention(query, key, value.bfloat16())
        with pytest.raises(UserError, match=r"value is torch\.float64"):
            CALLS[name](query, key, value.double(), backend=backend)
    assert out.dtype == sdpa.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)
    with pytest.raises(UserError, match=r"value is torch\.bfloat16"):
        CALLS[name](query, key, value.bfloat16(), backend=backend)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_modules_take_mixed_dtypes_under_autocast(name):
    query, key, value = draw()
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = create(name)(query, key, value.bfloat16(), need_weights=True)
    assert out.dtype == weights.dtype == torch.bfloat16
    assert out.isfinite().all()


@pytest.mark.parametrize("lengths", [None, []])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_empty_batches(name, lengths):
    leaves = [x.requires_grad_() for x in draw(0)]
    out, weights = create(name)(*leaves, key_lengths=lengths, need_weights=True)
    assert out.shape == (0, LENGTH, HEADS, WIDTH)
    assert weights.shape == (0, HEADS, LENGTH, LENGTH)
    out.sum().backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.parametrize("name", CALLS)
def test_empty_batches_of_operators(name):
    tensors = [x.transpose(1, 2).requires_grad_() for x in draw(0)]
    out = CALLS[name](*tensors[:2], tensors[2][..., :5])
    assert out.shape == (0, HEADS, LENGTH, 5)
    torch.autograd.grad(out.sum(), tensors)


@pytest.mark.parametrize("lengths", [[16, 5], (16, 5), np.array([16, 5]), torch.tensor([16, 5], dtype=torch.int32)])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_lengths_as_a_list(name, lengths):
    tensors = draw()
    attention = create(name)
    expected = attention(*tensors, key_lengths=torch.tensor([16, 5]))[0]
    assert torch.equal(attention(*tensors, key_lengths=lengths)[0], expected)


@pytest.mark.parametrize("lengths", ["16, 5", [16.0, 5.0], [[16], [5]], [16], [16, None], {16: 5}, 16])
@pytest.mark.parametrize("name", CALLS)
def test_refuses_lengths_that_are_none(name, lengths):
    with pytest.raises(UserError, match="key_lengths"):
        CALLS[name](*(x.transpose(1, 2) for x in draw()), key_lengths=lengths)


@pytest.mark.parametrize("name", CALLS)
def test_scale_as_a_tensor_without_dimensions(name):
    tensors = [x.transpose(1, 2) for x in draw()]
    expected = CALLS[name](*tensors, scale=0.25)
    for scale in (torch.tensor(0.25), np.float32(0.25)):
        assert torch.equal(CALLS[name](*tensors, scale=scale), expected)
    with pytest.raises(UserError, match="scale has no gradient"):
        CALLS[name](*tensors, scale=torch.tensor(0.25, requires_grad=True))


@pytest.mark.parametrize("scale", ["0.25", float("inf"), torch.ones(1), [0.25], True])
@pytest.mark.parametrize("name", CALLS)
def test_refuses_scales_that_are_no_number(name, scale):
    with pytest.raises(UserError, match=r"scale=.* has to be positive and finite"):
        CALLS[name](*(x.transpose(1, 2) for x in draw()), scale=scale)


@pytest.mark.parametrize("temperature", ["0.25", float("inf"), float("nan"), 0.0, [0.25]])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_refuses_temperatures_that_are_no_number(name, temperature):
    with pytest.raises(UserError, match=r"softmax_temp=.* has to be positive and finite"):
        create(name, softmax_temp=temperature)


@pytest.mark.parametrize("name", ["full", "local", "performer", "sblocal", "bs-longformer"])
def test_refuses_causal_that_is_not_boolean(name):
    # "false" would be true
    with pytest.raises(UserError, match=r"causal='false' is not valid\. Give true or false\."):
        create(name, causal="false")


NO_TENSORS = ["text", [[1.0]], np.ones((2, 2, 16, 8), dtype=np.float32), None, 3]


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("name", CALLS)
def test_operators_refuse_what_is_no_tensor(name, position):
    for wrong in NO_TENSORS:
        tensors = [x.transpose(1, 2) for x in draw()]
        tensors[position] = wrong
        with pytest.raises(UserError, match=f"{('query', 'key', 'value')[position]} has to be a tensor"):
            CALLS[name](*tensors)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_modules_refuse_what_is_no_tensor(name, position):
    attention = create(name)
    for wrong in NO_TENSORS:
        tensors = draw()
        tensors[position] = wrong
        with pytest.raises(UserError, match=f"{('query', 'key', 'value')[position]} has to be a tensor"):
            attention(*tensors)
    with pytest.raises(UserError, match="four dimensions"):
        attention(*(torch.randn(16, 8) for _ in range(3)))


@pytest.mark.parametrize("name", ["performer", "scatterbrain"])
def test_operators_refuse_projections_that_are_no_tensor(name):
    tensors = [x.transpose(1, 2) for x in draw()]
    with pytest.raises(UserError, match="projection has to be a tensor"):
        OPERATORS[name](*tensors, PROJECTION.numpy(), 3)


def test_reformer_has_keys_of_float64():
    query, _, value = (x.double() for x in draw(1))
    attention = create("reformer")
    # keys of float32 are off by 1e-8, and so are finite differences
    keys = attention._keys(query, query, None)
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones_like(keys[..., 0]), rtol=0, atol=1e-15)
    query.requires_grad_()
    assert torch.autograd.gradcheck(lambda q: attention(q, q, value)[0], [query])
