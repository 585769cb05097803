"""Timing of candidates against each other on shared machines."""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def in_turn(candidates: Sequence[T], rounds: int) -> Iterator[T]:
    """Every candidate once in each round.

    Each round begins at another candidate, so that none always follows the one that empties the cache.
    """
    for turn in range(rounds):
        start = turn * len(candidates) // rounds
        yield from candidates[start:]
        yield from candidates[:start]


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios within each round."""
    return statistics.median(x / y for x, y in zip(numerators, denominators, strict=True))


def seconds_per_call(call: Callable[[], object], number: int, device: torch.device, of_host: bool = False) -> float:
    """Time of one call, the mean of `number` calls in a row; by CUDA events on CUDA, unless it is that `of_host`."""
    if device.type == "cuda" and not of_host:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(number):
            call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / number
    if of_host:
        torch.cuda.synchronize()  # the host waits for the device where the queue of launches is full
    return timeit.timeit(call, number=number) / number


def graph_milliseconds(call: Callable[[], object], repeats: int) -> float | None:
    """Device time: the median replay of a CUDA graph, without the host's part; None where capture fails."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return 1e3 * statistics.median(seconds_per_call(graph.replay, 4, torch.device("cuda")) for _ in range(repeats))
