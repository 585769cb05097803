"""Supports of locality-sensitive hashing: queries attend to the keys with similar hashes.

Both attentions here sort queries and keys by a hash, cut both sorted lists into the same number n of equal clusters,
and let the queries of a cluster see the keys of the cluster of the same number; each hash function is one round:

- SMYRF: Daras, Kitaev, Odena, Dimakis, "SMYRF: Efficient Attention using Asymmetric Clustering", NeurIPS 2020. The
  hash is a random projection to one dimension.
- Reformer: Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", ICLR 2020. The hash is the nearest of a
  set of random directions; a cluster also sees the cluster before it.

A list of N tokens is cut at the ranks `c N // n`, so cluster sizes differ by at most one. Padding of keys is in no
cluster. Queries that are padding are sorted and cut on their own, so that they move no other query; with them, a
cluster may have one query more. With fewer visible keys than n, neighbouring clusters share a key: a query has no key
only in a sample without keys.

A pair that several hashes find is in the support once, in the round of the first: later rounds exclude it, given the
ranks of the keys under an earlier hash and the range of ranks that each query saw. Time and memory are O(T L) for each
pair of rounds, with L the keys of a tile; no T x S mask is built.

Shapes: B batch, H heads, G = B * H, T queries, S keys, E width, n clusters of C queries and L keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from scatterbrain.errors import UserError, check_whole_number
from scatterbrain.ops.common.inputs import check_inputs, length_mask
from scatterbrain.ops.common.numerics import no_autocast, stable_argsort
from scatterbrain.ops.sparse.supports import Round, Support


def draw_smyrf_projection(num_hashes: int, dim: int, seed: int) -> torch.Tensor:
    """Random projections of SMYRF's hashes, (num_hashes, dim + 2).

    Args:
        num_hashes: number of hash functions, each one round of attention.
        dim: width E of queries and keys; the transform that makes their norms equal adds two coordinates.
        seed: any integer; the result is a function of the arguments alone.

    Returns:
        (num_hashes, dim + 2) float32 standard normal, on the CPU. The last two columns belong to the coordinates that
        the transform adds to keys and to queries, in this order.

    Raises:
        UserError: a size below 1.
    """
    check_whole_number("num_hashes", num_hashes, 1)
    check_whole_number("dim", dim, 1)
    return _draw_normal((num_hashes, dim + 2), seed)


def draw_reformer_rotations(num_hashes: int, dim: int, num_buckets: int, seed: int) -> torch.Tensor:
    """Random directions of Reformer's hashes; each gives two buckets, one for either sign.

    Args:
        num_hashes: number of hash functions, each one round of attention.
        dim: width E of queries and keys.
        num_buckets: number of buckets, even; see `num_reformer_buckets`.
        seed: any integer; the result is a function of the arguments alone.

    Returns:
        (num_hashes, dim, num_buckets / 2) float32 standard normal, on the CPU.

    Raises:
        UserError: a size below 1, or an odd number of buckets.
    """
    check_whole_number("num_hashes", num_hashes, 1)
    check_whole_number("dim", dim, 1)
    check_whole_number("num_buckets", num_buckets, 2)
    if num_buckets % 2:
        raise UserError(f"num_buckets={num_buckets} has to be even: each direction gives a bucket for either sign.")
    return _draw_normal((num_hashes, dim, num_buckets // 2), seed)


def num_reformer_buckets(num_keys: int, bucket_size: int) -> int:
    """Number of buckets of about `bucket_size` keys: the even number nearest to S / bucket_size.

    Args:
        num_keys: number of keys S.
        bucket_size: keys of a bucket.

    Returns:
        Even number of at least 2.

    Raises:
        UserError: a size below 1.
    """
    check_whole_number("num_keys", num_keys, 1)
    check_whole_number("bucket_size", bucket_size, 1)
    return 2 * max(1, (num_keys + bucket_size) // (2 * bucket_size))


@torch.no_grad()
def smyrf_support(
    query: torch.Tensor,
    key: torch.Tensor,
    projection: torch.Tensor,
    cluster_size: int,
    key_lengths: torch.Tensor | None = None,
    query_lengths: torch.Tensor | None = None,
) -> Support:
    """Support of SMYRF: clusters of queries and keys with similar random projections.

    The paper's asymmetric transform (XBOX+ in its code) gives all queries and keys the same norm and keeps their inner
    products, so that the nearest keys are those of the largest inner product:

        F(q) = (q, 0, sqrt(MQ^2 + MK^2 - |q|^2)),    G(k) = (k, sqrt(MQ^2 + MK^2 - |k|^2), 0)

    with MQ and MK the largest norms of the sequence. The hash of E2LSH is a normal random projection; its random offset
    and its width are omitted, as neither changes the order. The published code counts a pair once for each hash that
    finds it; here it counts once.

    Args:
        query: (B, H, T, E); without gradient, and hashed in float32 whatever the dtype.
        key: (B, H, S, E), likewise.
        projection: (num_hashes, E + 2), see `draw_smyrf_projection`; one round for each.
        cluster_size: keys of a cluster. The number of clusters is n = ceil(S / cluster_size), of queries as of keys.
        key_lengths: (B,); keys j >= key_lengths[b] are in no cluster. None for all. The visible keys of each sample
            are shared by all n clusters.
        query_lengths: (B,); queries i >= query_lengths[b] are padding, which does not influence the clusters of other
            queries. None for no padding.

    Returns:
        Support over G = B * H sequences with C = ceil(T / n), or one more with `query_lengths`, and L = ceil(S / n).
        Each query is in exactly one tile of each round; ties keep the order of the positions.

    Raises:
        UserError: shapes or sizes that do not fit.
    """
    query, key, _, key_lengths = check_inputs(query, key, key, key_lengths)
    check_whole_number("cluster_size", cluster_size, 1)
    width = query.shape[-1]
    if projection.dim() != 2 or projection.shape[1] != width + 2 or not len(projection):
        raise UserError(
            f"projection has to be (num_hashes, {width + 2}), the width of query and two more, got "
            f"{tuple(projection.shape)}; draw it with dim={width}."
        )
    query, key = _flat_single(query), _flat_single(key)
    lengths, padding = _lengths_and_padding(key, key_lengths)
    queries, query_padding = _lengths_and_padding(query, query_lengths)
    query_norms, key_norms = (torch.linalg.vector_norm(x, dim=-1).square() for x in (query, key))
    # padding must not change the clusters
    query_norms, key_norms = query_norms.masked_fill(query_padding, 0.0), key_norms.masked_fill(padding, 0.0)
    largest = query_norms.amax(-1, keepdim=True) + key_norms.amax(-1, keepdim=True)
    query_added, key_added = (largest - query_norms).sqrt(), (largest - key_norms).sqrt()

    orders = []
    with no_autocast(query):
        for row in projection.float():
            query_hash = query @ row[:-2] + query_added * row[-1]
            key_hash = key @ row[:-2] + key_added * row[-2]
            key_hash = key_hash.masked_fill(padding, torch.inf)
            query_order = _padding_last(stable_argsort(query_hash), query_lengths, query_padding)
            orders.append((query_order, stable_argsort(key_hash)))
    return _clustered_support(orders, cluster_size, queries, lengths, 0, query_lengths is not None)


@torch.no_grad()
def reformer_support(
    query: torch.Tensor,
    key: torch.Tensor,
    rotations: torch.Tensor,
    bucket_size: int,
    key_lengths: torch.Tensor | None = None,
    query_lengths: torch.Tensor | None = None,
) -> Support:
    """Support of Reformer: chunks of queries and keys in the order of their buckets, and the chunk before.

    The bucket of x is `argmax([x R, -x R])` (Reformer, section 2, "Locality sensitive hashing"), which its norm does
    not change. Queries and keys are sorted by bucket and then by position, and cut into n chunks each; the queries of
    a chunk see the keys of the chunk of the same number and of the chunk before it, the first of those of the last.

    Reformer has one tensor for queries and keys: its keys are the queries at unit length. Pass those as `key` for the
    published attention. With separate keys, a chunk of queries and the chunk of keys of the same number may hold
    different buckets, since bucket sizes differ. So pairs of different buckets are kept, as the published code does by
    default although the paper excludes them: otherwise about three queries in ten of a trained vision transformer
    would have no key. A query sees itself like any other key.

    Args:
        query: (B, H, T, E); without gradient, and hashed in float32 whatever the dtype.
        key: (B, H, S, E), likewise.
        rotations: (num_hashes, E, num_buckets / 2), see `draw_reformer_rotations`; one round for each.
        bucket_size: keys of a chunk; a query sees twice as many in each round. The number of chunks is
            n = ceil(S / bucket_size), of queries as of keys, whatever the number of buckets.
        key_lengths: (B,); keys j >= key_lengths[b] are in no chunk. None for all. The visible keys of each sample
            are shared by all n chunks.
        query_lengths: (B,); queries i >= query_lengths[b] are padding, which does not influence the chunks of other
            queries. None for no padding.

    Returns:
        Support over G = B * H sequences with C = ceil(T / n), or one more with `query_lengths`, and
        L = min(S, ceil(2 S / n)). Each query is in exactly one tile of each round.

    Raises:
        UserError: shapes or sizes that do not fit.
    """
    query, key, _, key_lengths = check_inputs(query, key, key, key_lengths)
    check_whole_number("bucket_size", bucket_size, 1)
    width = query.shape[-1]
    if rotations.dim() != 3 or rotations.shape[1] != width or not rotations.numel():
        raise UserError(
            f"rotations has to be (num_hashes, {width}, num_buckets / 2) with the width of query, got "
            f"{tuple(rotations.shape)}; draw it with dim={width}."
        )
    query, key = _flat_single(query), _flat_single(key)
    lengths, padding = _lengths_and_padding(key, key_lengths)
    queries, query_padding = _lengths_and_padding(query, query_lengths)
    orders = []
    with no_autocast(query):
        for rotation in rotations.float():
            last = 2 * rotation.shape[1]
            key_bucket = _angular_bucket(key, rotation).masked_fill(padding, last)
            query_order = stable_argsort(_angular_bucket(query, rotation))
            query_order = _padding_last(query_order, query_lengths, query_padding)
            orders.append((query_order, stable_argsort(key_bucket)))
    return _clustered_support(orders, bucket_size, queries, lengths, 1, query_lengths is not None)


def _draw_normal(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).float()


def _flat_single(x: torch.Tensor) -> torch.Tensor:
    """Tensor (B, H, N, E) of any dtype as (G, N, E) float32."""
    return x.flatten(0, 1).float()


def _lengths_and_padding(x: torch.Tensor, lengths: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths (G, 1), between 0 and N, and mask of the padding (G, N) for tokens (G, N, E) and lengths (B,)."""
    groups, number = x.shape[:2]
    if lengths is None:
        lengths = torch.full((groups,), number, device=x.device)
    else:
        lengths = lengths.to(x.device, torch.int64).clamp(0, number)
        lengths = lengths.repeat_interleave(groups // lengths.shape[0])
    return lengths.unsqueeze(-1), ~length_mask(lengths, number)


def _padding_last(order: torch.Tensor, lengths: torch.Tensor | None, padding: torch.Tensor) -> torch.Tensor:
    """An order (G, N) with the padding (G, N) after all other tokens, both kinds in the order given."""
    if lengths is None:
        return order
    return order.gather(1, stable_argsort(padding.gather(1, order).byte()))


def _angular_bucket(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    rotated = x @ rotation
    return torch.cat([rotated, -rotated], -1).argmax(-1)


@dataclass(frozen=True)
class _SeenRanks:
    """Pairs of an earlier round: ranks of the keys, and the range of ranks that each query saw.

    Attributes:
        rank: (G, S) int32 rank of each key in the order of the hash.
        start: (G, T) int32 first rank that a query saw; below 0 where the range begins at the end of the order.
        count: (G, T) int32 number of ranks, 0 to the number of visible keys.
        lengths: (G, 1) int32 number of visible keys, at least 1.
    """

    rank: torch.Tensor
    start: torch.Tensor
    count: torch.Tensor
    lengths: torch.Tensor

    def hold(self, query_index: torch.Tensor, key_index: torch.Tensor) -> torch.Tensor:
        """Boolean (G, n, C, L), true for the pairs of tiles (G, n, C) and (G, n, L) that the round holds."""
        rank = _gather(self.rank, key_index.clamp_min(0)).unsqueeze(-2)
        start = _gather(self.start, query_index.clamp_min(0)).unsqueeze(-1)
        count = _gather(self.count, query_index.clamp_min(0)).unsqueeze(-1)
        return (rank - start).remainder_(self.lengths[..., None, None]) < count


def _gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Entries of x (G, N) at index (G, n, C)."""
    return x.gather(1, index.flatten(1)).view(index.shape)


def _inverse(order: torch.Tensor) -> torch.Tensor:
    """Ranks of a permutation (G, N), int32."""
    ranks = torch.arange(order.shape[1], device=order.device, dtype=torch.int32).expand_as(order)
    return torch.empty_like(ranks, memory_format=torch.contiguous_format).scatter_(1, order, ranks)


def _clustered_support(
    orders: list[tuple[torch.Tensor, torch.Tensor]],
    cluster_size: int,
    queries: torch.Tensor,
    lengths: torch.Tensor,
    look_back: int,
    has_padding: bool,
) -> Support:
    """Support of clusters of sorted queries and keys.

    Args:
        orders: for each hash, the positions of queries (G, T) and keys (G, S) in its order, padding last.
        cluster_size: keys of a cluster.
        queries: (G, 1) number of queries that are not padding.
        lengths: (G, 1) number of visible keys.
        look_back: number of clusters before its own whose keys a cluster sees, around the end.
        has_padding: whether there may be queries that are padding.
    """
    num_queries, num_keys = (order.shape[1] for order in orders[0])
    num_clusters = -(-num_keys // cluster_size)
    cluster = torch.arange(num_clusters, device=lengths.device).unsqueeze(0)

    # the cuts are the same for every hash: ranks of queries and of keys (G, n)
    def cut(number: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        start = cluster * number // num_clusters
        return start, (cluster + 1) * number // num_clusters - start

    key_start = (cluster - look_back) * lengths // num_clusters
    key_stop = (cluster + 1) * lengths // num_clusters
    # an empty cluster shares the key of a neighbour
    key_stop = torch.maximum(key_stop, cluster * lengths // num_clusters + 1)
    key_count = torch.minimum(key_stop - key_start, lengths)

    query_start, query_count = cut(queries)
    rank = torch.arange(num_queries, device=lengths.device)
    cluster_of_rank = _cluster_of_rank(rank, queries, num_clusters)
    query_ranks = _tile_ranks(query_start, query_count, -(-num_queries // num_clusters) + int(has_padding))
    if has_padding:
        # the padding of a cluster after its other queries
        start, count = cut(num_queries - queries)
        shift = (queries + start - query_start - query_count).unsqueeze(-1)
        ranks, valid = query_ranks
        slot_of_padding = ranks + shift
        query_ranks = (
            torch.where(valid, ranks, slot_of_padding),
            valid | (slot_of_padding < (queries + start + count).unsqueeze(-1)),
        )
        of_padding = _cluster_of_rank(rank - queries, num_queries - queries, num_clusters)
        cluster_of_rank = torch.where(rank < queries, cluster_of_rank, of_padding)
    key_ranks = _tile_ranks(key_start, key_count, min(num_keys, -(-(1 + look_back) * num_keys // num_clusters)))
    divisor = lengths.clamp_min(1)
    key_ranks = (key_ranks[0] % divisor.unsqueeze(-1), key_ranks[1])
    # ranks of keys that the query of each rank sees, (G, T)
    seen_start, seen_count = (x.gather(1, cluster_of_rank).int() for x in (key_start, key_count))

    rounds: list[Round] = []
    earlier: list[_SeenRanks] = []
    for query_order, key_order in orders:
        query_index, key_index = _take(query_order, *query_ranks), _take(key_order, *key_ranks)
        mask = None
        for seen in earlier:
            first = ~seen.hold(query_index, key_index)
            mask = first if mask is None else mask.logical_and_(first)
        rounds.append(Round(query_index, key_index, mask))
        if len(rounds) < len(orders):
            query_rank = _inverse(query_order).long()
            start, count = seen_start.gather(1, query_rank), seen_count.gather(1, query_rank)
            earlier.append(_SeenRanks(_inverse(key_order), start, count, divisor.int()))
    return Support(tuple(rounds))


def _cluster_of_rank(rank: torch.Tensor, number: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """Cluster of each rank (N,) or (G, N) of `number` (G, 1) tokens, the last c with c number // n <= rank: (G, N)."""
    return (((rank + 1) * num_clusters - 1) // number.clamp_min(1)).clamp(0, num_clusters - 1)


def _tile_ranks(start: torch.Tensor, count: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks `start`, `start + 1`, ... of each tile, (..., n) to (..., n, width), and which of them are in `count`."""
    slot = torch.arange(width, device=start.device)
    return start.unsqueeze(-1) + slot, slot < count.unsqueeze(-1)


def _take(order: torch.Tensor, ranks: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Positions (G, n, C) at the ranks of tiles in an order (G, N); -1 where they are not valid."""
    ranks = ranks.clamp_max(order.shape[1] - 1).expand(order.shape[0], -1, -1)
    return _gather(order, ranks).masked_fill(~valid, -1)
