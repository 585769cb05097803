"""Block-sparse attention, alone and with random features: exact between the pairs of blocks of a layout.

The layouts are those of Longformer (Beltagy et al., 2020), BigBird (Zaheer et al., NeurIPS 2020) and of the fixed
pattern of sparse transformers (Child et al., 2019); see `scatterbrain.ops.sparse.block_sparse`.
"""

from __future__ import annotations

import torch

from scatterbrain.attention.sparse import FixedSupport, SparseAttention, SparseLowRankAttention
from scatterbrain.errors import check_whole_number
from scatterbrain.ops.sparse.block_sparse import block_layout, keys_per_query, layout_support
from scatterbrain.ops.sparse.supports import Support


class BlockLayout(FixedSupport):
    """Support of a block layout.

    Args:
        layout: `longformer`, `bigbird` or `openai`.
        block: tokens of a block.
        seed: seed of BigBird's random blocks.
        **options: of the layout, see `block_layout`.
    """

    can_be_causal = True

    def __init__(self, layout: str, block: int, seed: int = 0, **options: int) -> None:
        super().__init__()
        check_whole_number("block", block, 1)
        self.layout, self.block, self.seed, self.options = layout, block, seed, options
        self._layout(block, block)  # refuse now what does not fit

    def _layout(self, num_queries: int, num_keys: int) -> torch.Tensor:
        blocks = (-(-length // self.block) for length in (num_queries, num_keys))
        return block_layout(self.layout, *blocks, seed=self.seed, **self.options)

    def make(self, num_queries: int, num_keys: int) -> Support:
        """The support of the layout for these lengths."""
        # a tile is as long as a block, also where the sequence is shorter
        block = min(self.block, max(num_queries, num_keys))
        return layout_support(self._layout(num_queries, num_keys), block, num_queries, num_keys)

    def sizes(self) -> dict[str, int]:
        """Tokens of a block."""
        return {"block": self.block}

    def columns(self, num_keys: int) -> float:
        """Keys of a query, on average over the queries."""
        return keys_per_query(self._layout(num_keys, num_keys), self.block, num_keys)


class BlockSparseAttention(SparseAttention):
    """Softmax attention between the pairs of blocks of a layout.

    Args:
        layout: `longformer`, `bigbird` or `openai`.
        block: tokens of a block.
        num_window_blocks: blocks of the sliding window, odd; with `openai` blocks of a local group.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: hide the keys j > i.
        seed: seed of BigBird's random blocks; they are part of the layout, and not redrawn.
        attention_dropout: probability of dropping an attention weight in training.
        backend: `naive`, `torch` or `auto`, see the operator.

    Raises:
        UserError: unknown layout, or a value out of range.
    """

    def __init__(
        self,
        layout: str,
        block: int,
        num_window_blocks: int = 3,
        softmax_temp: float | None = None,
        causal: bool = False,
        seed: int = 0,
        attention_dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        source = BlockLayout(layout, block, seed, **_window_option(layout, num_window_blocks))
        super().__init__(source, softmax_temp, causal, attention_dropout, backend)


class SBBlockSparseAttention(SparseLowRankAttention):
    """Scatterbrain with the pairs of blocks of a layout as its sparse support.

    Args:
        layout: `longformer`, `bigbird` or `openai`.
        block: tokens of a block.
        dim_heads: width E of queries and keys.
        nb_features: number of features M, even; None is E log E.
        num_window_blocks: blocks of the sliding window, odd; with `openai` blocks of a local group.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: has to be false.
        seed: seed of the random projections and of BigBird's random blocks.
        backend: `naive`, `torch` or `auto`, see the operator.
        **features: options of the random features, see `RandomFeatureOptions`.

    Raises:
        UserError: unknown layout, or a value out of range.
    """

    def __init__(
        self,
        layout: str,
        block: int,
        dim_heads: int,
        nb_features: int | None = None,
        num_window_blocks: int = 3,
        softmax_temp: float | None = None,
        causal: bool = False,
        seed: int = 0,
        backend: str = "auto",
        **features: str | bool,
    ) -> None:
        source = BlockLayout(layout, block, seed, **_window_option(layout, num_window_blocks))
        super().__init__(source, dim_heads, nb_features, softmax_temp, causal, seed, backend, **features)


def _window_option(layout: str, num_window_blocks: int) -> dict[str, int]:
    return {"num_local_blocks" if layout == "openai" else "num_sliding_blocks": num_window_blocks}
