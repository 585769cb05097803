"""Boolean masks of the keys, with padding anywhere: against renormalised weights and the specifications."""

from __future__ import annotations

import pytest
import torch

from scatterbrain.errors import UserError
from scatterbrain.ops.scatterbrain import triton as fused
from tests.helpers import OPERATORS, TensorRecorder, assert_close, draw_inputs, operators_and_windows

# float64 against float64, and float32 against it: outputs and gradients, as in test_against_naive.py
DOUBLE, SINGLE = 1e-12, (2e-6, 1e-5)


def draw_mask(kind: str, num_keys: int) -> torch.Tensor:
    """Mask (2, S): two samples that differ."""
    mask = torch.ones(2, num_keys, dtype=torch.bool)
    if kind == "left":
        mask[0, : num_keys // 2 + 1] = False
        mask[1, :1] = False
    elif kind == "holes":
        mask[0] = torch.rand(num_keys) < 0.4
        mask[1, num_keys // 3 : num_keys // 3 * 2] = False
    elif kind == "none of a sample":
        mask[0] = False
        mask[1, ::2] = False
    return mask


KINDS = ["left", "holes", "none of a sample"]
SHAPES = [(50, 50), (37, 101), (101, 37), (1, 1), (130, 131)]


def results(function, tensors, cotangent) -> dict[str, torch.Tensor]:
    """Output and gradients by name; a gradient that does not exist is left out."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, cotangent.to(out.dtype), allow_unused=True)
    named = dict(zip(("query", "key", "value", "projection"), gradients, strict=True))
    return {"out": out.detach()} | {f"grad of {name}": x for name, x in named.items() if x is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("name", "window"), operators_and_windows(1, 8, 200))
def test_weights_are_those_without_a_mask_normalised_over_visible_keys(name, window, is_causal, kind):
    *tensors, projection = draw_inputs(length=41, num_keys=37, width=5, value_width=3)
    mask = draw_mask(kind, 37)
    _, weights = OPERATORS[name].naive(*tensors, projection, window, is_causal=is_causal)
    weights = weights * mask[:, None, None]
    total = weights.sum(-1, keepdim=True)
    expected = weights / total.masked_fill(total == 0, 1.0)
    poisoned = [tensors[0], *(x.masked_fill(~mask[:, None, :, None], torch.nan) for x in tensors[1:])]
    out, result = OPERATORS[name].naive(*poisoned, projection, window, is_causal=is_causal, attn_mask=mask)
    assert_close("weights", expected, result, DOUBLE)
    assert_close("out", expected @ tensors[2], out, DOUBLE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("length", "num_keys"), SHAPES)
@pytest.mark.parametrize(("name", "window"), operators_and_windows(7, 66))
def test_torch_is_the_specification_and_hidden_keys_have_no_influence(name, window, length, num_keys, is_causal, kind):
    operator, mask = OPERATORS[name], draw_mask(kind, num_keys)
    tensors = draw_inputs(2, 2, length, num_keys, 5, 3, rows=4, dtype=torch.float32)
    cotangent = torch.randn(2, 2, length, 3)
    options = {"is_causal": is_causal, "attn_mask": mask}
    expected = results(lambda *x: operator.naive(*x, window, **options)[0], [x.double() for x in tensors], cotangent)
    hidden = ~mask[:, None, :, None]
    for fill in (0.0, torch.nan, torch.inf):
        query, key, value, projection = tensors
        tensors = query, key.masked_fill(hidden, fill), value.masked_fill(hidden, fill), projection
        for dtype in (torch.float64, torch.float32):
            got = results(lambda *x: operator(*x, window, **options), [x.to(dtype) for x in tensors], cotangent)
            assert got.keys() == expected.keys()
            for which, reference in expected.items():
                bound = DOUBLE if dtype == torch.float64 else SINGLE[which != "out"]
                assert_close(f"{which} ({dtype}, {fill})", reference, got[which], bound)
                if which in ("grad of key", "grad of value"):
                    assert (got[which].masked_select(hidden) == 0).all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_wide_heads(is_causal):
    # above a width of 128, one maximum over all keys is not safe
    operator, mask = OPERATORS["scatterbrain"], draw_mask("left", 170)
    tensors = draw_inputs(2, 2, 150, 170, width=144)
    options = {"is_causal": is_causal, "attn_mask": mask}
    expected, _ = operator.naive(*tensors, 40, **options)
    assert_close("out", expected, operator(*tensors, 40, **options), DOUBLE)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_mask_of_leading_keys_is_key_lengths_and_both_hide(name, is_causal):
    operator, tensors = OPERATORS[name], draw_inputs(length=33, num_keys=40)
    lengths, mask = torch.tensor([17, 0]), draw_mask("holes", 40)
    leading = torch.arange(40) < lengths[:, None]
    expected = operator(*tensors, 7, is_causal=is_causal, key_lengths=lengths)
    torch.testing.assert_close(operator(*tensors, 7, is_causal=is_causal, attn_mask=leading), expected)
    both = operator(*tensors, 7, is_causal=is_causal, attn_mask=mask, key_lengths=lengths)
    torch.testing.assert_close(both, operator(*tensors, 7, is_causal=is_causal, attn_mask=mask & leading))
    assert (both - expected).abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["torch", "naive"])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_shape_that_broadcasts_over_heads_and_queries(name, backend):
    operator, tensors, mask = OPERATORS[name], draw_inputs(length=20), draw_mask("holes", 20)
    expected = operator(*tensors, 7, attn_mask=mask, backend=backend)
    assert torch.equal(operator(*tensors, 7, attn_mask=mask[:, None, None], backend=backend), expected)


def test_full_attention_is_scaled_dot_product_attention():
    query, key, value, _ = draw_inputs(length=20)
    mask = draw_mask("left", 20)[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert_close("out", expected, OPERATORS["full"](query, key, value, None, 0, attn_mask=mask), DOUBLE)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("name", "window"), operators_and_windows(4))
def test_gradcheck(name, window, is_causal):
    operator, mask = OPERATORS[name], torch.tensor([[0, 1, 0, 1, 1, 0, 1], [0, 0, 0, 1, 1, 1, 1]]).bool()
    tensors = [x.requires_grad_() for x in draw_inputs(2, 1, 5, 7, 3, 2, rows=2)]
    tensors[3].requires_grad_("projection" in operator.takes)
    assert torch.autograd.gradcheck(lambda *x: operator(*x, window, is_causal=is_causal, attn_mask=mask), tensors)


@pytest.mark.parametrize("name", ["performer", "scatterbrain"])
def test_eps_and_dropout(name):
    operator, mask = OPERATORS[name], draw_mask("none of a sample", 30)
    tensors = draw_inputs(length=30)
    if name == "performer":
        expected, _ = operator.naive(*tensors, 0, eps=0.3, attn_mask=mask)
        assert_close("out", expected, operator(*tensors, 0, eps=0.3, attn_mask=mask), DOUBLE)
    out = operator(*tensors, 3, attn_mask=mask, dropout_p=0.5)
    assert torch.isfinite(out).all()
    assert (out[0] == 0).all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["local", "performer", "scatterbrain"])
def test_no_dense_mask(name, is_causal):
    tensors = draw_inputs(1, 1, 1024, width=64, rows=12, dtype=torch.float32)
    mask = draw_mask("left", 1024)[:1]
    with TensorRecorder() as recorder:
        OPERATORS[name](*tensors, 49, is_causal=is_causal, attn_mask=mask)
    assert 1024 * 64 <= recorder.largest < 4 * 1024 * 64


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(2, 7),
        torch.ones(2, 7, dtype=torch.int64),
        torch.ones(6, 7, dtype=torch.bool),
        torch.ones(2, 6, dtype=torch.bool),
        torch.ones(2, 1, 6, 7, dtype=torch.bool),
        torch.ones(2, 2, 1, 7, dtype=torch.bool),
    ],
    ids=lambda mask: f"{mask.dtype}-{tuple(mask.shape)}",
)
def test_refuses_other_masks(name, mask):
    tensors = draw_inputs(2, 2, 6, 7)
    with pytest.raises(UserError, match=r"attn_mask has to be boolean of shape \(2, 7\) or \(2, 1, 1, 7\).* mask == 0"):
        OPERATORS[name](*tensors, 3, attn_mask=mask)
    with pytest.raises(UserError, match="attn_mask has to be a tensor"):
        OPERATORS[name](*tensors, 3, attn_mask=mask.tolist())


@pytest.mark.parametrize("name", ["local", "performer", "scatterbrain"])
def test_the_kernels_take_no_mask(name, monkeypatch):
    pytest.importorskip("triton")
    operator, tensors = OPERATORS[name], draw_inputs(length=16, dtype=torch.float32)
    mask = draw_mask("left", 16)
    if torch.cuda.is_available():
        tensors, mask = [x.cuda() for x in tensors], mask.cuda()
    with pytest.raises(UserError, match=r"backend='triton' cannot run this: .* no attn_mask\. Choose 'torch'"):
        operator(*tensors, 3, attn_mask=mask, backend="triton")
    expected = operator(*tensors, 3, attn_mask=mask, backend="torch")
    monkeypatch.setattr(fused, "is_fast", lambda *_, **__: True)
    assert torch.equal(operator(*tensors, 3, attn_mask=mask), expected)
