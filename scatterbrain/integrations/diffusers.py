"""Scatterbrain in the models of diffusers: `replace` puts a processor around the processor of each attention layer.

Needs diffusers 0.35 or newer. The registry of attention backends is a closed list, so there is no name for
`set_attention_backend`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from scatterbrain.errors import UserError
from scatterbrain.integrations.router import ATTRIBUTE, OVERRIDE, Router, check_model, layer_routers, report
from scatterbrain.integrations.sdpa import SDPAMode

__all__ = ["ScatterbrainAttnProcessor", "replace", "report", "restore"]

NO_CALL = "attention without scaled_dot_product_attention (another backend or processor)"


class ScatterbrainAttnProcessor:
    """Processor that runs another one, whose calls of scaled_dot_product_attention a router gets.

    Projections, norms, rotary embeddings and the order of text and image tokens are those of the other processor.

    Args:
        processor: the layer's own processor.
        router: what computes or passes on its calls.
    """

    def __init__(self, processor: Callable[..., Any], router: Router) -> None:
        self.processor, self.router = processor, router

    @property
    def __call__(self) -> Callable[..., Any]:
        """The call, with the signature of the other processor: layers pass on what that names."""
        return functools.update_wrapper(functools.partial(_call, self), self.processor.__call__)


@torch.compiler.disable
def _call(processor: ScatterbrainAttnProcessor, *args: Any, **kwargs: Any) -> Any:
    router = processor.router
    before = sum(router.counts().values())
    with SDPAMode(router):
        out = processor.processor(*args, **kwargs)
    # a profile, or a plan, gets the calls in the router's place
    if OVERRIDE.get() is None and sum(router.counts().values()) == before:
        router.count(NO_CALL)
    return out


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

    A layer is a module with an attention processor. Self-attention is replaced, and joint attention of text and image
    tokens, which is self-attention of both in one sequence. Layers for cross-attention (`is_cross_attention`) stay.
    What the method does not take as it is, such as masks of the text, is computed as before, and `report` counts it.
    `state_dict` does not change. Layers run outside the graphs of `torch.compile`.

    Args:
        model: a transformer or U-Net, such as `pipeline.transformer`; changed in place.
        method: one of `scatterbrain.ATTENTIONS`.
        min_tokens: smallest number of tokens of a replaced attention.
        seed: seed of the random parts of the first layer; layer i has `seed + i`.
        layers: options of single layers, by patterns of their names (`fnmatch`, as in `model.named_modules()`), such as
            `{"transformer_blocks.0.*": {"memory_fraction": 1 / 8}, "single_transformer_blocks.*": None}`; None leaves a
            layer as it is.
        **options: options of `create_attention`, such as memory_fraction (default 1/32), and sizes.

    Raises:
        UserError: the model has no such layer, or a processor with weights of its own; unknown method, option or layer.
    """
    check_model(model)
    found = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "set_processor") and not getattr(module, "is_cross_attention", False)
    }
    if not found:
        raise UserError(
            f"{type(model).__name__} has no self-attention layer of diffusers. Give the transformer or the U-Net of a "
            "pipeline; scatterbrain.replace_sdpa takes any PyTorch code."
        )
    chosen = layer_routers(list(found), layers, seed, method=method, min_tokens=min_tokens, **options)
    for name, router in chosen.items():
        processor = found[name].processor
        if router is not None and isinstance(processor, nn.Module):
            raise UserError(
                f"{name}: {type(processor).__name__} has weights of its own, which would leave state_dict. "
                f"Leave it as it is by layers={{'{name}': None}}, or use scatterbrain.replace_sdpa."
            )
    restore(model)
    for name, router in chosen.items():
        if router is not None:
            vars(found[name])[ATTRIBUTE] = router
            found[name].set_processor(ScatterbrainAttnProcessor(found[name].processor, router))
    return model


def restore(model: nn.Module) -> nn.Module:
    """The model with its own processors again: undoes `replace`.

    Args:
        model: a model of diffusers; changed in place.

    Raises:
        UserError: it is no `torch.nn.Module`.
    """
    check_model(model)
    for module in model.modules():
        processor = vars(module).get("processor")
        if isinstance(processor, ScatterbrainAttnProcessor):
            module.set_processor(processor.processor)
            vars(module).pop(ATTRIBUTE, None)
    return model
