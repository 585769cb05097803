"""What the attentions with random features share: their options, a projection that can be redrawn, learned features."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

import torch
from torch import nn

from scatterbrain.attention.base import AttentionModule
from scatterbrain.errors import UserError, check_whole_number, did_you_mean
from scatterbrain.ops.common.features import centre_and_balance, check_centre, num_features
from scatterbrain.ops.common.projection import draw_projection
from scatterbrain.ops.learned import (
    FeatureMap,
    learned_feature_attention,
    naive_learned_feature_attention,
    random_feature_map,
)


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


class LearnedFeatures(nn.Module):
    """Trainable feature maps of the queries and keys of a layer, one for each head, see `scatterbrain.ops.learned`.

    Args:
        start: the map that both start from.

    Attributes:
        query_weight, key_weight: (H, M, E).
        query_bias, key_bias: (H, M).
        query_norm, key_norm: (H,).
    """

    def __init__(self, start: FeatureMap) -> None:
        super().__init__()
        for side in ("query", "key"):
            for name, tensor in start._asdict().items():
                self.register_parameter(f"{side}_{name}", nn.Parameter(tensor.clone()))

    @property
    def query_map(self) -> FeatureMap:
        """The feature map of the queries."""
        return FeatureMap(self.query_weight, self.query_bias, self.query_norm)

    @property
    def key_map(self) -> FeatureMap:
        """The feature map of the keys."""
        return FeatureMap(self.key_weight, self.key_bias, self.key_norm)

    def attend(self, *tensors: torch.Tensor, window: int = 0, **options) -> torch.Tensor:
        """Output of `learned_feature_attention` with these maps."""
        return learned_feature_attention(*tensors, self.query_map, self.key_map, window, **options)

    def weights(self, *tensors: torch.Tensor, window: int = 0, **options) -> torch.Tensor:
        """Dense weights (B, H, T, S) of `naive_learned_feature_attention` with these maps."""
        return naive_learned_feature_attention(*tensors, self.query_map, self.key_map, window, **options)[1]


class RandomFeatureAttention(AttentionModule):
    """Base of the attentions with random features; the buffer `projection_matrix` (R, E) holds their projection.

    With `learned_heads` the parameters of `learned_features` take its place.

    Args:
        dim_heads: width E of queries and keys.
        num_projections: number of random projections R.
        cosh: take each of them with both signs: M = 2 R features, else M = R.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: hide the keys j > i.
        seed: seed of the random projections.
        attention_dropout: probability of dropping an attention weight in training.
        backend: `naive`, `torch`, `triton` or `auto`.
        learned_heads: number of heads H with learned features, 1 to share them; None for random features.
        **features: options of the random features, see `RandomFeatureOptions`.

    Raises:
        UserError: unknown option (near names are suggested), or a value out of range; `centre` or `balance` with
            `causal`: they take statistics of all tokens; options of random features with learned ones.
    """

    projection_matrix: torch.Tensor
    learned_features: LearnedFeatures | None

    def __init__(
        self,
        dim_heads: int,
        num_projections: int,
        cosh: bool,
        softmax_temp: float | None,
        causal: bool,
        seed: int,
        attention_dropout: float,
        backend: str,
        learned_heads: int | None,
        **features: str | bool,
    ) -> None:
        super().__init__(softmax_temp, causal, attention_dropout, backend)
        self.dim_heads = dim_heads
        self.cosh = cosh
        self.learned_features = None
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
        projection = self._draw(num_projections, dim_heads, seed)
        if learned_heads is None:
            self.register_buffer("projection_matrix", projection)
            return
        check_whole_number("learned_heads", learned_heads, 1)
        if self.features != RandomFeatureOptions():
            raise UserError(
                f"learned_heads={learned_heads} takes no options of random features ({self.features}). Leave one out."
            )
        scale = dim_heads**-0.5 if self.softmax_temp is None else self.softmax_temp
        self.learned_features = LearnedFeatures(random_feature_map(projection, scale, cosh, learned_heads))

    @property
    def num_features(self) -> int:
        """Number of features M, random or learned."""
        if self.learned_features is not None:
            return self.learned_features.query_bias.shape[1]
        return num_features(self.projection_matrix, self.cosh)

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
        """Draw the random projections again, in place; learned features stay as they are.

        Args:
            seed: any integer.
        """
        if self.learned_features is not None:
            return
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
