"""timm's models with replaced attention: outputs, parameters, layers, and the way back."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import scatterbrain
from scatterbrain.errors import UserError

timm = pytest.importorskip("timm", minversion="1.0.23")
integration = pytest.importorskip("scatterbrain.integrations.timm")

SIZES = {"img_size": 64, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
# learned positions, rotary embeddings, and the attention layer of EVA
MODELS = (
    "vit_tiny_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_rope_mixed_224",
)


def create(name: str = "vit_tiny_patch16_224", **options) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **SIZES, **options)
    with torch.no_grad():  # queries and keys of some size
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_a_replaced_model(name):
    model, x = create(name), images()
    expected, state = model(x), copy.deepcopy(model.state_dict())
    assert integration.replace(model, "full", 16) is model
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert len(integration.report(model)) == 2
    assert all(counts == {"routed": 1} for counts in integration.report(model).values())

    # exact at a full budget: a window over all tokens
    integration.replace(model, "local", 16, local_context=2 * 64 + 11)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)

    integration.replace(model, "sbcluster", 16)
    out = model(x)
    assert not torch.allclose(out, expected, atol=1e-4)
    with scatterbrain.replace_sdpa("sbcluster", 16):
        torch.testing.assert_close(integration.restore(copy.deepcopy(model))(x), out)

    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model.load_state_dict(state)
    assert integration.restore(model) is model
    assert torch.equal(model(x), expected)
    assert integration.report(model) == {}
    assert not any(name in vars(module) for module in model.modules() for name in ("forward", "scatterbrain_router"))


def test_attn_layer_of_create_model():
    x, plain = images(), create()
    model = create(attn_layer="scatterbrain")
    model.load_state_dict(plain.state_dict())
    assert all(isinstance(block.attn, integration.ScatterbrainAttention) for block in model.blocks)
    torch.testing.assert_close(model(x), plain(x))
    assert set(integration.report(model)["blocks.0.attn"]) == {"fewer than 1024 tokens"}

    integration.replace(model, "sbcluster", 16)
    torch.testing.assert_close(model(x), integration.replace(create(), "sbcluster", 16)(x))
    assert integration.report(model)["blocks.0.attn"] == {"routed": 1}
    torch.testing.assert_close(integration.restore(model)(x), plain(x))


def test_attn_layer_replaces_long_sequences():
    torch.manual_seed(0)
    sizes = SIZES | {"img_size": 256, "depth": 1}
    model = timm.create_model("vit_tiny_patch16_224", attn_layer="scatterbrain", **sizes).eval()
    model(torch.randn(1, 3, 256, 256))
    assert integration.report(model) == {"blocks.0.attn": {"routed": 1}}


def test_options_of_layers():
    model = create()
    layers = {"blocks.0.*": {"method": "full"}, "blocks.1.attn": None}
    integration.replace(model, "local", 16, layers=layers)
    model(images())
    assert integration.report(model) == {"blocks.0.attn": {"routed": 1}}
    assert model.blocks[0].attn.scatterbrain_router.method == "full"
    with pytest.raises(UserError, match=r"no layer is named 'blocks\.7"):
        integration.replace(model, "local", layers={"blocks.7.attn": None})


def test_random_parts_differ_by_layer_and_stay_in_copies():
    model, x = integration.replace(create(), "performer", 16, seed=3), images()
    out = model(x)
    assert [layer.attn.scatterbrain_router.seed for layer in model.blocks] == [3, 4]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), out)
        assert other.blocks[0].attn.forward.module is other.blocks[0].attn
    assert not torch.allclose(integration.replace(model, "performer", 16, seed=9)(x), out, atol=1e-4)


def test_biases_and_masks_are_kept():
    torch.manual_seed(0)
    model = timm.create_model("beit_base_patch16_224", **SIZES).eval()
    x = images()
    expected = model(x)
    integration.replace(model, "sbcluster", 16)
    assert torch.equal(model(x), expected)
    assert all("routed" not in counts for counts in integration.report(model).values())

    layer, tokens = create().blocks[0].attn, torch.randn(2, 65, 32)
    mask = (torch.arange(65) >= torch.tensor([0, 20])[:, None])[:, None, None, :]
    calls = [{"attn_mask": mask}]
    if "is_causal" in inspect.signature(layer.forward).parameters:  # not in timm 1.0.23
        calls.append({"is_causal": True})
    expected = [layer(tokens, **kwargs) for kwargs in calls]
    integration.replace(layer, "full", 16)
    for kwargs, out in zip(calls, expected, strict=True):
        torch.testing.assert_close(layer(tokens, **kwargs), out)
    assert layer.scatterbrain_router.counts() == {"routed": len(calls)}
    integration.replace(layer, "smyrf", 16)
    for kwargs, out in zip(calls, expected, strict=True):
        assert torch.equal(layer(tokens, **kwargs), out)


def test_training_with_dropout_is_passed_on_and_without_has_gradients():
    model = integration.replace(create(attn_drop_rate=0.5), "sbcluster", 16).train()
    model(images()).sum().backward()
    assert all(counts == {"dropout": 1} for counts in integration.report(model).values())
    model = integration.replace(create(), "sbcluster", 16).train()
    model(images()).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.blocks.parameters())
    assert all(counts == {"routed": 1} for counts in integration.report(model).values())


def test_autocast():
    model = integration.replace(create(), "sbcluster", 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images()).dtype == torch.bfloat16


def test_distributed_data_parallel(tmp_path):
    model, x = integration.replace(create(), "performer", 16), images()
    expected = model(x)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        out = nn.parallel.DistributedDataParallel(model)(x)
        out.sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(out, expected)
    assert integration.report(model)["blocks.0.attn"] == {"routed": 2}


def test_compiled_models():
    model, x = integration.replace(create(), "sblocal", 16), images()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x))
    assert integration.report(model)["blocks.0.attn"] == {"routed": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "model is NoneType"),
        ({"layers": ["blocks.0.*"]}, "layers=.* is not valid"),
        ({"layers": {3: None}}, "layers=.* is not valid"),
        ({"layers": {"blocks.0.*": 3}}, r"layers: 3 of 'blocks\.0\.\*' is not valid"),
        ({"seed": "a"}, "seed=a is not valid"),
    ],
)
def test_arguments_of_other_types(options, message):
    with pytest.raises(UserError, match=message):
        integration.replace(**({"model": create()} | options))
    with pytest.raises(UserError, match="model is str"):
        integration.restore("model.pt")


def test_models_without_the_call_are_refused():
    with pytest.raises(UserError, match="Sequential has no attention layer of timm"):
        integration.replace(nn.Sequential(nn.Linear(2, 2)))
    model = create()
    model.blocks[1].attn.fused_attn = False
    with pytest.raises(UserError, match=r"blocks\.1\.attn: Attention does not use scaled_dot_product_attention"):
        integration.replace(model)
    assert not integration.report(model)
    integration.replace(model, layers={"blocks.1.attn": None})
    timm.layers.set_fused_attn(False)
    try:
        with pytest.raises(UserError, match="set_fused_attn"):
            create(attn_layer="scatterbrain")
    finally:
        timm.layers.set_fused_attn(True)
