"""From the host's memory to the device, while it computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

# Batches that are computed or wait for it while the host prepares another: enough to keep the device busy.
BATCHES_AHEAD = 2


class OverlappedTransfer:
    """Copies batches to a CUDA device on a stream of their own, while it computes the batches before them.

    A host that waits for nothing in a step asks for a copy well before the device can use it. It would get further
    ahead with each step, and every batch on its way takes memory: so it waits here until few are.

    Args:
        device: where the batches go. From page-locked memory the copies take no time of the host's.
        ahead: batches that may be computed or wait for it when the next one is copied, at least 1.
    """

    def __init__(self, device: torch.device, ahead: int = BATCHES_AHEAD) -> None:
        self._device = device
        self._ahead = ahead
        self._stream = torch.cuda.Stream(device)
        self._done: deque[torch.cuda.Event] = deque()  # of the batches asked for and not known to be computed

    def __call__(self, batch: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy the tensors of a batch; what the current stream does from now on sees the copies."""
        current = torch.cuda.current_stream(self._device)
        done = torch.cuda.Event(blocking=True)  # a host that spins would take a CPU from the workers
        done.record(current)
        self._done.append(done)
        if len(self._done) > self._ahead:
            self._done.popleft().synchronize()
        with torch.cuda.stream(self._stream):
            copies = [tensor.to(self._device, non_blocking=True) for tensor in batch]
        current.wait_stream(self._stream)
        for copy in copies:
            copy.record_stream(current)  # or its memory could be used for the next copy before it is read
        return copies
