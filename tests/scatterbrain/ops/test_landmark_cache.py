"""Decoding with the cache of landmarks equals causal landmark attention of the whole sequence."""

from __future__ import annotations

import pytest
import torch

from scatterbrain.errors import UserError
from scatterbrain.ops.clusters.causal import LandmarkCache, causal_landmark_attention
from tests.helpers import assert_close, draw_inputs

LENGTH = 150


def tensors(heads=2, length=LENGTH, dtype=torch.float64):
    query = draw_inputs(2, heads, length, dtype=torch.float32)[0]
    key, value = draw_inputs(2, 2, length, dtype=torch.float32)[1:3]
    return [x.to(dtype) for x in (query, key, value)]


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize(
    ("num_landmarks", "window", "chunk", "value_weight"),
    [(4, 0, 8, 0.0), (3, 20, 7, 0.0), (1, 3, 2, 0.0), (5, 1, 64, 0.0), (2, 9, 3, 0.0), (3, 0, 8, 4.0)],
)
def test_steps_equal_the_full_pass(heads, num_landmarks, window, chunk, value_weight):
    query, key, value = tensors(heads)
    options = {"chunk": chunk, "enable_gqa": True, "scale": 0.4, "value_weight": value_weight}
    full = causal_landmark_attention(query, key, value, num_landmarks, window, **options)
    cache = LandmarkCache(num_landmarks, window, chunk, value_weight=value_weight)
    for i in range(LENGTH):
        out = cache.step(*(x[:, :, i : i + 1] for x in (query, key, value)), scale=0.4)
        assert_close(f"token {i}", full[:, :, i : i + 1], out, 1e-11)


@pytest.mark.parametrize(
    ("dtype", "value_weight"), [(torch.float32, 0.0), (torch.bfloat16, 0.0), (torch.float32, 2.0)], ids=str
)
@pytest.mark.parametrize("prompt", [1, 8, 77, 120])
def test_prefill_then_steps(prompt, dtype, value_weight):
    query, key, value = tensors(4, dtype=dtype)
    options = {"chunk": 8, "value_weight": value_weight}
    full = causal_landmark_attention(query, key, value, 4, 16, enable_gqa=True, **options)
    cache = LandmarkCache(4, 16, **options)
    out = [cache.prefill(*(x[:, :, :prompt] for x in (query, key, value)))]
    out += [cache.step(*(x[:, :, i : i + 1] for x in (query, key, value))) for i in range(prompt, LENGTH)]
    assert cache.length == LENGTH
    assert out[0].dtype == dtype
    assert_close("out", full, torch.cat(out, 2), 1e-5 if dtype == torch.float32 else 1e-2)


def test_parts_of_any_length():
    query, key, value = tensors()
    full = causal_landmark_attention(query, key, value, 3, 9, chunk=5)
    cache, end = LandmarkCache(3, 9, 5), 0
    for size in (1, 13, 5, 64, 40, 27):
        cache.append(key[:, :, end : end + size], value[:, :, end : end + size])
        end += size
        assert_close("out", full[:, :, end - 1 : end], cache.attend(query[:, :, end - 1 : end]), 1e-11)
    assert end == LENGTH


@pytest.mark.parametrize(("prompt", "value_weight"), [(40, 0.0), (77, 0.0), (77, 2.0)])
def test_padding_before_the_prompts(prompt, value_weight):
    query, key, value = tensors(4, 120)
    mask = torch.arange(120) >= torch.tensor([0, 21])[:, None]
    hidden = ~mask[:, None, :, None]
    mask = mask[:, None, None]
    options = {"chunk": 8, "value_weight": value_weight}
    full = causal_landmark_attention(query, key, value, 4, 16, enable_gqa=True, attn_mask=mask, **options)
    key, value = key.masked_fill(hidden, torch.nan), value.masked_fill(hidden, torch.nan)
    cache = LandmarkCache(4, 16, **options)
    start = [x[:, :, :prompt] for x in (query, key, value)]
    out = [cache.prefill(*start, attn_mask=mask[..., :prompt].view(2, prompt))]
    out += [cache.step(*(x[:, :, i : i + 1] for x in (query, key, value))) for i in range(prompt, 120)]
    assert_close("out", full, torch.cat(out, 2), 1e-11)


def test_a_token_that_sees_nothing_gets_zero():
    query, key, value = tensors(2, 30)
    cache, mask = LandmarkCache(2, 0, 4), torch.zeros(2, 30, dtype=torch.bool)
    cache.append(key, value, mask)
    assert (cache.attend(query[:, :, :1]) == 0).all()


def test_memory_does_not_grow_with_the_sequence():
    key, value = torch.randn(2, 1, 1, 20_000, 8).unbind()
    cache = LandmarkCache(4, 64, 16)
    sizes = []
    for part in range(10):
        cache.append(*(x[:, :, 2000 * part : 2000 * (part + 1)] for x in (key, value)))
        sizes.append(cache.num_elements())
    # W / 2 + 2 C keys, and two nodes of each of 11 levels, once more as what products take
    assert max(sizes) <= (32 + 2 * 16) * 16 + 2 * 2 * 11 * 4 * 18 < 20_000 * 16 / 50


def test_autocast_changes_nothing():
    query, key, value = tensors(dtype=torch.float32)
    cache = [LandmarkCache(4, 16, 8) for _ in range(2)]
    plain = cache[0].prefill(query, key, value), cache[0].step(*(x[:, :, :1] for x in (query, key, value)))
    with torch.autocast("cpu", torch.bfloat16):
        out = cache[1].prefill(query, key, value), cache[1].step(*(x[:, :, :1] for x in (query, key, value)))
    assert all(torch.equal(x, y) for x, y in zip(plain, out, strict=True))


def test_errors_name_what_is_wrong():
    query, key, value = (x[:, :, :1] for x in tensors())
    cache = LandmarkCache(4)
    with pytest.raises(UserError, match="empty"):
        cache.attend(query)
    cache.step(query, key, value)
    with pytest.raises(UserError, match="one token"):
        cache.attend(query.expand(-1, -1, 2, -1))
    with pytest.raises(UserError, match="needs an empty one"):
        cache.prefill(query, key, value)
    with pytest.raises(UserError, match=r"attn_mask has to be boolean of shape \(2, 1\)"):
        cache.append(key, value, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(UserError, match="does not fit the cache"):
        cache.append(key[:1], value[:1])
    with pytest.raises(UserError, match="num_landmarks=65"):
        LandmarkCache(65)
    with pytest.raises(UserError, match="value_weight=-1"):
        LandmarkCache(4, value_weight=-1)


def test_refused_tokens_leave_the_cache_as_it_is():
    query, key, value = (x[:, :, :2] for x in tensors())
    cache = LandmarkCache(4)
    one = [x[:, :, :1] for x in (query, key, value)]
    cache.step(*one)
    other = torch.float16 if key.dtype != torch.float16 else torch.float32
    for call, match in (
        (lambda: cache.step(query, key, value), "one token"),
        (lambda: cache.step(one[0][..., 1:], *one[1:]), "query"),
        (lambda: cache.step(*one, scale=-1.0), "scale=-1.0"),
        (lambda: cache.step(*(x.to(other) for x in one)), "and the cache is"),
        (lambda: cache.append(key.to(other), value.to(other)), "and the cache is"),
        (lambda: cache.attend(None), "query has to be a tensor"),
    ):
        with pytest.raises(UserError, match=match):
            call()
        assert cache.length == 1
    empty = LandmarkCache(4)
    with pytest.raises(UserError, match="of the same tokens"):
        empty.prefill(one[0], key, value)
    with pytest.raises(UserError, match="attn_mask has to be a tensor"):
        empty.prefill(query, key, value, attn_mask=[[True, True]])
    assert empty.length == 0
