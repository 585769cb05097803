"""From configs to objects, with errors that name the option."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from scatterbrain.errors import UserError
from src.models.t2t_vit import T2T_VIT_VARIANTS, T2TViT, create_t2t_vit, get_variant


def build(config: DictConfig, group: str, **objects: Any) -> Any:
    """Instantiate `config`, which has a `_target_`.

    Args:
        config: the group's config.
        group: its name, for the message.
        **objects: arguments that no config holds.

    Raises:
        UserError: the object refuses its arguments; the message is its own.
    """
    try:
        return hydra.utils.instantiate(config, **objects)
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from error
        reason = str(cause).strip().rstrip(".!")
        if isinstance(cause, ModuleNotFoundError):
            raise UserError(f"{group} needs a package that is not installed: {reason}. Or choose another.") from error
        raise UserError(f"{group} cannot be built: {reason}. Check the options under '{group}'.") from error


def build_later(config: DictConfig, group: str, **changes: Any) -> Callable[..., Any]:
    """The function of a config's `_target_` with its options, for objects that come later, such as a model.

    Args:
        config: the group's config.
        group: its name, for the message.
        **changes: options in place of the config's.

    Raises:
        UserError: from the function, where it refuses its arguments.
    """
    # the objects it is applied to must not pass through the instantiation, which copies
    partial = hydra.utils.instantiate(config, _partial_=True, **changes)

    @functools.wraps(partial.func)
    def make(*arguments: Any, **options: Any) -> Any:
        try:
            return partial(*arguments, **options)
        except (AssertionError, TypeError, ValueError, ZeroDivisionError) as error:
            reason = str(error).strip().rstrip(".!") or type(error).__name__
            raise UserError(f"{group} cannot be built: {reason}. Check the options under '{group}'.") from error

    return make


def build_group(config: DictConfig | None, group: str) -> list[Any]:
    """Instantiate every entry of a group such as `callbacks` or `logger`; None is an empty group."""
    entries = config.items() if config is not None else ()
    return [build(entry, f"{group}.{name}") for name, entry in entries if entry is not None]


def build_model(config: DictConfig) -> T2TViT:
    """Build the T2T-ViT that the group `model` describes.

    Raises:
        UserError: see `create_t2t_vit`; one stage has an attention and the other none.
    """
    options = OmegaConf.to_container(config, resolve=True)
    options.pop("fast", None)  # of evaluations, see `runs_inference_form`
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
    except (TypeError, ValueError) as error:  # what its layers say of a value, or Python of an unknown option
        raise UserError(f"model cannot be built: {error}. Check the options under 'model'.") from error


def runs_inference_form(config: DictConfig, precision: str) -> bool:
    """Whether an evaluation runs the model's inference form, `src.models.inference`; `model.fast` of the group `model`.

    `auto` is on wherever the form runs: it was faster than the model on every device and in every precision measured.

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


def attention_name(config: DictConfig, model: T2TViT) -> str | None:
    """Name of the token stages' attention: `sblocal`, or `sblocal+local` where they differ.

    None for a variant whose token stages are part of the model.
    """
    if model.token_attentions is None:
        return None
    stages = (config.t2tattn1_cfg, config.t2tattn2_cfg)
    first, second = ("full" if stage is None else stage["name"] for stage in stages)
    return first if first == second else f"{first}+{second}"


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
