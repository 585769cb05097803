"""What the attention modules share: the calling convention, and random-feature rows that can be drawn again."""

from __future__ import annotations

import math

import torch
from torch import nn

from scatterbrain.errors import UserError
from scatterbrain.ops.common.features import centre_and_balance, check_centre
from scatterbrain.ops.common.inputs import check_dropout, check_inputs, default_scale
from scatterbrain.ops.common.projection import draw_projection


class AttentionModule(nn.Module):
    """Base of the attention modules.

    Sub-classes give `_attend` (the fast operator) and `_weights` (the dense weights, for inspection), both over
    (B, H, length, width) tensors.

    Args:
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: hide the keys j > i.
        attention_dropout: probability of dropping an attention weight in training.
        backend: form of the operator: `naive`, `torch` or `auto`.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        softmax_temp: float | None = None,
        causal: bool = False,
        attention_dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if softmax_temp is not None and not softmax_temp > 0:
            raise UserError(f"softmax_temp={softmax_temp} has to be positive; leave it out for E ** -0.5.")
        check_dropout(attention_dropout)
        self.softmax_temp = softmax_temp
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
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            query: (B, T, H, E).
            key: (B, S, H, E).
            value: (B, S, H, D).
            key_lengths: (B,) integers, number of keys of each sample; the rest is padding. None for all.
            need_weights: also return the weights of the dense form, without dropout. Takes O(T S) memory.

        Returns:
            Output (B, T, H, D), and weights (B, H, T, S) or None. A query that sees no key gives zero.

        Raises:
            UserError: shapes, dtypes or options that do not fit.
        """
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        query, key = self._prepare(query, key, value, key_lengths)
        options = {"is_causal": self.causal, "key_lengths": key_lengths, "scale": self.softmax_temp}
        dropout_p = self.attention_dropout if self.training else 0.0
        out = self._attend(query, key, value, dropout_p=dropout_p, backend=self.backend, **options)
        weights = None
        if need_weights:
            options["scale"] = default_scale(query, self.softmax_temp)
            weights = self._weights(query, key, value, **options).to(query.dtype)
        return out.transpose(1, 2), weights

    def _prepare(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys that the attention is taken of, fast and dense."""
        return query, key

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        raise NotImplementedError

    def _weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Options, for `print(model)`."""
        options = {"softmax_temp": self.softmax_temp, "causal": self.causal, "dropout": self.attention_dropout}
        return ", ".join(f"{name}={value}" for name, value in {**self.sizes(), **options}.items())

    def sizes(self) -> dict[str, int]:
        """Sizes that the memory is spent on, by the names of their options; empty for full attention."""
        return {}

    def memory_columns(self, num_keys: int) -> float:
        """Memory in columns of the attention matrix; full attention has `num_keys`; see `ops.common.budget`."""
        return float(num_keys)


class RandomFeatureAttention(AttentionModule):
    """Base of the attentions with random features: holds their rows in the buffer `projection_matrix` (rows, E).

    Args:
        dim_heads: width E of queries and keys.
        num_rows: number of rows.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: hide the keys j > i.
        seed: seed of the rows.
        row_norm: length of the rows, see `draw_projection`.
        attention_dropout: probability of dropping an attention weight in training.
        backend: form of the operator: `naive`, `torch` or `auto`.
        centre: `none`; `keys`, take their mean off the keys; `both`, that of the queries too. See
            `scatterbrain.ops.common.features.centre_and_balance`.
        balance: bring queries and keys to one second moment by a matrix that leaves their products as they are, ibid.
        coupling: how the rows depend on one another, `orthogonal`, `simplex` or `independent`; see `draw_projection`.

    Raises:
        UserError: a value out of range; `centre` or `balance` with `causal`: they look at all tokens.
    """

    projection_matrix: torch.Tensor

    def __init__(
        self,
        dim_heads: int,
        num_rows: int,
        softmax_temp: float | None,
        causal: bool,
        seed: int,
        row_norm: str,
        attention_dropout: float,
        backend: str,
        *,
        centre: str = "none",
        balance: bool = False,
        coupling: str = "orthogonal",
    ) -> None:
        super().__init__(softmax_temp, causal, attention_dropout, backend)
        check_centre(centre)
        if not isinstance(balance, bool):
            raise UserError(f"balance={balance!r} has to be true or false.")
        if causal and (centre != "none" or balance):
            raise UserError(
                f"centre='{centre}' and balance={balance} cannot be causal: they take statistics of all tokens, so a "
                "token would see what comes after it. Leave them out, or choose coupling='simplex'."
            )
        self.row_norm, self.centre, self.balance, self.coupling = row_norm, centre, balance, coupling
        self.register_buffer("projection_matrix", self._draw(num_rows, dim_heads, seed))

    def _draw(self, num_rows: int, dim_heads: int, seed: int) -> torch.Tensor:
        return draw_projection(num_rows, dim_heads, seed, row_norm=self.row_norm, coupling=self.coupling)

    def _prepare(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys with the same products, up to a term of the query, and better features."""
        if self.centre == "none" and not self.balance:
            return query, key
        check_inputs(query, key, value, key_lengths)
        return centre_and_balance(query, key, self.centre, self.balance, key_lengths)

    @torch.no_grad()
    def redraw_projection(self, seed: int) -> None:
        """Draw the rows again, in place, from `seed`."""
        self.projection_matrix.copy_(self._draw(*self.projection_matrix.shape, seed))


def refuse_causal(attention: AttentionModule, refused: bool) -> None:
    """Raise where an attention that looks at all keys at once should hide some of them.

    Raises:
        UserError: `refused` is true.
    """
    if refused:
        raise UserError(
            f"{type(attention).__name__} cannot be causal: its clusters, or its low-rank sums, are taken over all keys "
            "at once. Choose sblocal, local or performer."
        )


def even_features(dim_heads: int, nb_features: int | None) -> int:
    """Number of features of the cosh form, which come in pairs; None is the default.

    Raises:
        UserError: odd, or none at all.
    """
    nb_features = default_num_features(dim_heads) if nb_features is None else nb_features
    if nb_features < 2 or nb_features % 2:
        raise UserError(
            f"nb_features={nb_features} has to be an even number of at least 2: each row gives two features."
        )
    return nb_features


def default_num_features(dim_heads: int) -> int:
    """Number of random features where none is given: E log E (Choromanski et al., ICLR 2021, theorem 4), even."""
    return max(2, int(dim_heads * math.log(dim_heads)) // 2 * 2)
