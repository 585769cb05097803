"""Errors against full attention, beside dense float64 computations."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from scatterbrain.attention import ATTENTIONS, COMPARED
from scatterbrain.errors import UserError
from scatterbrain.ops.full import naive_full_attention
from scatterbrain.ops.local import naive_local_attention
from scatterbrain.ops.performer import naive_performer_attention
from scatterbrain.ops.scatterbrain import naive_scatterbrain_attention
from src.analysis.approximation import (
    attention_weights,
    bias_and_spread,
    effective_keys,
    largest_logit,
    load_model,
    relative_error,
    relative_errors,
)
from src.models.attention_inputs import (
    StageInputs,
    capture_inputs,
    capture_stage_inputs,
    create_block_attentions,
    create_stage_attentions,
)
from src.models.t2t_vit import T2T_VIT_VARIANTS, create_t2t_vit
from tests.helpers import assert_close
from tests.src.tasks.setup import IMAGE_SIZE, NUM_CLASSES

MEMORY = 1 / 4  # 64 and 16 tokens: windows and features of several each
# Two computations in float64 that add in different orders.
ROUNDING = 1e-12


@pytest.fixture
def model(checkpoints, shallow):
    return load_model(checkpoints["t2t_vit_t_14"])[1].double()


@pytest.fixture
def images():
    return torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float64)


@pytest.fixture
def stages(model, images):
    return capture_stage_inputs(model, images)


def dense(attention, inputs):
    """Output (B, N, H, E) and weights of the specification of a module, float64."""
    tensors = [x.transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value)]
    sizes, rows = attention.sizes(), getattr(attention, "projection_matrix", None)
    if not sizes:
        out, weights = naive_full_attention(*tensors, inputs.scale)
    elif rows is None:
        out, weights = naive_local_attention(*tensors, sizes["local_context"], inputs.scale)
    elif "local_context" not in sizes:
        out, weights = naive_performer_attention(*tensors, rows, inputs.scale)
    else:
        out, weights = naive_scatterbrain_attention(*tensors, rows, sizes["local_context"], inputs.scale)
    return out.transpose(1, 2), weights


def test_captured_inputs_reproduce_the_stages(model, images, stages):
    outputs = []
    blocks = [stage.attn for stage in (model.patch_embed.attention1, model.patch_embed.attention2)]
    handles = [block.register_forward_hook(lambda *arguments: outputs.append(arguments[-1])) for block in blocks]
    model(images)
    for handle in handles:
        handle.remove()
    for block, output, inputs, length, width in zip(blocks, outputs, stages, (64, 16), (147, 576), strict=True):
        assert inputs.query.shape == inputs.key.shape == inputs.value.shape == (3, length, 1, 64)
        assert inputs.scale == width**-0.5
        out = dense(block.attention, inputs)[0]
        assert_close("stage", output, inputs.value.squeeze(2) + block.proj(out.squeeze(2)), ROUNDING)


def fail(*_):
    raise ZeroDivisionError


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_gone_afterwards(model, images, monkeypatch, fails):
    seen = []
    own = [attention.register_forward_pre_hook(lambda *_: seen.append(1)) for attention in model.token_attentions]
    if fails:
        # behind the first stage, so that one of the two has been captured
        monkeypatch.setattr(model.patch_embed.attention2.norm1, "forward", fail)
        with pytest.raises(ZeroDivisionError):
            capture_stage_inputs(model, images)
    else:
        capture_stage_inputs(model, images)
    for attention, handle in zip(model.token_attentions, own, strict=True):
        assert list(attention._forward_pre_hooks) == [handle.id]
        handle.remove()
    assert len(seen) == (1 if fails else 2)


@pytest.mark.parametrize("variant", ["t2t_vit_t_14", "t2t_vit_7"])
def test_only_full_attention_is_captured(images, shallow, variant):
    attention = "local" if variant == "t2t_vit_t_14" else None
    other = create_t2t_vit(variant, attention, image_size=IMAGE_SIZE, num_classes=NUM_CLASSES)
    with pytest.raises(UserError, match="full attention in both token stages"):
        capture_stage_inputs(other, images.float())


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("name", COMPARED[1:])
def test_errors_are_those_of_a_dense_computation(model, stages, name, stage):
    inputs = stages[stage]
    attentions = [create_stage_attentions(name, model, MEMORY, seed)[stage] for seed in (0, 1)]
    full = dense(model.token_attentions[stage], inputs)
    for of_weights in (False, True):
        errors = relative_errors(inputs, attentions, of_weights=of_weights)
        assert errors.shape == (2, 3)
        for attention, row in zip(attentions, errors, strict=True):
            for image in range(3):
                result, reference = dense(attention, inputs)[of_weights][image], full[of_weights][image]
                expected = (result - reference).square().sum().sqrt() / reference.square().sum().sqrt()
                assert row[image].item() == pytest.approx(expected.item(), rel=ROUNDING)
        assert errors.min() > 0.01, "an attention that approximates nothing tests nothing"


def test_bias_and_spread(model, stages):
    inputs = stages[1]
    draws = [create_stage_attentions("performer", model, MEMORY, seed)[1] for seed in range(400)]
    errors, bias, spread = bias_and_spread(inputs, draws)
    assert_close("errors", relative_errors(inputs, draws), errors, ROUNDING)
    # by hand, and squares add up to the squared error but for the part of the mean's own spread
    outputs = torch.stack([attention(inputs.query, inputs.key, inputs.value)[0] for attention in draws]).flatten(2)
    full = dense(model.token_attentions[1], inputs)[0].flatten(1)
    variance = outputs.var(0).sum(1) / full.square().sum(1)
    assert_close("spread", variance.sqrt(), spread, ROUNDING)
    distance = (outputs.mean(0) - full).square().sum(1) / full.square().sum(1)
    assert_close("bias", (distance - variance / 400).sqrt(), bias, 1e-10)
    assert_close("sum", errors.square().mean(0), bias.square() + spread.square(), 1e-2)
    # fewer draws estimate the same bias, though their mean is further off by their spread
    fewer = [
        bias_and_spread(inputs, draws[start : start + 20])[1].square().mean().item() for start in range(0, 400, 20)
    ]
    assert sum(fewer) / 20 == pytest.approx(bias.square().mean().item(), rel=0.2)
    assert (bias.square() + spread.square() / 20).mean().item() > 1.5 * bias.square().mean().item()


@pytest.mark.parametrize("of_weights", [False, True])
def test_full_attention_has_no_error(model, stages, of_weights):
    for inputs, attentions in zip(stages, zip(create_stage_attentions("full", model), strict=True), strict=True):
        assert relative_errors(inputs, attentions, of_weights=of_weights).max() < ROUNDING


def test_reference_has_float32_at_least(model, stages):
    inputs = stages[0]
    narrow = StageInputs(inputs.query.bfloat16(), inputs.key.bfloat16(), inputs.value.bfloat16(), inputs.scale)
    # bfloat16 keeps 8 bits: were the reference rounded to it too, full attention would have no error
    assert 2**-12 < relative_errors(narrow, [model.token_attentions[0]]).min() < 2**-7


def test_relative_error_by_hand():
    reference = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    errors = relative_error(torch.tensor([[3.0, 4.0], [1.0, 2.0]]), reference)
    assert errors.tolist() == [0.0, 0.5]


@pytest.mark.parametrize("name", list(ATTENTIONS))
def test_weights_are_those_of_the_specification(model, stages, name):
    for inputs, attention in zip(stages, create_stage_attentions(name, model, MEMORY, seed=3), strict=True):
        weights = attention_weights(inputs, attention)
        expected = attention(inputs.query, inputs.key, inputs.value, need_weights=True)[1]
        assert_close("weights", expected, weights, ROUNDING)


@pytest.mark.parametrize("name", list(ATTENTIONS))
def test_attentions_are_those_of_an_evaluation(model, name):
    options = {"name": name} | ({} if name == "full" else {"memory_fraction": MEMORY})
    evaluated = create_t2t_vit("t2t_vit_t_14", [options, options], image_size=IMAGE_SIZE, num_classes=NUM_CLASSES)
    evaluated.redraw_projections(7)
    for seed, same in ((7, True), (8, False)):
        for own, attention in zip(
            evaluated.token_attentions, create_stage_attentions(name, model, MEMORY, seed), strict=True
        ):
            assert type(attention) is type(own)
            assert not attention.training
            assert (attention.softmax_temp, attention.sizes()) == (own.softmax_temp, own.sizes())
            draws = dict(attention.named_buffers())
            assert bool(draws) == evaluated.has_random_features
            for which, buffer in own.named_buffers():
                assert torch.equal(draws[which], buffer) == same


def test_effective_keys_of_known_weights():
    weights = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]], dtype=torch.float64)
    assert effective_keys(weights).tolist() == pytest.approx([4, 1, 2], rel=ROUNDING)


def test_largest_logit(stages):
    for inputs in stages:
        logits = torch.einsum("bthe,bshe->bhts", inputs.query, inputs.key) * inputs.scale
        expected = [image.abs().max().item() for image in logits]
        assert largest_logit(inputs).tolist() == pytest.approx(expected, rel=ROUNDING)


def test_one_image_of_a_batch(model, stages):
    for inputs, attentions in zip(
        stages, zip(create_stage_attentions("local", model, MEMORY), strict=True), strict=True
    ):
        alone = relative_errors(inputs.image(1), attentions)
        assert alone.shape == (1, 1)
        assert alone[0, 0].item() == pytest.approx(relative_errors(inputs, attentions)[0, 1].item(), rel=ROUNDING)


def test_a_checkpoint_tells_its_model(checkpoints, shallow, images):
    name, model = load_model(checkpoints["t2t_vit_t_14"])
    assert (name, model.image_size, model.num_classes) == ("t2t_vit_t_14", IMAGE_SIZE, NUM_CLASSES)
    assert not model.training
    stored = torch.load(checkpoints["t2t_vit_t_14"], weights_only=True)["state_dict_ema"]
    assert torch.equal(model.head.weight, stored["head.weight"])


def test_a_checkpoint_with_performer_tokens(checkpoints, shallow):
    with pytest.raises(UserError, match=r"holds t2t_vit_7: no attention of its token stages can be swapped"):
        load_model(checkpoints["t2t_vit_7"])


def test_a_checkpoint_of_no_known_variant(checkpoints):
    # without `shallow`, one block in place of 14
    with pytest.raises(UserError, match="none of the known variants"):
        load_model(checkpoints["t2t_vit_t_14"])


# Backbone -------------------------------------------------------------------------------------------------------------

BACKBONE_SIZE = 64  # 16 patches and the class token


@pytest.fixture
def deeper(monkeypatch):
    """Two blocks of three heads, whose attention is not all but uniform."""
    small = dataclasses.replace(T2T_VIT_VARIANTS["t2t_vit_t_14"], embed_dim=48, depth=2, num_heads=3)
    monkeypatch.setitem(T2T_VIT_VARIANTS, "t2t_vit_t_14", small)
    torch.manual_seed(0)
    model = create_t2t_vit("t2t_vit_t_14", "full", image_size=BACKBONE_SIZE, num_classes=NUM_CLASSES).double().eval()
    for block in model.blocks:
        block.attn.qkv.weight.data *= 12
    return model


@pytest.fixture
def larger_images():
    return torch.randn(3, 3, BACKBONE_SIZE, BACKBONE_SIZE, dtype=torch.float64)


def test_captured_inputs_reproduce_the_blocks(deeper, larger_images):
    outputs = []
    handles = [x.attn.register_forward_hook(lambda *arguments: outputs.append(arguments[-1])) for x in deeper.blocks]
    deeper(larger_images)
    for handle in handles:
        handle.remove()
    captured = capture_inputs(deeper, larger_images, "backbone")
    for block, output, inputs in zip(deeper.blocks, outputs, captured, strict=True):
        assert inputs.query.shape == inputs.key.shape == inputs.value.shape == (3, 17, 3, 16)
        assert inputs.scale == 16**-0.5
        tensors = [x.transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value)]
        out = naive_full_attention(*tensors, inputs.scale)[0].transpose(1, 2)
        assert_close("block", output, block.attn.proj(out.flatten(2)), ROUNDING)


def test_all_layers_are_the_stages_and_the_backbone(deeper, larger_images):
    found = capture_inputs(deeper, larger_images)
    alone = [
        *capture_stage_inputs(deeper, larger_images),
        *capture_inputs(deeper, larger_images, "backbone"),
    ]
    assert [inputs.query.shape[1] for inputs in found] == [256, 64, 17, 17]
    for one, other in zip(found, alone, strict=True):
        assert one.scale == other.scale
        for name in ("query", "key", "value"):
            assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_of_the_backbone_are_gone_afterwards(deeper, larger_images, monkeypatch, fails):
    if fails:
        monkeypatch.setattr(deeper.blocks[1].norm1, "forward", fail)
        with pytest.raises(ZeroDivisionError):
            capture_inputs(deeper, larger_images)
    else:
        capture_inputs(deeper, larger_images)
    for module in deeper.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_unknown_layers(deeper, larger_images):
    with pytest.raises(UserError, match=r"layers='backbon' is unknown\. Did you mean 'backbone'"):
        capture_inputs(deeper, larger_images, "backbon")


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("name", COMPARED[1:])
def test_errors_of_a_block_are_those_of_a_dense_computation(deeper, larger_images, name, block):
    inputs = capture_inputs(deeper, larger_images, "backbone")[block]
    attentions = [create_block_attentions(name, deeper, 0.5, seed)[block] for seed in (0, 1)]
    tensors = [x.transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value)]
    full = naive_full_attention(*tensors, 16**-0.5)
    full = full[0].transpose(1, 2), full[1]
    for of_weights in (False, True):
        errors = relative_errors(inputs, attentions, of_weights=of_weights)
        for attention, row in zip(attentions, errors, strict=True):
            result = dense(attention, inputs)[of_weights]
            for image in range(3):
                difference = (result - full[of_weights])[image]
                # over tokens, heads and width at once
                expected = difference.square().sum().sqrt() / full[of_weights][image].square().sum().sqrt()
                assert row[image].item() == pytest.approx(expected.item(), rel=ROUNDING)
        assert errors.min() > 0.01, "an attention that approximates nothing tests nothing"


def test_full_attention_has_no_error_in_the_backbone(deeper, larger_images):
    pairs = zip(capture_inputs(deeper, larger_images, "backbone"), create_block_attentions("full", deeper), strict=True)
    for inputs, attention in pairs:
        for of_weights in (False, True):
            assert relative_errors(inputs, [attention], of_weights=of_weights).max() < ROUNDING


def test_every_block_and_seed_has_rows_of_its_own(deeper):
    modules = [module for seed in (0, 1, 2) for module in create_block_attentions("sblocal", deeper, 0.5, seed)]
    rows = torch.stack([module.projection_matrix for module in modules])
    assert len(torch.unique(rows, dim=0)) == 6
    again = create_block_attentions("sblocal", deeper, 0.5, 2)[1]
    assert torch.equal(again.projection_matrix, rows[5])
    for module in modules:
        assert not module.training
        assert module.softmax_temp == 16**-0.5
        assert module.sizes() == {"local_context": 4, "nb_features": 2}


def test_attentions_that_a_backbone_cannot_have(deeper):
    with pytest.raises(UserError, match="17 tokens are no image"):
        create_block_attentions("local2d", deeper, 0.5)
    with pytest.raises(UserError, match="memory_fraction=0"):
        create_block_attentions("local", deeper, 0.0)
