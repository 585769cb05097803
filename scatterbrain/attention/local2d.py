"""Local attention and Scatterbrain with two-dimensional windows: tokens are an image in raster order.

W consecutive tokens are a strip of the image; the W nearest tokens are a rectangle around the query, cut off at the
border of the image. By default the image is square.
"""

from __future__ import annotations

import math

from scatterbrain.attention.sparse import FixedSupport, SparseAttention, SparseLowRankAttention
from scatterbrain.errors import UserError, check_whole_number
from scatterbrain.ops.sparse.supports import Support
from scatterbrain.ops.sparse.window2d import neighbourhood_shape, neighbourhood_support


class Neighbourhood(FixedSupport):
    """Support of rectangles around the queries.

    Args:
        num_neighbours: largest number of keys W of a query; the rectangle is the one nearest to a square.
        image_width: tokens of a row of the image; None for a square image.
    """

    def __init__(self, num_neighbours: int, image_width: int | None = None) -> None:
        super().__init__()
        if image_width is not None:
            check_whole_number("image_width", image_width, 1)
        self.num_neighbours, self.image_width = num_neighbours, image_width
        self.shape = neighbourhood_shape(num_neighbours)

    def make(self, num_queries: int, num_keys: int) -> Support:
        """The rectangles of an image with this number of tokens."""
        if num_keys != num_queries:
            raise UserError(
                f"Queries ({num_queries}) and keys ({num_keys}) have to be the tokens of one image for a "
                "two-dimensional window."
            )
        width = math.isqrt(num_keys) if self.image_width is None else self.image_width
        if num_keys % width or (self.image_width is None and width * width != num_keys):
            raise UserError(f"{num_keys} tokens are no image with rows of {width}: give image_width, tokens of a row.")
        return neighbourhood_support(num_keys // width, width, self.shape)

    def sizes(self) -> dict[str, int]:
        """Number of keys of a query, away from the border."""
        return {"num_neighbours": self.shape[0] * self.shape[1]}

    def columns(self, num_keys: int) -> float:
        """Number of keys of a query, away from the border."""
        return self.shape[0] * self.shape[1]


class Local2dAttention(SparseAttention):
    """Softmax attention inside a rectangle around the query.

    Args:
        num_neighbours: largest number of keys W of a query.
        image_width: tokens of a row of the image; None for a square image.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: has to be false.
        attention_dropout: probability of dropping an attention weight in training.
        backend: `naive`, `torch` or `auto`, see the operator.

    Raises:
        UserError: a value out of range; in the call, tokens that are no such image.
    """

    def __init__(
        self,
        num_neighbours: int,
        image_width: int | None = None,
        softmax_temp: float | None = None,
        causal: bool = False,
        attention_dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(Neighbourhood(num_neighbours, image_width), softmax_temp, causal, attention_dropout, backend)


class SBLocal2dAttention(SparseLowRankAttention):
    """Scatterbrain with a rectangle around the query as its sparse support.

    Args:
        num_neighbours: largest number of keys W of a query.
        dim_heads: width E of queries and keys.
        nb_features: number of features M, even; None is E log E.
        image_width: tokens of a row of the image; None for a square image.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: has to be false.
        seed: seed of the random projections.
        backend: `naive`, `torch` or `auto`, see the operator.
        **features: options of the random features, see `RandomFeatureOptions`.

    Raises:
        UserError: a value out of range; in the call, tokens that are no such image.
    """

    def __init__(
        self,
        num_neighbours: int,
        dim_heads: int,
        nb_features: int | None = None,
        image_width: int | None = None,
        softmax_temp: float | None = None,
        causal: bool = False,
        seed: int = 0,
        backend: str = "auto",
        **features: str | bool,
    ) -> None:
        source = Neighbourhood(num_neighbours, image_width)
        super().__init__(source, dim_heads, nb_features, softmax_temp, causal, seed, backend, **features)
