"""Cache of exact keys and of landmarks for decoding; time and memory of a token grow like log N."""

from __future__ import annotations

import itertools

import torch

from scatterbrain.errors import UserError, check_value_weight
from scatterbrain.ops.clusters.causal.attention import CHUNK, causal_landmark_attention, check_causal_sizes
from scatterbrain.ops.clusters.causal.blocked import Landmarks
from scatterbrain.ops.clusters.causal.levels import Level, assign_points, exact_chunks, join
from scatterbrain.ops.common.inputs import check_inputs, check_tensors, default_scale
from scatterbrain.ops.common.numerics import FLOOR, accumulation_dtype, no_autocast


class LandmarkCache:
    """Keys and values of a sequence as causal landmark attention sees them from its end, for decoding.

    Holds the exact keys of the current chunk and of the chunks that the window reaches, and one or two nodes of M
    landmarks of each level: at most W / 2 + 2 C keys and 2 M log2(N / C) landmarks. `append` of a token takes constant
    time on average, `attend` of one takes O(W + C + M log N). Results for finite keys and values are those of
    `causal_landmark_attention` for the whole sequence. For inference: there are no gradients.

    Example::

        cache = LandmarkCache(num_landmarks=32, window=256)
        out = cache.prefill(query, key, value)     # (B, H, T, D), all tokens of the prompt
        out = cache.step(query, key, value)        # (B, H, 1, D), one token more

    Args:
        num_landmarks: landmarks M of a node.
        window: width W of the window, see `causal_landmark_attention`.
        chunk: keys C of a chunk.
        num_steps: iterations of Lloyd's algorithm.
        value_weight: weight of the values in the clustering, see `causal_landmark_attention`.

    Attributes:
        length: number of keys so far.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        num_landmarks: int,
        window: int = 0,
        chunk: int = CHUNK,
        num_steps: int = 1,
        value_weight: float = 0.0,
    ) -> None:
        check_causal_sizes(num_landmarks, window, chunk, num_steps)
        check_value_weight(value_weight)
        self.num_landmarks, self.window, self.chunk, self.num_steps = num_landmarks, window, chunk, num_steps
        self.value_weight = value_weight
        self.length = 0
        self._key: torch.Tensor | None = None  # (B, Hkv, near, E), and the values
        self._value: torch.Tensor | None = None
        self._visible: torch.Tensor | None = None  # boolean (B, near)
        self._nodes: list[Level] = []  # one or two of each level, (B, Hkv, 1 or 2, M, width)
        self._landmarks: Landmarks | None = None  # all of them, as one node

    @torch.no_grad()
    def append(self, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None) -> None:
        """Add tokens to the end of the sequences.

        Args:
            key: (B, Hkv, n, E), n at least 1.
            value: (B, Hkv, n, D).
            attn_mask: boolean (B, n) or (B, 1, 1, n), false for keys to hide, such as padding before a prompt. None
                hides none.

        Raises:
            UserError: shapes or dtypes that do not fit, also those of the tokens before.
        """
        key, value = check_inputs(key, key, value)[1:3]
        batch, _, number, _ = key.shape
        if attn_mask is None:
            visible = key.new_ones(batch, number, dtype=torch.bool)
        else:
            check_tensors(attn_mask=attn_mask)
            if attn_mask.dtype != torch.bool or attn_mask.shape not in ((batch, number), (batch, 1, 1, number)):
                raise UserError(
                    f"attn_mask has to be boolean of shape ({batch}, {number}), true for the keys that take part, got "
                    f"{attn_mask.dtype} of shape {tuple(attn_mask.shape)}."
                )
            visible = attn_mask.reshape(batch, number).to(key.device)
            hidden = ~visible[:, None, :, None]
            key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
        if self._key is None:
            self._key, self._value, self._visible = key.clone(), value.clone(), visible
        else:
            for name, tensor, before in (("key", key, self._key), ("value", value, self._value)):
                if (tensor.dtype, tensor.device) != (before.dtype, before.device):
                    raise UserError(
                        f"{name} is {tensor.dtype} on {tensor.device}, and the cache is {before.dtype} on "
                        f"{before.device}: convert it."
                    )
                if (*tensor.shape[:2], tensor.shape[3]) != (*before.shape[:2], before.shape[3]):
                    raise UserError(
                        f"{name} {tuple(tensor.shape)} does not fit the cache of {tuple(before.shape)}: batch, heads "
                        "and width have to be the same. Make a new LandmarkCache for other sequences."
                    )
            self._key, self._value = torch.cat([self._key, key], 2), torch.cat([self._value, value], 2)
            self._visible = torch.cat([self._visible, visible], 1)
        self.length += key.shape[2]
        # chunks before the exact ones of the last token become nodes
        surplus = (self.length - 1) // self.chunk - exact_chunks(self.window, self.chunk)
        surplus -= (self.length - self._key.shape[2]) // self.chunk
        if surplus > 0:
            with no_autocast(key):
                self._add_nodes(surplus)

    def _add_nodes(self, count: int) -> None:
        """Make nodes of the first chunks of the exact keys."""
        size = count * self.chunk
        dtype = accumulation_dtype(self._key.dtype)
        key, value = (x[:, :, :size].to(dtype).unflatten(2, (count, -1)) for x in (self._key, self._value))
        visible = self._visible[:, :size].to(dtype).view(-1, 1, count, self.chunk, 1).expand_as(key[..., :1])
        self._key, self._value = self._key[:, :, size:].clone(), self._value[:, :, size:].clone()
        self._visible = self._visible[:, size:].clone()
        new = self._cluster(Level(key, value, visible, torch.zeros_like(visible)))
        for level in itertools.count():
            if level == len(self._nodes):
                self._nodes.append(new)
            else:
                self._nodes[level] = Level(*(torch.cat(pair, 2) for pair in zip(self._nodes[level], new, strict=True)))
            # one or two nodes stay, and the others, which begin at an even position, become half as many of the next
            nodes = self._nodes[level]
            num_pairs = (nodes.key.shape[2] - 1) // 2
            if num_pairs == 0:
                break
            self._nodes[level] = Level(*(x[:, :, 2 * num_pairs :].clone() for x in nodes))
            pairs = (x[:, :, : 2 * num_pairs].unflatten(2, (num_pairs, 2)).flatten(3, 4) for x in nodes)
            new = self._cluster(Level(*pairs))
        joined = (torch.cat([x.flatten(2, 3) for x in each], 2) for each in zip(*self._nodes, strict=True))
        self._landmarks = Landmarks.of(Level(*joined), self._key.shape[3])

    def _cluster(self, points: Level) -> Level:
        """Landmarks (B, Hkv, n, M, width) of nodes of points (B, Hkv, n, P, width)."""
        points = Level(*(x.flatten(0, 1) for x in points))
        labels = assign_points(points, self.num_landmarks, self.num_steps, self.value_weight)
        level = join(points, labels, self.num_landmarks)
        return Level(*(x.unflatten(0, self._key.shape[:2]) for x in level))

    @torch.no_grad()
    def attend(self, query: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        """Output (B, H, 1, D) for the last token of each sequence, which `append` has added; zero where all is hidden.

        Args:
            query: (B, H, 1, E), H a multiple of Hkv.
            scale: softmax scale s; None is E ** -0.5.

        Raises:
            UserError: no tokens yet, or a shape that does not fit.
        """
        if self._key is None:
            raise UserError("The LandmarkCache is empty. Add the keys and values of a token with append first.")
        _check_one_token(query)
        check_inputs(query, self._key, self._value, enable_gqa=True)
        scale = default_scale(query, scale)
        dtype = accumulation_dtype(query.dtype)
        with no_autocast(query):
            # the queries of a group of heads as rows
            rows = scale * query.to(dtype).reshape(query.shape[0], self._key.shape[1], -1, query.shape[3])
            key, value = self._key.to(dtype), self._value.to(dtype)
            hidden = ~self._visible[:, None, None]
            logits, values = [(rows @ key.transpose(2, 3)).masked_fill(hidden, FLOOR)], [value]
            if self._landmarks is not None:
                logits.append(self._landmarks.logits(rows, torch.linalg.vector_norm(rows, dim=-1, keepdim=True)))
                values.append(self._landmarks.value)
            joined = torch.cat(logits, -1)
            blind = joined.amax(-1, keepdim=True) <= FLOOR / 2
            out = (joined.softmax(-1) @ torch.cat(values, 2)).masked_fill(blind, 0.0)
        return out.view(*query.shape[:3], -1).to(query.dtype)

    def step(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Output (B, H, 1, D) for one more token of each sequence; arguments as of `append` and `attend`."""
        # before the cache changes
        _check_one_token(query)
        check_inputs(query, key, value, enable_gqa=True)
        scale = default_scale(query, scale)
        self.append(key, value, attn_mask)
        return self.attend(query, scale)

    @torch.no_grad()
    def prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None = None,
        attn_mask: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> torch.Tensor:
        """Output (B, H, T, D) for all tokens of a prompt, which are added to the empty cache.

        Args:
            query: (B, H, T, E), H a multiple of Hkv.
            key: (B, Hkv, T, E).
            value: (B, Hkv, T, D).
            scale: softmax scale s; None is E ** -0.5.
            attn_mask: boolean (B, T) or (B, 1, 1, T), false for keys to hide. None hides none.
            backend: of `causal_landmark_attention`.

        Raises:
            UserError: the cache is not empty, or shapes that do not fit.
        """
        if self.length > 0:
            raise UserError(f"The LandmarkCache has {self.length} tokens, and prefill needs an empty one. Use step.")
        check_tensors(query=query, key=key)
        if query.dim() == key.dim() == 4 and query.shape[2] != key.shape[2]:
            raise UserError(
                f"query {tuple(query.shape)} and key {tuple(key.shape)} have to be of the same tokens in prefill."
            )
        if attn_mask is not None:
            check_tensors(attn_mask=attn_mask)
        options = {"chunk": self.chunk, "scale": scale, "num_steps": self.num_steps, "backend": backend}
        if attn_mask is not None and attn_mask.dim() == 2:
            attn_mask = attn_mask[:, None, None]
        options |= {"attn_mask": attn_mask, "enable_gqa": True, "value_weight": self.value_weight}
        out = causal_landmark_attention(query, key, value, self.num_landmarks, self.window, **options)
        self.append(key, value, attn_mask)
        return out

    def num_elements(self) -> int:
        """Number of elements of the tensors of the cache."""
        tensors = [self._key, self._value, *(self._landmarks or ()), *(x for level in self._nodes for x in level)]
        return sum(x.numel() for x in tensors if x is not None)


def _check_one_token(query: torch.Tensor) -> None:
    """Check that queries are those of one token.

    Raises:
        UserError: they are not.
    """
    check_tensors(query=query)
    if query.dim() != 4 or query.shape[2] != 1:
        raise UserError(f"query {tuple(query.shape)} has to be (B, H, 1, E), one token. Use prefill for more.")
