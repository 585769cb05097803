"""Timing of candidates in turn, on machines whose speed varies over time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def in_turn(candidates: Sequence[T], rounds: int) -> Iterator[T]:
    """Every candidate once in each round.

    Each round starts at another candidate, so that no candidate always follows the same one, which may evict its
    cache.
    """
    for turn in range(rounds):
        start = turn * len(candidates) // rounds
        yield from candidates[start:]
        yield from candidates[:start]


def seconds_per_call(call: Callable[[], object], number: int, device: torch.device) -> float:
    """Seconds per call, the mean of `number` consecutive calls; measured by CUDA events on a CUDA device."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(number):
            call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / number
    begin = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - begin) / number
