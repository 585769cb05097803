"""From memory to window and features: the published numbers, and the rule behind them."""

from __future__ import annotations

import pytest

from src.ops.budget import AttentionBudget, attention_budget
from src.utils.errors import UserError

STAGES = (3136, 784)


@pytest.mark.parametrize(
    ("window_share", "feature_multiple", "published"),
    [
        (1.0, 1, [(98, 0), (24, 0)]),  # local
        (0.0, 1, [(0, 49), (0, 12)]),  # performer
        (0.5, 2, [(49, 24), (12, 6)]),  # sblocal
    ],
)
def test_published_numbers_at_one_thirty_second(window_share, feature_multiple, published):
    budgets = [attention_budget(length, 1 / 32, window_share, feature_multiple) for length in STAGES]
    assert [(budget.window, budget.nb_features) for budget in budgets] == published


@pytest.mark.parametrize("length", [32, 100, 784, 3136])
@pytest.mark.parametrize("fraction", [1 / 32, 1 / 8, 1.0])
@pytest.mark.parametrize(("window_share", "feature_multiple"), [(1.0, 1), (0.0, 1), (0.5, 2), (0.25, 1)])
def test_spends_no_more_than_it_may_and_not_much_less(length, fraction, window_share, feature_multiple):
    columns = length * fraction
    budget = attention_budget(length, fraction, window_share, feature_multiple)
    if window_share > 0:
        may = columns * window_share
        assert may - 1 < budget.window <= max(may, 1)
    else:
        assert budget.window == 0
    if window_share < 1:
        may = columns * (1 - window_share) / 2
        assert may - feature_multiple < budget.nb_features <= max(may, feature_multiple)
        assert budget.nb_features % feature_multiple == 0
    else:
        assert budget.nb_features == 0


def test_a_share_gets_at_least_one_of_its_kind():
    assert attention_budget(4, 1 / 32, 0.5, 2) == AttentionBudget(window=1, nb_features=2)
    assert attention_budget(4, 1 / 32, 1.0) == AttentionBudget(window=1, nb_features=0)
    assert attention_budget(4, 1 / 32, 0.0) == AttentionBudget(window=0, nb_features=1)


def test_memory_fraction_counts_a_feature_twice():
    assert AttentionBudget(window=98).memory_fraction(3136) == 1 / 32
    assert AttentionBudget(nb_features=49).memory_fraction(3136) == 1 / 32
    assert AttentionBudget(window=49, nb_features=24).memory_fraction(3136) == 97 / 3136


def test_memory_fraction_is_never_more_than_full_attention():
    assert AttentionBudget(window=50, nb_features=10).memory_fraction(60) == 1.0


@pytest.mark.parametrize("length", [0, -5])
def test_refuses_an_empty_sequence(length):
    with pytest.raises(UserError, match="sequence_length"):
        attention_budget(length, 1 / 32, 0.5)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan")])
def test_refuses_a_fraction_outside_of_zero_to_one(fraction):
    with pytest.raises(UserError, match="memory_fraction"):
        attention_budget(3136, fraction, 0.5)
