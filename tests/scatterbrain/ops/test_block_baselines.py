"""The dense definition of PISA and of its exact blocks alone, against loops over queries and keys."""

from __future__ import annotations

import math

import pytest
import torch

from scatterbrain.ops.sparse.naive import naive_block_attention


def by_loops(query, key, value, num_blocks, scale, taylor, block):
    """Output (N, D) of one head, pair by pair."""
    length = len(key)
    blocks = [list(range(start, min(start + block, length))) for start in range(0, length, block)]
    moment = sum(torch.outer(key[j] - key[own].mean(0), value[j]) for own in blocks for j in own)
    out = []
    for own in blocks:
        scores = [float(query[own].mean(0) @ key[others].mean(0)) for others in blocks]
        chosen = sorted(range(len(blocks)), key=scores.__getitem__)[-num_blocks:]
        for i in own:
            total, approximated, numerator = 0.0, 0.0, torch.zeros_like(value[0])
            for number, others in enumerate(blocks):
                mean = math.exp(scale * query[i] @ key[others].mean(0))
                for j in others:
                    weight = math.exp(scale * query[i] @ key[j]) if number in chosen else mean * taylor
                    total += weight
                    approximated += weight * (number not in chosen)
                    numerator = numerator + weight * value[j]
            numerator = numerator + approximated * scale / length * (query[i] @ moment)
            out.append(numerator / total)
    return torch.stack(out)


@pytest.mark.parametrize("taylor", [False, True])
@pytest.mark.parametrize(("length", "num_blocks"), [(12, 1), (14, 2), (14, 4)])
def test_against_loops(length, num_blocks, taylor):
    generator = torch.Generator().manual_seed(length)
    query, key, value = torch.randn(3, 2, 1, length, 5, generator=generator, dtype=torch.float64)
    out = naive_block_attention(query, key, value, num_blocks, 0.7, taylor, block=4)
    for sample in range(2):
        expected = by_loops(query[sample, 0], key[sample, 0], value[sample, 0], num_blocks, 0.7, taylor, 4)
        torch.testing.assert_close(out[sample, 0], expected)


def test_error_on_a_trained_network(golden):
    stored = golden("real_qkv")
    query, key, value = (torch.from_numpy(stored[f"stage2.{kind}"]).double().unsqueeze(1) for kind in "qkv")
    scale = 576**-0.5
    full = (scale * query @ key.mT).softmax(-1) @ value
    for num_blocks, taylor, expected in ((1, True, 0.543), (3, True, 0.385), (3, False, 0.474)):
        out = naive_block_attention(query, key, value, num_blocks, scale, taylor)
        error = ((out - full).flatten(1).norm(dim=1) / full.flatten(1).norm(dim=1)).mean().item()
        assert error == pytest.approx(expected, abs=5e-4)
