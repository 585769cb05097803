"""Reformer attention: exact between tokens of one chunk of an angular hash, and of the chunk before it.

Kitaev et al., "Reformer: The Efficient Transformer", ICLR 2020. Reformer shares queries and keys: its keys are the
queries at unit length, and a token attends to itself only where it sees no other. So `shared_qk=True`, as published and
as evaluated in the paper's comparison, ignores the keys of a trained network; `shared_qk=False` hashes queries and keys
both, and attends to the keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from scatterbrain.attention.sparse import SparseAttention, SupportSource
from scatterbrain.errors import UserError, check_whole_number
from scatterbrain.ops.common.inputs import length_mask, query_lengths
from scatterbrain.ops.common.numerics import accumulation_dtype
from scatterbrain.ops.sparse.lsh import draw_reformer_rotations, reformer_support
from scatterbrain.ops.sparse.supports import Round, Support


class ReformerBuckets(SupportSource):
    """Support of the pairs whose tokens, sorted by bucket, lie in one chunk or in neighbouring ones.

    Args:
        bucket_size: number of tokens of a chunk.
        dim_heads: width E of queries and keys.
        num_buckets: number of buckets of a hash, even.
        num_hashes: number of hashes.
        seed: seed of the rotations, which the buffer `projection_matrix` holds.
        leave_out_self: a token sees itself only where it sees nothing else.
    """

    projection_matrix: torch.Tensor

    def __init__(
        self, bucket_size: int, dim_heads: int, num_buckets: int, num_hashes: int, seed: int, leave_out_self: bool
    ) -> None:
        super().__init__()
        check_whole_number("bucket_size", bucket_size, 1)
        self.bucket_size, self.num_buckets, self.num_hashes = bucket_size, num_buckets, num_hashes
        self.leave_out_self = leave_out_self
        self.dim_heads = dim_heads
        self.register_buffer("projection_matrix", self._draw(seed))

    def _draw(self, seed: int) -> torch.Tensor:
        return draw_reformer_rotations(self.num_hashes, self.dim_heads, self.num_buckets, seed)

    def forward(self, query: torch.Tensor, key: torch.Tensor, key_lengths: torch.Tensor | None) -> Support:
        """The chunks of these queries and keys."""
        lengths = key_lengths, query_lengths(query, key, key_lengths)
        support = reformer_support(query, key, self.projection_matrix, self.bucket_size, *lengths)
        if not self.leave_out_self:
            return support
        rounds = []
        for each in support.rounds:
            pairs = each.pairs()
            own = each.query_index.unsqueeze(-1) == each.key_index.unsqueeze(-2)
            others = pairs & ~own
            mask = others | (pairs & ~others.any(-1, keepdim=True))
            rounds.append(Round(each.query_index, each.key_index, mask))
        return Support(tuple(rounds))

    def sizes(self) -> dict[str, int]:
        """Chunk size and number of hashes."""
        return {"bucket_size": self.bucket_size, "num_hashes": self.num_hashes}

    def columns(self, num_keys: int) -> float:
        """A chunk and the one before it, for each hash."""
        return 2 * self.bucket_size * self.num_hashes

    @torch.no_grad()
    def redraw(self, seed: int) -> None:
        """Draw the rotations again, in place.

        Args:
            seed: any integer.
        """
        self.projection_matrix.copy_(self._draw(seed))


class ReformerAttention(SparseAttention):
    """Softmax attention within the buckets of an angular hash.

    Args:
        bucket_size: number of tokens of a chunk.
        dim_heads: width E of queries and keys.
        num_buckets: number of buckets of a hash, even; S / bucket_size makes buckets as large as chunks.
        num_hashes: number of hashes; a pair that is close in several counts once.
        shared_qk: the keys are the queries at unit length, and `key` is ignored.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: has to be false.
        seed: seed of the rotations.
        attention_dropout: probability of dropping an attention weight in training.
        backend: `naive`, `torch` or `auto`, see the operator.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        bucket_size: int,
        dim_heads: int,
        num_buckets: int = 64,
        num_hashes: int = 2,
        shared_qk: bool = True,
        softmax_temp: float | None = None,
        causal: bool = False,
        seed: int = 0,
        attention_dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        source = ReformerBuckets(bucket_size, dim_heads, num_buckets, num_hashes, seed, leave_out_self=shared_qk)
        super().__init__(source, softmax_temp, causal, attention_dropout, backend)
        self.shared_qk = shared_qk

    def redraw_projection(self, seed: int) -> None:
        """Draw the rotations again, in place.

        Args:
            seed: any integer.
        """
        self.source.redraw(seed)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        return super()._attend(query, self._keys(query, key, options["key_lengths"]), value, **options)

    def _weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        return super()._weights(query, self._keys(query, key, options["key_lengths"]), value, **options)

    def _keys(self, query: torch.Tensor, key: torch.Tensor, key_lengths: torch.Tensor | None) -> torch.Tensor:
        if not self.shared_qk:
            return key
        if query.shape != key.shape:
            raise UserError(
                f"Reformer shares queries and keys: query {tuple(query.shape)} and key {tuple(key.shape)} have to be "
                "of one shape. shared_qk=False takes keys of another length."
            )
        if key_lengths is not None:
            # padding may hold any value, and the gradient of the norm of nan is nan
            hidden = ~length_mask(key_lengths, query.shape[2])[:, None, :, None]
            query = query.masked_fill(hidden, 0.0)
        # not in half precision; autocast would leave float32 keys beside queries of half precision
        return F.normalize(query.to(accumulation_dtype(query.dtype)), dim=-1).to(query.dtype)
