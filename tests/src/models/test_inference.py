"""The inference model of T2T-ViT against the model itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import src.models.inference as inference_module
from scatterbrain.errors import UserError
from src.models.inference import inference_model
from src.models.t2t_vit import T2T_VIT_VARIANTS, T2TViT, T2TViTVariant, create_t2t_vit
from tests.helpers import assert_close, rms_ratio

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRANSFORMER, PERFORMER = "t2t_vit_t_tiny", "t2t_vit_tiny"
TINY = {
    TRANSFORMER: T2TViTVariant("transformer", embed_dim=48, depth=3, num_heads=3),
    PERFORMER: T2TViTVariant("performer", embed_dim=48, depth=1, num_heads=2, mlp_ratio=2.0),
}
# float32 with products in another order, over a few layers
EXACT = 2e-6


@pytest.fixture(autouse=True)
def tiny_variants(monkeypatch):
    """Two small variants in the table."""
    for name, variant in TINY.items():
        monkeypatch.setitem(T2T_VIT_VARIANTS, name, variant)


def create(name: str = TRANSFORMER, attention=None, image_size: int = 48, **options) -> T2TViT:
    """A model in eval mode whose every bias, scale, shift and weight matters."""
    if attention is not None:
        # only what this module tests runs in Triton's interpreter
        attention = [{"name": attention, "backend": "auto" if DEVICE == "cuda" else "torch"}] * 2
    model = create_t2t_vit(name, attention, image_size, 7, **options)
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0 if "norm" in key and key.endswith("weight") else 0.0, 0.3)
        elif key != "pos_embed.pe" and not key.endswith(".w"):
            nn.init.normal_(parameter, 0.0, parameter.shape[-1] ** -0.5)
    return model.eval().to(DEVICE)


def draw_images(image_size: int = 48, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, image_size, image_size, device=DEVICE)


@pytest.mark.parametrize(
    ("name", "attention"),
    [(TRANSFORMER, attention) for attention in ("full", "local", "performer", "sblocal")] + [(PERFORMER, None)],
)
@pytest.mark.parametrize("image_size", [16, 48])
def test_gives_what_the_model_gives(name, attention, image_size):
    model, images = create(name, attention, image_size), draw_images(image_size)
    inference = inference_model(model)
    with torch.inference_mode():
        tokens = model.patch_embed(images)
        tokens = model.pos_embed(torch.cat([model.cls_token.expand(2, -1, -1), tokens], dim=1))
        assert_close("tokens", tokens, inference.forward_tokens(images), EXACT)
        assert_close("logits", model(images), inference(images), EXACT)
        channels_last = images.contiguous(memory_format=torch.channels_last)
        assert_close("logits of channels-last images", model(images), inference(channels_last), EXACT)


def test_gives_what_the_model_gives_in_double_precision():
    model, images = create().double(), draw_images().double()
    with torch.inference_mode():
        assert_close("logits", model(images), inference_model(model)(images), 1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_less_exact_than_the_models(dtype):
    model, images = create(attention="sblocal"), draw_images(batch=4)
    with torch.inference_mode():
        expected = copy.deepcopy(model).double()(images.double())
        model, images = model.to(dtype), images.to(dtype)
        logits = inference_model(model)(images)
        assert logits.dtype == dtype
        # rounded elsewhere: within chance, which spans a third on older versions of PyTorch
        assert rms_ratio(expected, logits) < 1.5 * rms_ratio(expected, model(images))


def test_published_layers_without_biases_are_taken_as_they_are():
    model, images = create(), draw_images()
    for block in model.blocks:
        block.attn.qkv.bias = nn.Parameter(torch.randn(block.attn.qkv.out_features, device=DEVICE))
        block.mlp.fc2.bias = None
    with torch.inference_mode():
        assert_close("logits", model(images), inference_model(model)(images), EXACT)


def test_rows_of_random_features_are_those_of_the_model():
    model, images = create(attention="sblocal"), draw_images()
    inference = inference_model(model)
    with torch.inference_mode():
        before = inference(images)
        model.redraw_projections(5)
        assert rms_ratio(before, inference(images)) > 1e-3
        assert_close("logits", model(images), inference(images), EXACT)


def test_a_cpu_takes_large_batches_in_parts(monkeypatch):
    model, images = create(attention="sblocal"), draw_images(batch=5)
    with torch.inference_mode():
        for images_at_a_time in (2, 5, 0):
            monkeypatch.setattr(inference_module, "PIXELS_PER_CHUNK", images_at_a_time * 48**2)
            assert_close("logits", model(images), inference_model(model)(images), EXACT)


def test_other_weights_are_copies():
    model, images = create(), draw_images()
    inference = inference_model(model)
    assert list(inference.parameters()) == []
    with torch.inference_mode():
        before = inference(images)
        for parameter in model.parameters():
            parameter.data.mul_(2)
        assert torch.equal(inference(images), before)


def test_images_stay_as_they_are():
    images = draw_images()
    before = images.clone()
    with torch.inference_mode():
        inference_model(create())(images)
    assert torch.equal(images, before)


def test_compiles_as_one_graph():
    model, images = create(attention="sblocal"), draw_images()
    inference = inference_model(model)
    with torch.inference_mode():
        logits = torch.compile(inference, fullgraph=True, backend="aot_eager")(images)
        assert_close("logits", model(images), logits, EXACT)


def test_refusals():
    model, images = create(), draw_images()
    inference = inference_model(model)
    with pytest.raises(UserError, match=r"takes images of shape \(B, 3, 48, 48\), got \(2, 3, 32, 48\)"):
        inference(images[:, :, :32])
    with pytest.raises(UserError, match=r"has no gradients\. .* train the model itself"):
        inference(images.clone().requires_grad_())
    with pytest.raises(UserError, match="fold the weights again after moving the model"):
        inference(images.double())
    with torch.autocast(DEVICE, dtype=torch.bfloat16), pytest.raises(UserError, match="autocast is on"):
        inference(images)
    with pytest.raises(UserError, match="cannot be trained"):
        inference.train()
    with pytest.raises(UserError, match=r"Call model\.eval\(\)"):
        inference_model(model.train())
    model.eval().head.double()
    with pytest.raises(UserError, match="of several dtypes or devices"):
        inference_model(model)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["full", "sblocal"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2.5e-2)], ids=str
)
def test_the_published_network_on_a_gpu(attention, dtype, tolerance):
    model = create("t2t_vit_t_14", attention, 224)
    images = draw_images(224, batch=8)
    with torch.inference_mode():
        expected = model(images)
        inference, images = inference_model(model.to(dtype)), images.to(dtype)
        logits = inference(images)
        assert_close("logits", expected, logits, tolerance)
        compiled = torch.compile(inference, fullgraph=True)(images)
        assert_close("logits of the compiled inference", expected, compiled, tolerance)

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            inference(images)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = inference(images)
        graph.replay()
        torch.cuda.synchronize()
        assert_close("logits of the replayed graph", expected, replayed, tolerance)
