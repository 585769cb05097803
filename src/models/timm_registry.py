"""T2T-ViT in timm's registry: `timm.create_model("t2t_vit_t_14")` after this module is imported.

>>> import timm
>>> import src.models.timm_registry
>>> model = timm.create_model("t2t_vit_t_14", attention="sblocal")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import is_model, register_model

from scatterbrain.errors import UserError
from src.models.t2t_vit import T2T_VIT_VARIANTS, T2TViT, create_t2t_vit


def entry_point(name: str) -> Callable[..., T2TViT]:
    """Function that timm calls to build a variant; `__name__` is the variant's.

    It takes the options of `create_t2t_vit`, and timm's names for two of them: `img_size` and `attn_drop_rate`.

    Args:
        name: one of `T2T_VIT_VARIANTS`.
    """

    def build(
        pretrained: bool = False,
        *,
        img_size: int = 224,
        in_chans: int = 3,
        attn_drop_rate: float = 0.0,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: Any = None,
        **options: Any,
    ) -> T2TViT:
        if pretrained or pretrained_cfg is not None:
            raise UserError(
                f"timm has no weights of {name}. Leave pretrained out, and load a file by "
                "src.utils.checkpoint.load_checkpoint(model, path)."
            )
        if in_chans != 3:
            raise UserError(f"in_chans={in_chans}: {name} takes images of 3 channels.")
        options = {"image_size": img_size, "attention_drop_rate": attn_drop_rate} | options
        model = create_t2t_vit(name, **options)
        size = (3, model.image_size, model.image_size)
        data = {"input_size": size, "crop_pct": 0.9, "interpolation": "bicubic"}
        data |= {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
        # what timm.data.resolve_model_data_config reads
        model.pretrained_cfg = {"architecture": name, "num_classes": model.num_classes, **data}
        model.pretrained_cfg |= pretrained_cfg_overlay or {}
        return model

    build.__name__ = build.__qualname__ = name
    return build


for variant in T2T_VIT_VARIANTS:
    if not is_model(variant):
        register_model(entry_point(variant))
