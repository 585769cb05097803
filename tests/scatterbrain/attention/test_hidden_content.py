"""What a query does not see has no influence on it, whatever it holds: forward and backward, every attention."""

from __future__ import annotations

import pytest
import torch

from scatterbrain.attention import ATTENTIONS, create_attention
from scatterbrain.errors import UserError
from scatterbrain.ops.clusters import landmark_attention
from scatterbrain.ops.clusters.triton import LEAST_TRITON
from scatterbrain.ops.common.backends import is_interpreted, no_kernels, triton_is_installed
from tests.helpers import OPERATORS

LENGTH, HEADS, WIDTH = 64, 2, 8
LENGTHS = torch.tensor([64, 41])
PADDING = (torch.arange(LENGTH) >= LENGTHS[:, None])[..., None, None]
# the first position that causal masking hides
FUTURE = 37
POISON = {"nan": float("nan"), "inf": float("inf"), "large": 1e20}


def create(name: str, **options) -> torch.nn.Module:
    return create_attention(name, LENGTH, WIDTH, memory_fraction=1 / 4, **options)


def can_be_causal(name: str) -> bool:
    try:
        create(name, causal=True)
    except UserError:
        return False
    return True


CAUSAL = [name for name in ATTENTIONS if can_be_causal(name)]


def draw() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, LENGTH, HEADS, WIDTH) for _ in range(3)]


def results(attention, tensors, read, key_lengths=None) -> dict[str, torch.Tensor]:
    """Output and weights of the rows `read` (B or 1, T, 1, 1), and the gradients of a sum over that output."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    out, weights = attention(*leaves, key_lengths=key_lengths, need_weights=True)
    out = out.masked_fill(~read, 0.0)
    weights = weights.detach().masked_fill(~read.transpose(1, 2), 0.0)
    cotangent = torch.linspace(0.5, 1.5, out.numel()).view_as(out)
    gradients = torch.autograd.grad((out * cotangent).sum(), leaves, allow_unused=True)
    gradients = dict(zip(("grad of query", "grad of key", "grad of value"), gradients, strict=True))
    return {"out": out.detach(), "weights": weights} | {k: g for k, g in gradients.items() if g is not None}


def compare(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.isfinite(tensor).all(), name
        torch.testing.assert_close(got[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("poison", ["nan", "large"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["local", "performer", "scatterbrain", "landmarks"])
@pytest.mark.skipif(not triton_is_installed(), reason="triton is not installed")
def test_kernels(name, is_causal, poison):
    device = "cpu" if is_interpreted() else "cuda"
    if name == "landmarks" and (reason := no_kernels(torch.empty(0, device=device), LEAST_TRITON)):
        pytest.skip(reason)
    tensors = [x.transpose(1, 2).contiguous() for x in draw()]
    hidden = torch.arange(LENGTH) >= FUTURE if is_causal else PADDING.squeeze(-1).squeeze(-1)
    hidden = hidden.expand(2, LENGTH)[:, None, :, None]
    options = {"is_causal": True} if is_causal else {"key_lengths": LENGTHS.to(device)}
    projection = torch.randn(5, WIDTH)

    def run(fill: float) -> dict[str, torch.Tensor]:
        leaves = [x.masked_fill(hidden, fill).to(device).requires_grad_() for x in tensors]
        if name == "landmarks":
            out = landmark_attention(*leaves, 8, 6, backend="triton", **options)
        else:
            out = OPERATORS[name](*leaves, projection.to(device), 6, backend="triton", **options)
        out = out.masked_fill(hidden.to(device), 0.0)
        cotangent = torch.linspace(0.5, 1.5, out.numel(), device=device).view_as(out)
        names = ("out", "grad of query", "grad of key", "grad of value")
        return dict(zip(names, (out.detach(), *torch.autograd.grad((out * cotangent).sum(), leaves)), strict=True))

    compare(run(0.0), run(POISON[poison]))


@pytest.mark.parametrize("backend", ["torch", "naive"])
@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_padding(name, poison, backend):
    attention = create(name, backend=backend)
    tensors = draw()
    clean, bad = (
        results(attention, [x.masked_fill(PADDING, fill) for x in tensors], ~PADDING, LENGTHS)
        for fill in (0.0, POISON[poison])
    )
    compare(clean, bad)


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("options", [{"centre": "both"}, {"balance": True}])
@pytest.mark.parametrize("name", ["performer", "sblocal", "sbsmyrf"])
def test_padding_with_statistics_of_all_tokens(name, options, poison):
    attention = create(name, **options)
    tensors = draw()
    clean, bad = (
        results(attention, [x.masked_fill(PADDING, fill) for x in tensors], ~PADDING, LENGTHS)
        for fill in (0.0, POISON[poison])
    )
    compare(clean, bad)


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_padding_of_queries_is_not_hashed_or_clustered_with_tokens(name, size):
    attention = create(name)
    tensors = draw()
    clean, other = (
        results(attention, [torch.where(PADDING, fill * torch.randn_like(x), x) for x in tensors], ~PADDING, LENGTHS)
        for fill in (0.0, size)
    )
    compare(clean, other)


@pytest.mark.parametrize("backend", ["torch", "naive"])
@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("name", CAUSAL)
def test_future(name, poison, backend):
    attention = create(name, causal=True, backend=backend)
    tensors = draw()
    past = (torch.arange(LENGTH) < FUTURE)[None, :, None, None]
    clean, bad = (
        results(attention, [x.masked_fill(~past, fill) for x in tensors], past) for fill in (0.0, POISON[poison])
    )
    compare(clean, bad)


@pytest.mark.parametrize("backend", ["torch", "naive"])
@pytest.mark.parametrize("lengths", [None, [64, 41]])
@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("name", OPERATORS)
def test_nan_is_not_hidden_from_the_queries_that_see_it(name, which, lengths, backend):
    window, place = 6, 30
    tensors = [x.transpose(1, 2).contiguous() for x in draw()]
    tensors[("query", "key", "value").index(which)][:, :, place] = torch.nan
    key_lengths = None if lengths is None else torch.tensor(lengths)
    options = {"is_causal": True, "key_lengths": key_lengths, "backend": backend}
    out = OPERATORS[name](*tensors, torch.randn(5, WIDTH), window, **options)
    last = {"query": place, "local": place + window // 2}.get(
        "local" if name == "local" and which != "query" else which
    )
    expected = torch.zeros(LENGTH, dtype=torch.bool)
    expected[place : LENGTH if last is None else last + 1] = True
    assert torch.equal(out.isnan().any(-1), expected.expand(2, HEADS, -1))


@pytest.mark.parametrize(("num_queries", "num_keys"), [(64, 20), (20, 64)])
@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_nan_of_other_lengths_reaches_its_window(num_queries, num_keys, backend):
    query, key, value = (torch.randn(1, 1, n, WIDTH) for n in (num_queries, num_keys, num_keys))
    key[:, :, 18] = torch.nan
    out = OPERATORS["local"](query, key, value, None, 6, is_causal=True, backend=backend)
    broken = out.isnan().any(-1).flatten().nonzero().flatten().tolist()
    assert broken == [i for i in range(num_queries) if 0 <= i - 18 <= 3]
