"""Scatterbrain in the models of transformers: the attention implementation "scatterbrain", and the masks for it.

>>> register()
>>> model = AutoModel.from_pretrained(name, attn_implementation="scatterbrain")

or, with options, `replace(model, "sblocal", memory_fraction=1 / 16)`. Needs transformers 5.0 or newer; before 5.4
masks have no notes, so that padding is passed on.

The mask function is that of "sdpa", and so is every mask. A mask that consists of causality and padding alone carries
a note that says so, for the methods that take these. Without a note, or where the mask was changed after it, the
library's own "sdpa" computes the call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from scatterbrain.errors import UserError
from scatterbrain.integrations.router import ATTRIBUTE, Router, check_model, layer_routers, report

__all__ = ["register", "replace", "report", "restore"]

NAME = "scatterbrain"
NOTE = "scatterbrain_note"
PREVIOUS = "scatterbrain_previous"
# What changes the weights in a way that no method has, by the names under which models pass it.
REFUSED = ("softcap", "position_bias", "s_aux", "sinks")


class Note(NamedTuple):
    """What a mask (B, 1, T, S) consists of.

    Attributes:
        is_causal: whether it hides the keys j > i.
        padding: boolean (B, S), false for keys that it hides; None for none.
        version: of the mask's memory, which in-place operations change.
    """

    is_causal: bool
    padding: torch.Tensor | None
    version: int


def register() -> None:
    """Register the attention implementation "scatterbrain" and its mask function with transformers.

    Models that name it then use `sbcluster` from 1,024 tokens on; `replace` sets other options.

    Raises:
        ImportError: transformers 5.0 or newer is not installed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, __version__
    except ImportError as error:
        raise ImportError(f"{__name__} needs transformers: pip install 'transformers>=5.0'") from error
    if int(__version__.split(".")[0]) < 5:
        raise ImportError(f"{__name__} needs transformers 5.0, not {__version__}: pip install -U transformers")
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask_function)


def replace(
    model: nn.Module,
    method: str = "sbcluster",
    min_tokens: int = 1024,
    *,
    seed: int = 0,
    layers: Mapping[str, Mapping[str, Any] | None] | None = None,
    **options: Any,
) -> nn.Module:
    """The model with the attention implementation "scatterbrain" and these options.

    What the method does not take as it is (a mask, decoding with a cache, cross-attention, dropout, a short sequence)
    the implementation "sdpa" computes; `report` counts it. `state_dict` does not change. Attention runs outside the
    graphs of `torch.compile`.

    Args:
        model: a `PreTrainedModel`; changed in place.
        method: one of `scatterbrain.ATTENTIONS`.
        min_tokens: smallest number of queries of a replaced call.
        seed: seed of the random parts; modules have consecutive ones.
        layers: options of single layers, by patterns of their names (`fnmatch`, as in `model.named_modules()`), such as
            `{"*.layers.0.*": {"memory_fraction": 1 / 8}, "*.layers.7.*": None}`; None is the implementation "sdpa".
        **options: options of `create_attention`, such as memory_fraction (default 1/32), and sizes.

    Raises:
        UserError: the model cannot change its attention implementation; unknown method, option or layer.
        ImportError: transformers 5.0 or newer is not installed.
    """
    register()
    if not hasattr(model, "set_attn_implementation"):
        raise UserError(
            f"{type(model).__name__} is no model of transformers. scatterbrain.replace_sdpa takes any PyTorch code."
        )
    # any module may call attention; those of PyTorch do not
    found = {
        name: module for name, module in model.named_modules() if not type(module).__module__.startswith("torch.nn.")
    }
    chosen = layer_routers(list(found), layers, seed, method=method, min_tokens=min_tokens, **options)
    # again, where the user has set another implementation since
    if PREVIOUS not in vars(model) or model.config._attn_implementation != NAME:
        configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
        previous = [(config, getattr(config, "_attn_implementation_internal", None)) for config in configs.values()]
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            vars(model)[PREVIOUS] = previous
            restore(model)
            raise UserError(
                f"{type(model).__name__} computes attention in its own code. scatterbrain.replace_sdpa takes any "
                "PyTorch code that calls scaled_dot_product_attention."
            )
        vars(model)[PREVIOUS] = previous
    for name, router in chosen.items():
        vars(found[name])[ATTRIBUTE] = router
    return model


def restore(model: nn.Module) -> nn.Module:
    """The model with the attention implementation that it had before `replace`.

    Args:
        model: a `PreTrainedModel`; changed in place.

    Raises:
        UserError: it is no `torch.nn.Module`.
    """
    check_model(model)
    for config, implementation in vars(model).pop(PREVIOUS, ()):
        config._attn_implementation_internal = implementation
    for module in model.modules():
        vars(module).pop(ATTRIBUTE, None)
    return model


@torch.compiler.disable
def attention_mask_function(**kwargs: Any) -> torch.Tensor | None:
    """Mask of the implementation "sdpa", with a note where it consists of causality and padding alone.

    Args:
        **kwargs: arguments of `transformers.masking_utils.sdpa_mask`.
    """
    from transformers.masking_utils import sdpa_mask

    # a mask made in inference mode has no version
    with torch.inference_mode(False):
        mask = sdpa_mask(**kwargs)
        if mask is not None:
            _add_note(mask, **kwargs)
    return mask


def _add_note(
    mask: torch.Tensor,
    batch_size: int,
    kv_length: int,
    mask_function: Any = None,
    q_length: int | None = None,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> None:
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function not in (bidirectional_mask_function, causal_mask_function):
        return  # windows, packed sequences, patterns of a model
    offsets = (q_offset, kv_offset)
    if q_length != kv_length or any(isinstance(x, torch.Tensor) or x != 0 for x in offsets):
        return
    if attention_mask is not None and attention_mask.shape != (batch_size, kv_length):
        return
    # a copy, since the mask was computed from the values of now
    padding = None if attention_mask is None else attention_mask.bool().clone()
    setattr(mask, NOTE, Note(mask_function is causal_mask_function, padding, mask._version))


@torch.compiler.disable
def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Output (B, T, H, D) of a layer, by its router.

    Args:
        module: the layer.
        query: (B, H, T, E).
        key: (B, Hkv, S, E), Hkv a divisor of H.
        value: (B, Hkv, S, D).
        attention_mask: mask of the implementation "sdpa".
        dropout: probability of dropping a weight.
        scaling: softmax scale; None is E ** -0.5.
        is_causal: hide the keys j > i where there is no mask; None is the layer's own attribute, and true without one.
        **kwargs: arguments of other implementations.

    Raises:
        UserError: a soft cap, position biases or sinks.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise UserError(
                f"{type(module).__name__} has {name}, which attn_implementation='{NAME}' cannot compute. "
                "Load the model with attn_implementation='eager'."
            )

    def sdpa() -> torch.Tensor:
        arguments = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
        return out.transpose(1, 2)

    # of its own where `replace` was not called
    router = vars(module)[ATTRIBUTE] if ATTRIBUTE in vars(module) else vars(module).setdefault(ATTRIBUTE, Router())
    if router is None:
        return sdpa().transpose(1, 2), None
    if kwargs.get("output_attentions"):
        router.count("output_attentions")
        return sdpa().transpose(1, 2), None
    causal, mask, padding = False, attention_mask, None
    note = getattr(attention_mask, NOTE, None)
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else bool(is_causal)
    elif note is not None and note.version == attention_mask._version:
        causal, mask, padding = note.is_causal, None, note.padding
    out = router.attend(
        *(query, key, value, mask, dropout, causal, scaling),
        enable_gqa=key.shape[1] != query.shape[1],
        pass_on=sdpa,
        key_mask=padding,
    )
    return out.transpose(1, 2).contiguous(), None
