"""What the attention kernels read of a plan: bit tables of the supports, lists of keys, sorted orders.

All lie in one buffer. The kernels of `supports.py` fill it, and `fill_tables` does so from an `AdaptivePlan` in plain
PyTorch: for plans that a user passes, and as the specification of those kernels. Centroids and means of the key
clusters are not part of it: they are statistics of the landmark kernels (`clusters/triton/operator.py`).
"""

from __future__ import annotations

import torch

from scatterbrain.ops.adaptive.definition import AdaptivePlan
from scatterbrain.ops.common.numerics import stable_argsort
from scatterbrain.ops.common.triton_functions import BufferLayout

# Bits of a word of the table of supports.
WORD = 32


def tables_layout(
    groups: int,
    length: int,
    num_keys: int,
    num_landmarks: int,
    num_query_landmarks: int,
    num_exact: int,
    sorts_keys: bool,
) -> BufferLayout:
    """Where the tables lie in their buffer; G sequences, one for each batch element and head, T queries, S keys.

    - `query_labels` (G, T) int16: cluster of each query in [0, Q).
    - `taken_words` (G, Q, ceil(M / 32)) int32: bit b & 31 of word b >> 5 is set where query cluster a takes key
      cluster b exactly. Bits past M are 0.
    - `exact_keys` (G, Q, K) int32: positions of the keys of the clusters that a query cluster takes, in the order of
      (cluster, position). Places past `exact_counts` hold anything.
    - `exact_counts` (G, Q) int32: numbers of these keys, at most K.
    - `query_order` (G, T) int32: positions of the queries, stably sorted by their cluster.
    - `query_starts` (G, Q + 1) int32: where each cluster starts in that order; the last is T.
    - `key_order` (G, S) int32, with `sorts_keys`: positions of the keys, stably sorted by their cluster; hidden keys
      are last.
    - `key_starts` (G, M + 1) int32, with `sorts_keys`: where each cluster starts in that order; the last is the number
      of visible keys.

    Args:
        groups: number of sequences G.
        length: number of queries T.
        num_keys: number of keys S.
        num_landmarks: number of key clusters M.
        num_query_landmarks: number of query clusters Q.
        num_exact: largest number K of keys that a query cluster takes.
        sorts_keys: whether there is an order of the keys, which the backward pass needs.
    """
    layout = BufferLayout()
    layout.add("query_labels", groups, length, dtype=torch.int16)
    layout.add("taken_words", groups, num_query_landmarks, -(-num_landmarks // WORD), dtype=torch.int32)
    layout.add("exact_keys", groups, num_query_landmarks, num_exact, dtype=torch.int32)
    layout.add("exact_counts", groups, num_query_landmarks, dtype=torch.int32)
    layout.add("query_order", groups, length, dtype=torch.int32)
    layout.add("query_starts", groups, num_query_landmarks + 1, dtype=torch.int32)
    if sorts_keys:
        layout.add("key_order", groups, num_keys, dtype=torch.int32)
        layout.add("key_starts", groups, num_landmarks + 1, dtype=torch.int32)
    return layout


def layout_of_plan(plan: AdaptivePlan, sorts_keys: bool) -> BufferLayout:
    """`tables_layout` of a plan."""
    batch, heads, num_query_landmarks, num_landmarks = plan.taken.shape
    lengths = plan.query_assignment.shape[2], plan.key_assignment.shape[2]
    return tables_layout(
        batch * heads, *lengths, num_landmarks, num_query_landmarks, plan.num_exact, sorts_keys=sorts_keys
    )


def fill_tables(plan: AdaptivePlan, sorts_keys: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Clusters (G, S) int16 of the keys, -1 for hidden keys, and the buffer of the tables; does not synchronise a GPU.

    Args:
        plan: with -1 for the clusters of hidden keys.
        sorts_keys: whether to sort the keys, see `tables_layout`.
    """
    key_labels, query_labels, taken = (x.flatten(0, 1) for x in plan[:3])
    buffer = layout_of_plan(plan, sorts_keys).empty(taken.device)
    views = layout_of_plan(plan, sorts_keys).views(buffer)
    num_query_landmarks, num_landmarks = taken.shape[1:]

    key_order, key_starts = _sort(key_labels, num_landmarks)
    query_order, query_starts = _sort(query_labels, num_query_landmarks)
    views["query_labels"].copy_(query_labels)
    views["query_order"].copy_(query_order)
    views["query_starts"].copy_(query_starts)
    if sorts_keys:
        views["key_order"].copy_(key_order)
        views["key_starts"].copy_(key_starts)

    bits = torch.nn.functional.pad(taken, (0, -num_landmarks % WORD)).unflatten(2, (-1, WORD)).long()
    words = (bits << torch.arange(WORD, device=bits.device)).sum(3)
    views["taken_words"].copy_(words - ((words >> (WORD - 1)) << WORD))  # the same bits as signed numbers

    sizes = key_starts.diff(dim=1).unsqueeze(1) * taken  # [G, Q, M]
    ends = sizes.cumsum(2)
    views["exact_counts"].copy_(ends[..., -1])
    if plan.num_exact > 0:
        place = torch.arange(plan.num_exact, device=taken.device).expand(*taken.shape[:2], -1).contiguous()
        cluster = torch.searchsorted(ends, place, right=True).clamp_max(num_landmarks - 1)
        # a place in the sorted keys: the start of its cluster, and as far behind it as in the list
        shift = key_starts[:, :-1].unsqueeze(1) - (ends - sizes)
        place = (place + shift.gather(2, cluster)).clamp(0, key_order.shape[1] - 1)
        views["exact_keys"].copy_(key_order.gather(1, place.flatten(1)).view_as(place))
    return key_labels.to(torch.int16), buffer


def plan_of_tables(
    key_labels: torch.Tensor, tables: dict[str, torch.Tensor], num_landmarks: int, batch: int
) -> AdaptivePlan:
    """The plan of which these are the tables, the opposite of `fill_tables`.

    Args:
        key_labels: cluster of each key (G, S), -1 for hidden keys.
        tables: by name, see `tables_layout`.
        num_landmarks: number of key clusters M.
        batch: number of batch elements.
    """
    bits = torch.arange(WORD, dtype=torch.int32, device=key_labels.device)
    taken = ((tables["taken_words"].unsqueeze(3) >> bits) & 1).flatten(2)[..., :num_landmarks].bool()
    tensors = (x.unflatten(0, (batch, -1)) for x in (key_labels.long(), tables["query_labels"].long(), taken))
    return AdaptivePlan(*tensors, num_exact=tables["exact_keys"].shape[2])


def _sort(labels: torch.Tensor, num_clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (G, N) in the order of their clusters (G, N), -1 last, and where each cluster starts (G, M + 1)."""
    labels = labels.where(labels >= 0, num_clusters)
    sizes = torch.zeros(labels.shape[0], num_clusters + 2, dtype=torch.int64, device=labels.device)
    sizes = sizes.scatter_add(1, labels + 1, torch.ones_like(labels))
    return stable_argsort(labels), sizes.cumsum(1)[:, :-1]
