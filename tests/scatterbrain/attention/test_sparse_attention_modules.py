"""Attention modules over sparse supports and clusters, with and without a low-rank part."""

from __future__ import annotations

import pytest
import torch

from scatterbrain.attention.block_sparse import BlockSparseAttention, SBBlockSparseAttention
from scatterbrain.attention.cluster import (
    ClusterAttention,
    PairedClusterAttention,
    SBAdaptiveAttention,
    SBClusterAttention,
)
from scatterbrain.attention.combination import (
    CombinationLocalPerformerAttention,
    CombinationSmyrfPerformerAttention,
)
from scatterbrain.attention.local import LocalAttention
from scatterbrain.attention.local2d import Local2dAttention, SBLocal2dAttention
from scatterbrain.attention.performer import PerformerAttention
from scatterbrain.attention.reformer import ReformerAttention
from scatterbrain.attention.smyrf import SBSmyrfAttention, SmyrfAttention
from scatterbrain.attention.sparse import MAX_CACHED_SUPPORTS
from scatterbrain.errors import UserError
from scatterbrain.ops.common.dense import dense_logits, dense_low_rank_logits
from tests.helpers import assert_close, dense_attention

LENGTH = 36
# float32 evaluations of one result
ROUNDING = 1e-5
# the difference of sums around a support may amplify roundings up to 64 times
ROUNDING_OF_DIFFERENCES = 1e-4

BUILD = {
    "smyrf": lambda **options: SmyrfAttention(5, 16, **options),
    "sbsmyrf": lambda **options: SBSmyrfAttention(5, 16, 10, **options),
    "reformer": lambda **options: ReformerAttention(4, 16, 8, **options),
    "reformer-separate": lambda **options: ReformerAttention(4, 16, 8, shared_qk=False, **options),
    **{
        f"bs-{layout}": lambda layout=layout, **options: BlockSparseAttention(layout, 4, **options)
        for layout in ("longformer", "bigbird", "openai")
    },
    **{
        f"sbbs-{layout}": lambda layout=layout, **options: SBBlockSparseAttention(layout, 4, 16, 10, **options)
        for layout in ("longformer", "bigbird", "openai")
    },
    "local2d": lambda **options: Local2dAttention(9, **options),
    "sblocal2d": lambda **options: SBLocal2dAttention(9, 16, 10, **options),
    "combination-local-performer": lambda **options: CombinationLocalPerformerAttention(5, 16, 10, **options),
    "combination-smyrf-performer": lambda **options: CombinationSmyrfPerformerAttention(5, 16, 10, **options),
    "cluster": lambda **options: ClusterAttention(6, **options),
    "sbcluster": lambda **options: SBClusterAttention(5, 6, **options),
    "pairedcluster": lambda **options: PairedClusterAttention(6, 3, **options),
    "sbpairedcluster": lambda **options: PairedClusterAttention(6, 3, 2, **options),
    "sbadaptive": lambda **options: SBAdaptiveAttention(5, 9, 3, 0.3, **options),
}
CLUSTERS = [name for name in BUILD if name.endswith(("cluster", "adaptive"))]
SPARSE = [name for name in BUILD if not name.startswith(("sb", "combination")) and name not in CLUSTERS]
LOW_RANK = [name for name in BUILD if name.startswith("sb") and name not in CLUSTERS]
RANDOM = [name for name in BUILD if not name.startswith(("bs-", "local2d")) and name not in CLUSTERS]
# an image, or queries that are keys too
SAME_LENGTHS = ("local2d", "sblocal2d", "reformer")


def draw(name: str = "reformer", value_width: int = 5, dtype: torch.dtype = torch.float32):
    """Query (2, T, 2, 16), key (2, 36, 2, 16), value (2, 36, 2, value_width); T is 36 or 29."""
    length = LENGTH if name in SAME_LENGTHS else LENGTH - 7
    sizes = ((length, 16), (LENGTH, 16), (LENGTH, value_width))
    return tuple(torch.randn(2, n, 2, width, dtype=dtype) for n, width in sizes)


def output(module: torch.nn.Module, *tensors: torch.Tensor, **options) -> torch.Tensor:
    return module(*tensors, **options)[0]


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("lengths", [None, [36, 11], [0, 36]])
def test_weights_average_the_values_to_the_output(name, lengths):
    query, key, value = draw(name)
    key_lengths = None if lengths is None else torch.tensor(lengths)
    out, weights = BUILD[name](softmax_temp=0.4)(query, key, value, key_lengths=key_lengths, need_weights=True)
    assert out.shape == (*query.shape[:3], 5)
    assert weights.shape == (2, 2, query.shape[1], LENGTH)
    assert (weights >= 0).all()
    sums = weights.sum(-1)
    blind = sums == 0
    if name in [*LOW_RANK, *CLUSTERS] or lengths is None:
        blind = blind & torch.tensor([length == 0 for length in lengths or [1, 1]])[:, None, None]
    if not name.startswith("combination"):  # its sparse half may see nothing, and leave half a sum
        assert_close("sums", (~blind).float(), sums, ROUNDING)
    for sample, length in enumerate(lengths or []):
        assert (weights[sample, ..., length:] == 0).all()
    assert_close("out", torch.einsum("bhts,bshd->bthd", weights, value), out, ROUNDING_OF_DIFFERENCES)


@pytest.mark.parametrize("name", LOW_RANK)
def test_low_rank_fills_in_for_what_the_support_lacks(name):
    query, key, value = draw(name)
    module = BUILD[name](softmax_temp=0.4)
    weights = module(query, key, value, need_weights=True)[1]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    support = module.source(q, k, None).dense(q.shape[2], LENGTH)
    support = support.expand(4, -1, -1).view(2, 2, -1, LENGTH)
    assert 0 < support.sum() < support.numel()
    low_rank = dense_low_rank_logits(q, k, module.projection_matrix, 0.4, cosh=True)
    logits = torch.where(support, dense_logits(q, k, 0.4), low_rank)
    _, expected = dense_attention(logits, torch.ones_like(support), v)
    assert_close("weights", expected, weights, ROUNDING)


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_weights_are_full_attention_on_the_support(name):
    query, key, value = draw(name)
    module = BUILD[name](softmax_temp=0.4)
    weights = module(query, key, value, need_weights=True)[1]
    keys = torch.nn.functional.normalize(query, dim=-1) if name == "reformer" else key
    logits = 0.4 * torch.einsum("bthe,bshe->bhts", query, keys)
    expected = logits.masked_fill(weights == 0, -torch.inf).softmax(-1)
    assert_close("weights", expected, weights, ROUNDING)
    assert (weights == 0).any()
    if name == "reformer":
        assert (weights.diagonal(dim1=-2, dim2=-1) == 0).all()


@pytest.mark.parametrize("name", BUILD)
def test_padding_does_not_matter(name):
    query, key, value = draw(name)
    module, lengths = BUILD[name](), torch.tensor([36, 23])
    before = output(module, query, key, value, key_lengths=lengths)
    if name != "reformer":  # its keys are the queries
        key[1, 23:] = 9.0
    value[1, 23:] = -9.0
    assert torch.equal(output(module, query, key, value, key_lengths=lengths), before)
    assert not torch.equal(output(module, query, key, value), before)


@pytest.mark.parametrize("name", BUILD)
def test_naive_backend_is_the_same_attention(name):
    tensors = draw(name)
    naive = output(BUILD[name](backend="naive"), *tensors)
    assert_close("out", naive, output(BUILD[name](backend="torch"), *tensors), ROUNDING_OF_DIFFERENCES)
    with pytest.raises(UserError, match="Did you mean 'naive'"):
        BUILD[name](backend="nave")(*tensors)


@pytest.mark.parametrize("name", BUILD)
def test_gradients_reach_every_input(name):
    tensors = [x.requires_grad_() for x in draw(name)]
    output(BUILD[name](), *tensors).square().sum().backward()
    for which, tensor in zip(("query", "key", "value"), tensors, strict=True):
        if name == "reformer" and which == "key":
            assert tensor.grad is None
        else:
            assert torch.isfinite(tensor.grad).all()
            assert tensor.grad.abs().amax(-1).count_nonzero() > tensor.grad[..., 0].numel() / 2


CAUSAL = ("bs-", "combination-local", "sbcluster")


@pytest.mark.parametrize("name", [name for name in BUILD if not name.startswith(CAUSAL)])
def test_causality_is_refused_where_it_means_nothing(name):
    with pytest.raises(UserError, match="cannot be causal"):
        BUILD[name](causal=True)


@pytest.mark.parametrize("name", [name for name in BUILD if name.startswith(CAUSAL)])
def test_causal_hides_the_future(name):
    query, key, value = draw(name)
    module = BUILD[name](causal=True)
    before = output(module, query, key, value)
    key[:, 21:], value[:, 21:] = 3 * key[:, 21:], -value[:, 21:]
    after = output(module, query, key, value)
    assert torch.equal(after[:, :21], before[:, :21])
    assert not torch.equal(after[:, 21:], before[:, 21:])


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {"softmax_temp": 0.6}) for name in BUILD]
    + [(name, {"seed": 1}) for name in [*RANDOM, "bs-bigbird"]]
    + [(name, {"row_norm": "sqrt_dim"}) for name in [*LOW_RANK, "combination-local-performer"]]
    + [(name, {"num_hashes": 3}) for name in ("smyrf", "sbsmyrf", "reformer", "combination-smyrf-performer")]
    + [(name, {"num_window_blocks": 5}) for name in BUILD if "bs-" in name]
    + [(name, {"image_width": 12}) for name in ("local2d", "sblocal2d")]
    + [(name, options) for name in CLUSTERS for options in ({"num_steps": 0}, {"value_weight": 3.0})],
)
def test_every_option_changes_the_result(name, options):
    tensors = draw(name)
    assert not torch.allclose(output(BUILD[name](**options), *tensors), output(BUILD[name](), *tensors), atol=1e-4)


@pytest.mark.parametrize("name", RANDOM)
def test_redraw_is_building_with_another_seed(name):
    tensors = draw(name)
    module, other = BUILD[name](seed=3), BUILD[name](seed=8)
    places = {which: buffer.data_ptr() for which, buffer in module.named_buffers()}
    assert places
    assert all(which.endswith("projection_matrix") for which in places)
    module.redraw_projection(8)
    assert {which: buffer.data_ptr() for which, buffer in module.named_buffers()} == places
    for which, buffer in module.named_buffers():
        assert torch.equal(buffer, dict(other.named_buffers())[which])
    if "bigbird" not in name:  # its blocks stay
        assert torch.equal(output(module, *tensors), output(other, *tensors))


@pytest.mark.parametrize("name", BUILD)
def test_the_global_generator_is_left_alone(name):
    tensors = draw(name)
    before = torch.get_rng_state()
    output(BUILD[name](), *tensors)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_modules_move_to_another_dtype(name, dtype):
    out = output(BUILD[name]().to(dtype), *draw(name, dtype=dtype))
    assert out.dtype == dtype
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", [*SPARSE, *CLUSTERS])
def test_dropout_acts_in_training_only(name):
    tensors = draw(name)
    module = BUILD[name](attention_dropout=0.5)
    assert not torch.equal(output(module.train(), *tensors), output(module, *tensors))
    assert torch.equal(output(module.eval(), *tensors), output(BUILD[name](), *tensors))


@pytest.mark.parametrize("name", ["pairedcluster", "sbpairedcluster"])
def test_padding_of_self_attention_moves_no_landmark(name):
    query, key, value = draw("reformer")
    module, lengths = BUILD[name](), torch.tensor([36, 23])
    before = output(module, query, key, value, key_lengths=lengths)
    query[1, 23:] = 9.0
    after = output(module, query, key, value, key_lengths=lengths)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1, :23], before[1, :23])


def test_reformers_keys_of_long_float16_queries():
    # the norm of a row is beyond the range of float16; autocast would take it in float32, and leave the keys there
    query, key, value = (x.half() for x in draw("reformer"))
    query = 20000 * query.sign()
    out, _ = ReformerAttention(4, 16, 8)(query, key, value)
    expected, _ = ReformerAttention(4, 16, 8)(query.float(), key.float(), value.float())
    assert out.dtype == torch.float16
    assert_close("out", expected, out, 2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BUILD)
def test_under_autocast_on_a_gpu(name):
    tensors = [x.to("cuda", torch.bfloat16) for x in draw(name)]
    module = BUILD[name]().to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        out = output(module, *tensors)
    assert out.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("name", BUILD)
def test_on_a_gpu_as_on_a_cpu(name):
    tensors, lengths = draw(name), torch.tensor([36, 23])
    module = BUILD[name]()
    expected = output(module, *tensors, key_lengths=lengths)
    out = output(module.to("cuda"), *(x.to("cuda") for x in tensors), key_lengths=lengths.to("cuda"))
    assert_close("out", expected, out.cpu(), ROUNDING_OF_DIFFERENCES)


def test_a_combination_is_the_average_of_its_parts():
    tensors = draw("combination")
    parts = (LocalAttention(5), PerformerAttention(16, 10, seed=2))
    out, weights = BUILD["combination-local-performer"](seed=2)(*tensors, need_weights=True)
    outs, all_weights = zip(*(part(*tensors, need_weights=True) for part in parts), strict=True)
    assert_close("out", sum(outs) / 2, out, 1e-7)
    assert_close("weights", sum(all_weights) / 2, weights, 1e-7)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SmyrfAttention(0, 16), "at least 1"),
        (lambda: ReformerAttention(4, 16, 7), "num_buckets=7 has to be even"),
        (lambda: BlockSparseAttention("longfomer", 4), "Did you mean 'longformer'"),
        (lambda: SBSmyrfAttention(5, 16, 7), "even"),
        (lambda: ClusterAttention(0), "num_landmarks=0 is not valid. Give a whole number of at least 1"),
        (lambda: PairedClusterAttention(4, 0), "num_query_landmarks=0 is not valid. Give a whole number of at least 1"),
        (lambda: ReformerAttention(4, 16, 8)(*draw("smyrf")), "of one shape"),
        (lambda: Local2dAttention(9)(*draw("smyrf")), "the tokens of one image"),
        (lambda: Local2dAttention(9, image_width=5)(*draw("local2d")), "36 tokens are no image with rows of 5"),
        (lambda: Local2dAttention(9)(*(x[:, :35] for x in draw("local2d"))), "35 tokens are no image"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()


@pytest.mark.parametrize("name", [name for name in BUILD if name.startswith("combination")])
def test_combination_of_large_values_does_not_overflow_in_half_precision(name):
    query, key, value = draw(name, dtype=torch.float16)
    value.fill_(40_000.0)
    out = output(BUILD[name](), query, key, value)
    assert_close("out", torch.full_like(out, 40_000.0, dtype=torch.float32), out.float(), 2e-3)


@pytest.mark.parametrize("name", ["bs-longformer", "sbbs-bigbird", "local2d"])
def test_supports_of_the_last_lengths_are_kept_and_no_more(name):
    module = BUILD[name]()
    lengths = [n * n for n in range(2, 20)]
    for length in lengths:
        module(*(torch.randn(1, length, 1, 16) for _ in range(3)))
    kept = [key[0] for key in module.source._cache]
    assert kept == lengths[-MAX_CACHED_SUPPORTS:]
    module(*(torch.randn(1, kept[0], 1, 16) for _ in range(3)))
    assert [key[0] for key in module.source._cache] == [*kept[1:], kept[0]]
