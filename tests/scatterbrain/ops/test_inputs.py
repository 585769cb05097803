"""Arguments that the operators refuse, and their messages."""

from __future__ import annotations

import pytest
import torch

from scatterbrain.errors import UserError
from tests.helpers import OPERATORS, draw_inputs

QUERY, KEY, VALUE, PROJECTION = range(4)


def call(name: str, replace: dict[int, torch.Tensor] | None = None, window: object = 3, **options) -> torch.Tensor:
    tensors = list(draw_inputs(2, 2, 6, 7, width=4, value_width=5, rows=3, dtype=torch.float32))
    for position, tensor in (replace or {}).items():
        tensors[position] = tensor
    return OPERATORS[name](*tensors, window, **options)


@pytest.mark.parametrize("name", OPERATORS)
def test_accepts_the_inputs_that_the_cases_below_change(name):
    assert call(name, key_lengths=torch.tensor([7, 2])).shape == (2, 2, 6, 5)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({QUERY: torch.randn(2, 6, 4)}, r"query has to be .* four dimensions .* \(2, 6, 4\)"),
        ({KEY: torch.ones(2, 2, 7, 4, dtype=torch.int64)}, r"key has to be a floating-point .* torch.int64"),
        ({VALUE: torch.randn(2, 2, 7, 5).double()}, r"value is torch.float64 .* query is torch.float32"),
        ({KEY: torch.randn(2, 2, 7, 3)}, r"key \(2, 2, 7, 3\) has to be \(B, H, S, E\) .* \(2, 2, 6, 4\)"),
        ({KEY: torch.randn(1, 2, 7, 4)}, r"key \(1, 2, 7, 4\) has to be \(B, H, S, E\)"),
        ({KEY: torch.randn(2, 1, 7, 4)}, r"key \(2, 1, 7, 4\) has to be \(B, H, S, E\)"),
        ({VALUE: torch.randn(2, 2, 6, 5)}, r"value \(2, 2, 6, 5\) has to be \(B, H, S, D\) .* \(2, 2, 7, 4\)"),
        ({VALUE: torch.randn(2, 2, 7, 0)}, "empty"),
        ({QUERY: torch.randn(2, 2, 0, 4)}, "empty"),
    ],
)
def test_refuses_tensors_that_do_not_fit(name, replace, message):
    with pytest.raises(UserError, match=message):
        call(name, replace)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(
    "lengths", [torch.tensor([7]), torch.tensor([[7, 2]]), torch.tensor([7.0, 2.0]), torch.tensor([True, False])]
)
def test_refuses_lengths_that_are_not_one_integer_for_each_sample(name, lengths):
    with pytest.raises(UserError, match=r"key_lengths has to be integers of shape \(2,\)"):
        call(name, key_lengths=lengths)


@pytest.mark.parametrize("name", ["performer", "scatterbrain"])
@pytest.mark.parametrize("projection", [torch.randn(3, 5), torch.randn(4), torch.randn(0, 4)])
def test_refuses_projections_that_do_not_fit(name, projection):
    with pytest.raises(UserError, match=r"projection has to be \(rows, 4\)"):
        call(name, {PROJECTION: projection})


@pytest.mark.parametrize("name", ["local", "scatterbrain"])
@pytest.mark.parametrize(
    ("window", "message"),
    [(0, "0 keys sees nothing"), (-3, "not a number of keys"), (2.5, "not a number of keys"), (True, "True")],
)
def test_refuses_windows_without_keys(name, window, message):
    with pytest.raises(UserError, match=message):
        call(name, window=window)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_refuses_scales_that_are_not_positive(name, scale):
    with pytest.raises(UserError, match=r"scale=.* has to be positive"):
        call(name, scale=scale)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, 2.0])
def test_refuses_dropout_outside_of_zero_to_one(name, dropout_p):
    with pytest.raises(UserError, match=r"has to lie in \[0, 1\)"):
        call(name, dropout_p=dropout_p)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(
    ("backend", "hint"),
    [("navie", "Did you mean 'naive'"), ("tourch", "Did you mean 'torch'"), ("xyz", "naive, torch")],
)
def test_refuses_unknown_backends_and_names_near_ones(name, backend, hint):
    with pytest.raises(UserError, match=f"backend='{backend}' is not available here. .*{hint}"):
        call(name, backend=backend)


@pytest.mark.parametrize(("eps", "is_causal"), [(-1e-8, False), (1e-8, True)])
def test_refuses_eps_that_performer_does_not_take(eps, is_causal):
    with pytest.raises(UserError, match="eps="):
        call("performer", eps=eps, is_causal=is_causal)


@pytest.mark.parametrize("name", OPERATORS)
def test_default_scale_is_that_of_the_width(name):
    tensors = draw_inputs(length=20, width=16)
    assert torch.equal(OPERATORS[name](*tensors, 3), OPERATORS[name](*tensors, 3, scale=0.25))
    assert not torch.equal(OPERATORS[name](*tensors, 3), OPERATORS[name](*tensors, 3, scale=0.3))


@pytest.mark.parametrize("option", ["is_causal", "enable_gqa"])
@pytest.mark.parametrize("name", OPERATORS)
def test_refuses_switches_that_are_not_boolean(name, option):
    # "false" would be true
    with pytest.raises(UserError, match=f"{option}='false' is not valid. Give true or false."):
        call(name, **{option: "false"})


@pytest.mark.parametrize("name", [name for name, operator in OPERATORS.items() if "projection" in operator.takes])
def test_refuses_to_run_without_a_projection(name):
    with pytest.raises(UserError, match="projection has to be a tensor, got NoneType"):
        call(name, {PROJECTION: None})
