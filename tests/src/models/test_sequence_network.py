"""The network on sequences: what its tokens see, and that attentions share all other weights."""

from __future__ import annotations

import pytest
import torch

from scatterbrain.errors import UserError
from src.models.sequence_network import create_network, rotate, rotations, sinusoids

LENGTH = 32
CAUSAL = ("full", "local", "performer", "sblocal", "sbcluster")
COMPARED = (*CAUSAL, "smyrf", "sbsmyrf", "cluster", "pairedcluster", "sbadaptive", "reformer")


def network(name, causal=False, seed=0, **options):
    """A small network."""
    options = {"dim": 16, "depth": 2, "heads": 2, "mlp_dim": 32, "memory_fraction": 1 / 4} | options
    options = {"pool": "none" if causal else "cls"} | options
    return create_network({"name": name}, 256, 10, LENGTH, causal, seed=seed, **options)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_later_byte_never_changes_an_earlier_logit(name):
    model = network(name, causal=True).double().eval()
    tokens = torch.randint(256, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens)
        assert before.shape == (1, LENGTH, 10)
        for position in (1, 13, LENGTH - 1):
            other = tokens.clone()
            other[:, position:] = (other[:, position:] + 1) % 256
            after = model(other)
            # other sums behind the position, in float64
            torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-9)
            assert (after[:, position] - before[:, position]).abs().max() > 1e-4


@pytest.mark.parametrize("name", COMPARED)
def test_keys_and_values_of_padding_are_hidden(name):
    attention = network(name).blocks[0].attention.double()
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, LENGTH, 2, 8, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([20, 5])
    padding = (torch.arange(LENGTH) >= lengths[:, None])[..., None, None]
    before, _ = attention(query, key, value, key_lengths=lengths)
    after, _ = attention(query, key.where(~padding, 3.0), value.where(~padding, 100.0), key_lengths=lengths)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)
    seen, _ = attention(query, key, value.where(~padding, 100.0))
    assert (seen - before).abs().max() > 1e-3


# The hashes sort the queries of padding among the others, which moves the clusters: what is there, which is always the
# same, is not hidden from them. It is in no weighted sum, see above.
@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("name", [name for name in COMPARED if name not in ("smyrf", "sbsmyrf", "reformer")])
def test_padding_is_hidden(name, pool):
    model = network(name, pool=pool).double().eval()
    tokens = torch.randint(1, 15, (8, LENGTH), generator=torch.Generator().manual_seed(0))
    # so short that the padding is within the reach of the windows of two blocks
    lengths = torch.arange(1, 9).clamp(max=4)
    padding = torch.arange(LENGTH) >= lengths[:, None]
    with torch.no_grad():
        before = model(tokens, lengths)
        after = model(tokens.where(~padding, 15), lengths)
        seen = model(tokens.where(~padding, 15), None)
    assert before.shape == (8, 10)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)
    assert (seen - before).abs().amax(1).min() > 1e-6


@pytest.mark.parametrize("causal", [False, True])
def test_attentions_share_weights(causal):
    first, *others = (network(name, causal, seed=5) for name in (CAUSAL if causal else COMPARED))
    weights = dict(first.named_parameters())
    for other in others:
        found = dict(other.named_parameters())
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert not torch.equal(network("full", causal, seed=6).head.weight, first.head.weight)


def test_blocks_have_features_of_their_own_and_redraw_them():
    model = network("performer")
    assert model.has_random_features
    before = [block.attention.projection_matrix.clone() for block in model.blocks]
    assert not torch.equal(*before)
    model.redraw_projections(1)
    drawn = [block.attention.projection_matrix for block in model.blocks]
    assert not torch.equal(*drawn)
    assert not torch.equal(drawn[0], before[0])
    # as a network of that seed has them
    for block, other in zip(model.blocks, network("performer", seed=1).blocks, strict=True):
        assert torch.equal(block.attention.projection_matrix, other.attention.projection_matrix)
    assert not network("full").has_random_features


def test_sizes_of_the_network():
    model = network("full", qkv_dim=8, positions="sinusoidal", dropout=0.5)
    assert model.blocks[0].qkv.weight.shape == (24, 16)
    assert model.blocks[0].mlp.fc1.weight.shape == (32, 16)
    assert "positions" not in dict(model.named_parameters())
    tokens = torch.zeros(2, LENGTH, dtype=torch.long)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize(("length", "depth", "seen"), [(1024, 1, 31), (1000, 4, 120), (2000, 4, 248)])
def test_a_window_passes_few_tokens_to_the_answer(length, depth, seen):
    """Of Image, Text and ListOps, as docs/sequence_training.md says."""
    network = create_network({"name": "local"}, 256, 10, length, depth=depth, dim=16, heads=1, mlp_dim=16).eval()
    embedded = []
    network.embedding.register_forward_hook(lambda *hooked: embedded.append(hooked[-1]))
    with torch.enable_grad():
        logits = network(torch.zeros(1, length, dtype=torch.long))
        (gradient,) = torch.autograd.grad(logits[0, 0], embedded)
    reached = gradient[0].any(-1)
    assert reached[:seen].all()
    assert not reached[seen:].any()


def test_fixed_positions():
    positions = sinusoids(50, 6)
    torch.testing.assert_close(positions[:, 0], torch.arange(50.0).sin())
    torch.testing.assert_close(positions[:, 5], (torch.arange(50.0) * 1e4 ** (-2 / 3)).cos())
    assert sinusoids(50, 7).shape == (50, 7)


def test_rotary_positions_by_complex_numbers():
    x = torch.randn(2, 20, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angles = torch.arange(20.0, dtype=torch.float64)[:, None, None] * torch.tensor([1e4 ** (-i / 3) for i in range(3)])
    expected = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angles), angles)
    # the angles of `rotations` are in float32
    out = rotate(x, rotations(25, 6))
    torch.testing.assert_close(out, torch.cat([expected.real, expected.imag], -1), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    for dtype in (torch.bfloat16, torch.float16):
        low = x.to(dtype)
        rotated = rotate(low, rotations(25, 6))
        assert rotated.dtype == dtype
        # rounded once, at the end
        assert torch.equal(rotated, rotate(low.float(), rotations(25, 6)).to(dtype))


def test_scores_of_rotary_positions_depend_on_the_distance_alone():
    query, key = torch.randn(2, 1, 1, 2, 8, generator=torch.Generator().manual_seed(0)).expand(-1, 1, 4096, 2, 8)
    rotary = rotations(4096, 8)
    scores = torch.einsum("bqhe,bkhe->hqk", rotate(query, rotary)[:, ::64], rotate(key, rotary)[:, ::64])
    torch.testing.assert_close(scores[:, 1:, 1:], scores[:, :-1, :-1], rtol=0, atol=5e-3)
    assert (scores[:, 0] - scores[:, 0, :1]).abs().amax() > 0.5


@pytest.mark.parametrize("name", CAUSAL)
def test_a_network_with_rotary_positions(name):
    model = network(name, causal=True, positions="rotary")
    assert not [key for key in model.state_dict() if "positions" in key or "rotary" in key]
    tokens = torch.randint(256, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    seen = {}
    for number, block in enumerate(model.blocks):
        block.attention.register_forward_pre_hook(lambda _, inputs, n=number: seen.update({n: inputs}))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens)
        assert {x.dtype for inputs in seen.values() for x in inputs} == {torch.bfloat16}
    block = model.blocks[0]
    query, key, value = block.qkv(block.norm1(model.embedding(tokens))).unflatten(-1, (3, 2, 8)).unbind(2)
    model(tokens)
    for found, expected in zip(seen[0], (rotate(query, model.rotary), rotate(key, model.rotary), value), strict=True):
        torch.testing.assert_close(found, expected)
    out.float().square().mean().backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    # those of queries, of keys and of values
    assert all(block.qkv.weight.grad.unflatten(0, (3, 16)).abs().amax((1, 2)).min() > 0 for block in model.blocks)


def test_outputs_with_rotary_positions_have_no_origin():
    model = network("full", causal=True, positions="rotary").double().eval()
    tokens = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens)
        model.rotary = model.rotary[:, 7:]
        torch.testing.assert_close(model(tokens), before, rtol=0, atol=1e-5)
        model.rotary = model.rotary[:, ::2]
        assert (model(tokens[:, :12]) - before[:, :12]).abs().max() > 1e-3


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_rotary_positions_of_networks_for_sequences(pool):
    model = network("full", pool=pool, positions="rotary")
    assert model.rotary.shape == (2, LENGTH + (pool == "cls"), 4)
    tokens = torch.randint(256, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    assert (model(tokens.flip(1)) - model(tokens)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": True, "pool": "cls"}, r"model\.pool=cls needs tokens that see each other"),
        ({"pool": "max"}, r"model\.pool=max is unknown"),
        ({"positions": "rotated"}, r"model\.positions=rotated is unknown.*rotary"),
        ({"positions": "rotary", "qkv_dim": 6}, r"model\.positions=rotary needs heads of an even width, not of 3"),
        ({"dropout": 1}, r"model\.dropout=1 is not valid"),
        ({"depth": 0}, r"model\.depth=0 is not valid"),
        ({"heads": 3}, r"model\.heads=3 does not divide a width of 16"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        network("full", **options)


@pytest.mark.parametrize("name", [name for name in COMPARED if name not in CAUSAL])
def test_attentions_that_cannot_be_causal_say_so(name):
    with pytest.raises(UserError, match="cannot be causal"):
        network(name, causal=True)
