"""Times of a profile on CUDA: the device's, the host's where that is longer, and replays of CUDA graphs."""

from __future__ import annotations

import time

import pytest
import torch

import scatterbrain
from scatterbrain.tuning.measuring import milliseconds
from tests.scatterbrain.tuning.models import Layer, inputs, network

pytestmark = pytest.mark.gpu
CYCLES = 2_000_000  # about a millisecond


def test_times_are_those_of_the_device():
    calls = [lambda number=number: torch.cuda._sleep(number * CYCLES) for number in (1, 4)]
    short, long = milliseconds(calls, torch.device("cuda"), 5)
    assert 3 < long / short < 5


def test_the_host_s_time_counts_unless_graphs_are_timed():
    x = torch.ones(4, device="cuda")

    def call() -> None:
        time.sleep(2e-2)  # far more than other processes on the GPU delay an event by
        x.add_(1)

    assert milliseconds([call], torch.device("cuda"), 3)[0] > 15
    assert milliseconds([call], torch.device("cuda"), 3, cuda_graphs=True)[0] < 5


def test_a_call_that_cannot_be_captured_is_timed_as_it_is():
    x = torch.ones(4, device="cuda")
    assert milliseconds([lambda: x.sum().item()], torch.device("cuda"), 3, cuda_graphs=True)[0] > 0
    assert x.sum().item() == 4


def test_a_profile_by_graphs():
    model, x = network(Layer()).cuda(), inputs().cuda()
    options = {"min_tokens": 16, "repeats": 3}
    eager, graphs = (
        scatterbrain.profile(model, x, ["sblocal", "sbcluster"], [1 / 8], cuda_graphs=each, **options)
        for each in (False, True)
    )
    assert graphs.device == f"{eager.device}, CUDA graphs"
    for before, after in zip(eager.calls[0].measurements, graphs.calls[0].measurements, strict=True):
        assert after.error == pytest.approx(before.error, rel=1e-3)
        assert 0 < after.milliseconds < before.milliseconds, "these shapes are the host's"
