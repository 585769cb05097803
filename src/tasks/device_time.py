"""How long a device works on a part of what it is asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from src.tasks.provenance import seconds_now


class DeviceTime:
    """Adds up the time that a device takes for some of its work.

    On CUDA it is the device's own clock that is read, and nobody waits for the device; elsewhere the host waits for
    what was asked for.

    Args:
        device: what does the work, on its current stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Count the work that is asked for within."""
        if self._device.type != "cuda":
            begin = seconds_now(self._device)
            yield
            self._seconds += seconds_now(self._device) - begin
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._pending.append((begin, end))
        # in order, so that no more are kept than there is work on its way
        while self._pending and self._pending[0][1].query():
            self._add()

    def seconds(self) -> float:
        """The time so far; waits for the work."""
        while self._pending:
            self._pending[0][1].synchronize()
            self._add()
        return self._seconds

    def _add(self) -> None:
        begin, end = self._pending.popleft()
        self._seconds += begin.elapsed_time(end) / 1e3
