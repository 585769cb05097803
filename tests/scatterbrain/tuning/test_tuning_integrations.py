"""Profile and plan of models of timm and transformers, their replaced attention included."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import scatterbrain
from scatterbrain.tuning.calls import PlannedCall
from scatterbrain.tuning.forwards import call_counts
from tests.scatterbrain.tuning.models import grown

TOKENS = 64


def exact_plan(report: scatterbrain.ProfileReport) -> scatterbrain.Plan:
    """Plan of the measured methods that take a call, whatever their times."""
    for call in report.calls:
        call.milliseconds = 1e9
    return scatterbrain.tune(report, max_error=1e-4)


# timm ---------------------------------------------------------------------------------------------------------------

TIMM_SIZES = {"img_size": 64, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5}


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_dinov2", "eva02_tiny_patch14_224"])
def test_models_of_timm(name, replaced):
    timm = pytest.importorskip("timm", minversion="1.0.23")
    torch.manual_seed(0)
    model = grown(timm.create_model(name, **TIMM_SIZES), 0.1)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = model(images)
    if replaced:  # a plan goes before `replace`
        integration = pytest.importorskip("scatterbrain.integrations.timm")
        integration.replace(model, "local", 16)
        approximate = model(images)
    report = scatterbrain.profile(
        model, images, ["strided", "sbcluster"], [1.0], min_tokens=16, repeats=1, maps="*.1.*"
    )
    assert [call.name for call in report.calls] == ["blocks.0.attn", "blocks.1.attn"]
    assert [bool(call.maps) for call in report.calls] == [False, True]
    assert all(call.measurements[0].error <= 1e-5 for call in report.calls)
    plan = exact_plan(report)
    scatterbrain.apply(model, plan)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert call_counts(model) == {"blocks.0.attn": {"routed": 1}, "blocks.1.attn": {"routed": 1}}
    assert plan.check(model, images, repeats=0).error < 1e-3
    scatterbrain.restore(model)
    torch.testing.assert_close(model(images), approximate if replaced else expected)


@pytest.mark.parametrize("plan_first", [False, True])
def test_a_plan_and_replace_are_undone_in_any_order(plan_first):
    timm = pytest.importorskip("timm", minversion="1.0.23")
    integration = pytest.importorskip("scatterbrain.integrations.timm")
    torch.manual_seed(0)
    model = grown(timm.create_model("vit_tiny_patch16_224", **TIMM_SIZES), 0.1)
    wrapped = []
    layer = model.blocks[0].attn
    layer.forward = lambda x, **kwargs: wrapped.append(1) or type(layer).forward(layer, x, **kwargs)  # another package
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    report = scatterbrain.profile(model, images, ["performer"], [0.5], min_tokens=16, repeats=1)
    for call in report.calls:
        call.milliseconds = 1e9
    plan = scatterbrain.tune(report, max_error=1e9)
    full = model(images)
    planned = scatterbrain.apply(model, plan)(images)
    scatterbrain.restore(model)
    replaced = integration.replace(model, "local", 16)(images)
    integration.restore(model)
    undo = {integration.restore: planned, scatterbrain.restore: replaced}
    for first, second in (tuple(undo), tuple(undo)[::-1]):
        if plan_first:
            integration.replace(scatterbrain.apply(model, plan), "local", 16)
        else:
            scatterbrain.apply(integration.replace(model, "local", 16), plan)
        assert torch.equal(model(images), planned)
        assert torch.equal(copy.deepcopy(model)(images), planned)
        assert torch.equal(first(model)(images), undo[first])
        wrapped.clear()
        assert torch.equal(second(model)(images), full)
        assert len(wrapped) == 1
        assert not any(name.startswith("scatterbrain") for module in model.modules() for name in vars(module))


# transformers -------------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def text_model(kind: str, implementation: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", minversion="5.4")
    if implementation == "scatterbrain":
        from scatterbrain.integrations.transformers import register

        register()
    torch.manual_seed(0)
    if kind == "bert":
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = transformers.BertConfig(**SIZES, **dropout, vocab_size=50, attn_implementation=implementation)
        return grown(transformers.BertModel(config), 0.2)
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=2, vocab_size=50, use_cache=False, attn_implementation=implementation
    )
    return grown(transformers.LlamaModel(config), 0.2)


def text(padding: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 50, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    if padding:
        mask[0, :9] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "scatterbrain"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_models_of_transformers(kind, implementation, padding):
    """Causality and padding are kept: the method gets them, or PyTorch computes the call."""
    model, x = text_model(kind, implementation), text(padding)
    seen = x["attention_mask"].bool()
    with torch.no_grad():
        expected = text_model(kind, "sdpa")(**x).last_hidden_state
    methods = ["full", "local", "strided"]
    report = scatterbrain.profile(model, x, methods, [1.0], min_tokens=16, repeats=1)
    assert len(report.calls) == 2
    # masks of transformers say what they consist of to the implementation "scatterbrain" alone
    known = implementation == "scatterbrain" or not padding
    for call in report.calls:
        full, local, strided = call.measurements
        if kind == "llama" and implementation == "scatterbrain":
            assert (call.kv_heads, call.is_causal) == (2, True)
        assert (full.error is not None) == (local.error is not None) == known
        assert full.error is None or full.error <= 1e-5
        assert (strided.error is not None) == (kind == "bert" and not padding)
        assert known == (not full.reason)
    with torch.no_grad():
        torch.testing.assert_close(model(**x).last_hidden_state[seen], expected[seen], rtol=1e-4, atol=1e-4)
    calls = [PlannedCall(c.name, 0, "local", 1 / 8, 0, 16, 0.1, 1.0, 2.0) for c in report.calls]
    plan = scatterbrain.Plan("Model", "cpu", {}, "max_error=1", calls)
    scatterbrain.apply(model, plan)
    with torch.no_grad():
        out = model(**x).last_hidden_state[seen]
    counts = call_counts(model)
    assert len(counts) == 2
    if known:
        assert all(count == {"routed": 1} for count in counts.values())
        assert not torch.allclose(out, expected[seen], atol=1e-2)
    else:
        assert all("routed" not in count for count in counts.values())
        torch.testing.assert_close(out, expected[seen], rtol=1e-4, atol=1e-4)
    assert "last_hidden_state" in plan.check(model, x, repeats=0).outputs
    scatterbrain.restore(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**x).last_hidden_state[seen], expected[seen], rtol=1e-4, atol=1e-4)


def test_decoding_with_a_cache_stays_with_pytorch():
    model = text_model("llama", "sdpa")
    x = text(False)
    names = [name for name, _ in model.named_modules() if name.endswith("self_attn")]
    calls = [PlannedCall(n, 0, "local", 1 / 8, 0, 16, 0.1, 1.0, 2.0) for n in names]
    with torch.no_grad():
        cache = model(**x, use_cache=True).past_key_values
        scatterbrain.apply(model, scatterbrain.Plan("Model", "cpu", {}, "max_error=1", calls))
        model(input_ids=x["input_ids"][:, :1], past_key_values=cache, use_cache=True)
    reason = "another number of queries than of keys (cross-attention, or a cache)"
    assert call_counts(model) == {name: {reason: 1} for name in names}
