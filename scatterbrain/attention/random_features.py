"""What the attentions with random features share: their options, and a projection that can be redrawn."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

import torch

from scatterbrain.attention.base import AttentionModule
from scatterbrain.errors import UserError, check_whole_number, did_you_mean
from scatterbrain.ops.common.features import centre_and_balance, check_centre
from scatterbrain.ops.common.projection import draw_projection


@dataclass(frozen=True)
class RandomFeatureOptions:
    """Options of the random features, the keyword arguments `**features` of every attention that has them.

    Attributes:
        row_norm: lengths of the random projections: `chi`, those of normal vectors (unbiased), or `sqrt_dim`; see
            `scatterbrain.ops.common.projection.draw_projection`.
        centre: what is subtracted before the features are taken, to lower their variance: `none`; `keys`, the mean of
            the keys; `both`, the mean of the queries too. See `scatterbrain.ops.common.features.centre_and_balance`.
        balance: also bring queries and keys to one second moment, by a matrix that preserves their products; ibid.
        coupling: dependence of the random projections, `orthogonal`, `simplex` or `independent`; see
            `draw_projection`.

    Raises:
        UserError: a value out of range.
    """

    row_norm: str = "chi"
    centre: str = "none"
    balance: bool = False
    coupling: str = "orthogonal"

    def __post_init__(self) -> None:
        check_centre(self.centre)
        if not isinstance(self.balance, bool):
            raise UserError(f"balance={self.balance!r} has to be true or false.")

    @property
    def use_statistics(self) -> bool:
        """Whether means or second moments over all tokens are taken."""
        return self.centre != "none" or self.balance


def option_parameters(module: type[AttentionModule]) -> dict[str, inspect.Parameter]:
    """Options of an attention by name: parameters of its constructor, with those of `RandomFeatureOptions` written out.

    Args:
        module: class of the attention.
    """
    parameters = dict(inspect.signature(module).parameters)
    if parameters.pop("features", None) is not None:
        parameters |= inspect.signature(RandomFeatureOptions).parameters
    return parameters


class RandomFeatureAttention(AttentionModule):
    """Base of the attentions with random features; the buffer `projection_matrix` (R, E) holds their projection.

    Args:
        dim_heads: width E of queries and keys.
        num_projections: number of random projections R.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: hide the keys j > i.
        seed: seed of the random projections.
        attention_dropout: probability of dropping an attention weight in training.
        backend: `naive`, `torch`, `triton` or `auto`.
        **features: options of the random features, see `RandomFeatureOptions`.

    Raises:
        UserError: unknown option (near names are suggested), or a value out of range; `centre` or `balance` with
            `causal`: they take statistics of all tokens.
    """

    projection_matrix: torch.Tensor

    def __init__(
        self,
        dim_heads: int,
        num_projections: int,
        softmax_temp: float | None,
        causal: bool,
        seed: int,
        attention_dropout: float,
        backend: str,
        **features: str | bool,
    ) -> None:
        super().__init__(softmax_temp, causal, attention_dropout, backend)
        self.dim_heads = dim_heads
        known = option_parameters(type(self))
        for name in features:
            if name not in known:
                raise UserError(f"{type(self).__name__} has no option '{name}'. {did_you_mean(name, known)}")
        self.features = RandomFeatureOptions(**features)
        if causal and self.features.use_statistics:
            raise UserError(
                f"centre='{self.features.centre}' and balance={self.features.balance} cannot be causal: they take "
                "statistics of all tokens, so a token would depend on later ones. Leave them out, or choose "
                "coupling='simplex'."
            )
        self.register_buffer("projection_matrix", self._draw(num_projections, dim_heads, seed))

    def _draw(self, num_projections: int, dim_heads: int, seed: int) -> torch.Tensor:
        row_norm, coupling = self.features.row_norm, self.features.coupling
        return draw_projection(num_projections, dim_heads, seed, row_norm=row_norm, coupling=coupling)

    def _prepare(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **masks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys of the same softmax attention, with less variance of their features."""
        if not self.features.use_statistics:
            return query, key
        return centre_and_balance(query, key, self.features.centre, self.features.balance, **masks)

    @torch.no_grad()
    def redraw_projection(self, seed: int) -> None:
        """Draw the random projections again, in place.

        Args:
            seed: any integer.
        """
        self.projection_matrix.copy_(self._draw(*self.projection_matrix.shape, seed))


def even_features(dim_heads: int, nb_features: int | None) -> int:
    """Number of features with both signs of each random projection; None is `default_num_features`.

    Raises:
        UserError: odd, or none at all.
    """
    check_whole_number("dim_heads", dim_heads, 1)
    nb_features = default_num_features(dim_heads) if nb_features is None else nb_features
    check_whole_number("nb_features", nb_features, 0)
    if nb_features < 2 or nb_features % 2:
        raise UserError(
            f"nb_features={nb_features} has to be an even number of at least 2: each random projection gives two."
        )
    return nb_features


def default_num_features(dim_heads: int) -> int:
    """Number of random features where none is given: E log E (Choromanski et al., ICLR 2021, theorem 4), even."""
    return max(2, int(dim_heads * math.log(dim_heads)) // 2 * 2)
