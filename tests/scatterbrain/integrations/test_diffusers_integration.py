"""`replace` in transformers of diffusers, against their own scaled_dot_product_attention."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import scatterbrain
from scatterbrain.errors import UserError
from scatterbrain.integrations.diffusers import NO_CALL, ScatterbrainAttnProcessor, replace, report, restore

diffusers = pytest.importorskip("diffusers", minversion="0.35")

SIDE = 8  # image tokens 64
TEXT = 12
TOLERANCES = {"atol": 1e-5, "rtol": 1e-5}
JOINT = SIDE**2 + TEXT


def made(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # queries and keys of some size, and no zeros in the last layers
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def flux() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Joint attention in a double block and a single one, with rotary embeddings and norms."""
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, joint_attention_dim=24, pooled_projection_dim=24, axes_dims_rope=(4, 4, 8), **sizes
    )
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3).float()
    inputs = {"hidden_states": normal(2, SIDE**2, 4), "encoder_hidden_states": normal(2, TEXT, 24)}
    inputs |= {"pooled_projections": normal(2, 24), "timestep": torch.tensor([0.3, 0.7])}
    return made(model), inputs | {"img_ids": places, "txt_ids": torch.zeros(TEXT, 3)}


def sd3() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Joint attention; the last block drops the text's output."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=SIDE, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=24, out_channels=4,
    )  # fmt: skip
    inputs = {"hidden_states": normal(2, 4, SIDE, SIDE), "encoder_hidden_states": normal(2, TEXT, 24)}
    return made(model), inputs | {"pooled_projections": normal(2, 24), "timestep": torch.tensor([3, 700])}


def pixart() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Self-attention, and cross-attention with as many text tokens as image tokens, some hidden by a mask."""
    model = diffusers.PixArtTransformer2DModel(
        sample_size=SIDE, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, cross_attention_dim=32, caption_channels=24,
    )  # fmt: skip
    mask = torch.ones(2, SIDE**2)
    mask[1, 20:] = 0
    inputs = {"hidden_states": normal(2, 4, SIDE, SIDE), "encoder_hidden_states": normal(2, SIDE**2, 24)}
    return made(model), inputs | {"encoder_attention_mask": mask, "timestep": torch.tensor([3, 700])}


MODELS = {
    "flux": (flux, ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"], JOINT),
    "sd3": (sd3, ["transformer_blocks.0.attn", "transformer_blocks.1.attn"], JOINT),
    "pixart": (pixart, ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"], SIDE**2),
}
EXACT = {"full": {}, "local": {"local_context": 2 * JOINT + 5}}


def output(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    extra = {"added_cond_kwargs": {}} if "encoder_attention_mask" in inputs else {}
    with torch.no_grad():
        return model(**inputs, **extra).sample


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("name", MODELS)
def test_an_exact_method_is_the_model_s_own_attention(name, method):
    make, layers, _ = MODELS[name]
    model, inputs = make()
    expected = output(model, inputs)
    state = {key: each.clone() for key, each in model.state_dict().items()}
    assert replace(model, method, min_tokens=1, **EXACT[method]) is model
    torch.testing.assert_close(output(model, inputs), expected, **TOLERANCES)
    assert report(model) == {layer: {"routed": 1} for layer in layers}
    assert model.state_dict().keys() == state.keys()
    restore(model)
    assert report(model) == {}
    assert not any(isinstance(each, ScatterbrainAttnProcessor) for each in model.attn_processors.values())
    torch.testing.assert_close(output(model, inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_replace_sdpa_reaches_the_same_layers(name):
    make, layers, _ = MODELS[name]
    model, inputs = make()
    replace(model, "sbcluster", min_tokens=1, local_context=9, num_landmarks=8)
    expected = output(model, inputs)
    restore(model)
    with scatterbrain.replace_sdpa("sbcluster", min_tokens=1, local_context=9, num_landmarks=8) as replacement:
        found = output(model, inputs)
    assert replacement.report()["routed"] == len(layers)
    torch.testing.assert_close(found, expected, **TOLERANCES)


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_computed_by_the_method(name):
    make, layers, length = MODELS[name]
    model, inputs = make()
    expected = output(model, inputs)
    assert (output(replace(model, "zero", min_tokens=length), inputs) - expected).norm() > 1e-2 * expected.norm()
    replace(model, "zero", min_tokens=length + 1)
    torch.testing.assert_close(output(model, inputs), expected, rtol=0, atol=0)
    assert report(model) == {layer: {f"fewer than {length + 1} tokens": 1} for layer in layers}


@pytest.mark.parametrize(("method", "outcome"), [("local", "routed"), ("smyrf", "attn_mask, and smyrf takes none")])
def test_masks_of_joint_attention(method, outcome):
    """Text tokens that are hidden stay hidden, and a method without masks never gets one."""
    model, inputs = flux()
    mask = torch.ones(2, 1, 1, JOINT, dtype=torch.bool)
    mask[1, ..., TEXT - 5 : TEXT] = False
    seen = output(model, inputs)
    inputs["joint_attention_kwargs"] = {"attention_mask": mask}
    expected = output(model, inputs)
    assert (seen - expected).norm() > 1e-3 * expected.norm()
    replace(model, method, min_tokens=1, **EXACT.get(method, {}))
    torch.testing.assert_close(output(model, inputs), expected, **TOLERANCES)
    assert report(model) == {layer: {outcome: 1} for layer in MODELS["flux"][1]}


def test_options_of_single_layers():
    model, inputs = flux()
    replace(model, "full", min_tokens=1, layers={"single_*": {"method": "local"}, "transformer_blocks.*": None})
    output(model, inputs)
    assert report(model) == {"single_transformer_blocks.0.attn": {"routed": 1}}
    processors = model.attn_processors
    assert processors["single_transformer_blocks.0.attn.processor"].router.method == "local"
    assert not isinstance(processors["transformer_blocks.0.attn.processor"], ScatterbrainAttnProcessor)
    # a second call replaces the options of the first
    replace(model, "full", min_tokens=1)
    assert not isinstance(model.transformer_blocks[0].attn.processor.processor, ScatterbrainAttnProcessor)


def test_random_parts_differ_by_layer_and_are_the_same_in_each_call():
    model, inputs = sd3()
    replace(model, "performer", min_tokens=1, seed=5)
    assert [block.attn.processor.router.seed for block in model.transformer_blocks] == [5, 6]
    torch.testing.assert_close(output(model, inputs), output(model, inputs), rtol=0, atol=0)


def test_copies_and_pickles_compute_the_same():
    model, inputs = sd3()
    replace(model, "performer", min_tokens=1)
    expected = output(model, inputs)
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(output(each, inputs), expected, rtol=0, atol=0)
        assert set(report(each)) == set(MODELS["sd3"][1])
    assert all(counts == {"routed": 1} for counts in report(model).values())


def test_the_processor_has_the_signature_of_the_one_inside():
    model, _ = flux()
    attention = model.transformer_blocks[0].attn
    expected = inspect.signature(attention.processor.__call__)
    replace(model, "full")
    assert inspect.signature(attention.processor.__call__) == expected


def test_another_processor_is_counted():
    from diffusers.models.attention_processor import AttnProcessor

    model, inputs = pixart()
    for block in model.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())  # softmax written out
    expected = output(model, inputs)
    replace(model, "zero", min_tokens=1)
    torch.testing.assert_close(output(model, inputs), expected, rtol=0, atol=0)
    assert report(model) == {layer: {NO_CALL: 1} for layer in MODELS["pixart"][1]}


def test_what_cannot_be_replaced():
    with pytest.raises(UserError, match="Linear has no self-attention layer of diffusers"):
        replace(nn.Linear(2, 2))
    model, _ = flux()
    model.transformer_blocks[0].attn.processor = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"transformer_blocks\.0\.attn: Linear has weights of its own"):
        replace(model)
    replace(model, layers={"transformer_blocks.*": None})


def test_compiled():
    model, inputs = sd3()
    replace(model, "full", min_tokens=1)
    expected = output(model, inputs)
    torch.testing.assert_close(output(torch.compile(model, backend="eager"), inputs), expected, **TOLERANCES)


def test_the_example_of_the_documentation(capsys):
    page = (Path(__file__).resolve().parents[3] / "docs" / "use_in_your_model.md").read_text(encoding="utf-8")
    (code,) = [body for body in re.findall(r"```py\n(.*?)```", page, re.DOTALL) if "diffusers" in body]
    torch.manual_seed(0)
    exec(compile(code, "use_in_your_model.md", "exec"), {})
    assert capsys.readouterr().out.strip() == re.search(r"^# (\{.*)$", code, re.MULTILINE).group(1)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_profile_and_a_plan(replaced):
    model, inputs = sd3()
    layers = MODELS["sd3"][1]
    expected = output(model, inputs)
    if replaced:  # a plan goes before `replace`
        replace(model, "local", min_tokens=1, local_context=5)
        approximate = output(model, inputs)
    before = report(model)
    profile = scatterbrain.profile(model, inputs, ["strided"], [1.0], min_tokens=16, repeats=1)
    assert [call.name for call in profile.calls] == layers
    for call in profile.calls:
        assert call.measurements[0].error < 1e-5
        call.milliseconds = 1e9  # the method is the faster one
    scatterbrain.apply(model, scatterbrain.tune(profile, max_error=1e-4))
    torch.testing.assert_close(output(model, inputs), expected, rtol=1e-4, atol=1e-4)
    assert report(model) == before
    scatterbrain.restore(model)
    torch.testing.assert_close(output(model, inputs), approximate if replaced else expected)
