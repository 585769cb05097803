"""Base of the attention modules: the calling convention, and the interface that sub-classes implement."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from scatterbrain.errors import UserError, check_switch
from scatterbrain.ops.common.inputs import (
    check_attn_mask,
    check_dropout,
    check_inputs,
    check_scale,
    check_tensors,
    default_scale,
    empty_output,
)

# A module warns where the keys are more than this many times those its sizes were chosen for, or fewer.
LENGTH_FACTOR = 2


class AttentionModule(nn.Module):
    """Base of the attention modules: `(query, key, value, key_lengths, need_weights) -> (out, weights or None)`.

    Sub-classes implement `_attend` (the operator) and `_weights` (the dense weights, for inspection), both over
    (B, H, length, width) tensors, and `sizes` and `memory_columns`.

    Args:
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: hide the keys j > i.
        attention_dropout: probability of dropping an attention weight in training.
        backend: `naive` (dense, float64), `torch`, `triton` where the operator has kernels, or `auto`.

    Attributes:
        takes_attn_mask: whether keys may be hidden anywhere in the sequence; `_prepare`, `_attend` and `_weights` then
            get the mask (B, S) of a call that has one as `attn_mask`.
        dim_heads: width E of queries and keys that the module was made for; None for any.
        sequence_length: number of keys S that its sizes were chosen for, set by `create_attention`; None for any.

    Raises:
        UserError: a value out of range.
    """

    takes_attn_mask: bool = False
    dim_heads: int | None = None
    sequence_length: int | None = None

    def __init__(
        self,
        softmax_temp: float | None = None,
        causal: bool = False,
        attention_dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_dropout(attention_dropout)
        check_switch("causal", causal)
        self.softmax_temp = None if softmax_temp is None else check_scale("softmax_temp", softmax_temp)
        self.causal = causal
        self.attention_dropout = attention_dropout
        self.backend = backend

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_lengths: torch.Tensor | None = None,
        need_weights: bool = False,
        *,
        attn_mask: torch.Tensor | None = None,
        enable_gqa: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output of the attention, and its weights where they are requested.

        Args:
            query: (B, T, H, E).
            key: (B, S, H, E).
            value: (B, S, H, D).
            key_lengths: (B,) integers, a tensor or a list: number of keys of each sample; the rest is padding. None for
                all.
            need_weights: also return the dense weights, without dropout. Takes O(T S) memory.
            attn_mask: boolean (B, S) or (B, 1, 1, S), true for the keys that take part: padding anywhere in the
                sequence. None for all.
            enable_gqa: key and value may have Hkv heads, H a multiple of Hkv; `repeat_interleave` repeats them.

        Returns:
            Output (B, T, H, D), and weights (B, H, T, S) or None. A query that sees no key gives zero.

        Raises:
            UserError: shapes, dtypes or options that do not fit; `attn_mask` where `takes_attn_mask` is false.
        """
        dropout_p = self.attention_dropout if self.training else 0.0
        if key_lengths is None and attn_mask is None and need_weights is False and enable_gqa is False:
            out = self._attend_again(query, key, value, dropout_p)
            if out is not None:
                self._warn_of_length(key.shape[1])
                return out, None
        check_tensors(query=query, key=key, value=value)
        if min(x.dim() for x in (query, key, value)) < 3:
            raise UserError("query, key and value have to be tensors of four dimensions (B, length, H, width).")
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        query, key, value, key_lengths = check_inputs(query, key, value, key_lengths, enable_gqa=enable_gqa)
        masks = {"key_lengths": key_lengths}
        if attn_mask is not None:
            if not self.takes_attn_mask:
                raise UserError(
                    f"{type(self).__name__} takes no attn_mask. Move the padding behind the tokens and give "
                    "key_lengths, or choose an attention that takes it, such as full, local, performer or sblocal."
                )
            masks["attn_mask"] = check_attn_mask(attn_mask, query, key)
        if self.dim_heads is not None and query.shape[3] != self.dim_heads:
            raise UserError(
                f"{type(self).__name__} was made for heads of width {self.dim_heads}, and query is "
                f"{tuple(query.transpose(1, 2).shape)}, (B, length, H, width). Create it with "
                f"dim_heads={query.shape[3]}."
            )
        self._warn_of_length(key.shape[2])
        if query.shape[0] == 0:
            weights = query.new_zeros(*query.shape[:3], key.shape[2]) if need_weights else None
            return empty_output(query, key, value).transpose(1, 2), weights
        query, key = self._prepare(query, key, value, **masks)
        options = {"is_causal": self.causal, "scale": self.softmax_temp, **masks}
        out = self._attend(query, key, value, dropout_p=dropout_p, backend=self.backend, **options)
        weights = None
        if need_weights:
            options["scale"] = default_scale(query, self.softmax_temp)
            weights = self._weights(query, key, value, **options).to(query.dtype)
        return out.transpose(1, 2), weights

    def _warn_of_length(self, num_keys: int) -> None:
        """Warn once where the number of keys makes the share of columns another."""
        expected = self.sequence_length
        if expected is None or torch.compiler.is_compiling():
            return
        if expected > LENGTH_FACTOR * num_keys or num_keys > LENGTH_FACTOR * expected:
            self.sequence_length = None
            warnings.warn(
                f"The sizes of this {type(self).__name__} ({self.sizes()}) were chosen for {expected} keys, and it got "
                f"{num_keys}: its share of the attention columns is another. Modules take tensors "
                f"(B, length, H, width); create it with sequence_length={num_keys} if that is the length.",
                stacklevel=3,
            )

    def _prepare(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **masks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys that both the operator and the dense weights are computed from."""
        return query, key

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        raise NotImplementedError

    def _attend_again(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float
    ) -> torch.Tensor | None:
        """Output (B, T, H, D) of what `_prepare` and `_attend` compute, by an operator that has checked such a call.

        None where it has not. Short sequences need it: checks and transposes take longer than the kernels.

        Args:
            query: (B, T, H, E).
            key: (B, S, H, E).
            value: (B, S, H, D).
            dropout_p: probability of dropping a weight.
        """
        return None

    def __init_subclass__(cls, **options) -> None:
        super().__init_subclass__(**options)
        if "_attend_again" not in vars(cls) and ("_attend" in vars(cls) or "_prepare" in vars(cls)):
            cls._attend_again = AttentionModule._attend_again  # that of a base class would pass over them

    def _weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Options, for `print(model)`."""
        options = {name: getattr(self, name) for name in ("num_steps", "value_weight") if hasattr(self, name)}
        options |= {"softmax_temp": self.softmax_temp, "causal": self.causal, "dropout": self.attention_dropout}
        return ", ".join(f"{name}={value}" for name, value in {**self.sizes(), **options}.items())

    def sizes(self) -> dict[str, int]:
        """Sizes that the budget determines, by the names of their options; empty for full attention."""
        return {}

    def memory_columns(self, num_keys: int) -> float:
        """Columns of the attention matrix that it takes, of `num_keys`; see `ops.common.budget`.

        Args:
            num_keys: number of keys S.
        """
        return float(num_keys)


def refuse_causal(attention: AttentionModule, refused: bool) -> None:
    """Check that an attention that depends on all keys at once is not causal.

    Args:
        attention: the module, for the message.
        refused: whether causal masking was requested and is not possible.

    Raises:
        UserError: `refused` is true.
    """
    if refused:
        raise UserError(
            f"{type(attention).__name__} cannot be causal: it chooses, clusters or sums over all keys at once. "
            "Choose sbcluster, sblocal, local or performer."
        )
