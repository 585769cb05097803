"""Attention modules: the calling convention, the factory, and that every option does something."""

from __future__ import annotations

import inspect

import pytest
import torch

from scatterbrain.attention import attention_memory, create_attention
from scatterbrain.attention.full import FullAttention
from scatterbrain.attention.local import LocalAttention
from scatterbrain.attention.performer import PerformerAttention
from scatterbrain.attention.sblocal import SBLocalAttention
from scatterbrain.errors import UserError
from scatterbrain.ops.common.projection import draw_projection
from tests.helpers import OPERATORS, assert_close

# float32 evaluations of one result
ROUNDING = 5e-6

BUILD = {
    "full": lambda **options: FullAttention(**options),
    "local": lambda **options: LocalAttention(7, **options),
    "performer": lambda **options: PerformerAttention(16, nb_features=10, **options),
    "sblocal": lambda **options: SBLocalAttention(7, 16, nb_features=10, **options),
}
WITH_FEATURES = ["performer", "sblocal"]


def draw(length: int = 40, num_keys: int = 40, value_width: int = 16, dtype: torch.dtype = torch.float32):
    """Query (2, length, 2, 16), key (2, num_keys, 2, 16), value (2, num_keys, 2, value_width)."""
    return (
        torch.randn(2, length, 2, 16, dtype=dtype),
        torch.randn(2, num_keys, 2, 16, dtype=dtype),
        torch.randn(2, num_keys, 2, value_width, dtype=dtype),
    )


def output(module: torch.nn.Module, *tensors: torch.Tensor, **options) -> torch.Tensor:
    return module(*tensors, **options)[0]


def parameters(module_class: type) -> dict[str, object]:
    return {name: p.default for name, p in inspect.signature(module_class).parameters.items()}


def test_signatures():
    required = inspect.Parameter.empty
    common = {"softmax_temp": None, "causal": False}
    features = {"dim_heads": required, "nb_features": None, **common, "seed": 0}
    expected = {
        FullAttention: common,
        LocalAttention: {"local_context": required, **common},
        PerformerAttention: features,
        SBLocalAttention: {"local_context": required, **features},
    }
    for module_class, leading in expected.items():
        signature = parameters(module_class)
        assert list(signature)[: len(leading)] == list(leading)
        assert {name: signature[name] for name in leading} == leading
    assert parameters(create_attention) == {
        "config_name": required,
        "sequence_length": required,
        "dim_heads": 64,
        "softmax_temp": None,
        "memory_fraction": 1 / 32,
        "seed": 0,
        "options": required,
    }


@pytest.mark.parametrize("name", BUILD)
def test_layout(name):
    query, key, value = draw(30, 45, 5)
    out, weights = BUILD[name]()(query, key, value)
    assert out.shape == (2, 30, 2, 5)
    assert weights is None
    operator = OPERATORS["scatterbrain" if name == "sblocal" else name]
    rows = dict(BUILD[name]().named_buffers()).get("projection_matrix")
    expected, _ = operator.naive(*(x.transpose(1, 2) for x in (query, key, value)), rows, 7)
    assert_close("out", expected.transpose(1, 2), out, ROUNDING)


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, [40, 11], [0, 40]])
@pytest.mark.parametrize("temp", [None, 0.4])
def test_weights_average_the_values_to_the_output(name, causal, lengths, temp):
    query, key, value = draw(25, 40, 5)
    key_lengths = None if lengths is None else torch.tensor(lengths)
    module = BUILD[name](causal=causal, softmax_temp=temp)
    out, weights = module(query, key, value, key_lengths=key_lengths, need_weights=True)
    assert weights.shape == (2, 2, 25, 40)
    assert weights.dtype == query.dtype
    assert (weights >= 0).all()
    sees = torch.ones(2, 2, 25)
    if lengths is not None:
        # a query of the local window far behind the end of its sample sees nothing
        first = (torch.arange(25) - 3).clamp_min(0) if name == "local" else torch.zeros(25)
        hidden = first >= key_lengths[:, None]
        sees = (~hidden).float()[:, None].expand(2, 2, 25)
        for sample, length in enumerate(lengths):
            assert (weights[sample, ..., length:] == 0).all()
    assert_close("sums", sees, weights.sum(-1), ROUNDING)
    if causal:
        assert (weights.triu(1) == 0).all()
    assert_close("out", torch.einsum("bhts,bshd->bthd", weights, value), out, ROUNDING)


@pytest.mark.parametrize("name", BUILD)
def test_key_lengths_are_the_keys_cut_off(name):
    query, key, value = draw(30, 40)
    module = BUILD[name]()
    out = output(module, query, key, value, key_lengths=torch.tensor([40, 23]))
    cut = output(module, query[1:], key[1:, :23], value[1:, :23])
    assert_close("out", cut, out[1:], ROUNDING)
    assert not torch.equal(out[1:], output(module, query, key, value)[1:])


@pytest.mark.parametrize("name", BUILD)
def test_causal_hides_the_future(name):
    query, key, value = draw()
    module = BUILD[name](causal=True)
    before = output(module, query, key, value)
    key[:, 21:], value[:, 21:] = 3 * key[:, 21:], -value[:, 21:]
    after = output(module, query, key, value)
    assert torch.equal(after[:, :21], before[:, :21])
    assert not torch.equal(after[:, 21:], before[:, 21:])


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in BUILD for options in ({"softmax_temp": 0.4}, {"causal": True})]
    + [(name, options) for name in WITH_FEATURES for options in ({"seed": 1}, {"row_norm": "sqrt_dim"})],
)
def test_every_option_changes_the_result(name, options):
    tensors = draw()
    assert not torch.allclose(output(BUILD[name](**options), *tensors), output(BUILD[name](), *tensors), atol=1e-4)


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softmax_temp": 0.4}])
def test_naive_backend_is_the_same_attention(name, options):
    tensors = draw()
    naive = output(BUILD[name](backend="naive", **options), *tensors)
    for backend in ("torch", "auto"):
        assert_close("out", naive, output(BUILD[name](backend=backend, **options), *tensors), ROUNDING)


@pytest.mark.parametrize("name", BUILD)
def test_unknown_backends_are_refused(name):
    with pytest.raises(UserError, match="Did you mean 'naive'"):
        BUILD[name](backend="nave")(*draw())


@pytest.mark.parametrize("name", BUILD)
def test_dropout_acts_in_training_only(name):
    tensors = draw()
    without = output(BUILD[name](), *tensors)
    module = BUILD[name](attention_dropout=0.5)
    assert not torch.equal(output(module.train(), *tensors), output(module, *tensors))
    assert torch.equal(output(module.eval(), *tensors), without)


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("options", [{"softmax_temp": 0.0}, {"softmax_temp": -1.0}, {"attention_dropout": 1.0}])
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(UserError):
        BUILD[name](**options)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LocalAttention(0), "at least 1"),
        (lambda: SBLocalAttention(0, 16), "at least 1"),
        (lambda: SBLocalAttention(7, 16, nb_features=5), "even"),
        (lambda: SBLocalAttention(7, 16, nb_features=0), "at least 2"),
        (lambda: PerformerAttention(16, nb_features=0), "at least 1"),
        (lambda: PerformerAttention(16, row_norm="long"), "row_norm='long'"),
    ],
)
def test_sizes_out_of_range_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_default_number_of_features_is_e_log_e():
    # 64 ln 64 = 266.2
    assert PerformerAttention(64).projection_matrix.shape == (266, 64)
    assert SBLocalAttention(7, 64).projection_matrix.shape == (133, 64)


@pytest.mark.parametrize("name", WITH_FEATURES)
def test_projection_is_a_buffer_that_can_be_overwritten(name):
    tensors = draw()
    module = BUILD[name](seed=3)
    rows = 10 if name == "performer" else 5
    assert module.projection_matrix.shape == (rows, 16)
    assert list(module.state_dict()) == ["projection_matrix"]
    assert not list(module.parameters())
    before = output(module, *tensors)
    other = BUILD[name](seed=4)
    module.projection_matrix.copy_(other.projection_matrix)
    assert not torch.equal(output(module, *tensors), before)
    assert torch.equal(output(module, *tensors), output(other, *tensors))


@pytest.mark.parametrize("name", WITH_FEATURES)
@pytest.mark.parametrize("row_norm", ["chi", "sqrt_dim"])
def test_redraw(name, row_norm):
    module = BUILD[name](seed=3, row_norm=row_norm)
    buffer, before = module.projection_matrix, module.projection_matrix.clone()
    module.redraw_projection(8)
    assert module.projection_matrix is buffer
    assert not torch.equal(buffer, before)
    assert torch.equal(buffer, draw_projection(*before.shape, 8, row_norm=row_norm))
    module.redraw_projection(3)
    assert torch.equal(buffer, before)


@pytest.mark.parametrize("name", WITH_FEATURES)
def test_building_does_not_touch_the_global_generator(name):
    before = torch.get_rng_state()
    module = BUILD[name]()
    output(module, *(torch.ones(1, 5, 1, 16) for _ in range(3)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_modules_move_to_another_dtype(name, dtype):
    module = BUILD[name]().to(dtype)
    assert output(module, *draw(dtype=dtype)).dtype == dtype


def test_memory_of_the_published_budgets():
    names = ("full", "local", "performer", "sblocal")
    assert {name: attention_memory(create_attention(name, 3136), 3136) for name in names} == {
        "full": 1.0,
        "local": 1 / 32,
        "performer": 1 / 32,
        "sblocal": 97 / 3136,
    }


def test_arguments_reach_the_module():
    module = create_attention(
        "sblocal",
        784,
        dim_heads=16,
        softmax_temp=0.3,
        memory_fraction=1 / 8,
        seed=5,
        causal=True,
        attention_dropout=0.1,
    )
    assert isinstance(module, SBLocalAttention)
    assert module.sizes() == {"local_context": 49, "nb_features": 24}
    assert (module.softmax_temp, module.causal, module.attention_dropout) == (0.3, True, 0.1)
    assert torch.equal(module.projection_matrix, draw_projection(12, 16, 5))


def test_overrides_of_the_budget():
    module = create_attention("sblocal", 784, local_context=5, nb_features=8)
    assert module.sizes() == {"local_context": 5, "nb_features": 8}
    # None is "as the budget says", as a config has it
    assert create_attention("sblocal", 784, local_context=None).sizes()["local_context"] == 12


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("sblocl", "Did you mean 'sblocal'"),
        ("preformer", "Did you mean .*'performer'"),
        ("xyz", "full, .*local, .*performer, .*sblocal"),
    ],
)
def test_unknown_names_are_refused_with_a_suggestion(name, hint):
    with pytest.raises(UserError, match=f"Unknown attention '{name}'. .*{hint}"):
        create_attention(name, 784)


@pytest.mark.parametrize(
    ("name", "option", "hint"),
    [
        ("sblocal", "local_contxt", "Did you mean 'local_context'"),
        ("local", "nb_features", "Choose one of: .*local_context"),
        ("full", "local_context", "Choose one of: .*softmax_temp"),
        ("performer", "atention_dropout", "Did you mean 'attention_dropout'"),
    ],
)
def test_unknown_options_are_refused_with_a_suggestion(name, option, hint):
    with pytest.raises(UserError, match=f"Attention '{name}' has no option '{option}'. .*{hint}"):
        create_attention(name, 784, **{option: 3})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("local", {"local_context": 3.5}),
        ("local", {"local_context": "7"}),
        ("performer", {"nb_features": True}),
        ("performer", {"seed": "one"}),
        ("sblocal", {"dim_heads": 64.0}),
    ],
)
def test_sizes_that_are_no_integers_are_refused(name, options):
    with pytest.raises(UserError, match="has to be an integer"):
        create_attention(name, 784, **options)


@pytest.mark.parametrize("options", [{"memory_fraction": 0.0}, {"memory_fraction": 1.5}, {"sequence_length": 0}])
def test_budgets_out_of_range_are_refused(options):
    with pytest.raises(UserError):
        create_attention("local", **{"sequence_length": 784, **options})


def test_options_show_in_the_representation():
    assert "local_context=12, nb_features=6" in repr(create_attention("sblocal", 784))
    assert "num_steps=1, value_weight=4.0, softmax" in repr(create_attention("sbcluster", 784, value_weight=4.0))
