"""Copies to the device during its work: what waits for what (on the CPU with stand-ins for streams and events)."""

from __future__ import annotations

import contextlib

import pytest
import torch

from src.tasks.prefetch import CudaPrefetcher


class Recorder:
    """Stands in for streams and events, and records the calls."""

    def __init__(self, patch):
        self.log = []
        recorder = self

        class Stream:
            def __init__(self, name):
                self.name = name

            def wait_stream(self, other):
                recorder.log.append(f"{self.name} waits for {other.name}")

        class Event:
            number = 0

            def __init__(self, blocking):
                assert blocking
                self.number = Event.number
                Event.number += 1

            def record(self, stream):
                recorder.log.append(f"event {self.number} on {stream.name}")

            def synchronize(self):
                recorder.log.append(f"host waits for event {self.number}")

        @contextlib.contextmanager
        def entered(stream):
            recorder.log.append(f"on {stream.name}")
            yield
            recorder.log.append("off")

        current = Stream("compute")
        patch.setattr(torch.cuda, "Stream", lambda device: Stream("copy"))
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "current_stream", lambda device: current)
        patch.setattr(torch.cuda, "stream", entered)
        patch.setattr(
            torch.Tensor, "record_stream", lambda self, stream: recorder.log.append(f"kept for {stream.name}")
        )


def test_copies_have_their_stream_and_the_host_stays_near(monkeypatch):
    recorder = Recorder(monkeypatch)
    prefetcher = CudaPrefetcher(torch.device("cpu"), ahead=2)
    batch = [torch.arange(3), torch.ones(2)]
    for number in range(4):
        recorder.log.clear()
        copies = prefetcher(batch)
        assert all(torch.equal(a, b) for a, b in zip(copies, batch, strict=True))
        waits = [] if number < 2 else [f"host waits for event {number - 2}"]
        copied = ["on copy", "off", "compute waits for copy", "kept for compute", "kept for compute"]
        assert recorder.log == [f"event {number} on compute", *waits, *copied]


@pytest.mark.gpu
def test_batches_arrive_while_the_device_is_busy():
    prefetcher = CudaPrefetcher(torch.device("cuda"))
    weight = torch.randn(2048, 2048, device="cuda")
    batches = [torch.randint(256, (512, 1024), dtype=torch.uint8).pin_memory() for _ in range(12)]
    sums = []
    for batch in batches:
        (copy,) = prefetcher([batch])
        for _ in range(20):
            weight @ weight
        sums.append(copy.sum())
        del copy  # its memory is free for the next copy, but for the work that is under way
    assert [int(x) for x in sums] == [int(batch.sum()) for batch in batches]
