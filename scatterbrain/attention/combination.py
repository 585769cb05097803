"""Average of two attentions: the paper's baseline for putting sparse and low-rank together without correction.

    out = (out_sparse + out_low_rank) / 2

Each part is normalised on its own: pairs of the sparse support count twice, all others half. Scatterbrain's single
normalisation over exact and estimated weights avoids this.
"""

from __future__ import annotations

import torch
from torch import nn

from scatterbrain.attention.base import AttentionModule
from scatterbrain.attention.local import LocalAttention
from scatterbrain.attention.performer import PerformerAttention
from scatterbrain.attention.smyrf import SmyrfAttention
from scatterbrain.ops.common.inputs import check_tensors


class CombinationAttention(AttentionModule):
    """Average of the outputs, and of the weights, of several attentions.

    Args:
        *parts: the attentions, with one softmax scale and all causal or none.
    """

    def __init__(self, *parts: AttentionModule) -> None:
        super().__init__(parts[0].softmax_temp, parts[0].causal)
        self.parts = nn.ModuleList(parts)
        self.takes_attn_mask = all(part.takes_attn_mask for part in parts)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_lengths: torch.Tensor | None = None,
        need_weights: bool = False,
        **options: torch.Tensor | bool | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Means of the outputs and of the weights of the parts; arguments as in `AttentionModule.forward`."""
        check_tensors(query=query, key=key, value=value)
        self._warn_of_length(key.shape[1])
        outputs, weights = zip(
            *(part(query, key, value, key_lengths, need_weights, **options) for part in self.parts), strict=True
        )
        # divided first: a sum may overflow where the mean does not
        mean = sum(each / len(weights) for each in weights) if need_weights else None
        return sum(each / len(outputs) for each in outputs), mean

    def sizes(self) -> dict[str, int]:
        """Those of all parts."""
        return {name: size for part in self.parts for name, size in part.sizes().items()}

    def memory_columns(self, num_keys: int) -> float:
        """Sum over the parts."""
        return sum(part.memory_columns(num_keys) for part in self.parts)

    def redraw_projection(self, seed: int) -> None:
        """Draw the random projections and hashes of the parts again, in place.

        Args:
            seed: any integer.
        """
        for part in self.parts:
            if hasattr(part, "redraw_projection"):
                part.redraw_projection(seed)


class CombinationLocalPerformerAttention(CombinationAttention):
    """Average of local attention and Performer.

    Args:
        local_context: width of the window in keys.
        dim_heads: width E of queries and keys.
        nb_features: number of features M; None is E log E.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: hide the keys j > i.
        seed: seed of the random projections.
        backend: `naive`, `torch` or `auto`, see the operators.
        **features: options of the random features, see `RandomFeatureOptions`.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        local_context: int,
        dim_heads: int,
        nb_features: int | None = None,
        softmax_temp: float | None = None,
        causal: bool = False,
        seed: int = 0,
        backend: str = "auto",
        **features: str | bool,
    ) -> None:
        super().__init__(
            LocalAttention(local_context, softmax_temp, causal, backend=backend),
            PerformerAttention(dim_heads, nb_features, softmax_temp, causal, seed, backend=backend, **features),
        )


class CombinationSmyrfPerformerAttention(CombinationAttention):
    """Average of SMYRF and Performer.

    Args:
        cluster_size: number of keys of a cluster.
        dim_heads: width E of queries and keys.
        nb_features: number of features M; None is E log E.
        num_hashes: number of hashes.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: has to be false.
        seed: seed of the random projections and of the hashes.
        backend: `naive`, `torch` or `auto`, see the operators.
        **features: options of the random features, see `RandomFeatureOptions`.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        cluster_size: int,
        dim_heads: int,
        nb_features: int | None = None,
        num_hashes: int = 2,
        softmax_temp: float | None = None,
        causal: bool = False,
        seed: int = 0,
        backend: str = "auto",
        **features: str | bool,
    ) -> None:
        super().__init__(
            SmyrfAttention(cluster_size, dim_heads, num_hashes, softmax_temp, causal, seed, backend=backend),
            PerformerAttention(dim_heads, nb_features, softmax_temp, causal, seed, backend=backend, **features),
        )
