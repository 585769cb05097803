"""The attentions by name, and the factory that fits one to a sequence length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from scatterbrain.attention.base import AttentionModule
from scatterbrain.attention.baselines import (
    QueryClusterAttention,
    RandomKeysAttention,
    StridedAttention,
    UniformAttention,
    ZeroAttention,
)
from scatterbrain.attention.block_sparse import BlockSparseAttention, SBBlockSparseAttention
from scatterbrain.attention.cluster import (
    SUMMARY_SIZE,
    ClusterAttention,
    PairedClusterAttention,
    SBAdaptiveAttention,
    SBClusterAttention,
)
from scatterbrain.attention.combination import (
    CombinationLocalPerformerAttention,
    CombinationSmyrfPerformerAttention,
)
from scatterbrain.attention.full import FullAttention
from scatterbrain.attention.local import LocalAttention
from scatterbrain.attention.local2d import Local2dAttention, SBLocal2dAttention
from scatterbrain.attention.performer import PerformerAttention
from scatterbrain.attention.random_features import option_parameters
from scatterbrain.attention.reformer import ReformerAttention
from scatterbrain.attention.sblocal import SBLocalAttention
from scatterbrain.attention.smyrf import SBSmyrfAttention, SmyrfAttention
from scatterbrain.errors import UserError, check_whole_number, did_you_mean
from scatterbrain.ops.clusters.causal.attention import CHUNK
from scatterbrain.ops.clusters.causal.levels import visible_columns
from scatterbrain.ops.common.budget import block_for, budget_columns, features_for, keys_for
from scatterbrain.ops.sparse.lsh import num_reformer_buckets

__all__ = ["ATTENTIONS", "COMPARED", "AttentionKind", "attention_memory", "create_attention", "option_parameters"]

# The attentions of the paper's table on T2T-ViT: what the tools compare by default.
COMPARED = ("full", "local", "performer", "sblocal")
# Defaults of the published configurations: hashes, and blocks of a sliding window or of a local group.
NUM_HASHES = 2
NUM_WINDOW_BLOCKS = 3
# Integer options without a minimum of 1.
MAY_BE_ZERO = ("num_exact", "num_steps")
# Share of exact keys in what a query cluster of paired clusters sees: more increases the error on T2T-ViT.
EXACT_SHARE = 1 / 8


@dataclass(frozen=True)
class AttentionKind:
    """Registry entry of an attention: its module, and how a budget of columns determines its sizes.

    Attributes:
        module: class of the attention.
        fit: function from (budget in columns of the attention matrix, sequence length, options given by the user) to
            the sizes, by the names of their options; None for an attention without a budget.
        fixed: options that the name implies.
    """

    module: type[AttentionModule]
    fit: Callable[[float, int, Mapping[str, Any]], dict[str, int]] | None = None
    fixed: Mapping[str, str] = field(default_factory=dict)


Options = Mapping[str, Any]


def _cluster(columns: float, options: Options) -> dict[str, int]:
    return {"cluster_size": keys_for(columns / options.get("num_hashes", NUM_HASHES))}


def _buckets(columns: float, length: int, options: Options) -> dict[str, int]:
    # as published: the budget does not count the chunk before
    bucket_size = options.get("bucket_size", keys_for(columns / options.get("num_hashes", NUM_HASHES)))
    return {"bucket_size": bucket_size, "num_buckets": num_reformer_buckets(length, bucket_size)}


def _block(columns: float, _: int, options: Options) -> dict[str, int]:
    return {"block": block_for(columns, options.get("num_window_blocks", NUM_WINDOW_BLOCKS))}


def _block_and_features(columns: float, length: int, options: Options) -> dict[str, int]:
    # as published: as many features as a block has tokens, in addition to the budget
    block = options.get("block", _block(columns, length, options)["block"])
    return {"block": block, "nb_features": block}


def _paired_clusters(columns: float, length: int, exact_share: float) -> dict[str, int]:
    # a number of query clusters whose summaries cost no more than the columns
    queries = keys_for(min(columns / 5, length / SUMMARY_SIZE))
    # a key cluster or an exact key costs a column, and a summary for each query cluster
    seen = keys_for((columns - queries) / (1 + queries * SUMMARY_SIZE / length))
    num_exact = int(seen * exact_share)
    sizes = {"num_landmarks": seen - num_exact, "num_query_landmarks": queries}
    return sizes | ({"num_exact": num_exact} if exact_share else {})


def _adaptive(columns: float, length: int, options: Options) -> dict[str, int | float]:
    # first a window, up to 32 keys: without it, weight near the diagonal is lost; chosen keys where there are so many
    # landmarks that their clusters are smaller than the share that a query cluster takes
    window = keys_for(max(columns / 16, min(3 / 8 * columns, 32)))
    queries = options.get("num_query_landmarks", keys_for(columns / 16))
    num_exact = int(columns * min(1 / 4, columns / 1024) / (1 + queries / length))
    num_landmarks = keys_for(columns - queries - window - num_exact * (1 + queries / length))
    return {
        "local_context": window,
        "num_landmarks": num_landmarks,
        "num_query_landmarks": queries,
        "density": num_exact / length,
    }


def _window_and_landmarks(columns: float, length: int, options: Options) -> dict[str, int]:
    if not options.get("causal", False):
        return {"local_context": keys_for(columns / 2), "num_landmarks": keys_for(columns / 2)}
    # at most half of the columns for landmarks, and the rest for the query's own chunk and others before it
    num_landmarks = CHUNK
    own = visible_columns(length, 0, 0, CHUNK)
    while num_landmarks > 1 and visible_columns(length, num_landmarks, 0, CHUNK) - own > columns / 2:
        num_landmarks //= 2
    num_landmarks = options.get("num_landmarks", num_landmarks)
    num_exact = max(0, int((columns - visible_columns(length, num_landmarks, 0, CHUNK)) / CHUNK))
    return {"local_context": max(1, 2 * num_exact * CHUNK), "num_landmarks": num_landmarks}


# One entry for each config of configs/model/t2tattn_cfg.
ATTENTIONS: dict[str, AttentionKind] = {
    "full": AttentionKind(FullAttention),
    "local": AttentionKind(LocalAttention, lambda c, *_: {"local_context": keys_for(c)}),
    "performer": AttentionKind(PerformerAttention, lambda c, *_: {"nb_features": features_for(c)}),
    "sblocal": AttentionKind(
        SBLocalAttention, lambda c, *_: {"local_context": keys_for(c / 2), "nb_features": features_for(c / 2, 2)}
    ),
    "smyrf": AttentionKind(SmyrfAttention, lambda c, _, options: _cluster(c, options)),
    "sbsmyrf": AttentionKind(
        SBSmyrfAttention,
        lambda c, _, options: {**_cluster(c / 2, options), "nb_features": features_for(c / 2, 2)},
    ),
    "reformer": AttentionKind(ReformerAttention, _buckets),
    "linear-attention-performer": AttentionKind(PerformerAttention, lambda c, *_: {"nb_features": features_for(c)}),
    "combination-local-performer": AttentionKind(
        CombinationLocalPerformerAttention,
        lambda c, *_: {"local_context": keys_for(c / 2), "nb_features": features_for(c / 2)},
    ),
    "combination-smyrf-performer": AttentionKind(
        CombinationSmyrfPerformerAttention,
        lambda c, _, options: {**_cluster(c / 2, options), "nb_features": features_for(c / 2)},
    ),
    **{
        f"bs-{layout}": AttentionKind(BlockSparseAttention, _block, {"layout": layout})
        for layout in ("bigbird", "longformer", "openai")
    },
    **{
        f"sbbs-{layout}": AttentionKind(SBBlockSparseAttention, _block_and_features, {"layout": layout})
        for layout in ("bigbird", "longformer", "openai")
    },
    "cluster": AttentionKind(ClusterAttention, lambda c, *_: {"num_landmarks": keys_for(c)}),
    "sbcluster": AttentionKind(SBClusterAttention, _window_and_landmarks),
    "pairedcluster": AttentionKind(PairedClusterAttention, lambda c, length, _: _paired_clusters(c, length, 0)),
    "sbpairedcluster": AttentionKind(
        PairedClusterAttention, lambda c, length, _: _paired_clusters(c, length, EXACT_SHARE)
    ),
    "sbadaptive": AttentionKind(SBAdaptiveAttention, _adaptive),
    "local2d": AttentionKind(Local2dAttention, lambda c, *_: {"num_neighbours": keys_for(c)}),
    "sblocal2d": AttentionKind(
        SBLocal2dAttention, lambda c, *_: {"num_neighbours": keys_for(c / 2), "nb_features": features_for(c / 2, 2)}
    ),
    # to compare with: floors, and clustered attention
    "zero": AttentionKind(ZeroAttention),
    "uniform": AttentionKind(UniformAttention),
    "strided": AttentionKind(StridedAttention, lambda c, *_: {"num_keys": keys_for(c)}),
    "random-keys": AttentionKind(RandomKeysAttention, lambda c, *_: {"num_keys": keys_for(c)}),
    "querycluster": AttentionKind(QueryClusterAttention, lambda c, *_: {"num_query_landmarks": keys_for(c)}),
}


def create_attention(
    config_name: str,
    sequence_length: int,
    dim_heads: int = 64,
    softmax_temp: float | None = None,
    memory_fraction: float = 1 / 32,
    seed: int = 0,
    **options: Any,
) -> AttentionModule:
    """Attention module whose sizes (window, features, clusters) fit a budget of attention columns.

    Args:
        config_name: one of `ATTENTIONS`.
        sequence_length: number of keys S that the budget refers to.
        dim_heads: width E of queries and keys.
        softmax_temp: softmax scale; None is E ** -0.5.
        memory_fraction: columns over those of the full attention matrix; see `scatterbrain.ops.common.budget`.
        seed: seed of the random features, where there are any.
        **options: options of the module, see its class; sizes override the budget. None selects the default.

    Returns:
        Module `(query, key, value, key_lengths=None, need_weights=False) -> (out, weights or None)`.

    Raises:
        UserError: unknown name or option (near names are suggested), or a value out of range.
    """
    if config_name not in ATTENTIONS:
        raise UserError(f"Unknown attention '{config_name}'. {did_you_mean(config_name, ATTENTIONS)}")
    kind = ATTENTIONS[config_name]
    parameters = option_parameters(kind.module)
    known = set(parameters) - set(kind.fixed)
    options = {name: value for name, value in options.items() if value is not None}
    for name in options:
        if name not in known:
            raise UserError(f"Attention '{config_name}' has no option '{name}'. {did_you_mean(name, known)}")

    arguments = {"softmax_temp": softmax_temp, "dim_heads": dim_heads, "seed": seed} | options
    for name, value in arguments.items():
        wanted = parameters[name].annotation if name in parameters else ""
        if wanted in ("int", "int | None") and (isinstance(value, bool) or not isinstance(value, int)):
            raise UserError(f"{name}={value!r} of attention '{config_name}' has to be an integer.")
        # before the budget divides by them
        if wanted in ("int", "int | None") and name != "seed":
            check_whole_number(name, value, 0 if name in MAY_BE_ZERO else 1)
    if kind.fit is not None:
        columns = budget_columns(sequence_length, memory_fraction)
        arguments = kind.fit(columns, sequence_length, options) | arguments
    arguments = {name: value for name, value in arguments.items() if name in known}
    module = kind.module(**arguments, **kind.fixed)
    if kind.fit is not None:
        module.sequence_length = sequence_length
    return module


def attention_memory(attention: AttentionModule, sequence_length: int) -> float:
    """Columns of an attention over those of the full attention matrix, by the rule of `ops.common.budget`.

    Args:
        attention: the module.
        sequence_length: number of keys S.

    Returns:
        Fraction in [0, 1].

    Raises:
        UserError: a length below 1.
    """
    check_whole_number("sequence_length", sequence_length, 1)
    return min(1.0, attention.memory_columns(sequence_length) / sequence_length)
