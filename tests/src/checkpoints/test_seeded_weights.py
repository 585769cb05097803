"""Tensors from names: stored reference outputs stand or fall with these numbers."""

import pytest
import torch

from scatterbrain.errors import UserError
from src.checkpoints import convert_t2t_vit_state_dict
from src.checkpoints.seeded_weights import published_shapes, seeded_tensor, seeded_weights
from src.models.t2t_vit import T2T_VIT_VARIANTS, create_t2t_vit

# Of the recipe behind the stored reference outputs.
STORED_DRAWS = {
    "query": [
        [-1.2133147817420311, 0.4293555689564899, 0.2089133634430113],
        [-0.2826803720918461, 0.024520379376900717, 0.5184015215836841],
    ],
    "projection1": [-0.1759383067309906, -1.459915127543225, 0.1712034623287096, 0.7317700645714236],
}
STORED_WEIGHTS = {
    "cls_token": [[[0.503175604931714, 0.17699546463636356, 0.07932094771904967]]],
    "tokens_to_token.attention1.w": [0.8701881439765037, -0.9973981048307535, -0.10275021855842792],
    "tokens_to_token.attention1.norm1.weight": [1.0073584978686507, 1.0492919729403114, 0.9178284700386583],
    "blocks.0.norm1.bias": [-0.08291579055301385, -0.0043682900915166115, 0.02701206184814678],
    "blocks.3.mlp.fc1.bias": [0.07470473058047526, 0.06793555182098446],
    "head.weight": [
        [0.7792638887985693, -0.6675834689996384, -0.7645725286546969, -0.6660659036024675],
        [-0.35539153708958743, 0.6453884756243428, -0.6286291874490006, 0.3432429352034382],
    ],
}


@pytest.mark.parametrize("name", STORED_DRAWS)
def test_tensors_are_the_stored_ones(name):
    expected = torch.tensor(STORED_DRAWS[name], dtype=torch.float64)
    torch.testing.assert_close(seeded_tensor(name, expected.shape), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", STORED_WEIGHTS)
def test_weights_are_the_stored_ones(name):
    expected = torch.tensor(STORED_WEIGHTS[name], dtype=torch.float64)
    weights = seeded_weights({name: expected.shape})
    torch.testing.assert_close(weights[name], expected, rtol=1e-15, atol=0)


def test_scalar_and_empty_shapes():
    assert seeded_tensor("a", ()).shape == ()
    assert seeded_tensor("a", (0, 3)).shape == (0, 3)


def test_position_table_is_the_sinusoid_of_the_model():
    table = seeded_weights({"pos_embed": (1, 5, 256)})["pos_embed"]
    model = create_t2t_vit("t2t_vit_7", image_size=32, num_classes=2)
    torch.testing.assert_close(table, model.pos_embed.pe.detach().double(), rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["t2t_vit_7", "t2t_vit_t_14"])
def test_official_shapes_are_published_keys_that_convert_to_those_of_the_model(variant):
    shapes = published_shapes(variant, num_classes=3, image_size=32)
    assert shapes["pos_embed"] == (1, 5, T2T_VIT_VARIANTS[variant].embed_dim)
    assert shapes["tokens_to_token.attention1.norm1.weight"] == (147,)
    assert shapes["head.weight"] == (3, T2T_VIT_VARIANTS[variant].embed_dim)
    assert not any(key.startswith(("patch_embed", "pos_embed.")) for key in shapes)
    model = create_t2t_vit(variant, image_size=32, num_classes=3)
    model.load_state_dict(convert_t2t_vit_state_dict(seeded_weights(shapes)), strict=True)


def test_official_shapes_names_a_wrong_variant():
    with pytest.raises(UserError, match=r"t2t_vit_77.*Did you mean 't2t_vit_7'"):
        published_shapes("t2t_vit_77")
