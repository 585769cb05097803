"""Learned features, operator and modules: against loops and the specification, and what the window keeps exact."""

from __future__ import annotations

import pytest
import torch

from scatterbrain.attention import create_attention
from scatterbrain.attention.performer import PerformerAttention
from scatterbrain.attention.sblocal import SBLocalAttention
from scatterbrain.errors import UserError
from scatterbrain.ops.common.windows import window_mask
from scatterbrain.ops.full import full_attention
from scatterbrain.ops.learned import FeatureMap, learned_feature_attention, naive_learned_feature_attention
from tests.helpers import assert_close

WIDTH, HEADS, FEATURES, SCALE = 8, 2, 6, 0.4
# float32 evaluations of one result
ROUNDING = 2e-5

BUILD = {
    "performer": lambda **options: PerformerAttention(WIDTH, FEATURES, SCALE, **options),
    "sblocal": lambda **options: SBLocalAttention(7, WIDTH, FEATURES, SCALE, **options),
}


def draw_maps(heads: int = HEADS, size: float = 0.5) -> tuple[FeatureMap, FeatureMap]:
    """Maps of queries and of keys, float64."""
    draw = lambda *shape: size * torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    return tuple(FeatureMap(draw(heads, FEATURES, WIDTH), draw(heads, FEATURES), draw(heads)) for _ in range(2))


def draw(num_queries: int = 40, num_keys: int = 40, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Query, key (2, H, N, 8), value (2, H, S, 5)."""
    sizes = ((num_queries, WIDTH), (num_keys, WIDTH), (num_keys, 5))
    return [torch.randn(2, HEADS, n, width, dtype=torch.float64).to(dtype) for n, width in sizes]


def module(name: str, heads: int = HEADS, **options) -> PerformerAttention | SBLocalAttention:
    """A module with drawn maps in place of those it starts with."""
    attention = BUILD[name](learned_heads=heads, **options)
    for parameter, value in zip(attention.parameters(), (x for each in draw_maps(heads) for x in each), strict=True):
        parameter.data.copy_(value)
    return attention


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("window", [0, 5])
def test_specification_is_the_definition(heads, window):
    query, key, value = draw(9, 12)
    maps = draw_maps(heads)
    out, weights = naive_learned_feature_attention(query, key, value, *maps, window, SCALE)
    in_window = window_mask(9, 12, window) if window else torch.zeros(9, 12, dtype=torch.bool)
    for b, h, i in ((0, 0, 0), (1, 1, 8), (0, 1, 4)):
        row = []
        for j in range(12):
            q, k = query[b, h, i], key[b, h, j]
            if in_window[i, j]:
                row.append((SCALE * q @ k).exp())
                continue
            features = []
            for x, (weight, bias, norm) in zip((q, k), maps, strict=True):
                own = h % heads
                features.append([(weight[own, m] @ x + bias[own, m] - norm[own] * x @ x).exp() for m in range(6)])
            row.append(sum(a * b for a, b in zip(*features, strict=True)))
        row = torch.stack(row)
        assert_close("weights", row / row.sum(), weights[b, h, i], 1e-12)
        assert_close("out", (row / row.sum()) @ value[b, h], out[b, h, i], 1e-12)


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(40, 40), (33, 70), (70, 33)])
@pytest.mark.parametrize("window", [0, 7, 200])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "lengths", "holes"])
def test_output_and_gradients_against_the_specification(heads, num_queries, num_keys, window, is_causal, mask):
    tensors = draw(num_queries, num_keys)
    maps = draw_maps(heads)
    masks = {"is_causal": is_causal}
    if mask == "lengths":
        masks["key_lengths"] = torch.tensor([num_keys, 11])
    if mask == "holes":
        masks["attn_mask"] = torch.arange(num_keys).remainder(3).ne(torch.tensor([[0], [1]]))
    leaves = [x.clone().requires_grad_() for x in (*tensors, *maps[0], *maps[1])]
    again = [x.clone().requires_grad_() for x in leaves]
    expected, _ = naive_learned_feature_attention(
        *leaves[:3], FeatureMap(*leaves[3:6]), FeatureMap(*leaves[6:]), window, SCALE, **masks
    )
    options = {"scale": SCALE, **masks}
    got = learned_feature_attention(*again[:3], FeatureMap(*again[3:6]), FeatureMap(*again[6:]), window, **options)
    assert_close("out", expected, got, 1e-9)
    cotangent = torch.randn_like(expected)
    names = ["query", "key", "value", *(f"{side}.{name}" for side in "qk" for name in FeatureMap._fields)]
    gradients = (
        torch.autograd.grad((out * cotangent).sum(), each, allow_unused=True, materialize_grads=True)
        for out, each in ((expected, leaves), (got, again))
    )
    for name, one, other in zip(names, *gradients, strict=True):
        # some are zero: of the norm of queries without a window, of all maps with nothing outside it
        torch.testing.assert_close(other, one, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("causal", [False, True])
def test_the_start_is_random_features(name, causal):
    query, key, value = (x.transpose(1, 2) for x in draw(dtype=torch.float32))
    for heads in (1, HEADS):
        learned = BUILD[name](learned_heads=heads, seed=3, causal=causal)
        assert_close(
            "out", BUILD[name](seed=3, causal=causal)(query, key, value)[0], learned(query, key, value)[0], 1e-5
        )
        assert learned.sizes() == BUILD[name]().sizes()
        assert learned.memory_columns(100) == BUILD[name]().memory_columns(100)


@pytest.mark.parametrize("size", [0.5, 30.0])
def test_the_window_is_exact_whatever_the_features_are(size):
    """A shared maximum, as random features have it, underflows to nan with the larger maps."""
    query, key, value = draw(dtype=torch.float32)
    maps = draw_maps(size=size)
    full = full_attention(query, key, value, scale=SCALE)
    assert_close("out", full, learned_feature_attention(query, key, value, *maps, 80, scale=SCALE), ROUNDING)
    # the ratios of weights in the window are those of full attention, and all sum to one
    attention = module("sblocal")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    weights = attention(q, k, v, need_weights=True)[1]
    exact = (SCALE * query.double() @ key.double().transpose(-2, -1)).masked_fill(~window_mask(40, 40, 7), -torch.inf)
    inside = weights.masked_fill(~window_mask(40, 40, 7), 0.0)
    assert_close("window", exact.softmax(-1), inside / inside.sum(-1, keepdim=True), ROUNDING)
    assert_close("sums", torch.ones(2, HEADS, 40), weights.sum(-1), ROUNDING)
    assert (weights.masked_fill(window_mask(40, 40, 7), 0.0).sum(-1) > 0).all()


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("causal", [False, True])
def test_weights_average_the_values_to_the_output(name, causal):
    query, key, value = (x.transpose(1, 2) for x in draw(33, 40, torch.float32))
    lengths = torch.tensor([40, 11])
    for heads in (1, HEADS):
        out, weights = module(name, heads, causal=causal)(query, key, value, key_lengths=lengths, need_weights=True)
        assert_close("out", torch.einsum("bhts,bshd->bthd", weights, value), out, ROUNDING)
        assert (weights[1, ..., 11:] == 0).all()
        assert not causal or (weights.triu(1) == 0).all()


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("content", [float("nan"), float("inf"), 1e20])
def test_what_is_hidden_has_no_influence(name, content):
    query, key, value = (x.transpose(1, 2) for x in draw(dtype=torch.float32))
    for causal, masks in ((False, {"key_lengths": torch.tensor([40, 23])}), (True, {})):
        attention = module(name, causal=causal)
        before = attention(query, key, value, **masks)[0]
        q, k, v = query.clone(), key.clone(), value.clone()
        for x in (k, v, q) if causal else (k, v):
            x[1, 23:] = content
        after = attention(q, k, v, **masks)[0]
        assert torch.equal(before[:, :23], after[:, :23])


@pytest.mark.parametrize("name", BUILD)
def test_state_dict_holds_the_maps_and_a_redraw_leaves_them(name):
    tensors = [x.transpose(1, 2) for x in draw(dtype=torch.float32)]
    trained, other = module(name), BUILD[name](learned_heads=HEADS)
    assert set(trained.state_dict()) == {
        f"learned_features.{side}_{part}" for side in ("query", "key") for part in FeatureMap._fields
    }
    assert not torch.allclose(trained(*tensors)[0], other(*tensors)[0], atol=1e-3)
    other.load_state_dict(trained.state_dict())
    other.redraw_projection(9)
    assert torch.equal(trained(*tensors)[0], other(*tensors)[0])
    with pytest.raises(RuntimeError, match="learned_features"):
        BUILD[name]().load_state_dict(trained.state_dict())


@pytest.mark.parametrize("name", BUILD)
def test_grouped_queries_dropout_and_autocast(name):
    query, key, value = (x.transpose(1, 2) for x in draw(dtype=torch.float32))
    attention = module(name)
    repeated = [x[:, :, :1].expand(-1, -1, HEADS, -1) for x in (key, value)]
    out = attention(query, key[:, :, :1], value[:, :, :1], enable_gqa=True)[0]
    assert_close("out", attention(query, *repeated)[0], out, ROUNDING)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close("autocast", attention(query, key, value)[0], attention(query, key, value)[0].float(), 1e-2)
    attention.attention_dropout = 0.5
    assert torch.equal(attention.eval()(query, key, value)[0], module_like(attention)(query, key, value)[0])
    assert not torch.allclose(
        attention.train()(query, key, value)[0], attention.eval()(query, key, value)[0], atol=1e-2
    )


def module_like(attention: torch.nn.Module) -> torch.nn.Module:
    """A copy without dropout."""
    name = "sblocal" if isinstance(attention, SBLocalAttention) else "performer"
    copy = BUILD[name](learned_heads=HEADS)
    copy.load_state_dict(attention.state_dict())
    return copy


def test_refuses():
    tensors = draw(dtype=torch.float32)
    maps = draw_maps()
    with pytest.raises(UserError, match="backend='triton' is not available here"):
        learned_feature_attention(*tensors, *maps, backend="triton")
    with pytest.raises(UserError, match="backend='triton' is not available here"):
        module("sblocal", backend="triton")(*(x.transpose(1, 2) for x in tensors))
    with pytest.raises(UserError, match=r"query_map.weight has to be \(2 or 1, features, 8\).*got \(3, 6, 8\)"):
        learned_feature_attention(*tensors, *draw_maps(3))
    with pytest.raises(UserError, match=r"key_map.bias and key_map.norm have to be"):
        learned_feature_attention(*tensors, maps[0], maps[1]._replace(norm=torch.zeros(1)))
    with pytest.raises(UserError, match="have to be equal in shape"):
        learned_feature_attention(*tensors, maps[0], FeatureMap(*(x[:1] for x in maps[1])))
    with pytest.raises(UserError, match="window=-1"):
        learned_feature_attention(*tensors, *maps, -1)
    for options in ({"row_norm": "sqrt_dim"}, {"centre": "keys"}):
        with pytest.raises(UserError, match="learned_heads=1 takes no options of random features"):
            BUILD["performer"](learned_heads=1, **options)
    with pytest.raises(UserError, match="learned_heads=0"):
        create_attention("sblocal", 64, WIDTH, learned_heads=0)
    with pytest.raises(UserError, match="Attention 'sbsmyrf' has no option 'learned_heads'"):
        create_attention("sbsmyrf", 64, WIDTH, learned_heads=1)
