"""The specifications themselves, against loops over queries, keys and features in Python floats."""

from __future__ import annotations

import math

import pytest
import torch

from scatterbrain.ops.performer import naive_performer_attention
from src.checkpoints.seeded_weights import seeded_tensor
from tests.helpers import OPERATORS, assert_close, draw_inputs, load_golden, operators_and_windows

# Both sides are float64 and add at most a dozen terms.
ROUNDING = 1e-12


def kernel(name, query, key, projection, scale, in_window):
    """Unnormalised weight of one key for one query, all vectors as lists."""
    dot = sum(a * b for a, b in zip(query, key, strict=True))
    if name == "full" or (in_window and name in ("local", "scatterbrain")):
        return math.exp(scale * dot)
    if name == "local":
        return 0.0
    signs = (1,) if name == "performer" else (1, -1)
    total = 0.0
    for row in projection:
        for sign in signs:
            product = 1.0
            for x in (query, key):
                along = sum(a * b for a, b in zip(row, x, strict=True))
                norm = sum(a * a for a in x)
                product *= math.exp(sign * math.sqrt(scale) * along - scale * norm / 2)
            total += product
    return total / (len(signs) * len(projection))


def loop_attention(name, query, key, value, projection, window, scale, is_causal, key_lengths, eps=0.0):
    """Output and weights, one number at a time."""
    batch, heads, length, num_keys = *query.shape[:3], key.shape[2]
    out = torch.zeros(batch, heads, length, value.shape[3], dtype=torch.float64)
    weights = torch.zeros(batch, heads, length, num_keys, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                for j in range(num_keys):
                    if (is_causal and j > i) or (key_lengths is not None and j >= key_lengths[b]):
                        continue
                    in_window = -(window // 2) <= j - i < (window + 1) // 2
                    pair = query[b, h, i].tolist(), key[b, h, j].tolist()
                    weights[b, h, i, j] = kernel(name, *pair, projection.tolist(), scale, in_window)
                total = weights[b, h, i].sum() + eps
                if total > 0:
                    weights[b, h, i] /= total
                for j in range(num_keys):
                    out[b, h, i] += weights[b, h, i, j] * value[b, h, j]
    return out, weights


@pytest.mark.parametrize(("name", "window"), operators_and_windows(1, 4, 5))
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [None, [0, 3]])
@pytest.mark.parametrize(("length", "num_keys"), [(6, 6), (5, 8), (8, 5)])
def test_specification_against_a_loop(name, window, is_causal, lengths, length, num_keys):
    tensors = draw_inputs(2, 1, length, num_keys, width=3, value_width=2, rows=2)
    key_lengths = None if lengths is None else torch.tensor(lengths)
    expected = loop_attention(name, *tensors, window, 0.7, is_causal, lengths)
    result = OPERATORS[name].naive(*tensors, window, scale=0.7, is_causal=is_causal, key_lengths=key_lengths)
    for what, reference, got in zip(("out", "weights"), expected, result, strict=True):
        assert got.dtype == torch.float64
        assert_close(what, reference, got, ROUNDING)


def test_eps_of_performer_joins_the_normaliser():
    query, key, value, projection = draw_inputs(2, 1, 5, 6, width=3, value_width=2, rows=2)
    expected = loop_attention("performer", query, key, value, projection, 0, 0.7, False, [6, 0], eps=0.5)
    result = naive_performer_attention(query, key, value, projection, 0.7, False, torch.tensor([6, 0]), eps=0.5)
    for what, reference, got in zip(("out", "weights"), expected, result, strict=True):
        assert_close(what, reference, got, ROUNDING)


@pytest.mark.parametrize("name", OPERATORS)
def test_weights_sum_to_one_where_a_key_is_visible(name):
    tensors = draw_inputs(2, 1, 9, width=3, rows=2)
    _, weights = OPERATORS[name].naive(*tensors, 3, is_causal=True, key_lengths=torch.tensor([0, 9]))
    assert_close(
        "sums", torch.tensor([0.0, 1.0]).repeat_interleave(9).view(2, 1, 9).double(), weights.sum(-1), ROUNDING
    )


@pytest.mark.parametrize("entry", sorted(load_golden("attention")))
def test_specification_gives_the_stored_outputs(golden, entry):
    """Entries such as `sblocal.w7.m10.cold.causal.padded`, see `tests/golden/README.md`."""
    kind, *options = entry.split(".")
    sizes = {option[0]: int(option[1:]) for option in options if option[1:].isdigit()}
    query, key, value = (seeded_tensor(name, (2, 50, 2, 16)).transpose(1, 2) for name in ("query", "key", "value"))
    if "sharp" in options:
        query, key = 4 * query, 4 * key
    num_projections = sizes.get("m", 2) // (2 if kind == "sblocal" else 1)
    out, _ = OPERATORS["scatterbrain" if kind == "sblocal" else kind].naive(
        *(query, key, value, seeded_tensor("projection", (num_projections, 16)), sizes.get("w")),
        scale=0.3 if "cold" in options else None,
        is_causal="causal" in options,
        key_lengths=torch.tensor([50, 37]) if "padded" in options else None,
    )
    # another order of sums, with logits of up to 50
    assert_close(entry, torch.from_numpy(golden("attention")[entry]), out.transpose(1, 2)[:, ::3], 1e-9)
