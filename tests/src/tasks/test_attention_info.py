"""What the token stages' attention costs, as results have it."""

from __future__ import annotations

import pytest
import torch

from src.models.t2t_vit import create_t2t_vit
from src.tasks.attention_info import attention_cost, attention_memory_fraction

CPU = torch.device("cpu")
LENGTHS = (3136, 784)


def model(attention):
    return create_t2t_vit("t2t_vit_t_7", attention).eval()


def test_operations_are_those_of_the_definitions():
    full = sum(length**2 for length in LENGTHS)
    assert attention_cost(model("full"), CPU)["attention_operations"] == 1.0
    assert attention_cost(model("zero"), CPU)["attention_operations"] == 0.0
    # logits and averages of 98 and 24 keys, and no other product
    strided = attention_cost(model("strided"), CPU)["attention_operations"]
    assert strided == pytest.approx((98 * 3136 + 24 * 784) / full)
    assert strided == pytest.approx(attention_memory_fraction(model("strided")))
    # the clustering costs more than the attention
    assert attention_cost(model("querycluster"), CPU)["attention_operations"] > 2 * strided


def test_peak_memory_is_that_of_a_call_of_the_first_stage():
    output = 3136 * 64 * 4 / 2**20
    peaks = {name: attention_cost(model(name), CPU)["attention_peak_mib"] for name in ("zero", "full", "pairedcluster")}
    assert output <= peaks["zero"] < peaks["full"] < peaks["pairedcluster"]
    assert peaks["full"] < 3136**2 * 4 / 2**20, "the matrix is never there"
    assert attention_cost(model("zero").bfloat16(), CPU)["attention_peak_mib"] < 0.6 * peaks["zero"]


def test_the_model_is_left_as_it_was():
    own = model("sblocal").bfloat16()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    attention_cost(own, CPU)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    assert own.token_attentions[0].projection_matrix.dtype == torch.bfloat16


def test_variants_without_swappable_attention_have_no_cost():
    cost = attention_cost(create_t2t_vit("t2t_vit_7"), CPU)
    assert cost == {"attention_operations": None, "attention_peak_mib": None}
