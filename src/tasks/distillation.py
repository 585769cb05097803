"""Distillation of learned features from the weights of full attention, one layer at a time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from scatterbrain.attention.base import AttentionModule
from scatterbrain.attention.performer import PerformerAttention
from scatterbrain.attention.random_features import LearnedFeatures
from scatterbrain.attention.sblocal import SBLocalAttention
from scatterbrain.errors import UserError, check_whole_number
from scatterbrain.ops.common.inputs import default_scale
from scatterbrain.ops.common.windows import window_bounds
from scatterbrain.ops.learned import log_learned_features
from src.datamodules.sampling import spread
from src.models.attention_inputs import StageInputs, create_stage_attentions
from src.models.t2t_vit import T2TViT


@torch.enable_grad()
def distil_features(
    attention: PerformerAttention | SBLocalAttention,
    layers: Sequence[StageInputs],
    *,
    steps: int = 400,
    lr: float = 0.01,
    num_queries: int = 128,
    seed: int = 0,
    advance: Callable[[int], None] = lambda steps: None,
) -> list[float]:
    """Losses of all steps, in nats, of training an attention's learned features to match full attention's weights.

    The loss is the Kullback-Leibler divergence from full attention's weights to those of the module, mean over queries
    and heads (Zhang et al., ICLR 2024, equation 4, up to the entropy of full attention), with the module's window and
    causality. Nothing but the features is trained. They start from keys, see `start_from_keys`; Adam, with half a
    cosine from `lr` to zero.

    Args:
        attention: with `learned_heads`, on the device of the inputs.
        layers: inputs of the layer for one batch each, see `capture_inputs`, or `capture_calls` for other networks; a
            step takes one of them.
        steps: number of updates.
        lr: learning rate.
        num_queries: queries of a step, drawn anew each time; all keys take part.
        seed: of the start, the order of batches, and the queries.
        advance: called with the number of steps done.

    Raises:
        UserError: the module has no learned features, there are no inputs, or a number out of range.
    """
    features = getattr(attention, "learned_features", None)
    if features is None or not layers:
        raise UserError("Distillation takes an attention with learned_heads=H, and inputs of its layer.")
    check_whole_number("steps", steps, 1)
    check_whole_number("num_queries", num_queries, 1)
    generator = torch.Generator().manual_seed(seed)
    start_from_keys(features, layers[int(torch.randint(len(layers), (), generator=generator))], generator)
    optimizer = torch.optim.Adam(features.parameters(), lr=lr)
    losses = []
    for step in range(steps):
        if step % len(layers) == 0:
            order = torch.randperm(len(layers), generator=generator).tolist()
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        inputs = layers[order[step % len(layers)]]
        rows = torch.randperm(inputs.query.shape[1], generator=generator)[:num_queries]
        loss = divergence(attention, inputs, rows.to(inputs.query.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        advance(1)
    return torch.stack(losses).tolist()


def learned_stage_attentions(
    features: str,
    training: Sequence[tuple[StageInputs, StageInputs]],
    options: Mapping[str, Any],
    name: str,
    model: T2TViT,
    memory_fraction: float,
    seed: int,
) -> tuple[AttentionModule, AttentionModule]:
    """Modules of `create_stage_attentions` whose features are parameters, of one of three kinds.

    Args:
        features: `random`, as they are created; `keys`, where training starts; or `learned`.
        training: inputs of both stages, of the photographs to learn from.
        options: of `distil_features`.
        name: `performer` or `sblocal`.
        model: as in `create_stage_attentions`, and so the others.
        memory_fraction: see there.
        seed: of the random features and of the training.
    """
    modules = create_stage_attentions(name, model, memory_fraction, seed, learned_heads=1)
    for module, inputs in zip(modules, zip(*training, strict=True), strict=True):
        if features == "learned":
            distil_features(module, inputs, seed=seed, **options)
        elif features == "keys":
            start_from_keys(module.learned_features, inputs[0], torch.Generator().manual_seed(seed))
    return modules


@torch.no_grad()
def mean_divergence(attention: AttentionModule, layers: Sequence[StageInputs], num_queries: int = 64) -> float:
    """Mean of `divergence` over the samples of a layer's inputs, and `num_queries` queries of each, spread evenly."""
    rows = torch.tensor(spread(layers[0].query.shape[1], num_queries), device=layers[0].query.device)
    images = (inputs.image(number) for inputs in layers for number in range(len(inputs.query)))
    return statistics.fmean(divergence(attention, image, rows).item() for image in images)


@torch.no_grad()
def start_from_keys(features: LearnedFeatures, inputs: StageInputs, generator: torch.Generator) -> None:
    """Set the features to M random keys c_m: phi_q(q)_m = exp(s q.c_m), phi_k(k)_m = exp(-s |k - c_m|^2 / 2).

    It is a smooth form of landmarks, which the keys near c_m share. Steps from random features end at larger losses.
    """
    heads, num_features, _ = features.key_weight.shape
    keys = inputs.key.transpose(1, 2).flatten(0, 1) if heads == 1 else inputs.key.permute(2, 0, 1, 3)
    keys = keys.reshape(heads, -1, keys.shape[-1]).float()
    index = torch.stack([torch.randperm(keys.shape[1], generator=generator)[:num_features] for _ in range(heads)])
    index = index.to(keys.device).expand(heads, -1)
    # fewer keys than features: some are taken twice
    index = index.repeat(1, -(-num_features // index.shape[1]))[:, :num_features]
    centres = inputs.scale * keys.gather(1, index[..., None].expand(-1, -1, keys.shape[-1]))
    for weight in (features.query_weight, features.key_weight):
        weight.copy_(centres)
    features.query_bias.zero_()
    features.query_norm.zero_()
    features.key_bias.copy_(-centres.square().sum(-1) / (2 * inputs.scale))
    features.key_norm.fill_(inputs.scale / 2)


def divergence(attention: AttentionModule, inputs: StageInputs, rows: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence from full attention's weights to a module's with learned features, in nats.

    Mean over the queries `rows` (n,), heads and samples; dense, O(n S) memory.
    """
    query, key = (x.transpose(1, 2).float() for x in (inputs.query, inputs.key))
    query = query[:, :, rows]
    exact = default_scale(query, inputs.scale) * query @ key.transpose(-2, -1)  # [B, H, n, S]
    distance = torch.arange(key.shape[2], device=key.device) - rows[:, None]  # [n, S]
    left, right = window_bounds(getattr(attention, "local_context", 0))
    features = attention.learned_features
    logs = log_learned_features(query, features.query_map), log_learned_features(key, features.key_map)
    tops = [x.amax(-1, keepdim=True) for x in logs]
    log_query, log_key = ((x - top).exp() for x, top in zip(logs, tops, strict=True))
    products = (log_query @ log_key.transpose(-2, -1)).clamp_min(torch.finfo(torch.float32).tiny)
    low_rank = products.log() + tops[0] + tops[1].transpose(-2, -1)
    logits = torch.where((distance >= -left) & (distance < right), exact, low_rank)
    if attention.causal:
        exact, logits = (x.masked_fill(distance > 0, -math.inf) for x in (exact, logits))
    log_full, log_weights = exact.log_softmax(-1), logits.log_softmax(-1)
    return torch.where(log_full.isfinite(), log_full.exp() * (log_full - log_weights), 0.0).sum(-1).mean()
