"""Local attention and Scatterbrain in the plane: tokens are an image, and a window is a rectangle of it.

A row of W tokens in raster order is a strip of the image; the W nearest tokens are a rectangle around the query. At
the border of the image it is cut off. Tokens have to be an image: by default a square one.
"""

from __future__ import annotations

import math

from scatterbrain.attention.sparse import FixedSupport, SparseAttention, SparseLowRankAttention
from scatterbrain.errors import UserError
from scatterbrain.ops.sparse.supports import Support
from scatterbrain.ops.sparse.window2d import neighbourhood_shape, neighbourhood_support


class Neighbourhood(FixedSupport):
    """Rectangles around the queries.

    Args:
        num_neighbours: keys W of a query at most; the rectangle is the nearest to a square with so many.
        image_width: tokens of a line of the image; None for a square image.
    """

    def __init__(self, num_neighbours: int, image_width: int | None = None) -> None:
        super().__init__()
        self.num_neighbours, self.image_width = num_neighbours, image_width
        self.shape = neighbourhood_shape(num_neighbours)

    def make(self, num_queries: int, num_keys: int) -> Support:
        """The rectangles of an image of so many tokens."""
        if num_keys != num_queries:
            raise UserError(
                f"Queries ({num_queries}) and keys ({num_keys}) have to be the tokens of one image for a window in the "
                "plane."
            )
        width = math.isqrt(num_keys) if self.image_width is None else self.image_width
        if num_keys % width or (self.image_width is None and width * width != num_keys):
            raise UserError(f"{num_keys} tokens are no image of lines of {width}: give image_width, tokens of a line.")
        return neighbourhood_support(num_keys // width, width, self.shape)

    def sizes(self) -> dict[str, int]:
        """Keys of a query, borders aside."""
        return {"num_neighbours": self.shape[0] * self.shape[1]}

    def columns(self, num_keys: int) -> float:
        """Keys of a query, borders aside."""
        return self.shape[0] * self.shape[1]


class Local2dAttention(SparseAttention):
    """Softmax attention inside a rectangle around the query.

    Args:
        num_neighbours: keys W of a query at most.
        image_width: tokens of a line of the image; None for a square image.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: has to be false.
        attention_dropout: probability of dropping an attention weight in training.
        backend: form of the operator: `naive`, `torch` or `auto`.

    Raises:
        UserError: a value out of range; later, tokens that are no such image.
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
    """Scatterbrain over a rectangle around the query.

    Args:
        num_neighbours: keys W of a query at most.
        dim_heads: width E of queries and keys.
        nb_features: number of features M, even; None is E log E.
        image_width: tokens of a line of the image; None for a square image.
        softmax_temp: softmax scale; None is E ** -0.5.
        causal: has to be false.
        seed: seed of the rows.
        backend: form of the operator: `naive`, `torch` or `auto`.
        **features: options of the random features, see `RandomFeatureOptions`.

    Raises:
        UserError: a value out of range; later, tokens that are no such image.
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
        super().__init__(
            source,
            dim_heads,
            nb_features,
            softmax_temp,
            causal,
            seed,
            backend,
            **features,
        )
