"""What a profile measures at an attention call: error, effective keys, time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from scatterbrain.integrations.router import Router, compute_dtype, key_padding
from scatterbrain.ops.common.numerics import no_autocast

# Queries of a head whose weights are computed for the number of effective keys.
NUM_QUERIES = 128
# Calls in a row for each time on CUDA, so that the time of the first launch counts little.
CUDA_CALLS = 4


@dataclass
class Candidate:
    """A method to measure at a call.

    Attributes:
        method: its name.
        budget: memory fraction; None for none.
        router: computes it.
        seed_offset: added to the router's seed.
    """

    method: str
    budget: float | None
    router: Router
    seed_offset: int = 0


def relative_error(result: torch.Tensor, full: torch.Tensor, queries: torch.Tensor | None = None) -> float:
    """|| result - full || / || full ||, mean over the first dimension.

    Args:
        result: (B, ...).
        full: (B, ...).
        queries: boolean (B, T) for tensors (B, H, T, D), false for queries to leave out; None leaves out none.
    """
    difference, full = result.double() - full.double(), full.double()
    if queries is not None:
        keep = queries[:, None, :, None]
        difference, full = difference.where(keep, 0.0), full.where(keep, 0.0)
    above, below = (x.reshape(len(x), -1).norm(dim=1) for x in (difference, full))
    # not above > 0, which is false for NaN: that would be no error at all
    return (above / below).where(above != 0, 0.0).mean().item()


def key_mask_of(
    attn_mask: torch.Tensor | None, key_mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor | None:
    """Boolean mask (B, S) of the keys of a call that a method took; None where all take part.

    Args:
        attn_mask: mask of scaled_dot_product_attention.
        key_mask: boolean (B, S), instead of it.
        query: (B, H, T, E).
        key: (B, H, S, E).
    """
    if attn_mask is not None:
        key_mask = key_padding(attn_mask, query.shape[0], key.shape[2])
    if key_mask is not None and key_mask.dtype != torch.bool:
        key_mask = key_mask == 0
    return key_mask


def full_output(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Output (B, H, T, D) of full attention in float32, or float64 for tensors in float64.

    Args:
        query: (B, H, T, E).
        key: (B, Hkv, S, E), Hkv a divisor of H.
        value: (B, Hkv, S, D).
        key_mask: boolean (B, S), false for hidden keys; None hides none.
        is_causal: hide the keys j > i.
        scale: softmax scale; None is E ** -0.5.
    """
    # rounded as the methods get them under autocast
    tensors = [x.to(compute_dtype(x)) for x in (query, key, value)]
    query, key, value = (x if x.dtype == torch.float64 else x.float() for x in tensors)
    mask = None
    if key_mask is not None:
        mask = key_mask[:, None, None, :]
        if is_causal:
            mask = mask & torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    with no_autocast(query):
        return F.scaled_dot_product_attention(
            *(query, key, value, mask),
            is_causal=is_causal and mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )


def weights_of(
    query: torch.Tensor,
    key: torch.Tensor,
    queries: torch.Tensor,
    attn_mask: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    sample: int,
) -> torch.Tensor:
    """Attention weights (H, n, S) of some queries of a sample, float32.

    Args:
        query: (B, H, T, E).
        key: (B, Hkv, S, E), Hkv a divisor of H.
        queries: (n,) positions of the queries.
        attn_mask: as in scaled_dot_product_attention.
        key_mask: boolean (B, S), false for hidden keys; None hides none.
        is_causal: hide the keys j > i.
        scale: softmax scale; None is E ** -0.5.
        sample: index b.
    """
    heads, length, width = query.shape[1:]
    q, k = query[sample][:, queries].float(), key[sample].float().repeat_interleave(heads // key.shape[1], 0)
    with no_autocast(query):
        logits = (width**-0.5 if scale is None else scale) * (q @ k.transpose(-2, -1))  # [H, n, S]
    if is_causal:
        later = torch.arange(k.shape[1], device=q.device) > queries[:, None]
        logits = logits.masked_fill(later, -torch.inf)
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[sample], -torch.inf)
    if attn_mask is not None:
        mask = attn_mask.expand(query.shape[0], heads, length, k.shape[1])[sample][:, queries]
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1)


def effective_keys(
    query: torch.Tensor,
    key: torch.Tensor,
    attn_mask: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> float:
    """Number of keys over which a query spreads its weights: exp of their mean entropy in nats.

    The mean is over samples, heads and 128 queries at equal distances; queries that see no key are left out.

    Args:
        query: (B, H, T, E).
        key: (B, Hkv, S, E), Hkv a divisor of H.
        attn_mask: as in scaled_dot_product_attention.
        key_mask: boolean (B, S), false for hidden keys; None hides none.
        is_causal: hide the keys j > i.
        scale: softmax scale; None is E ** -0.5.

    Returns:
        A number in [1, S].
    """
    length = query.shape[2]
    number = min(length, NUM_QUERIES)
    queries = ((torch.arange(number, device=query.device) + 0.5) * length / number).long()
    total, count = 0.0, 0
    for sample in range(query.shape[0]):
        weights = weights_of(query, key, queries, attn_mask, key_mask, is_causal, scale, sample)
        entropy = torch.special.entr(weights).sum(-1)
        seen = entropy.isfinite()
        total, count = total + entropy[seen].sum().item(), count + int(seen.sum())
    return float(torch.tensor(total / max(count, 1)).exp())


def milliseconds(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    repeats: int,
    least: float = 0.0,
    cuda_graphs: bool = False,
) -> list[float]:
    """Median time of each call, in rounds of all of them, so that what slows the machine down slows all.

    On CUDA by events around four calls in a row, with the host's time where that is longer.

    Args:
        calls: what to time; each is called once before.
        device: where they compute.
        repeats: number of rounds.
        least: further rounds, up to 100, until they have taken this many milliseconds.
        cuda_graphs: on CUDA, time replays of a graph of each call, without the host's time; calls that cannot be
            captured are timed as they are.
    """
    for call in calls:
        call()
    if cuda_graphs and device.type == "cuda":
        calls = [_captured(call, device) for call in calls]
    rounds: list[list[float]] = []
    start = time.perf_counter()
    while len(rounds) < repeats or (len(rounds) < 100 and 1e3 * (time.perf_counter() - start) < least):
        rounds.append([_milliseconds(call, device) for call in calls])
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def _captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Replay of a CUDA graph of a call, or the call where capture fails."""
    try:
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
    except RuntimeError:
        torch.cuda.synchronize(device)
        return call
    return graph.replay


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record(torch.cuda.current_stream(device))
        for _ in range(CUDA_CALLS):
            call()
        end.record(torch.cuda.current_stream(device))
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / CUDA_CALLS
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return 1e3 * (time.perf_counter() - start)
