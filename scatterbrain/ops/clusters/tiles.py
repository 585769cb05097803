"""Points sorted by cluster, in tiles of one cluster each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from scatterbrain.ops.common.numerics import gather_rows, stable_argsort


@dataclass(frozen=True)
class ClusterTiles:
    """Points sorted by cluster and cut into tiles of C points, all of one cluster.

    Attributes:
        index: (G, n, C) positions of the points; -1 for none.
        owner: (G, n) cluster of each tile; any for a tile without points.
        slot: (G, N) place of each point among the n C places; 0 for a point of no cluster.
    """

    index: torch.Tensor
    owner: torch.Tensor
    slot: torch.Tensor

    @classmethod
    def of(cls, labels: torch.Tensor, num_clusters: int) -> ClusterTiles:
        """Tiles of points of the clusters (G, N), -1 for none."""
        groups, length = labels.shape
        # half a cluster, so that the last tile of each, on average half empty, is small
        size = min(64, max(8, length // (2 * num_clusters) // 8 * 8))
        # an upper bound for all clusterings: a number that depends on the data would synchronise the GPU
        num_tiles = length // size + min(num_clusters, length)
        labels = labels.where(labels >= 0, num_clusters)
        counts = torch.zeros(groups, num_clusters + 1, dtype=torch.int64, device=labels.device)
        counts = counts.scatter_add(1, labels, torch.ones_like(labels))
        tiles = -(-counts // size)
        tiles[:, -1] = 0
        ends = tiles.cumsum(1)
        first_slot = (ends - tiles) * size
        first_slot[:, -1] = num_tiles * size
        order = stable_argsort(labels)
        labels = labels.gather(1, order)
        rank = torch.arange(length, device=labels.device) - (counts.cumsum(1) - counts).gather(1, labels)
        # points of no cluster share an extra last place, which is dropped
        slot = (first_slot.gather(1, labels) + rank).clamp_max(num_tiles * size)
        index = torch.full((groups, num_tiles * size + 1), -1, device=labels.device).scatter(1, slot, order)
        tile = torch.arange(num_tiles, device=labels.device).expand(groups, -1).contiguous()
        ends = ends[:, :-1].contiguous()
        if torch.onnx.is_in_onnx_export():  # which has no searchsorted
            owner = (ends.unsqueeze(1) <= tile.unsqueeze(2)).sum(2)
        else:
            owner = torch.searchsorted(ends, tile, right=True)
        owner = owner.clamp_max(num_clusters - 1)
        slot = torch.zeros_like(slot).scatter(1, order, slot.where(labels < num_clusters, 0))
        return cls(index[:, :-1].reshape(groups, num_tiles, size), owner, slot)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Tiles (G, n, C, F) of the rows of (G, N, F); any row for no point."""
        return gather_rows(x, self.index.flatten(1).clamp_min(0)).view(*self.index.shape, x.shape[-1])

    def bias(self, dtype: torch.dtype) -> torch.Tensor:
        """Bias (G, n, C, 1) of the logits: 0 where there is a point, -inf for none."""
        return torch.zeros_like(self.index, dtype=dtype).masked_fill_(self.index < 0, -math.inf).unsqueeze(-1)

    def put(self, x: torch.Tensor) -> torch.Tensor:
        """Rows (G, N, F) of the tiles (G, n, C, F)."""
        return gather_rows(x.flatten(1, 2), self.slot)
