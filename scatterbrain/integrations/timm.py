"""Scatterbrain in the models of timm: `replace` for a built model, `attn_layer="scatterbrain"` for `create_model`.

Parameters, their names and their values stay, so pre-trained weights load before and after. Importing this module
registers the attention layer. Needs timm 1.0.23 or newer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from scatterbrain.errors import UserError
from scatterbrain.integrations.router import ATTRIBUTE, Router, check_model, layer_routers, report
from scatterbrain.integrations.sdpa import SDPAMode
from scatterbrain.tuning.forwards import PlannedForward

try:
    from timm.layers import Attention
    from timm.models import vision_transformer

    LAYERS = vision_transformer.ATTN_LAYERS
except (ImportError, AttributeError) as error:
    raise ImportError("scatterbrain.integrations.timm needs timm 1.0.23 or newer: pip install -U timm") from error

FORWARD = "scatterbrain_forward"

__all__ = ["ScatterbrainAttention", "replace", "report", "restore"]


class ScatterbrainAttention(Attention):
    """timm's attention layer with `sbcluster` in place of full attention, from 1,024 tokens on.

    The layer of `create_model(..., attn_layer="scatterbrain")`; `replace` sets other options.

    Args:
        *args: arguments of `timm.layers.Attention`.
        **kwargs: arguments of `timm.layers.Attention`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_fused("attn_layer='scatterbrain'", self)
        _install(self, Router())


LAYERS["scatterbrain"] = ScatterbrainAttention


def replace(
    model: nn.Module,
    method: str = "sbcluster",
    min_tokens: int = 1024,
    *,
    seed: int = 0,
    layers: Mapping[str, Mapping[str, Any] | None] | None = None,
    **options: Any,
) -> nn.Module:
    """The model, whose attention layers are computed by a method of this library from now on.

    A layer is a module of timm that calls scaled_dot_product_attention, such as `Attention`, `AttentionRope` and
    `EvaAttention`. Only that call is replaced: projections, rotary embeddings and norms are the layer's own. What the
    method does not take as it is, such as the relative position biases of BEiT and Swin, is computed as before, and
    `report` counts it. `state_dict` does not change. Layers run outside the graphs of `torch.compile`.

    Args:
        model: model of timm; changed in place.
        method: one of `scatterbrain.ATTENTIONS`.
        min_tokens: smallest number of tokens of a replaced attention.
        seed: seed of the random parts of the first layer; layer i has `seed + i`.
        layers: options of single layers, by patterns of their names (`fnmatch`, as in `model.named_modules()`), such as
            `{"blocks.0.*": {"memory_fraction": 1 / 8}, "blocks.11.*": None}`; None leaves a layer as it is.
        **options: options of `create_attention`, such as memory_fraction (default 1/32), and sizes.

    Raises:
        UserError: the model has no such layer, or computes attention without scaled_dot_product_attention; unknown
            method, option or layer.
    """
    check_model(model)
    found = {name: module for name, module in model.named_modules() if hasattr(module, "fused_attn")}
    if not found:
        raise UserError(
            f"{type(model).__name__} has no attention layer of timm. scatterbrain.replace_sdpa takes any PyTorch code."
        )
    chosen = layer_routers(list(found), layers, seed, method=method, min_tokens=min_tokens, **options)
    for name, router in chosen.items():
        if router is not None:
            _check_fused(name, found[name])
    for name, router in chosen.items():
        _remove(found[name])
        if router is not None:
            _install(found[name], router)
    return model


def restore(model: nn.Module) -> nn.Module:
    """The model with its own attention again: undoes `replace` and `attn_layer="scatterbrain"`.

    Args:
        model: model of timm; changed in place.

    Raises:
        UserError: it is no `torch.nn.Module`.
    """
    check_model(model)
    for module in model.modules():
        _remove(module)
    return model


def _check_fused(name: str, module: nn.Module) -> None:
    if not module.fused_attn:
        raise UserError(
            f"{name}: {type(module).__name__} does not use scaled_dot_product_attention here. Call "
            "timm.layers.set_fused_attn(True, experimental=True) before create_model."
        )


class _ReplacedForward:
    """Forward of a layer whose attention its router gets; the forward before, where there is no router any more."""

    def __init__(self, module: nn.Module, previous: Callable[..., Any] | None) -> None:
        # that of the instance, such as one of another package that wraps it
        self.module, self.previous = module, previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, args, kwargs)


def _install(module: nn.Module, router: Router) -> None:
    # beside parameters and sub-modules, so that state_dict stays
    vars(module)[ATTRIBUTE] = router
    if FORWARD in vars(module):
        return
    outer = vars(module).get("forward")
    planned = isinstance(outer, PlannedForward)  # a plan stays outside, where scatterbrain.restore finds it
    replaced = vars(module)[FORWARD] = _ReplacedForward(module, outer.previous if planned else outer)
    if planned:
        outer.previous = replaced
    else:
        vars(module)["forward"] = replaced


def _remove(module: nn.Module) -> None:
    vars(module).pop(ATTRIBUTE, None)
    replaced, outer = vars(module).get(FORWARD), vars(module).get("forward")
    if replaced is None:
        return
    if isinstance(outer, PlannedForward) and outer.previous is replaced:
        outer.previous = replaced.previous
    elif outer is replaced:
        del vars(module)["forward"]
        if replaced.previous is not None:
            vars(module)["forward"] = replaced.previous
    else:
        return  # another package wraps it: it stays, without a router
    del vars(module)[FORWARD]


@torch.compiler.disable
def _forward(replaced: _ReplacedForward, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Output of the layer's own forward, whose attention the router gets."""
    forward = replaced.previous or functools.partial(type(replaced.module).forward, replaced.module)
    router = vars(replaced.module).get(ATTRIBUTE)
    with contextlib.nullcontext() if router is None else SDPAMode(router):
        return forward(*args, **kwargs)
