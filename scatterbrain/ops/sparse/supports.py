"""Sparse supports: which pairs (query, key) an attention computes exactly, cut into dense tiles.

Windows, clusters of a hash, and blocks of a layout all are sets of pairs. They are written down as *rounds*: a round
cuts the queries into tiles, and gives each tile its keys. Every pair of a tile is in the support, less those that the
tile's mask leaves out. A pair is in the support once: where several rounds hold it, the masks of all but one leave it
out. `ops.sparse.tiled` computes attention over such a support; `Support.dense` is the definition it is tested against.

Shapes: G = B * H sequences (1 where all are cut alike), n tiles of C queries and L keys.
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
        mask: boolean, broadcasts to (G or 1, n, C, L): false for pairs that are left out; None leaves out none.
    """

    query_index: torch.Tensor
    key_index: torch.Tensor
    mask: torch.Tensor | None = None

    def pairs(self) -> torch.Tensor:
        """Boolean (G or 1, n, C, L): the pairs of each tile that exist and are not left out."""
        pairs = (self.query_index >= 0).unsqueeze(-1) & (self.key_index >= 0).unsqueeze(-2)
        return pairs if self.mask is None else pairs & self.mask


@dataclass(frozen=True)
class Support:
    """A set of pairs.

    Attributes:
        rounds: that it is the union of; no pair is in two of them.
    """

    rounds: tuple[Round, ...]

    def to(self, device: torch.device) -> Support:
        """The same on another device."""
        return Support(
            tuple(
                Round(*(None if x is None else x.to(device) for x in (each.query_index, each.key_index, each.mask)))
                for each in self.rounds
            )
        )

    def multiplicity(self, num_queries: int, num_keys: int) -> torch.Tensor:
        """In how many tiles each pair is: (G or 1, T, S) int64, 0 or 1 for a valid support."""
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
        """Boolean mask of the pairs: (G or 1, T, S)."""
        return self.multiplicity(num_queries, num_keys) > 0
