"""Errors of causal landmark attention, and of simpler forms of it, on queries, keys and values of trained networks.

    python -m tests.scatterbrain.ops.causal_error --inputs qkv.npz... --output docs/data/causal_error.json

Each file holds arrays q<layer>, k<layer> and v<layer> of shape (1, N, H, E). The error is the L2 norm of the difference
of outputs from causal full attention's over that of these, the mean over the heads; the columns are the exact keys and
landmarks that a query sees, the mean over the queries.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from scatterbrain.attention import create_attention
from scatterbrain.ops.clusters.causal import blocked, causal_landmark_attention
from scatterbrain.ops.clusters.causal.levels import Level, assign_points, chunks_of, join, visible_columns
from scatterbrain.ops.sparse.naive import block_means
from src.analysis.benchmark.report import header
from src.analysis.tools import write_results

CHUNK = 64


def dense(logits: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Output (B, H, T, D) of a softmax, and the mean number of weights."""
    seen = (logits > -math.inf).sum(-1).double().mean().item()
    return logits.softmax(-1) @ value, seen


def local(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int) -> tuple[torch.Tensor, float]:
    """The last `window` keys of each query."""
    i = torch.arange(query.shape[2], device=query.device)
    distance = i[:, None] - i
    logits = query.shape[-1] ** -0.5 * query @ key.transpose(2, 3)
    return dense(logits.masked_fill((distance < 0) | (distance >= window), -math.inf), value)


def without_levels(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_landmarks: int, spread: bool
) -> tuple[torch.Tensor, float]:
    """The own chunk and the one before exactly, and M landmarks of every earlier chunk."""
    batch, heads, length, width = query.shape
    scale = width**-0.5
    points = chunks_of(key, value, None, CHUNK, length)
    points = Level(points[0], points[1], points[2].float(), torch.zeros_like(points[0][..., :1]))
    level = join(points, assign_points(points, num_landmarks, 1), num_landmarks)
    level = Level(*(x.flatten(1, 2).unflatten(0, (batch, heads)) for x in level))
    mean, mean_value, count, _ = level
    j = torch.arange(length, device=query.device)
    i, chunk = j[:, None], j[:, None] // CHUNK
    exact = (scale * query @ key.transpose(2, 3)).masked_fill((j > i) | (j // CHUNK < chunk - 1), -math.inf)
    count, log_count = count.transpose(2, 3), count.transpose(2, 3).clamp_min(1.0).log()
    far = scale * query @ mean.transpose(2, 3) + log_count
    if spread:
        norm = scale * query.norm(dim=-1, keepdim=True)
        far = far + blocked.spread_correction(norm, blocked.spread_of(level, width).transpose(2, 3), log_count)
    of_chunk = torch.arange(mean.shape[2], device=query.device) // num_landmarks
    far = far.masked_fill((count == 0) | (of_chunk >= chunk - 1), -math.inf)
    return dense(torch.cat([exact, far], -1), torch.cat([value, mean_value], 2))


def with_levels(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    window: int,
    spread: bool = True,
    value_weight: float = 0.0,
) -> tuple[torch.Tensor, float]:
    """Causal landmark attention, also without the correction for the spread of a cluster."""
    replaced = contextlib.nullcontext() if spread else mock.patch.object(blocked, "spread_correction", return_value=0.0)
    with replaced:
        options = {"chunk": CHUNK, "value_weight": value_weight}
        out = causal_landmark_attention(query, key, value, num_landmarks, window, **options)
    return out, visible_columns(query.shape[2], num_landmarks, window, CHUNK)


def best_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_keys: int, taylor: bool
) -> tuple[torch.Tensor, float]:
    """The own chunk and the earlier ones whose mean has the largest product with the own chunk's mean query.

    With `taylor`, PISA (arXiv 2602.01077) with a causal mask: keys of the other earlier chunks have the weight of their
    chunk's mean, and a term of first order is added for them: G s q.X / n, where G is their share of the weight, n the
    number of keys of earlier chunks and X the sum over these of (k - mean of its chunk) v^T.

    Args:
        query: (B, H, N, E).
        key: (B, H, N, E).
        value: (B, H, N, D).
        num_keys: keys of the chunks that are exact, the own one among them; rounded up to whole chunks.
        taylor: whether other chunks have a weight.
    """
    length, width = query.shape[2:]
    scale = width**-0.5
    means = block_means(key, CHUNK)
    chunks = torch.arange(means.shape[2], device=query.device)
    past, own = chunks < chunks[:, None], chunks == chunks[:, None]
    scores = (block_means(query, CHUNK) @ means.transpose(2, 3)).masked_fill(own, math.inf)
    scores = scores.masked_fill(~(past | own), -math.inf)
    order = scores.topk(min(len(chunks), -(-num_keys // CHUNK))).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True) & (past | own)
    i = torch.arange(length, device=query.device)
    of = i // CHUNK
    exact = chosen[:, :, of][..., of] & (i <= i[:, None])
    logits = scale * query @ key.transpose(2, 3)
    if not taylor:
        return dense(logits.masked_fill(~exact, -math.inf), value)
    rest = past[of][:, of] & ~exact
    logits = torch.where(rest, (scale * query @ means.transpose(2, 3))[..., of], logits)
    weights = logits.masked_fill(~(exact | rest), -math.inf).softmax(-1)
    # X of each chunk, then that of all chunks before it
    deviation, padded = (
        F.pad(x, (0, 0, 0, -length % CHUNK)).unflatten(2, (-1, CHUNK)) for x in (key - means[:, :, of], value)
    )
    first = deviation.transpose(3, 4) @ padded
    first = first.cumsum(2) - first
    queries = F.pad(query, (0, 0, 0, -length % CHUNK)).unflatten(2, (-1, CHUNK))
    share = (weights * rest).sum(-1, keepdim=True) / (CHUNK * of).clamp_min(1)[:, None]
    out = weights @ value + share * scale * (queries @ first).flatten(2, 3)[:, :, :length]
    columns = exact.sum(-1) + rest.sum(-1) / CHUNK
    return out, columns.double().mean().item()


def window_and_features(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, columns: int
) -> tuple[torch.Tensor, float]:
    """`sblocal` that spends half of the columns on the last keys, and half on random features."""
    length, width = query.shape[2:]
    half = columns // 4 * 2  # features come in pairs
    # half of a window lies before the query
    module = create_attention("sblocal", length, width, local_context=2 * half, nb_features=half, causal=True)
    out, _ = module.to(query.device)(*(x.transpose(1, 2) for x in (query, key, value)))
    seen = (torch.arange(length) + 1).clamp_max(half + 1).double().mean().item()
    return out.transpose(1, 2), seen + half


def with_budget(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, memory_fraction: float, value_weight: float = 0.0
) -> tuple[torch.Tensor, float]:
    """Causal landmark attention of the sizes that `create_attention` takes for a budget."""
    sizes = create_attention("sbcluster", query.shape[2], memory_fraction=memory_fraction, causal=True)
    return with_levels(query, key, value, sizes.num_landmarks, sizes.local_context, value_weight=value_weight)


FORMS: dict[str, Callable[..., tuple[torch.Tensor, float]]] = {
    "local, window N / 8": lambda *x: local(*x, x[0].shape[2] // 8),
    "local, window 256": lambda *x: local(*x, 256),
    "every chunk, M = 8": lambda *x: without_levels(*x, 8, False),
    "every chunk, M = 8, spread": lambda *x: without_levels(*x, 8, True),
    "levels, M = 32, W = 1, no spread": lambda *x: with_levels(*x, 32, 1, False),
    "levels, M = 32, W = 1": lambda *x: with_levels(*x, 32, 1),
    "levels, M = 16, W = 128": lambda *x: with_levels(*x, 16, 128),
    "levels, M = 32, W = 128": lambda *x: with_levels(*x, 32, 128),
    "levels, M = 64, W = 128": lambda *x: with_levels(*x, 64, 128),
    "sbcluster, memory_fraction 1/8": lambda *x: with_budget(*x, 1 / 8),
    "sbcluster, 1/8, value_weight 1": lambda *x: with_budget(*x, 1 / 8, 1.0),
    "sbcluster, 1/8, value_weight 4": lambda *x: with_budget(*x, 1 / 8, 4.0),
    "sblocal, N / 8": lambda *x: window_and_features(*x, x[0].shape[2] // 8),
    "block top-k, N / 8": lambda *x: best_blocks(*x, x[0].shape[2] // 8, False),
    "PISA, N / 8": lambda *x: best_blocks(*x, x[0].shape[2] // 8, True),
}


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean over the heads of the relative L2 norm of the difference."""
    return ((out - expected).flatten(2).norm(dim=2) / expected.flatten(2).norm(dim=2)).mean().item()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", nargs="+", type=Path, required=True, metavar="FILE", help="q, k, v of layers, npz")
    parser.add_argument("--heads", type=int, default=None, metavar="H", help="first heads of each layer (all)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="of PyTorch (cpu)")
    parser.add_argument("--output", type=Path, default=None, metavar="FILE", help="JSON file of the results")
    arguments = parser.parse_args()
    results = []
    table: dict[str, list[str]] = {name: [] for name in FORMS}
    titles = []
    for path in arguments.inputs:
        arrays = np.load(path)
        network = path.stem.split("_")[0]
        for layer in sorted((name[1:] for name in arrays.files if name[0] == "q"), key=int):
            tensors = [
                torch.from_numpy(arrays[name + layer]).to(arguments.device).float().transpose(1, 2) for name in "qkv"
            ]
            tensors = [x[:, : arguments.heads].contiguous() for x in tensors]
            length = tensors[0].shape[2]
            titles.append(f"{network} {layer}, N = {length}")
            full, _ = local(*tensors, length)
            for name, form in FORMS.items():
                out, columns = form(*tensors)
                row = {"form": name, "error": error(out, full), "columns": columns}
                results.append({"network": network, "layer": int(layer), "length": length, **row})
                table[name].append(f"{row['error']:.3f} / {columns:.0f}")
    print("| error / columns |", " | ".join(titles), "|")
    print("|---" * (1 + len(titles)) + "|")
    for name, cells in table.items():
        print(f"| {name} |", " | ".join(cells), "|")
    write_results(
        arguments, {**header(arguments, torch.device(arguments.device), "inputs", chunk=CHUNK), "results": results}
    )


if __name__ == "__main__":
    main()
