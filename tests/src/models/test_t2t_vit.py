"""The T2T-ViT models: sizes, options, refusals, position table, random features, gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scatterbrain.attention.full import FullAttention
from scatterbrain.attention.local import LocalAttention
from scatterbrain.attention.sblocal import SBLocalAttention
from scatterbrain.errors import UserError
from scatterbrain.ops.common.projection import draw_projection
from src.models.modules.token_stage import TokenPerformer
from src.models.t2t_vit import (
    T2T_VIT_VARIANTS,
    T2TViTVariant,
    create_t2t_vit,
    resize_position_table,
    sinusoid_table,
    stage_seed,
)
from tests.helpers import assert_close

# Published numbers, position table included; the last is ours.
PARAMETERS = {
    "t2t_vit_7": 4_310_222,
    "t2t_vit_10": 5_889_230,
    "t2t_vit_12": 6_941_902,
    "t2t_vit_14": 21_545_550,
    "t2t_vit_19": 39_177_422,
    "t2t_vit_24": 64_105_934,
    "t2t_vit_t_14": 21_541_070,
    "t2t_vit_t_19": 39_172_942,
    "t2t_vit_t_24": 64_101_454,
    "t2t_vit_14_resnext": 21_545_550,
    "t2t_vit_14_wide": 25_156_302,
    "t2t_vit_t_7": 4_305_742,
}
HEADS = {
    "t2t_vit_7": 4,
    "t2t_vit_10": 4,
    "t2t_vit_12": 4,
    "t2t_vit_14": 6,
    "t2t_vit_19": 7,
    "t2t_vit_24": 8,
    "t2t_vit_t_14": 6,
    "t2t_vit_t_19": 7,
    "t2t_vit_t_24": 8,
    "t2t_vit_14_resnext": 32,
    "t2t_vit_14_wide": 12,
    "t2t_vit_t_7": 4,
}
# Published token stages before a small backbone: what a test draws of weights is what it takes of time.
TRANSFORMER = "t2t_vit_t_tiny"
PERFORMER = "t2t_vit_tiny"
TINY = {
    TRANSFORMER: T2TViTVariant("transformer", embed_dim=64, depth=3, num_heads=2),
    PERFORMER: T2TViTVariant("performer", embed_dim=64, depth=3, num_heads=2),
}


@pytest.fixture(autouse=True)
def tiny_variants(monkeypatch):
    """Two small variants in the table."""
    for name, variant in TINY.items():
        monkeypatch.setitem(T2T_VIT_VARIANTS, name, variant)


def create(name: str = TRANSFORMER, attention=None, image_size: int = 32, num_classes: int = 5, **options) -> nn.Module:
    """A model for small images, in eval mode."""
    return create_t2t_vit(name, attention, image_size, num_classes, **options).eval()


def images(image_size: int = 32, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, image_size, image_size)


def test_the_table_holds_these_variants():
    assert T2T_VIT_VARIANTS.keys() - TINY.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_numbers_of_parameters_and_heads(name, monkeypatch):
    # the draws of the weights take longer than everything else, and only their number matters here
    monkeypatch.setattr("src.models.t2t_vit.trunc_normal_", lambda tensor, std: tensor)
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda self: None)
    model = create_t2t_vit(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    # heads leave no trace in the shapes of the weights
    assert [block.attn.num_heads for block in model.blocks] == [HEADS[name]] * T2T_VIT_VARIANTS[name].depth


@pytest.mark.parametrize("attention", ["full", "local", "performer", "sblocal"])
def test_swapping_the_attention_adds_no_parameter(attention):
    with_it, without = (dict(create(attention=choice).named_parameters()) for choice in (attention, None))
    assert {key: x.shape for key, x in with_it.items()} == {key: x.shape for key, x in without.items()}


@pytest.mark.parametrize("image_size", [16, 32, 64, 96, 240])
@pytest.mark.parametrize("name", [PERFORMER, TRANSFORMER])
def test_image_sizes(name, image_size):
    model = create(name, image_size=image_size)
    assert model.pos_embed.pe.shape[1] == (image_size // 16) ** 2 + 1
    with torch.inference_mode():
        assert model.patch_embed(images(image_size, 1)).shape[1] == (image_size // 16) ** 2
        assert model(images(image_size, 1)).shape == (1, 5)


@pytest.mark.parametrize("attention", ["local", "performer", "sblocal"])
@pytest.mark.parametrize("image_size", [16, 96])
def test_image_sizes_of_swapped_attentions(attention, image_size):
    with torch.inference_mode():
        out = create(attention=attention, image_size=image_size)(images(image_size, 1))
    assert out.shape == (1, 5)
    assert out.isfinite().all()


@pytest.mark.parametrize(("name", "attention"), [(PERFORMER, None), (TRANSFORMER, "sblocal")])
def test_384_pixels(name, attention):
    model = create(name, attention, image_size=384)
    assert model.pos_embed.pe.shape[1] == 577
    with torch.inference_mode():
        assert model(images(384, 1)).shape == (1, 5)


@pytest.mark.parametrize("image_size", [0, -16, 8, 100, 225, 224.0, "224"])
def test_refuses_image_sizes_that_do_not_divide(image_size):
    with pytest.raises(UserError, match=f"image_size={image_size} is not a positive multiple of 16"):
        create_t2t_vit(PERFORMER, image_size=image_size)


@pytest.mark.parametrize("num_classes", [1, 10, 1000])
def test_number_of_classes(num_classes):
    assert create(PERFORMER, num_classes=num_classes)(images()).shape == (2, num_classes)


@pytest.mark.parametrize("num_classes", [0, -1, 2.5])
def test_refuses_numbers_of_classes(num_classes):
    with pytest.raises(UserError, match="num_classes="):
        create_t2t_vit(PERFORMER, num_classes=num_classes)


@pytest.mark.parametrize(
    "shape", [(2, 3, 32, 48), (2, 3, 64, 64), (2, 1, 32, 32), (3, 32, 32), (2, 32, 32, 3)], ids=str
)
def test_refuses_images_of_another_shape(shape):
    with pytest.raises(UserError, match=r"takes images of shape \(B, 3, 32, 32\), got .*image_size="):
        create(PERFORMER)(torch.randn(shape))


@pytest.mark.parametrize(
    ("name", "hint"),
    [("t2t_vit_t14", "Did you mean 't2t_vit_t_14'"), ("T2T-ViT-7", "t2t_vit_7"), ("resnet50", "Choose one of: .*t2t")],
)
def test_unknown_variants_are_refused_with_a_suggestion(name, hint):
    with pytest.raises(UserError, match=f"Unknown T2T-ViT variant '{name}'. .*{hint}"):
        create_t2t_vit(name)


@pytest.mark.parametrize("name", [name for name, variant in T2T_VIT_VARIANTS.items() if variant.tokens == "performer"])
def test_performer_tokens_take_no_attention(name):
    with pytest.raises(UserError, match=rf"{name} takes no attention: .*t2t_vit_t_"):
        create_t2t_vit(name, attention="sblocal")


@pytest.mark.parametrize("attention", [None, "full", "local", "performer", "sblocal"])
def test_scale_of_the_token_stages_is_that_of_their_input_width(attention):
    first, second = create(attention=attention).token_attentions
    assert first.softmax_temp == 147**-0.5
    assert second.softmax_temp == 576**-0.5


def test_scale_of_a_token_stage_reaches_its_attention():
    # by hand, so that a scale that is stored but not used would show
    model = create()
    stage = model.patch_embed.attention1
    x = torch.randn(2, 64, 147)
    with torch.inference_mode():
        normed = stage.norm1(x)
        query, key, value = (10 * normed @ stage.attn.qkv.weight.T).chunk(3, dim=-1)
        weights = (query @ key.transpose(1, 2) / math.sqrt(147)).softmax(-1)
        expected = value + stage.attn.proj(weights @ value)
        stage.attn.qkv.weight.mul_(10)
        assert_close("stage", expected, stage.attn(normed), 1e-5)  # float32
        # with 64 in place of 147 the weights are others
        wrong = value + stage.attn.proj((query @ key.transpose(1, 2) / 8).softmax(-1) @ value)
        assert (wrong - expected).abs().max() > 1e-3


def test_budgets_follow_from_the_image_size():
    for image_size, expected in ((224, [(49, 24), (12, 6)]), (384, [(144, 72), (36, 18)])):
        model = create_t2t_vit(TRANSFORMER, "sblocal", image_size=image_size)
        assert [tuple(attention.sizes().values()) for attention in model.token_attentions] == expected


def test_none_is_full_attention():
    assert all(isinstance(attention, FullAttention) for attention in create().token_attentions)
    assert create(PERFORMER).token_attentions is None
    assert isinstance(create(PERFORMER).patch_embed.attention1, TokenPerformer)


def test_a_pair_configures_each_stage():
    model = create(attention=[{"name": "sblocal", "local_context": 5, "nb_features": 8, "seed": 9}, "local"])
    first, second = model.token_attentions
    assert isinstance(first, SBLocalAttention)
    assert isinstance(second, LocalAttention)
    assert first.sizes() == {"local_context": 5, "nb_features": 8}
    assert torch.equal(first.projection_matrix, draw_projection(4, 64, 9))
    first, second = create(attention=({"name": "local", "memory_fraction": 0.5}, {"name": "full"})).token_attentions
    assert first.sizes() == {"local_context": 32}
    assert isinstance(second, FullAttention)


def test_configs_are_not_changed():
    config = {"name": "local", "local_context": 3}
    create(attention=[config, config])
    assert config == {"name": "local", "local_context": 3}


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("sblocl", "Unknown attention 'sblocl'. Did you mean 'sblocal'"),
        (["sblocal"], "neither a name nor a pair"),
        (["sblocal"] * 3, "neither a name nor a pair"),
        ({"name": "sblocal"}, "neither a name nor a pair"),
        ({"name": "sblocal", "seed": 3}, "neither a name nor a pair"),
        ([{"local_context": 3}, "full"], "stage 1 has no name"),
        (["full", {"local_context": 3}], "stage 2 has no name"),
        ([{"name": "local", "local_contxt": 3}, "full"], "Did you mean 'local_context'"),
        ([{"name": "local", "softmax_temp": 0.125}, "full"], "softmax_temp of a token stage follows from the model"),
        ([{"name": "performer", "dim_heads": 32}, "full"], "dim_heads of a token stage follows from the model"),
        (["full", {"name": "local", "sequence_length": 9}], "sequence_length of a token stage follows"),
        ([{"name": "local", "memory_fraction": 2}, "full"], "memory_fraction=2"),
    ],
)
def test_attention_configs_that_are_refused(attention, message):
    with pytest.raises(UserError, match=message):
        create_t2t_vit(TRANSFORMER, attention)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="drop_ratio"):
        create_t2t_vit(PERFORMER, drop_ratio=0.1)


# --- random features


@pytest.mark.parametrize(
    ("name", "attention", "expected"),
    [
        (PERFORMER, None, False),
        (TRANSFORMER, None, False),
        (TRANSFORMER, "local", False),
        (TRANSFORMER, "performer", True),
        (TRANSFORMER, "sblocal", True),
        (TRANSFORMER, ["local", "sblocal"], True),
    ],
)
def test_has_random_features(name, attention, expected):
    assert create(name, attention).has_random_features is expected


def test_stages_and_seeds_have_features_of_their_own():
    seeds = [stage_seed(seed, stage) for seed in range(10) for stage in range(2)]
    assert len(set(seeds)) == 20
    model = create(attention=[{"name": "performer", "nb_features": 6}] * 2, seed=3)
    first, second = (attention.projection_matrix for attention in model.token_attentions)
    assert first.shape == second.shape
    assert not torch.equal(first, second)
    other = create(attention=[{"name": "performer", "nb_features": 6}] * 2, seed=4)
    for rows in (attention.projection_matrix for attention in other.token_attentions):
        assert not torch.equal(rows, first)
        assert not torch.equal(rows, second)


def test_redraw_projections_is_building_with_that_seed():
    model = create(attention="sblocal", seed=3)
    rows = [attention.projection_matrix for attention in model.token_attentions]
    before = [x.clone() for x in rows]
    x = images()
    with torch.inference_mode():
        out = model(x)
        model.redraw_projections(8)
        assert not torch.equal(model(x), out)
    for attention, expected, buffer in zip(
        model.token_attentions, create(attention="sblocal", seed=8).token_attentions, rows, strict=True
    ):
        assert attention.projection_matrix is buffer
        assert torch.equal(buffer, expected.projection_matrix)
    model.redraw_projections(3)
    assert all(torch.equal(x, y) for x, y in zip(rows, before, strict=True))


def test_redraw_projections_leaves_models_without_projections_unchanged():
    model = create(PERFORMER)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.redraw_projections(8)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("attention", ["performer", "sblocal"])
def test_the_seed_of_the_features_does_not_touch_the_weights(attention):
    weights = []
    for seed in (0, 1):
        torch.manual_seed(5)
        weights.append(dict(create(attention=attention, seed=seed).named_parameters()))
    assert all(torch.equal(parameter, weights[1][key]) for key, parameter in weights[0].items())


# --- position table


@pytest.mark.parametrize(("dim", "position"), [(6, 0), (6, 3), (8, 100)])
def test_sinusoid(dim, position):
    row = sinusoid_table(101, dim)[0, position].double()
    expected = [
        (math.sin, math.cos)[channel % 2](position / 10000 ** (2 * (channel // 2) / dim)) for channel in range(dim)
    ]
    # rounded to float32 once
    torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64), rtol=6e-8, atol=6e-8)


@pytest.mark.parametrize(("old", "new"), [(14, 24), (14, 7), (14, 15), (2, 14), (1, 3)])
def test_resized_position_table_is_that_of_the_published_code(old, new):
    table = torch.randn(1, 1 + old * old, 12)
    # as published: rows to a channels-first grid, bicubic, back, behind the row of the class token
    grid = table[0, 1:].T.reshape(1, 12, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic").reshape(12, new * new).T
    expected = torch.cat([table[0, :1], grid])[None]
    assert torch.equal(resize_position_table(table, new * new), expected)


def cubic(x: float) -> float:
    """Keys' kernel with a = -0.75."""
    x = abs(x)
    if x <= 1:
        return 1.25 * x**3 - 2.25 * x**2 + 1
    return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def test_resizing_224_to_384_by_hand():
    old, new = 14, 24
    table = torch.randn(1, 1 + old * old, 3, dtype=torch.float64)
    # (new, old) matrix of one axis: pixel centres, edges repeated
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(tap, 0), old - 1)] += cubic(centre - tap)
    grid = torch.einsum("ip,jq,pqc->ijc", matrix, matrix, table[0, 1:].view(old, old, 3)).reshape(1, new * new, 3)
    assert_close("table", torch.cat([table[:, :1], grid], dim=1), resize_position_table(table, new * new), 1e-12)


def test_a_table_of_the_same_size_is_kept():
    table = torch.randn(1, 197, 8)
    assert resize_position_table(table, 196) is table


@pytest.mark.parametrize("shape", [(1, 196, 8), (1, 1, 8), (1, 0, 8), (197, 8), (1, 15, 8)], ids=str)
def test_refuses_tables_that_are_no_square_grid(shape):
    with pytest.raises(UserError, match="not one class token and a square grid"):
        resize_position_table(torch.randn(shape), 196)


def test_the_position_table_is_stored_but_not_trained():
    model = create(PERFORMER)
    assert "pos_embed.pe" in model.state_dict()
    assert not model.pos_embed.pe.requires_grad
    assert torch.equal(model.pos_embed.pe, sinusoid_table(5, 64))


# --- training


@pytest.mark.parametrize(
    ("name", "attention"), [(PERFORMER, None), *((TRANSFORMER, a) for a in ("full", "local", "performer", "sblocal"))]
)
def test_gradients_reach_every_trainable_parameter(name, attention):
    model = create(name, attention).train()
    F.cross_entropy(model(images()), torch.tensor([1, 3])).backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
            assert parameter.grad.abs().max() > 0, key
        else:
            assert parameter.grad is None, key
    fixed = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    rows = {"patch_embed.attention1.w", "patch_embed.attention2.w"} if name == PERFORMER else set()
    assert fixed == rows | {"pos_embed.pe"}


@pytest.mark.parametrize("option", ["drop_rate", "attention_drop_rate", "drop_path_rate"])
def test_dropout_options_act_in_training_only(option):
    x = images()

    def outputs(training: bool, **options) -> torch.Tensor:
        torch.manual_seed(2)
        model = create(**options).train(training)
        torch.manual_seed(3)
        return model(x)

    with torch.inference_mode():
        # the transformer tokens have no dropout of their own
        without = outputs(True)
        assert_close("without", outputs(False), without, 1e-6)  # fused layers may round otherwise
        assert not torch.allclose(outputs(True, **{option: 0.5}), without, atol=1e-4)
        assert torch.equal(outputs(False, **{option: 0.5}), outputs(False))


def test_drop_path_grows_over_the_depth():
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in create(PERFORMER, drop_path_rate=0.3).blocks]
    assert rates == pytest.approx([0.0, 0.15, 0.3])


def test_initial_weights():
    model = create_t2t_vit(PERFORMER)
    weight = model.blocks[0].mlp.fc1.weight
    # 12,288 samples: the standard deviation is known to 0.6 %
    assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert all((m.bias == 0).all() for m in model.modules() if isinstance(m, nn.Linear) and m.bias is not None)
    rows = model.patch_embed.attention1.w
    # orthogonal rows of length sqrt(32), float32
    assert_close("rows", 32 * torch.eye(32), rows @ rows.T, 1e-6)


def test_batch_of_one_and_of_many_agree():
    model, x = create(attention="sblocal"), images(batch=4)
    with torch.inference_mode():
        together = model(x)
        alone = torch.cat([model(x[i : i + 1]) for i in range(4)])
    assert_close("logits", alone, together, 1e-5)  # float32 sums in another order, five layers
