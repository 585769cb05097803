"""T2T-ViT in timm's registry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_model_data_config

import src.models.timm_registry  # noqa: F401
from scatterbrain.errors import UserError
from src.models.t2t_vit import T2T_VIT_VARIANTS, create_t2t_vit


def test_every_variant_is_registered():
    assert set(timm.list_models("t2t_vit_*", module="timm_registry")) == set(T2T_VIT_VARIANTS)


def test_it_is_the_factory_s_model():
    options = {"attention": "sblocal", "num_classes": 5, "seed": 3}
    torch.manual_seed(0)
    model = timm.create_model("t2t_vit_t_7", img_size=64, attn_drop_rate=0.1, drop_path_rate=0.2, **options)
    torch.manual_seed(0)
    expected = create_t2t_vit("t2t_vit_t_7", image_size=64, attention_drop_rate=0.1, drop_path_rate=0.2, **options)
    assert repr(model) == repr(expected)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.eval()(images), expected.eval()(images), rtol=0, atol=0)
    assert resolve_model_data_config(model)["input_size"] == (3, 64, 64)
    assert resolve_model_data_config(model)["crop_pct"] == 0.9


@pytest.mark.parametrize(
    ("options", "message"), [({"pretrained": True}, "no weights"), ({"in_chans": 1}, "3 channels")]
)
def test_what_timm_cannot_give(options, message):
    with pytest.raises(UserError, match=message):
        timm.create_model("t2t_vit_t_14", **options)


def test_registration_is_the_experiment_s():
    """The library registers its attention layer alone, and imports nothing of src."""
    code = (
        "import sys, timm, scatterbrain.integrations.timm; "
        "print(timm.is_model('t2t_vit_t_14'), any(name.split('.')[0] == 'src' for name in sys.modules))"
    )
    root = Path(__file__).resolve().parents[3]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]
