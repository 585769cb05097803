"""Forward passes for many batches of one static shape, without gradients: padding, CUDA graphs, torch.compile."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

logger = logging.getLogger(__name__)

Forward = Callable[[torch.Tensor], torch.Tensor]
# The first calls compile and select kernels, and allocate workspaces of libraries.
WARM_UP_CALLS = 3


class PaddedForward:
    """Pads smaller batches with zeros, so that a function gets batches of one size.

    Args:
        function: from (B, ...) to (B, ...), image by image.
        batch_size: the size; None takes that of the first batch.
    """

    def __init__(self, function: Forward, batch_size: int | None = None) -> None:
        self._function = function
        self._batch_size = batch_size

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Map (B, ...) to (B, ...)."""
        if self._batch_size is None:
            self._batch_size = len(images)
        missing = self._batch_size - len(images)
        if missing <= 0:
            return self._function(images)
        padding = images.new_zeros(missing, *images.shape[1:])
        return self._function(torch.cat([images, padding]))[: len(images)]


class CudaGraphForward:
    """A function captured as a CUDA graph on its first call and replayed from then on: one launch for all its kernels.

    In-place changes of parameters and buffers, such as new random projections, take effect on the next call; values
    computed from them on the host do not. Inputs of another shape or dtype than the first call the function itself; so
    do all inputs, after a warning, if capture fails.

    Args:
        function: from a CUDA tensor to a CUDA tensor.
    """

    def __init__(self, function: Forward) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self._failed = False

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Map the input to the output, which the next call overwrites."""
        if self._graph is None and not self._failed:
            self._capture(images)
        if self._failed or (images.shape, images.dtype) != (self._images.shape, self._images.dtype):
            return self._function(images)
        self._images.copy_(images)
        self._graph.replay()
        return self._output

    def _capture(self, images: torch.Tensor) -> None:
        self._images = images.clone()
        current, stream = torch.cuda.current_stream(images.device), torch.cuda.Stream(images.device)
        with _autocast_cache_disabled():
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_CALLS):
                    self._function(self._images)
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # other threads may fill page-locked memory during the capture
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    self._output = self._function(self._images)
            except RuntimeError as error:
                self._failed = True
                del self._images
                if images.is_cuda:
                    # after a failed capture, PyTorch's generator still counts as captured
                    generator = torch.cuda.default_generators[images.device.index]
                    generator.graphsafe_set_state(generator.clone_state())
                reason = (str(error.__context__ or error).splitlines() or [type(error).__name__])[0].rstrip(".")
                logger.warning("The network cannot be captured as a CUDA graph and runs without: %s.", reason)
                return
        self._graph = graph


@contextmanager
def _autocast_cache_disabled() -> Iterator[None]:
    """Disable autocast's cache of cast weights, which it frees while the graph would still read them."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def compiled(function: Forward, **options: Any) -> Forward:
    """A function compiled by `torch.compile` for one shape.

    Args:
        function: from a tensor to a tensor.
        **options: of `torch.compile`.
    """

    def call(images: torch.Tensor) -> torch.Tensor:
        return function(images)

    # a separate code object, or all functions would share one recompilation limit
    code = call.__code__.replace(co_name=f"compiled_{id(function)}")
    own = types.FunctionType(code, globals(), closure=call.__closure__)
    return torch.compile(own, dynamic=False, **options)
