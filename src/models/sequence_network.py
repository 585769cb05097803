"""A small transformer on sequences of tokens, with any attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import Mlp
from torch import nn

from scatterbrain.attention import create_attention
from scatterbrain.errors import UserError, check_whole_number, did_you_mean, is_number

POOLS = ("cls", "mean", "none")
POSITIONS = ("learned", "sinusoidal", "rotary")


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`; the attention is over (B, N, H, qkv_dim / H)."""

    def __init__(
        self, dim: int, heads: int, attention: nn.Module, mlp_dim: int, qkv_dim: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * qkv_dim, bias=False)
        self.attention = attention
        self.proj = nn.Linear(qkv_dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_dim, drop=dropout)

    def forward(
        self, x: torch.Tensor, lengths: torch.Tensor | None, rotary: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map tokens (B, N, dim) to (B, N, dim); lengths (B,) or None; `rotary`, see `rotate`, or None."""
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        out, _ = self.attention(query, key, value, key_lengths=lengths)
        x = x + self.dropout(self.proj(out.flatten(2)))
        return x + self.mlp(self.norm2(x))


class Network(nn.Module):
    """Tokens and positions, pre-norm blocks, and a linear map of each token or of one vector for the sequence.

    Args:
        attentions: one for each block, over `length` tokens, and one more with `pool="cls"`.
        vocabulary: number of different tokens.
        num_classes: number of outputs.
        length: most tokens N.
        dim: width.
        heads: number of heads.
        mlp_dim: hidden width of the MLPs.
        qkv_dim: width of queries, keys and values, over all heads; None is `dim`.
        dropout: probability, of embeddings, of the attentions' outputs and in the MLPs.
        pool: what the output is computed from: `"cls"`, a learned vector before the tokens; `"mean"` of the tokens;
            `"none"`, each token, which has its own output.
        positions: `"learned"`, or `"sinusoidal"` and fixed, vectors that are added to the tokens; or `"rotary"`: each
            block rotates its queries and keys, see `rotate`.
        seed: of the weights, which do not depend on the attentions.
    """

    def __init__(
        self,
        attentions: Sequence[nn.Module],
        vocabulary: int,
        num_classes: int,
        length: int,
        dim: int,
        heads: int,
        mlp_dim: int,
        qkv_dim: int | None = None,
        dropout: float = 0.0,
        pool: str = "cls",
        positions: str = "learned",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.pool, self.length = pool, length
        self.qkv_dim = dim if qkv_dim is None else qkv_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(vocabulary, dim)
            if positions == "learned":
                self.positions = nn.Parameter(0.02 * torch.randn(length, dim))
            else:
                added = sinusoids(length, dim) if positions == "sinusoidal" else None
                self.register_buffer("positions", added, persistent=False)
            num_positions = length + (pool == "cls")
            rotary = rotations(num_positions, self.qkv_dim // heads) if positions == "rotary" else None
            self.register_buffer("rotary", rotary, persistent=False)
            # as large as the positions that are added; with rotary positions 1.0 also trains at higher learning rates
            nn.init.normal_(self.embedding.weight, std=0.02 if positions == "learned" else 1.0)
            self.cls = nn.Parameter(torch.zeros(dim)) if pool == "cls" else None
            self.dropout = nn.Dropout(dropout)
            self.blocks = nn.ModuleList(
                Block(dim, heads, attention, mlp_dim, self.qkv_dim, dropout) for attention in attentions
            )
            self.norm = nn.LayerNorm(dim)
            self.head = nn.Linear(dim, num_classes)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, classes) of the tokens (B, N), or (B, N, classes); behind `lengths` (B,) is padding."""
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions[: tokens.shape[1]]
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)
            lengths = None if lengths is None else lengths + 1
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, lengths, self.rotary)
        x = self.norm(x)
        if self.pool == "cls":
            x = x[:, 0]
        elif self.pool == "mean" and lengths is None:
            x = x.mean(1)
        elif self.pool == "mean":
            seen = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
            x = (x * seen[..., None]).sum(1) / lengths[:, None]
        return self.head(x)

    @property
    def has_random_features(self) -> bool:
        """Whether the attentions hold random projections, which `redraw_projections` replaces."""
        return any(hasattr(block.attention, "redraw_projection") for block in self.blocks)

    def redraw_projections(self, seed: int) -> None:
        """Redraw the random projections of all blocks in place, each from a seed of its own."""
        for number, block in enumerate(self.blocks):
            if hasattr(block.attention, "redraw_projection"):
                block.attention.redraw_projection(seed * len(self.blocks) + number)


def position_angles(length: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Angles (length, width / 2): position * 10,000 ** (-2 i / width)."""
    return torch.arange(length)[:, None] * torch.exp(-math.log(1e4) * torch.arange(0, width, 2, dtype=dtype) / width)


def sinusoids(length: int, dim: int) -> torch.Tensor:
    """Fixed positions (length, dim): sines and cosines of wavelengths from 2 pi to 10,000 times that."""
    angles = position_angles(length, dim, torch.float32)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :dim]


def rotations(length: int, width: int) -> torch.Tensor:
    """Cosines and sines (2, length, width / 2) of rotary positions: angle i is position * 10,000 ** (-2 i / width)."""
    angles = position_angles(length, width, torch.float64)  # in float32 those of distant positions would be off
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Queries or keys (B, N, H, E) with rotary positions, in their dtype.

    Features i and i + E / 2 are a pair, rotated by the angle i of their position, so that the product of a query and a
    key depends on how far apart they are alone (Su et al., 2021, RoFormer, arXiv 2104.09864, section 3.2.2, where
    neighbours 2 i and 2 i + 1 are the pairs). `rotary` (2, at least N, E / 2) is of `rotations`.
    """
    cos, sin = rotary[:, : x.shape[1], None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def create_network(
    attention: Mapping[str, Any],
    vocabulary: int,
    num_classes: int,
    length: int,
    causal: bool = False,
    memory_fraction: float = 1 / 16,
    dim: int = 512,
    depth: int = 4,
    heads: int = 8,
    mlp_dim: int = 1024,
    qkv_dim: int | None = None,
    dropout: float = 0.0,
    pool: str = "cls",
    positions: str = "learned",
    seed: int = 0,
) -> Network:
    """A network with an attention in every block, each with a seed of its own.

    Args:
        attention: `name` of the attention and its options, see `scatterbrain.attention.create_attention`.
        vocabulary: number of different tokens.
        num_classes: number of outputs.
        length: most tokens N of a sequence.
        causal: whether a token may not see those after it; takes `pool="none"`.
        memory_fraction: budget of the attention: its columns over those of the full attention matrix.
        dim: width.
        depth: number of blocks.
        heads: number of heads.
        mlp_dim: hidden width of the MLPs.
        qkv_dim: width of queries, keys and values, over all heads; None is `dim`.
        dropout: probability.
        pool: see `Network`.
        positions: see `Network`.
        seed: of the weights and of the random features.

    Raises:
        UserError: a value out of range, or an attention that cannot be causal.
    """
    sizes = {"dim": dim, "depth": depth, "heads": heads, "mlp_dim": mlp_dim}
    for name, value in (sizes if qkv_dim is None else {**sizes, "qkv_dim": qkv_dim}).items():
        check_whole_number(f"model.{name}", value, 1)
    for name, value, known in (("pool", pool, POOLS), ("positions", positions, POSITIONS)):
        if value not in known:
            raise UserError(f"model.{name}={value} is unknown. {did_you_mean(str(value), known)}")
    if not (is_number(dropout) and 0 <= dropout < 1):
        raise UserError(f"model.dropout={dropout} is not valid. Give a number of at least 0 and below 1.")
    if causal and pool != "none":
        raise UserError(
            f"model.pool={pool} needs tokens that see each other. Give model.pool=none for a causal network."
        )
    width = dim if qkv_dim is None else qkv_dim
    if width % heads:
        raise UserError(f"model.heads={heads} does not divide a width of {width}. Choose another.")
    if positions == "rotary" and width // heads % 2:
        raise UserError(
            f"model.positions=rotary needs heads of an even width, not of {width // heads} ({width} over "
            f"model.heads={heads}). Choose other model.heads, or a model.qkv_dim that is a multiple of {2 * heads}."
        )
    if not isinstance(attention, Mapping) or "name" not in attention:
        raise UserError(f"model.attention={attention} is not valid. Choose an attention by model/attention=NAME.")
    options = {**attention, "memory_fraction": memory_fraction}
    name = options.pop("name")
    if causal:  # an attention without the option is refused only here
        options["causal"] = True
    num_keys = length + (pool == "cls")
    # seeds of the blocks differ, and those of two trainings do not overlap
    seeds = (seed * depth + number for number in range(depth))
    attentions = [create_attention(name, num_keys, width // heads, seed=each, **options) for each in seeds]
    return Network(
        attentions, vocabulary, num_classes, length, dim, heads, mlp_dim, qkv_dim, dropout, pool, positions, seed
    )
