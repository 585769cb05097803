"""Padding, CUDA graphs (on the CPU with stand-ins for what CUDA offers) and compilation for one shape."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
from torch import nn

from src.utils.static_shapes import WARM_UP_CALLS, CudaGraphForward, PaddedForward, compiled

NO_CUDA = not torch.cuda.is_available()


class Doubling:
    """Twice the input plus a buffer, and the shapes of the inputs it has got."""

    def __init__(self):
        self.shapes = []
        self.buffer = torch.zeros(())

    def __call__(self, x):
        self.shapes.append(tuple(x.shape))
        return 2 * x + self.buffer


def test_smaller_batches_are_filled_up_and_cut():
    function = Doubling()
    forward = PaddedForward(function)
    batches = [torch.randn(size, 2) for size in (3, 1, 3, 2)]
    for batch in batches:
        assert torch.equal(forward(batch), 2 * batch)
    assert function.shapes == [(3, 2)] * 4


def test_the_first_batch_may_be_small():
    shapes = []
    forward = PaddedForward(lambda images: shapes.append(len(images)) or images, 4)
    for number in (1, 4, 3):
        images = torch.randn(number, 3)
        assert torch.equal(forward(images), images)
    assert shapes == [4, 4, 4]


def test_a_larger_batch_is_passed_on():
    forward = PaddedForward(Doubling())
    forward(torch.randn(2, 2))
    assert forward(torch.ones(5, 2)).tolist() == [[2.0, 2.0]] * 5


class Stream:
    def wait_stream(self, other):
        pass


class Recording:
    """Stands in for `torch.cuda`'s graphs: a replay computes the recorded function again, into the same output."""

    def __init__(self, patch, function, fails=False):
        self.function, self.replays, self.modes, self.cache = function, 0, [], []
        recording = self

        class Graph:
            def replay(self):
                recording.replays += 1
                recording.forward._output.copy_(function(recording.forward._images))

        @contextlib.contextmanager
        def record(graph, capture_error_mode):
            recording.modes.append(capture_error_mode)
            recording.cache.append(torch.is_autocast_cache_enabled())
            try:
                yield
                if fails:
                    raise RuntimeError("operation not permitted when stream is capturing\nC++ stack")
            finally:
                if fails:
                    raise RuntimeError("an error of the end of the capture")

        patch.setattr(torch.cuda, "Stream", lambda device: Stream())
        patch.setattr(torch.cuda, "current_stream", lambda device: Stream())
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", record)
        self.forward = CudaGraphForward(function)


def test_a_graph_is_recorded_once_and_replayed(monkeypatch):
    function = Doubling()
    recording = Recording(monkeypatch, function)
    for number in range(1, 4):
        images = torch.randn(3, 2)
        assert torch.equal(recording.forward(images), 2 * images)
        assert recording.replays == number
    assert len(function.shapes) == WARM_UP_CALLS + 1 + recording.replays
    assert recording.modes == ["thread_local"]
    assert recording.cache == [False]
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("other", [torch.ones(2, 2), torch.ones(3, 3), torch.ones(3, 2, dtype=torch.float64)])
def test_other_inputs_go_to_the_function(monkeypatch, other):
    recording = Recording(monkeypatch, Doubling())
    recording.forward(torch.randn(3, 2))
    assert torch.equal(recording.forward(other), 2 * other)
    assert recording.replays == 1


def test_where_recording_fails_the_function_runs(monkeypatch, caplog):
    function = Doubling()
    forward = Recording(monkeypatch, function, fails=True).forward
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            images = torch.randn(3, 2)
            assert torch.equal(forward(images), 2 * images)
    (record,) = caplog.records
    assert record.getMessage() == (
        "The network cannot be captured as a CUDA graph and runs without: operation not permitted when stream is "
        "capturing."
    )
    assert len(function.shapes) == WARM_UP_CALLS + 1 + 3


def test_an_error_of_the_function_itself_is_raised(monkeypatch):
    def fail(images):
        raise RuntimeError("a bug")

    forward = Recording(monkeypatch, fail).forward
    with pytest.raises(RuntimeError, match="a bug"):
        forward(torch.ones(2))


def test_compiled_functions_of_one_class_do_not_share_a_limit():
    for size in range(1, 11):  # the limit is 8
        layer = nn.Linear(size, 3)
        x = torch.randn(2, layer.in_features)
        with torch.inference_mode():
            torch.testing.assert_close(compiled(layer, backend="eager")(x), layer(x))


@pytest.mark.gpu
@pytest.mark.skipif(NO_CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("autocast", [False, True])
def test_graphs_on_cuda_see_changes_in_place(autocast):
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 5)).cuda().eval()
    model.register_buffer("rows", torch.zeros(5, device="cuda"))

    def function(x):
        return model(x) + model.rows

    forward = PaddedForward(CudaGraphForward(function))
    for step, size in enumerate((8, 8, 3, 8)):
        model.rows.fill_(step)
        images = torch.randn(size, 64, device="cuda")
        # each step is under autocast of its own, as in a trainer
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            torch.testing.assert_close(
                forward(images).clone(), function(images), rtol=1e-2, atol=1e-2 if autocast else 1e-5
            )


@pytest.mark.gpu
@pytest.mark.skipif(NO_CUDA, reason="needs a CUDA device")
def test_what_cannot_be_recorded_on_cuda_runs_all_the_same(caplog):
    def function(x):
        return x * x.sum().item()

    forward = CudaGraphForward(function)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            x = torch.rand(4, device="cuda")
            torch.testing.assert_close(forward(x), function(x))
    assert len(caplog.records) == 1
