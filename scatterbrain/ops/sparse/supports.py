"""Sparse supports: the pairs (query, key) that an attention computes exactly, as dense tiles.

Windows, clusters of a hash and blocks of a layout are sets of pairs. They are stored as *rounds*: a round partitions
queries into tiles and lists the keys of each tile. The support holds every pair of a tile that its mask does not
exclude. A pair counts once: where several rounds contain it, the masks of all but one exclude it. `ops.sparse.tiled`
computes attention over a support; `Support.dense` is the definition it is tested against.

Shapes: G = B * H sequences (1 where all have the same tiles), n tiles of C queries and L keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Round:
    """Tiles of queries and keys. Each query lies in at most one tile of a round.

    Attributes:
        query_index: (G or 1, n, C) int64 positions of the queries; -1 for none.
        key_index: (G or 1, n, L) int64 positions of the keys; -1 for none. No key twice in a tile.
        mask: boolean, broadcasts to (G or 1, n, C, L): false for excluded pairs; None excludes none.
    """

    query_index: torch.Tensor
    key_index: torch.Tensor
    mask: torch.Tensor | None = None

    def pairs(self) -> torch.Tensor:
        """Boolean (G or 1, n, C, L), true for the pairs of each tile that exist and are not excluded."""
        pairs = (self.query_index >= 0).unsqueeze(-1) & (self.key_index >= 0).unsqueeze(-2)
        return pairs if self.mask is None else pairs & self.mask


@dataclass(frozen=True)
class Support:
    """A set of pairs of queries and keys.

    Attributes:
        rounds: the rounds whose union it is; no pair is in two of them.
    """

    rounds: tuple[Round, ...]

    def to(self, device: torch.device) -> Support:
        """The same support on another device."""
        return Support(
            tuple(
                Round(*(None if x is None else x.to(device) for x in (each.query_index, each.key_index, each.mask)))
                for each in self.rounds
            )
        )

    def multiplicity(self, num_queries: int, num_keys: int) -> torch.Tensor:
        """Number of tiles that hold each pair: (G or 1, T, S) int64, 0 or 1 for a valid support."""
        total = torch.zeros(1, num_queries, num_keys, dtype=torch.int64)
        for each in self.rounds:
            pairs = each.pairs()
            groups = pairs.shape[0]
            query = each.query_index.unsqueeze(-1).expand(pairs.shape)
            key = each.key_index.unsqueeze(-2).expand(pairs.shape)
            flat = (query * num_keys + key).clamp_min(0).reshape(groups, -1)
            counts = torch.zeros(groups, num_queries * num_keys, dtype=torch.int64, device=pairs.device)
            counts.scatter_add_(1, flat, pairs.reshape(groups, -1).long())
            total = total.to(counts.device) + counts.view(groups, num_queries, num_keys)
        return total

    def dense(self, num_queries: int, num_keys: int) -> torch.Tensor:
        """Boolean mask (G or 1, T, S) of the pairs."""
        return self.multiplicity(num_queries, num_keys) > 0
