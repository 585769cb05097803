"""Attention maps of image models, as small PNG files."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from typing import Any

import torch
import torch.nn.functional as F

from scatterbrain.ops.common.numerics import no_autocast
from scatterbrain.tuning.calls import AttentionMap, method_label
from scatterbrain.tuning.measuring import Candidate, weights_of

# Tokens of classes and registers before those of the image, at most.
MAX_PREFIX = 8
# Keys of a map, at most: the methods' weights are dense here.
MAX_TOKENS = 4200
MIN_SIDE = 4
THUMBNAIL = 160
# Colours from the smallest to the largest weight: dark blue, teal, green, yellow.
COLOURS = ((15, 15, 60), (40, 80, 140), (35, 145, 140), (95, 200, 95), (253, 231, 37))


def grid_of(num_tokens: int) -> tuple[int, int] | None:
    """Number of tokens before those of a square image, and the image's side in tokens; None where there is no image.

    Args:
        num_tokens: number of tokens.
    """
    for prefix in range(MAX_PREFIX + 1):
        side = math.isqrt(max(num_tokens - prefix, 0))
        if side >= MIN_SIDE and side * side == num_tokens - prefix:
            return prefix, side
    return None


def attention_maps(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, masks: tuple, candidates: list[Candidate]
) -> list[AttentionMap]:
    """Maps of the first sample's middle query, and of its first token where that is none of the image.

    Those of full attention, and of each candidate with the smallest budget.

    Args:
        query: (B, H, T, E).
        key: (B, Hkv, S, E).
        value: (B, Hkv, S, D).
        masks: attn_mask, key_mask, is_causal and scale of the call.
        candidates: the methods.
    """
    grid = grid_of(key.shape[2])
    if grid is None or query.shape[2] != key.shape[2] or key.shape[2] > MAX_TOKENS:
        return []
    prefix, side = grid
    positions = {"centre": prefix + side // 2 * side + side // 2} | ({"first token": 0} if prefix else {})
    queries = torch.tensor(list(positions.values()), device=query.device)
    full = weights_of(query, key, queries, *masks, 0).mean(0)[:, prefix:]  # [n, side * side]
    shown = {"full": full}
    budgets = [candidate.budget for candidate in candidates if candidate.budget is not None]
    for candidate in candidates:
        if candidate.budget in (None, min(budgets, default=None)):
            weights = _weights(candidate, query, key, value, masks, queries)
            if weights is not None:
                shown[method_label(candidate.method, candidate.budget)] = weights[:, prefix:]
    return [
        AttentionMap(where, label, png_of((weights[number] / full[number].max()).reshape(side, side)))
        for number, where in enumerate(positions)
        for label, weights in shown.items()
    ]


def _weights(
    candidate: Candidate,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masks: tuple,
    queries: torch.Tensor,
) -> torch.Tensor | None:
    """Mean over heads (n, S) of a method's weights of the first sample; None where it does not take the call."""
    attn_mask, key_mask, is_causal, scale = masks
    router = candidate.router
    tensors = [x[:1] for x in (query, key, value)]
    if attn_mask is not None or key_mask is not None:
        return None
    out, _ = router.try_attend(
        *tensors, None, 0.0, is_causal, scale, query.shape[1] != key.shape[1], seed_offset=candidate.seed_offset
    )
    if out is None:
        return None
    module = router.module_for(query, is_causal, scale, candidate.seed_offset)
    tensors = [x.float().transpose(1, 2) for x in tensors]
    with no_autocast(query):
        _, weights = module(*tensors, need_weights=True, enable_gqa=query.shape[1] != key.shape[1])
    return weights[0].mean(0)[queries]


def thumbnail(args: tuple[Any, ...]) -> str | None:
    """The first image of a model's inputs as a PNG file in base64; None where there is none.

    Args:
        args: positional arguments, or values of keyword arguments.
    """
    for x in args:
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() == 4 and x.shape[1] == 3:
            image = x[:1].detach().float().cpu()
            image = F.interpolate(image, size=(THUMBNAIL, THUMBNAIL), mode="bilinear", antialias=True)[0]
            low, high = image.amin(), image.amax()
            return _png(((image - low) / (high - low).clamp_min(1e-9) * 255).byte().permute(1, 2, 0), 2)
    return None


def png_of(image: torch.Tensor) -> str:
    """A map (h, w) with values in [0, 1] as a PNG file of colours, in base64; the root of a value is what is shown.

    Args:
        image: the map; larger and smaller values are clamped.
    """
    # small weights, too, are to be seen
    return _png((image.float().nan_to_num().clamp(0, 1).sqrt() * 255).round().byte().cpu(), 3)


def _png(pixels: torch.Tensor, colour_type: int) -> str:
    """PNG file of 8-bit pixels: (h, w, 3) for RGB (colour type 2), (h, w) for a palette (3)."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + bytes(row.flatten().tolist()) for row in pixels)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0))]
    if colour_type == 3:
        chunks.append((b"PLTE", _palette()))
    chunks += [(b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return base64.b64encode(data).decode()


def _palette() -> bytes:
    anchors = torch.tensor(COLOURS, dtype=torch.float32)
    x = torch.linspace(0, len(COLOURS) - 1, 256)
    low = x.floor().long().clamp_max(len(COLOURS) - 2)
    share = (x - low)[:, None]
    return bytes((anchors[low] * (1 - share) + anchors[low + 1] * share).round().byte().flatten().tolist())
