"""The attentions by name, and the factory that fits one to a sequence length."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from src.models.modules.attention.base import AttentionModule
from src.models.modules.attention.full import FullAttention
from src.models.modules.attention.local import LocalAttention
from src.models.modules.attention.performer import PerformerAttention
from src.models.modules.attention.sblocal import SBLocalAttention
from src.ops.budget import AttentionBudget, attention_budget
from src.utils.errors import UserError, did_you_mean

__all__ = ["ATTENTIONS", "attention_memory", "create_attention"]


@dataclass(frozen=True)
class AttentionKind:
    """How an attention is built and what it spends its memory on.

    Attributes:
        module: its class.
        window_share: part of the budget for the window; None where the attention has no budget.
        feature_multiple: number of features that come together.
    """

    module: type[AttentionModule]
    window_share: float | None
    feature_multiple: int = 1


# One entry for each config of configs/model/t2tattn_cfg.
ATTENTIONS: dict[str, AttentionKind] = {
    "full": AttentionKind(FullAttention, None),
    "local": AttentionKind(LocalAttention, 1.0),
    "performer": AttentionKind(PerformerAttention, 0.0),
    "sblocal": AttentionKind(SBLocalAttention, 0.5, feature_multiple=2),
}


def create_attention(
    config_name: str,
    sequence_length: int,
    dim_heads: int = 64,
    softmax_temp: float | None = None,
    memory_fraction: float = 1 / 32,
    seed: int = 0,
    **options,
) -> AttentionModule:
    """Build an attention whose window and features fit a memory budget.

    Args:
        config_name: one of `ATTENTIONS`.
        sequence_length: number of keys S that the budget is counted for.
        dim_heads: width E of queries and keys.
        softmax_temp: softmax scale; None is E ** -0.5.
        memory_fraction: memory over that of the full attention matrix; see `src.ops.budget`.
        seed: seed of the random features, where there are any.
        **options: options of the module; `local_context` and `nb_features` override the budget. None is the default.

    Returns:
        Module `(query, key, value, key_lengths=None, need_weights=False) -> (out, weights or None)`.

    Raises:
        UserError: unknown name or option (near names are suggested), or a value out of range.
    """
    if config_name not in ATTENTIONS:
        raise UserError(f"Unknown attention '{config_name}'. {did_you_mean(config_name, ATTENTIONS)}")
    kind = ATTENTIONS[config_name]
    known = set(inspect.signature(kind.module).parameters)
    options = {name: value for name, value in options.items() if value is not None}
    for name in options:
        if name not in known:
            raise UserError(f"Attention '{config_name}' has no option '{name}'. {did_you_mean(name, known)}")

    arguments = {"softmax_temp": softmax_temp, "dim_heads": dim_heads, "seed": seed}
    if kind.window_share is not None:
        budget = attention_budget(sequence_length, memory_fraction, kind.window_share, kind.feature_multiple)
        arguments.update(local_context=budget.window, nb_features=budget.nb_features)
    arguments = {name: value for name, value in arguments.items() if name in known} | options
    for name in ("local_context", "nb_features", "dim_heads", "seed"):
        value = arguments.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise UserError(f"{name}={value!r} of attention '{config_name}' has to be an integer.")
    return kind.module(**arguments)


def attention_memory(attention: AttentionModule, sequence_length: int) -> float:
    """Memory of an attention over that of the full attention matrix, by the rule of `src.ops.budget`."""
    sizes = attention.sizes()
    if not sizes:
        return 1.0
    budget = AttentionBudget(sizes.get("local_context", 0), sizes.get("nb_features", 0))
    return budget.memory_fraction(sequence_length)
