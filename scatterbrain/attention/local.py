"""Local attention: softmax over a window of W keys, O(T W) time, O(T) memory."""

from __future__ import annotations

import torch

from scatterbrain.attention.base import AttentionModule
from scatterbrain.ops.common.inputs import check_window
from scatterbrain.ops.local import local_attention, naive_local_attention


class LocalAttention(AttentionModule):
    """Softmax attention inside the window `-(W // 2) <= j - i < (W + 1) // 2`.

    Args:
        local_context: width W >= 1 of the window in keys.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: hide the keys j > i.
        attention_dropout: probability of dropping an attention weight in training.
        backend: `naive`, `torch`, `triton` or `auto`, see the operator.

    Raises:
        UserError: a value out of range.
    """

    takes_attn_mask = True

    def __init__(
        self,
        local_context: int,
        softmax_temp: float | None = None,
        causal: bool = False,
        attention_dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(softmax_temp, causal, attention_dropout, backend)
        check_window(local_context)
        self.local_context = local_context

    def sizes(self) -> dict[str, int]:
        """The window."""
        return {"local_context": self.local_context}

    def memory_columns(self, num_keys: int) -> float:
        """The window's keys."""
        return self.local_context

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        return local_attention(query, key, value, self.local_context, **options)

    def _weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        return naive_local_attention(query, key, value, self.local_context, **options)[1]
