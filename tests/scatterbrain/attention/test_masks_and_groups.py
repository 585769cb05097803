"""Masks of the keys and grouped queries in the attention modules, against the table in docs/attentions.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.export import Dim, export

from scatterbrain.attention import ATTENTIONS, create_attention
from scatterbrain.errors import UserError

PAGE = Path(__file__).parents[3] / "docs" / "attentions.md"
# a square, for the two-dimensional windows
LENGTH, HEADS, WIDTH = 36, 2, 8
# padding on the left, and holes
MASK = torch.ones(2, LENGTH, dtype=torch.bool)
MASK[0, :15] = False
MASK[1, 4::3] = False
HIDDEN = ~MASK[..., None, None]
BOTH = {"centre": "both", "balance": True}


def read_table() -> dict[str, tuple[bool, bool]]:
    """Whether each attention takes `attn_mask` and can be causal."""
    section = PAGE.read_text().split("## Masks\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split("|") for line in section.splitlines() if line.startswith("| `")]
    return {
        name: (attn_mask.strip() == "yes", causal.strip() == "yes")
        for names, _, attn_mask, causal in rows
        for name in re.findall(r"`([^`]+)`", names)
    }


TABLE = read_table()
TAKE_MASK = [name for name, (attn_mask, _) in TABLE.items() if attn_mask]


def create(name: str, **options) -> torch.nn.Module:
    return create_attention(name, LENGTH, WIDTH, memory_fraction=1 / 4, **options)


def draw(dtype: torch.dtype = torch.float32, key_heads: int = HEADS, heads: int = HEADS) -> list[torch.Tensor]:
    return [torch.randn(2, LENGTH, count, WIDTH, dtype=dtype) for count in (heads, key_heads, key_heads)]


def results(attention, tensors, **options) -> dict[str, torch.Tensor]:
    """Output and weights of the queries at visible positions, and the gradients of a sum over that output."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    out, weights = attention(*leaves, need_weights=True, **options)
    out, weights = out.masked_fill(HIDDEN, 0.0), weights.detach().masked_fill(HIDDEN.transpose(1, 2), 0.0)
    gradients = torch.autograd.grad((out * torch.linspace(0.5, 1.5, out.numel()).view_as(out)).sum(), leaves)
    return {"out": out.detach(), "weights": weights} | dict(zip(("query", "key", "value"), gradients, strict=True))


def test_the_table_lists_every_attention():
    assert TABLE.keys() == ATTENTIONS.keys()


@pytest.mark.parametrize("name", ATTENTIONS)
def test_what_takes_masks_is_in_the_table(name):
    takes_mask, can_be_causal = TABLE[name]
    if can_be_causal:
        create(name, causal=True)
    else:
        with pytest.raises(UserError, match="cannot be causal"):
            create(name, causal=True)
    if not takes_mask:
        with pytest.raises(UserError, match=r"Attention takes no attn_mask\. .* key_lengths, or choose .* full, local"):
            create(name)(*draw(), attn_mask=MASK)


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in TAKE_MASK]
    + [(name, {"causal": True}) for name in TAKE_MASK if TABLE[name][1]]
    + [(name, BOTH) for name in ("performer", "sblocal", "sblocal2d", "combination-local-performer")],
    ids=str,
)
def test_hidden_keys_have_no_weight_and_no_influence(name, options):
    tensors = draw(torch.float64)
    clean, poisoned, naive = (
        results(
            create(name, backend=backend, **options).double(),
            [x.masked_fill(HIDDEN, fill) for x in tensors],
            attn_mask=MASK,
        )
        for backend, fill in (("torch", 0.0), ("torch", torch.nan), ("naive", torch.nan))
    )
    assert (clean["weights"].masked_select(~MASK[:, None, None]) == 0).all()
    # every visible query of a visible key sees itself
    torch.testing.assert_close(clean["weights"].sum(-1), MASK[:, None].expand(-1, HEADS, -1).double())
    torch.testing.assert_close(clean["weights"] @ tensors[2].transpose(1, 2), clean["out"].transpose(1, 2))
    for other in (poisoned, naive):
        for which, expected in clean.items():
            torch.testing.assert_close(other[which], expected, msg=lambda text, which=which: f"{which}: {text}")


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in TAKE_MASK] + [(name, BOTH) for name in ("performer", "sblocal", "sblocal2d")],
    ids=str,
)
def test_a_mask_of_leading_keys_is_key_lengths(name, options):
    attention, tensors, lengths = create(name, **options), draw(), torch.tensor([LENGTH, 17])
    expected, weights = attention(*tensors, key_lengths=lengths, need_weights=True)
    mask = torch.arange(LENGTH) < lengths[:, None]
    result = attention(*tensors, attn_mask=mask[:, None, None], need_weights=True)
    torch.testing.assert_close(result, (expected, weights))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_grouped_queries(name):
    attention, tensors = create(name), draw(key_heads=2, heads=4)
    repeated = [tensors[0], *(x[:, :, [0, 0, 1, 1]] for x in tensors[1:])]
    expected = attention(*repeated, need_weights=True)
    result = attention(*tensors, need_weights=True, enable_gqa=True)
    assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))
    with pytest.raises(UserError, match="enable_gqa=True takes heads of key and value whose number divides H"):
        attention(*tensors)


@pytest.mark.parametrize("name", ["full", "performer", "sblocal", "bs-longformer", "sbcluster", "pairedcluster"])
def test_export_with_a_mask(name):
    shapes = {0: Dim("batch", max=64)}
    of_arguments = {"query": shapes, "key": shapes, "value": shapes, "attn_mask": shapes}
    arguments, attention = draw(), create(name).eval()
    program = export(attention, tuple(arguments), {"attn_mask": MASK}, dynamic_shapes=of_arguments).module()
    for batch in (1, 2, 5):
        tensors, mask = [torch.randn(batch, LENGTH, HEADS, WIDTH) for _ in range(3)], torch.rand(batch, LENGTH) < 0.5
        expected = create(name).eval()(*tensors, attn_mask=mask)[0]
        torch.testing.assert_close(program(*tensors, attn_mask=mask)[0], expected, rtol=1e-4, atol=1e-5)
