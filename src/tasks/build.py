"""The model of the config group `model`, with errors that name the option."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from scatterbrain.errors import UserError
from src.models.t2t_vit import T2T_VIT_VARIANTS, T2TViT, create_t2t_vit, get_variant


def build_model(config: DictConfig) -> T2TViT:
    """The T2T-ViT that the group `model` describes.

    Raises:
        UserError: see `create_t2t_vit`; one stage has an attention and the other none.
    """
    options = OmegaConf.to_container(config, resolve=True)
    options.pop("fast", None)  # of evaluations, see `uses_inference_model`
    stages = [options.pop(f"t2tattn{stage}_cfg") for stage in (1, 2)]
    if stages == [None, None]:
        stages = None
    elif None in stages:
        raise UserError(
            "Only one of model.t2tattn1_cfg and model.t2tattn2_cfg is set. Choose both by model/t2tattn_cfg=NAME."
        )
    try:
        return create_t2t_vit(attention=stages, **options)
    except UserError:
        raise
    except (TypeError, ValueError) as error:  # a layer refuses a value, or Python an unknown option
        raise UserError(f"model cannot be built: {error}. Check the options under 'model'.") from error


def uses_inference_model(config: DictConfig, precision: str) -> bool:
    """Whether an evaluation runs the model of `src.models.inference`, by the option `model.fast`.

    `auto` is on wherever that model runs: it was the faster one on every device and in every precision measured.

    Args:
        config: the group's config.
        precision: Lightning's name of it, such as `"32-true"`.

    Raises:
        UserError: `fast` is none of auto, on and off, or on with autocast.
    """
    fast = {True: "on", False: "off"}.get(config.fast, config.fast)  # YAML reads on and off as true and false
    if fast not in ("auto", "on", "off"):
        raise UserError(f"model.fast={fast!r} is not valid. Give auto, on or off.")
    if fast == "off":
        return False
    if not precision.endswith("-true"):
        if fast == "on":
            raise UserError(
                f"model.fast=on does not run under autocast (trainer.precision={precision}). Use "
                "trainer.precision=bf16-true, 16-true or 32-true, or model.fast=auto."
            )
        return False
    return True


def check_swappable(variant: str) -> None:
    """Refuse a variant of T2T-ViT whose attention is its own.

    Raises:
        UserError: the variant that `--variant` names is unknown, or its attention cannot be swapped.
    """
    if get_variant(variant).tokens != "transformer":
        swappable = (name for name, sizes in T2T_VIT_VARIANTS.items() if sizes.tokens == "transformer")
        raise UserError(
            f"--variant {variant}: the attention of its token stages is part of the model and cannot be swapped. "
            f"Choose one of: {', '.join(sorted(swappable))}."
        )
