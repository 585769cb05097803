"""Copies of batches to the device while it computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

# Batches in the device's queue while the host prepares another: enough to keep the device busy.
BATCHES_AHEAD = 2


class CudaPrefetcher:
    """Copies batches to a CUDA device on a side stream, while it computes the batches before them.

    The number of batches in the queue is bounded, since each takes device memory: a host whose steps never synchronise
    would queue without limit.

    Args:
        device: where the batches go. Copies from page-locked memory do not block the host.
        ahead: batches that may be queued or computed when the next one is copied, at least 1.
    """

    def __init__(self, device: torch.device, ahead: int = BATCHES_AHEAD) -> None:
        self._device = device
        self._ahead = ahead
        self._stream = torch.cuda.Stream(device)
        self._done: deque[torch.cuda.Event] = deque()  # of queued batches, oldest first

    def __call__(self, batch: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors of a batch on the device; later work of the current stream sees them."""
        current = torch.cuda.current_stream(self._device)
        done = torch.cuda.Event(blocking=True)  # spinning would take a CPU from the workers
        done.record(current)
        self._done.append(done)
        if len(self._done) > self._ahead:
            self._done.popleft().synchronize()
        with torch.cuda.stream(self._stream):
            copies = [tensor.to(self._device, non_blocking=True) for tensor in batch]
        current.wait_stream(self._stream)
        for copy in copies:
            copy.record_stream(current)  # or the allocator could reuse its memory before it is read
        return copies
