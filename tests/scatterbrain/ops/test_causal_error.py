"""The measurement of errors under a causal mask: its forms against loops over queries, and its table."""

import json
import math

import numpy as np
import pytest
import torch

from tests.scatterbrain.ops import causal_error

LENGTH = 216


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, LENGTH, 8, generator=generator, dtype=torch.float64) for _ in "qkv"]


def blocks_of_a_query(query, key, value, i, num_chunks, taylor):
    """Output (D,) of one query of one head by the definition."""
    scale, own = query.shape[-1] ** -0.5, i // 64
    chunk = [slice(64 * c, 64 * (c + 1)) for c in range(own + 1)]
    mean_query = query[chunk[own]].mean(0)
    score = [mean_query @ key[part].mean(0) for part in chunk]
    score[own] = math.inf
    best = sorted(range(own + 1), key=lambda c: -score[c])[:num_chunks]
    total, out, share, first = 0.0, torch.zeros(value.shape[-1]).double(), 0.0, torch.zeros(8, 8).double()
    for j in range(i + 1):
        c = j // 64
        if c not in best and not taylor:
            continue
        weight = (scale * query[i] @ (key[j] if c in best else key[chunk[c]].mean(0))).exp()
        total, out = total + weight, out + weight * value[j]
        share = share + (weight if c not in best else 0.0)
    for j in range(64 * own):
        first += torch.outer(key[j] - key[chunk[j // 64]].mean(0), value[j])
    out = out / total
    return out + share / total * scale / (64 * own) * query[i] @ first if taylor and own else out


@pytest.mark.parametrize("taylor", [False, True])
@pytest.mark.parametrize("num_chunks", [1, 2])
def test_best_blocks(tensors, num_chunks, taylor):
    out, columns = causal_error.best_blocks(*tensors, 64 * num_chunks, taylor)
    for head, i in ((0, 5), (1, 63), (0, 64), (1, 127), (0, 150), (1, 199)):
        expected = blocks_of_a_query(*(x[0, head] for x in tensors), i, num_chunks, taylor)
        torch.testing.assert_close(out[0, head, i], expected)
    assert 30 < columns < 64 * num_chunks + taylor * 3


@pytest.mark.parametrize("taylor", [False, True])
def test_best_blocks_that_are_all(tensors, taylor):
    out, columns = causal_error.best_blocks(*tensors, LENGTH, taylor)
    full, seen = causal_error.local(*tensors, LENGTH)
    torch.testing.assert_close(out, full)
    assert columns == pytest.approx(seen) == pytest.approx((LENGTH + 1) / 2)


@pytest.mark.parametrize("name", causal_error.FORMS)
def test_the_future_has_no_influence(tensors, name):
    tensors = [x.float() for x in tensors]
    before, _ = causal_error.FORMS[name](*tensors)
    query, key, value = (x.clone() for x in tensors)
    for x in (key, value):
        x[:, :, 128:] = 7.0
    # the scores of chunks depend on the mean query of a chunk, which holds later queries of the same chunk
    query[:, :, 128:] = -1.0
    after, _ = causal_error.FORMS[name](query, key, value)
    torch.testing.assert_close(after[:, :, :128], before[:, :, :128])


def test_the_table(tmp_path, monkeypatch, capsys):
    generator = np.random.default_rng(0)
    arrays = {f"{name}3": generator.standard_normal((1, LENGTH, 2, 8)).astype("float16") for name in "qkv"}
    np.savez(tmp_path / "net_qkv.npz", **arrays)
    output = tmp_path / "error.json"
    command = ["causal_error", "--inputs", str(tmp_path / "net_qkv.npz"), "--heads", "1", "--output", str(output)]
    monkeypatch.setattr("sys.argv", command)
    causal_error.main()
    assert "| error / columns | net 3, N = 216 |" in capsys.readouterr().out
    results = json.loads(output.read_text())["results"]
    assert [row["form"] for row in results] == list(causal_error.FORMS)
    assert all(math.isfinite(row["error"]) for row in results)
